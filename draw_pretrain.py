"""Stage 1: train DRAW, a world model with a discrete latent state, in the source simulator.

DRAW predicts a categorical latent z_t from one observation (no recurrence) and learns dynamics
logits u_t = f(z_{t-1}, sigma_{t-1}, a_{t-1}) that anticipate it. Data comes from Plan2Explore: an
exploration actor-critic, trained in imagination, seeks states where an ensemble disagrees about
the next embedding; a task actor-critic trains beside it on the predicted reward.

One iteration of the loop below:

    1. act in the environments, store x_t, a_t, reward, flags in the replay
    2. world model:  L = reconstructions + 1.5 max(1, KL(sg q || p)) + 0.5 max(1, KL(q || sg p))
    3. ensemble:     predict embed_{t+1} from (sigma_t, z_t, a_t)
    4. exploration and task actor-critic in imagination (its equations: see `ActorCritic`)

    python draw_pretrain.py laptop --env-id redraw/PendulumSwingup-v0 --run-dir runs/source

writes runs/source/draw.pt (weights, sizes, arguments), runs/source/replay/*.npz (a dataset for
the later stages) and metrics.csv. Next: redraw_adapt.py.
"""

import dataclasses
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Optional

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import tyro
from torch import nn
from tqdm import tqdm

from common import (ARRAYS, DRAW, Actor, Critic, DivergenceCheck, Interrupt, Logger, Policy, Sizes, UserError, check_range, explained, held_noise,
                    kl_categorical, load_checkpoint, load_state, make_envs, mix, mlp, pick_device, read_npz, restore, sample_onehot, save_checkpoint,
                    save_dataset, save_state, seed_everything, softmax, symlog, to_device, twohot_log_prob, twohot_mean, unimix, write_atomically)  # fmt: skip


@dataclass
class Args:
    env_id: str = "redraw/PendulumSwingup-v0"  # source environment, a Gymnasium id, also as module:id
    run_dir: Optional[str] = None  # folder for everything this run writes (default: runs/pretrain-ENV-SEED)
    overwrite: bool = False  # start anew in a folder that holds a run already
    resume: bool = False  # go on from the last save of the run in run_dir, given the same flags; without one, start
    save_every: int = 20_000  # agent steps between two saves, each of which ends the running episodes
    seed: int = 1
    device: str = "auto"  # auto, cpu or cuda
    track: bool = False  # log to Weights & Biases too
    bf16: bool = False  # networks compute in bfloat16; distributions, losses and weights stay float32
    compile: bool = False  # torch.compile of the losses and the imagination; the first update then takes minutes

    # data
    steps: int = 9_000_000  # agent steps, summed over the environments
    n_envs: int = 4
    parallel_envs: bool = False  # step each environment in a process of its own, while the models learn
    episode_steps: Optional[int] = None  # time limit while training (default: the environment's); short episodes see more start states
    image_size: int = 64  # pixels, for this project's environments
    # strength, 0 to 1, of random changes of what the encoder sees, for a target that looks a little different (a real camera); see `augment`
    augment: float = 0.0
    # which policy collects: Plan2Explore, the task's, random actions, or a third of the episodes each
    collect: Literal["explore", "task", "random", "mixed"] = "explore"
    prefill: int = 1024  # random steps before the first update
    hold: float = 1.0  # mean number of steps that a random action is held
    gain: float = 1.0  # random actions are uniform over [-gain, gain], clipped to [-1, 1]; with 2, half have full force
    replay_size: int = 1_000_000  # rows kept

    # world model
    S: int = 256  # categorical variables in the latent
    K: int = 4  # classes of each
    cnn_depth: int = 32  # channels of the first convolution; each further one doubles them
    vector_units: int = 1024  # of the networks that read and predict the vector
    vector_layers: int = 5
    units: int = 512  # of posterior, dynamics, heads and ensemble
    actor_units: int = 512  # of actors and critics
    batch: int = 16  # B, sequences per update
    length: int = 64  # T, steps per sequence
    rewarded: float = 0.0  # share of the sequences that hold a reward; if it is rare, few updates would see any
    train_every: float = 2.0  # agent steps per update
    lr: float = 1e-4
    warmup: int = 0  # updates over which the learning rate rises from 0
    decay: bool = False  # let the learning rate fall to a tenth over the run, along a cosine
    image_scale: float = 1.0  # weight of the image loss; it is summed over pixels, so small images want a larger one
    vector_scale: float = 1.0  # weight of the vector loss
    reward_scale: float = 1.0  # weight of the reward loss
    soft_updates: int = 0  # updates over which the latent fades from probabilities to samples; shortens the blurred phase

    # imagination
    horizon: int = 40  # H
    starts: int = 1024  # imagined trajectories per update, at most batch * length
    # world-model updates before the first actor-critic update: a policy trained on a blurred model learns its errors;
    # until then random actions collect
    policy_start: int = 0
    policy_every: int = 1  # world-model updates per update of the task's actor-critic
    explore_every: int = 1  # the same for the exploration actor-critic
    gamma: float = 1 - 1 / 333
    lam: float = 0.95
    entropy: float = 3e-4
    actor_lr: float = 3e-5
    return_floor: float = 1.0  # least scale that the task's advantages are divided by; sparse rewards and short runs want less
    # how the task's actor learns: REINFORCE, or the return's gradient through the dynamics (straight-through)
    actor_grad: Literal["reinforce", "dynamics"] = "reinforce"
    ensemble: int = 8  # members
    ensemble_target: int = 0  # the members predict a random projection of the embedding to so many numbers (0: all of it)

    log_every: int = 100  # updates between two lines in the logs


PRESETS = {
    "laptop": (
        "minutes on two CPU cores: 32x32 images, small networks, short episodes",
        Args(
            save_every=4_000, steps=40_000, episode_steps=60, image_size=32, collect="mixed", prefill=16_000, hold=16.0, gain=2.0,
            replay_size=200_000, S=64, K=4, cnn_depth=8, vector_units=128, vector_layers=2, units=128, actor_units=128, batch=32, length=8,
            rewarded=0.25, train_every=3.0, lr=3e-3, warmup=100, decay=True, image_scale=300.0, vector_scale=400.0, reward_scale=50.0,
            soft_updates=500, policy_start=2500, policy_every=2, explore_every=8, horizon=15, gamma=0.99, starts=128, actor_lr=5e-4,
            return_floor=0.01, ensemble=5, ensemble_target=64,
        ),
    ),
    "duckietown": (
        "an hour on one CPU core: lane following, 32x32 images with random changes, dense reward",
        Args(
            env_id="deploy_duckiebot:redraw/Duckietown-v0", save_every=12_000, steps=72_000, episode_steps=30, image_size=32, augment=0.5,
            collect="mixed", prefill=12_000, hold=5.0, replay_size=200_000, S=64, K=4, cnn_depth=8, vector_units=128, vector_layers=2, units=256,
            actor_units=128, batch=32, length=8, train_every=5.0, lr=3e-3, warmup=100, decay=True, image_scale=50.0, vector_scale=5000.0,
            reward_scale=100.0, soft_updates=300, policy_start=500, policy_every=2, explore_every=10, horizon=15, gamma=0.95, starts=128,
            actor_lr=5e-4, return_floor=0.1, ensemble=3, ensemble_target=64,
        ),
    ),
    "paper": ("the paper's sizes: one CUDA GPU, about a day", Args()),
}  # fmt: skip


EXPLORE, TASK, RANDOM = 0, 1, 2  # who collects an episode
ROWS_PER_FILE = 2000  # of the replay on disk


class Replay:
    """A ring of rows per environment, in the row convention of common.load_dataset. The images lie on a CUDA device if they fill less
    than half of what is free there, else in the main memory."""

    def __init__(self, rows, n_envs, sizes, device="cpu"):
        self.length, L, device = max(rows // n_envs, 2), sizes.image_size, torch.device(device)
        shapes = {"image": (L, L, 3), "vector": (sizes.vector_size,), "action": (sizes.action_size,)}
        fits = device.type == "cuda" and 2 * n_envs * self.length * L * L * 3 < torch.cuda.mem_get_info(device)[0]
        # In the main memory, np.empty takes none until a row is written.
        self.data = {key: torch.from_numpy(np.empty((n_envs, self.length, *shapes.get(key, ())), dtype)) for key, dtype in ARRAYS.items()}
        if fits:
            self.data["image"] = torch.empty_like(self.data["image"], device=device)
        self.added = 0  # rows ever written, per environment
        self.full = set()  # names of the files that `save` need not write again

    def add(self, **row):
        """One row of every environment; each value (n_envs, ...)."""
        for key, value in row.items():
            self.data[key][:, self.added % self.length] = torch.as_tensor(value, device=self.data[key].device)
        self.added += 1

    def __len__(self):
        return min(self.added, self.length)

    def sample(self, B, T, device, rewarded=0.0):
        """Random sequences: dict of tensors (B, T, ...). They may cross episode borders, not the ring's head.
        A share `rewarded` of them is drawn so that they hold a row with reward, as far as there are any."""
        n_envs, oldest = len(self.data["reward"]), self.added - len(self)
        env, start = np.random.randint(0, n_envs, B), np.random.randint(0, len(self) - T + 1, B)
        if n := round(rewarded * B):
            paid_env, paid_row = np.nonzero(self.data["reward"][:, : len(self)].numpy() > 0)
            if len(paid_row):
                pick = np.random.randint(0, len(paid_row), n)
                age = (paid_row[pick] - oldest) % self.length  # rows since the oldest one
                env[:n], start[:n] = paid_env[pick], np.clip(age - np.random.randint(0, T, n), 0, len(self) - T)
        rows = env[:, None] * self.length + (oldest + start[:, None] + np.arange(T)) % self.length  # (B, T)
        rows, out = torch.from_numpy(rows.flatten()), {}
        for key, v in self.data.items():
            value = v.flatten(0, 1).index_select(0, to_device(rows, v.device))  # a memory copy a row, on either device
            out[key] = to_device(value, device).unflatten(0, (B, T))
        return out

    def save(self, folder):
        """Writes the rows as a dataset folder, each file a stretch of at most ROWS_PER_FILE rows of one environment, named by its first row. A full
        file is written once, so that a save costs what was added since the last one. Returns the names of the files that count."""
        oldest, names, R = self.added - len(self), [], ROWS_PER_FILE
        for env in range(len(self.data["reward"])):
            for k in range(oldest // R, -(-self.added // R)):
                name = f"env{env:03d}-{k * R:09d}.npz"
                if name not in self.full:
                    rows = np.arange(max(k * R, oldest), min((k + 1) * R, self.added))
                    name = f"env{env:03d}-{rows[0]:09d}.npz"
                    save_dataset(Path(folder) / name, {key: v[env, rows % self.length].cpu().numpy() for key, v in self.data.items()})
                    self.full |= {name} if len(rows) == R else set()
                names.append(name)
        return names

    def load(self, folder, names, added):
        """Reads back what `save` had written when it returned `names` and `added` rows had been added."""
        self.added = added
        for name in names:
            chunk = read_npz(Path(folder) / name, self.data)
            env, rows = int(name[3:6]), int(name[7:16]) + np.arange(len(chunk["is_first"]))
            keep = (rows >= added - len(self)) & (rows < added)  # a file may hold older rows, or, if a later save was cut short, newer ones
            for key, v in self.data.items():
                v[env, rows[keep] % self.length] = torch.from_numpy(chunk[key][keep]).to(v.device)
            self.full |= {name} if len(rows) == ROWS_PER_FILE and rows[-1] < added else set()


def reconstruction_errors(draw, z, image, vector):
    """Of the observation predicted from z (..., S, K) alone: image and vector, each (...). Squared errors, the vector's of symlog: a
    unit-variance Gaussian's log-likelihood up to a factor, so they are summed over pixels and over V."""
    image_error = ((draw.decoder(z.flatten(-2)) - image.float() / 255.0) ** 2).sum((-3, -2, -1))
    return image_error, ((draw.vector_head(z.flatten(-2)) - symlog(vector)) ** 2).sum(-1)


def augment(image, strength):
    """Random changes of looks, other ones for each image: what differs between a simulator's camera and a real one's. The world model sees the
    changed image and reconstructs the clean one, so that its latent leaves them out. A list like the authors', but for superpixels and
    dropped channels, as plain tensor operations.

    Args:
        image: uint8 (..., L, L, 3).   strength: 0 changes nothing, 1 is the most.
    Returns:
        uint8 (..., L, L, 3)
    """
    x = image.flatten(0, -4).permute(0, 3, 1, 2).contiguous() / 255.0  # (B, 3, L, L)
    (B, _, L, _), device = x.shape, x.device

    def vary(low, high, *shape, share=1.0):
        """Uniform over [low, high], times the strength; for a `share` of the images, 0 for the others; (B, *shape)"""
        on = torch.rand(B, *[1] * len(shape), device=device) < share
        return strength * torch.empty(B, *shape, device=device).uniform_(low, high) * on

    # Where the camera looks: turned by up to 3 degrees, 5 % nearer or farther, shifted by 3 % of the picture, and a pincushion or barrel.
    turn, zoom, shift, bend = vary(-0.05, 0.05, 1, 1), vary(-0.05, 0.05, 1, 1), vary(-0.06, 0.06, 2, 1, 1), vary(-0.1, 0.1, 1, 1, share=0.5)
    axis = (2 * torch.arange(L, device=device) + 1) / L - 1
    v, u = axis[:, None], axis[None]  # (L, 1) down, (1, L) to the right
    grow = 1 + zoom + bend * (u**2 + v**2)
    grid = torch.stack([grow * u - turn * v + shift[:, 0], grow * v + turn * u + shift[:, 1]], -1)  # (B, L, L, 2)
    x = F.grid_sample(x, grid, padding_mode="border", align_corners=False)
    # Smeared to a side, or with the opposite sign sharpened.
    x = x + vary(-0.3, 0.5, 1, 1, 1, share=0.7) * (x.roll(1, -1) - x)
    # Colours: one matrix turns the hue by up to 52 degrees, changes saturation and channels; then contrast, brightness, fog and tone.
    grey = torch.full((3, 3), 1 / 3, device=device)
    around = (torch.eye(3, device=device).roll(1, 0) - torch.eye(3, device=device).roll(1, 1)) / 3**0.5  # the turn around the axis of greys
    hue, saturation = vary(-0.9, 0.9, 1, 1, share=0.8), 1 + vary(-0.5, 0.5, 1, 1)
    colours = grey + saturation * (hue.cos() * (torch.eye(3, device=device) - grey) + hue.sin() * around)  # (B, 3, 3)
    colours = colours * (1 + vary(-0.2, 0.2, 3, 1)) * (1 + vary(-0.3, 0.3, 1, 1)) * (1 - (fog := vary(0.0, 0.5, 1, 1, share=0.3)))
    x = torch.baddbmm(vary(-0.2, 0.2, 1, 1) + fog, colours, x.flatten(2)).view_as(x).clamp(0.0, 1.0)
    x = x + vary(-0.5, 0.5, 1, 1, 1, share=0.2) * x * (1 - x)
    # Noise, pixels that fail, and a rectangle that hides what is behind it.
    noise = torch.rand_like(x)
    x = x + vary(0.0, 0.3, 1, 1, 1) * (noise - 0.5)
    x = x * (noise[:, :1] >= 0.005 * strength)
    centre, half = torch.rand(B, 2, 1, 1, device=device) * 2 - 1, vary(0.0, 0.4, 2, 1, 1, share=0.5)
    hidden = ((u - centre[:, 0]).abs() < half[:, 0]) & ((v - centre[:, 1]).abs() < half[:, 1])  # (B, L, L)
    x = torch.where(hidden[:, None], torch.rand(B, 3, 1, 1, device=device), x)
    return (x.clamp(0.0, 1.0) * 255.0).round().byte().permute(0, 2, 3, 1).reshape(image.shape)


def world_model_loss(draw, data, args, soft):
    """The loss of DRAW on replayed sequences.

    Args:
        data: sequences of Replay.sample, (B, T, ...).
        soft: share of the probabilities in the latent; 0 but early in training, so that z is one-hot.
    Returns: loss (), dict of metrics, and (embed (B, T, E), z, sigma (B, T, S, K)) without gradients.
    """
    first = data["is_first"].clone()  # (B, T)
    first[:, 0] = True
    seen = augment(data["image"], args.augment) if args.augment else data["image"]
    embed = draw.encoder(seen, data["vector"])  # (B, T, E), all images in one call
    q = draw.posterior(embed)  # log q(z_t | x_t), (B, T, S, K), unimix included
    z = sample_onehot(q.exp())  # (B, T, S, K), straight-through
    z = z + soft * (q.exp() - z)
    u = draw.observe(z, data["action"], first)  # (B, T, S, K)
    p = unimix(u)  # log p(z_t | ...)

    # Reconstructions from z_t alone
    image, vector = reconstruction_errors(draw, z, data["image"], data["vector"])  # (B, T) each
    reward = -twohot_log_prob(draw.reward_head(z.flatten(-2)), data["reward"])  # (B, T), of arriving at x_t
    cont = F.binary_cross_entropy_with_logits(draw.continue_head(z.flatten(-2)).squeeze(-1), 1.0 - data["is_terminal"].float(), reduction="none")
    # KL balancing with free bits. The first step of a sequence has no cause to be predicted from.
    kl_dyn = kl_categorical(q.detach(), p)  # (B, T), teaches the dynamics
    kl_rep = kl_categorical(q, p.detach())  # (B, T), makes the latent predictable
    kl = (1.5 * kl_dyn.clamp(min=1.0) + 0.5 * kl_rep.clamp(min=1.0)) * ~first

    loss = (args.image_scale * image + args.vector_scale * vector + args.reward_scale * reward + cont + kl).mean()
    metrics = {
        "world_model/loss": loss, "world_model/image": image.mean(), "world_model/vector": vector.mean(), "world_model/reward": reward.mean(),
        "world_model/continue": cont.mean(), "world_model/kl": (kl_dyn * ~first).sum() / (~first).sum(),
        "world_model/posterior_entropy": -(q.exp() * q).sum((-2, -1)).mean(),
    }  # fmt: skip
    return loss, metrics, (embed.detach(), z.detach(), softmax(u).detach())


@torch.no_grad()
def source_range(draw, batches):
    """How a world model does at home: the yardstick for the target's data in stage 2, which then needs no source data.

    Args:
        batches: replayed sequences, dicts of tensors (B, T, ...); the model was trained on them, but saw each only some tens of times.
    Returns: dict of plain numbers: "kl", KL(q || p) per step in nats, first steps left out; and the 1, 50 and 99 % quantiles over frames
        of "image error" and "vector error", of the reconstruction, and of "posterior entropy", in nats.
    """
    kls, frames = [], []
    for data in batches:
        q = draw.posterior(draw.encoder(data["image"], data["vector"]))
        z = sample_onehot(q.exp())
        kl = kl_categorical(q, unimix(draw.observe(z, data["action"], data["is_first"])))  # (B, T)
        kls.append(kl[:, 1:][~data["is_first"][:, 1:]])
        errors = reconstruction_errors(draw, z, data["image"], data["vector"])
        frames.append(torch.stack([*errors, -(q.exp() * q).sum((-2, -1))]).flatten(1))  # (3, B*T)
    quantiles = torch.quantile(torch.cat(frames, 1), torch.tensor([0.01, 0.5, 0.99], device=q.device), dim=1)  # (3 quantiles, 3)
    return {"kl": torch.cat(kls).mean().item()} | dict(zip(("image error", "vector error", "posterior entropy"), quantiles.T.tolist()))


def average_gradients(parameters):
    """Of several processes (torchrun): their mean gradient, which is that of the joint batch, since every loss is a mean over its batch."""
    if dist.is_initialized():
        gradients = [p.grad for p in parameters]
        joint = torch.cat([g.flatten() for g in gradients])  # one message instead of many
        dist.all_reduce(joint)
        for gradient, mean in zip(gradients, (joint / dist.get_world_size()).split([g.numel() for g in gradients])):
            gradient.copy_(mean.view_as(gradient))


def of_all_processes(x):
    """x (n, ...) of each process, one after the other, (processes * n, ...); x itself of a process alone"""
    if not dist.is_initialized():
        return x
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


class Ensemble(nn.Module):
    """Plan2Explore: `members` MLPs that predict embed_{t+1} from (sigma_t, z_t, a_t)."""

    def __init__(self, sizes, embed_size, members, target):
        super().__init__()
        Z = sizes.S * sizes.K
        # A fixed random projection keeps distances; predicting all of E would cost more than the world model.
        self.register_buffer("projection", torch.randn(embed_size, target) / embed_size**0.5 if target else None)
        self.members = nn.ModuleList(mlp(2 * Z + sizes.action_size, sizes.units, 2, target or embed_size) for _ in range(members))

    def forward(self, sigma, z, action):
        """-> predictions (members, ..., projected E)"""
        x = torch.cat([sigma.flatten(-2), z.flatten(-2), action / action.abs().clamp(min=1.0)], -1)
        return torch.stack([m(x) for m in self.members])

    def loss(self, sigma, z, action, embed, is_first):
        """Squared error of predicting the next embedding, summed over dimensions; () from (B, T, ...)."""
        with torch.autocast(embed.device.type, enabled=False):  # the target keeps its digits
            target = embed[:, 1:] if self.projection is None else embed[:, 1:] @ self.projection
        error = (self(sigma[:, :-1], z[:, :-1], action[:, :-1]) - target) ** 2
        return (error.sum(-1).mean(0) * ~is_first[:, 1:]).mean()

    def disagreement(self, sigma, z, action):
        """Intrinsic reward: the deviation over the members, averaged over dimensions, (...)"""
        return self(sigma, z, action).std(0).mean(-1)


class ActorCritic(nn.Module):
    """An actor and a critic trained in imagination (lambda-returns, two-hot critic).

    The actor's loss below is REINFORCE's; with actor_grad "dynamics" it is -w_t (R_t / scale + 3e-4 entropy), whose gradient goes
    through the imagined dynamics.

        R_t = r_{t+1} + gamma c_{t+1} ((1 - lambda) v_{t+1} + lambda R_{t+1}),   v = critic mean
        scale = max(return_floor, EMA_0.99 of [percentile_95(R) - percentile_5(R)])
        actor:  -w_t (log pi(a_t) sg((R_t - v_t) / scale) + 3e-4 entropy)
        critic: -w_t (log p(R_t) + log p(mean of the slow critic)),   slow = 2 % EMA each update

    r_{t+1} and c_{t+1} are reward and continue of ARRIVING at the imagined state t+1.
    """

    def __init__(self, sizes, args, actor_grad, scale_floor, device):
        super().__init__()
        self.args, self.actor_grad, self.scale_floor = args, actor_grad, scale_floor
        self.actor, self.critic, self.slow_critic = Actor(sizes).to(device), Critic(sizes).to(device), Critic(sizes).to(device)
        self.slow_critic.load_state_dict(self.critic.state_dict())
        self.register_buffer("scale", torch.zeros((), device=device))
        self.optimizer = torch.optim.Adam([*self.actor.parameters(), *self.critic.parameters()], lr=args.actor_lr, eps=1e-5, fused=True)

    def losses(self, draw, z, sigma, weight, reward_fn):
        """The two losses of imagined trajectories; arguments as in `update`. Returns actor_loss (), critic_loss (), rewards, values,
        returns and entropy (H, B), and the new scale ()."""
        args, H = self.args, self.args.horizon
        with torch.set_grad_enabled(self.actor_grad == "dynamics"):  # REINFORCE needs no gradient through the dynamics
            zs, sigmas, actions = [z], [sigma], []
            for _ in range(H):
                action = self.actor(z.detach()).rsample()  # (B, A)
                sigma = softmax(draw.dynamics(z, sigma, action))  # sigma_{t+1}
                z = sample_onehot(mix(sigma))  # z_{t+1} ~ p
                zs, sigmas, actions = zs + [z], sigmas + [sigma], actions + [action]
            zs, sigmas, actions = torch.stack(zs), torch.stack(sigmas), torch.stack(actions)  # (H+1, B, S, K), (H, B, A)
            rewards = reward_fn(zs[:-1], sigmas[:-1], actions, zs[1:])  # (H, B): r_1 .. r_H
            discounts = args.gamma * draw.cont(zs[1:])  # (H, B): gamma c_1 .. gamma c_H
        weights = torch.cat([weight[None], weight * discounts[:-1].detach().cumprod(0)])  # (H, B): w_0 .. w_{H-1}

        logits = self.critic(zs)  # (H+1, B, BINS)
        values = twohot_mean(logits)  # (H+1, B)
        if self.actor_grad == "reinforce":
            values = values.detach()
        R, returns = values[-1], []
        for t in reversed(range(H)):
            R = rewards[t] + discounts[t] * ((1 - args.lam) * values[t + 1] + args.lam * R)
            returns.insert(0, R)
        returns = torch.stack(returns)  # (H, B): R_0 .. R_{H-1}
        p5, p95 = torch.quantile(of_all_processes(returns.detach()), torch.linspace(0.05, 0.95, 2, device=returns.device))
        new_scale = 0.99 * self.scale + 0.01 * (p95 - p5)
        scale = new_scale.clamp(min=self.scale_floor)

        pi = self.actor(zs[:-1].detach())
        entropy = pi.entropy().sum(-1)  # (H, B)
        if self.actor_grad == "reinforce":
            objective = pi.log_prob(actions).sum(-1) * (returns - values[:-1]) / scale
        else:
            objective = returns / scale
        actor_loss = -(weights * (objective + args.entropy * entropy)).mean()
        with torch.no_grad():
            slow_values = twohot_mean(self.slow_critic(zs[:-1]))  # (H, B)
        critic_loss = -(weights * (twohot_log_prob(logits[:-1], returns.detach()) + twohot_log_prob(logits[:-1], slow_values))).mean()
        return actor_loss, critic_loss, rewards, values, returns, entropy, new_scale

    def update(self, draw, z, sigma, weight, reward_fn, check=None):
        """One update from imagined trajectories.

        Args:
            z, sigma: (B, S, K), posterior states to start from.   weight: (B,), 0 where a start is terminal, else 1.
            reward_fn: function (z_t, sigma_t, a_t, z_{t+1}), each (H, B, ...) -> rewards (H, B).
            check: function (dict of terms, batch), called before the optimiser's step, that may end the run.
        Returns: dict of metrics.
        """
        actor_loss, critic_loss, rewards, values, returns, entropy, new_scale = self.losses(draw, z, sigma, weight, reward_fn)
        self.optimizer.zero_grad()
        if self.actor_grad == "reinforce":  # neither loss depends on the other's parameters
            (actor_loss + critic_loss).backward(inputs=[*self.actor.parameters(), *self.critic.parameters()])
        else:
            actor_loss.backward(inputs=list(self.actor.parameters()), retain_graph=True)
            critic_loss.backward(inputs=list(self.critic.parameters()))
        average_gradients([*self.actor.parameters(), *self.critic.parameters()])
        actor_norm = nn.utils.clip_grad_norm_(self.actor.parameters(), 100.0)
        critic_norm = nn.utils.clip_grad_norm_(self.critic.parameters(), 100.0)
        terms = {"reward": rewards, "critic": values, "actor_loss": actor_loss, "critic_loss": critic_loss, "gradient": actor_norm + critic_norm}
        if check:
            check(terms, {"z": z, "sigma": sigma, "weight": weight})
        self.optimizer.step()
        self.scale = torch.where(new_scale.isfinite(), new_scale, self.scale)
        with torch.no_grad():
            for slow, fast in zip(self.slow_critic.parameters(), self.critic.parameters()):
                slow.lerp_(fast, 0.02)
        metrics = {"return": returns.mean(), "reward": rewards.mean(), "entropy": entropy.mean(), "scale": self.scale, "critic_loss": critic_loss}
        return {k: v.detach() for k, v in metrics.items()}  # without the graph of the imagination


def open_loop(draw, z, action, dynamics=None, prior=mix):
    """One sampled rollout that sees the first frame alone and then follows the actions that were really taken.

    Args:
        z: (n, S, K), sampled from the posterior of x_0.   action: (n, H, A), a_0 .. a_{H-1}.
        dynamics, prior: (z, sigma, a) -> u and sigma -> p, to use instead of DRAW's own.
    Returns: z_0 .. z_H, (n, H + 1, S, K).
    """
    dynamics, (z_before, sigma_before) = dynamics or draw.dynamics, draw.initial(len(z))
    sigma, zs = softmax(dynamics(z_before, sigma_before, torch.zeros(len(z), action.shape[-1], device=z.device))), [z]  # sigma_0, as in DRAW.observe
    for a in action.unbind(1):
        sigma = softmax(dynamics(zs[-1], sigma, a))
        zs.append(sample_onehot(prior(sigma)))
    return torch.stack(zs, 1)


@torch.no_grad()
def pictures(draw, replay, logger, step, device, T=40):
    """prediction.gif: four episodes; reality, reconstruction, and the open-loop prediction from the first frame and the actions."""
    order = (replay.added - len(replay) + np.arange(len(replay))) % replay.length  # rows of the ring, oldest first
    begins = np.union1d(0, np.flatnonzero(replay.data["is_first"][0, order].numpy()))
    lengths = np.diff(begins, append=len(order))
    T = min(T, lengths.max())
    rows = order[begins[lengths >= T][-4:, None] + np.arange(T)]  # (4, T), of the first environment
    image, vector, action = (replay.data[k][0, rows].to(device) for k in ("image", "vector", "action"))
    q = draw.posterior(draw.encoder(image, vector)).exp()
    seen = sample_onehot(q)  # (4, T, S, K)
    foreseen = open_loop(draw, seen[:, 0], action[:, :-1])  # (4, T, S, K)
    decoded = [draw.decoder(z.flatten(-2)).clamp(0, 1) * 255 for z in (seen, foreseen)]  # (4, T, L, L, 3) each
    video = torch.cat([image.float(), *decoded], 2).to(torch.uint8)  # below each other
    logger.video(step, "prediction", torch.cat(list(video), 2).cpu().numpy().repeat(2, 1).repeat(2, 2), fps=8)  # side by side


@torch.random.fork_rng()  # so that the run does not depend on it
@torch.no_grad()
def disagreement_map(draw, ensemble, replay, logger, step, device, most=512):
    """disagreement.gif, which does not move: where in the latent space the ensemble disagrees, and the frames that it knows least and best."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    n = min(max(1, most // len(replay.data["reward"])), len(replay))
    rows = (replay.added - n + np.arange(n)) % replay.length  # the newest
    image, vector, action, first = (replay.data[k][:, rows].to(device) for k in ("image", "vector", "action", "is_first"))
    z = sample_onehot(draw.posterior(draw.encoder(image, vector)).exp())  # (n_envs, n, S, K)
    sigma = softmax(draw.observe(z, action, first))
    disagreement = ensemble.disagreement(sigma, z, action).flatten()  # (n_envs * n,)
    x = z.flatten(0, 1).flatten(1)
    x = x - x.mean(0)
    x = (x @ torch.linalg.svd(x, full_matrices=False)[2][:2].T).cpu().numpy()  # (n_envs * n, 2), along their two widest directions
    order = disagreement.argsort(descending=True)
    strips = [torch.cat(list(image.flatten(0, 1)[i]), 1) for i in (order[:8], order[-8:])]
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    figure.colorbar(left.scatter(*x.T, c=disagreement.cpu().numpy(), s=6, cmap="viridis"), ax=left, label="disagreement")
    left.set(title="recent latents, seen from their two widest directions", xticks=[], yticks=[])
    right.imshow(torch.cat(strips).cpu().numpy())
    right.set(title="frames with the largest (above) and the least", xticks=[], yticks=[])
    FigureCanvasAgg(figure).draw()
    logger.video(step, "disagreement", np.asarray(figure.canvas.buffer_rgba())[None, ..., :3])


def main(args):
    check_range(args, 1, 10**12, "steps", "episode_steps", "image_size", "log_every", "policy_every", "explore_every", "save_every")
    check_range(args, 1e-9, 10**9, "hold", "gain", "train_every", "return_floor")
    check_range(args, 1e-9, 1, "lr", "actor_lr")
    check_range(args, 1, 65536, "n_envs", "batch", "horizon", "S", "cnn_depth", "units", "actor_units", "vector_units", "vector_layers")
    check_range(args, 2, 65536, "length", "ensemble", "K")  # of a variable with one class nothing can be learnt
    check_range(args, 0, 10**9, "soft_updates", "ensemble_target", "policy_start", "warmup", "entropy", "image_scale", "vector_scale", "reward_scale")
    check_range(args, 0, 1, "rewarded", "gamma", "lam", "augment")
    check_range(args, 1, args.batch * args.length, "starts")  # no more than the states of a batch
    least = args.n_envs * args.length
    if min(args.prefill, args.replay_size) < least or args.prefill >= args.steps:
        raise UserError(f"--prefill and --replay-size must be at least n_envs x length = {least} rows, and --prefill less than --steps")
    interrupt = Interrupt()
    seed_everything(args.seed)
    device = pick_device(args.device)
    # Under torchrun, several processes share the numbers of `shared`, and the batch of an update is all of theirs together: from here on
    # `args` counts for one process, `typed` is what the user gave, which the files of the run hold.
    typed, rank, world = args, int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    run_dir = Path(args.run_dir or f"runs/pretrain-{args.env_id.split('/')[-1]}-{args.seed}")
    if world > 1:
        shared = ("n_envs", "batch", "starts", "steps", "prefill", "replay_size", "save_every")
        if any(getattr(args, name) % world for name in shared):
            raise UserError(f"{world} processes can't share " + ", ".join(f"--{n.replace('_', '-')} {getattr(args, n)}" for n in shared if getattr(args, n) % world))
        typed = dataclasses.replace(args, track=args.track and rank == 0)
        args = dataclasses.replace(args, train_every=args.train_every / world, **{name: getattr(args, name) // world for name in shared})
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        run_dir = run_dir if rank == 0 else run_dir.with_name(f"{run_dir.name}-rank{rank}")  # each process keeps its own replay and state
    envs = make_envs(args.env_id, args.n_envs, args.image_size, args.episode_steps, args.parallel_envs)
    spaces = envs.single_observation_space
    sizes = Sizes(
        image_size=spaces["image"].shape[0], vector_size=spaces["vector"].shape[0], action_size=envs.single_action_space.shape[0],
        S=args.S, K=args.K, cnn_depth=args.cnn_depth, vector_units=args.vector_units, vector_layers=args.vector_layers,
        units=args.units, actor_units=args.actor_units,
    )  # fmt: skip
    with explained(f"--replay-size {args.replay_size}, --image-size or the networks' sizes are too large for the memory"):
        draw, replay = DRAW(sizes).to(device), Replay(args.replay_size, args.n_envs, sizes, device)
    saved = load_state(run_dir, typed, device)
    if saved and saved["world"] != world:
        raise UserError(f"--resume: the run was started with {saved['world']} processes, now there are {world}")
    if world > 1:  # killed between their writes, some have saved once more than the others: these take that save back
        state, before = run_dir / "state.pt", run_dir / "state-before.pt"
        step = int(of_all_processes(torch.tensor([saved["step"] if saved else 0], device=device)).min())
        if saved and saved["step"] > step and before.exists() and (older := load_checkpoint(before, ("state",), device))["step"] == step:
            os.replace(before, state)
            saved = older
        if len(set(of_all_processes(torch.tensor([saved["step"] if saved else 0], device=device)).tolist())) > 1:
            raise UserError("--resume: the processes' last saves are of different steps; start anew with --overwrite")
    logger = Logger(run_dir, typed, saved)

    if device.type == "cpu":
        draw = draw.to(memory_format=torch.channels_last)
    ensemble = Ensemble(sizes, draw.encoder.embed_size, args.ensemble, args.ensemble_target).to(device)
    task = ActorCritic(sizes, args, args.actor_grad, scale_floor=args.return_floor, device=device)
    explore = ActorCritic(sizes, args, "reinforce", scale_floor=0.01, device=device)
    optimizer = torch.optim.Adam(draw.parameters(), lr=args.lr, eps=1e-8, fused=True)
    ensemble_optimizer = torch.optim.Adam(ensemble.parameters(), lr=args.lr, eps=1e-8, fused=True)
    modules = {"draw": draw, "ensemble": ensemble, "task": task, "explore": explore, "optimizer": optimizer, "ensemble_optimizer": ensemble_optimizer,
               "task_optimizer": task.optimizer, "explore_optimizer": explore.optimizer}  # fmt: skip

    autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.bf16)
    loss_of = world_model_loss
    if args.compile:
        loss_of, ensemble.loss = torch.compile(world_model_loss), torch.compile(ensemble.loss)
        for actor_critic in (task, explore):
            if actor_critic.actor_grad == "reinforce":  # two backward passes through one compiled graph are not possible
                actor_critic.losses = torch.compile(actor_critic.losses)

    def task_reward(z, sigma, action, z_next):
        return draw.reward(z_next)

    def explore_reward(z, sigma, action, z_next):
        return ensemble.disagreement(sigma, z, action)

    divergence = DivergenceCheck(run_dir, modules, lag=8 if device.type == "cuda" else 0)

    def check(terms, batch):
        divergence(updates, terms, **batch)

    def save(step, **more):
        divergence.look()
        interrupt.waits = True
        files = replay.save(run_dir / "replay")  # first the rows, then the state that counts on them, then what nobody needs any more
        if world > 1 and state.exists():  # kept, until all processes have written the new one
            write_atomically(before, lambda file: file.write(state.read_bytes()))
        save_state(logger, modules, world=world, step=step, update=updates, purge_step=updates + 1, finished=finished, policy_metrics=policy_metrics,
                   action=torch.from_numpy(action), replay_files=files, replay_added=replay.added)  # fmt: skip
        if world > 1:
            dist.barrier()  # the rows that only the state before counts on go when all have the new one
        for old in (run_dir / "replay").glob("*.npz"):
            if old.name not in files:  # rows that left the ring, or of a run that this one overwrites
                old.unlink()
        save_checkpoint(
            run_dir / "draw.pt", stage="draw_pretrain", args=dataclasses.asdict(typed), sizes=dataclasses.asdict(sizes), draw=draw.state_dict(),
            task_actor=task.actor.state_dict(), explore_actor=explore.actor.state_dict(), updates=updates, **more,
        )  # fmt: skip

    total_updates = int((args.steps - args.prefill) / args.train_every)
    if args.collect != "random" and args.policy_start >= total_updates:
        print(f"warning: no policy is trained: --policy-start {args.policy_start}, but these --steps make {total_updates} updates; random actions collect")
    updates, begin, finished, policy_metrics, start = 0, 0, [], {}, time.time()
    action = np.zeros((args.n_envs, sizes.action_size), np.float32)
    collectors = np.full(args.n_envs, RANDOM)  # per environment, drawn anew for each episode
    if saved:
        replay.load(run_dir / "replay", saved["replay_files"], saved["replay_added"])
        updates, begin, finished, policy_metrics = (saved[k] for k in ("update", "step", "finished", "policy_metrics"))
        action = saved["action"].cpu().numpy()
        restore(saved, modules)
    elif rank:
        seed_everything(args.seed + 1000 * rank)  # from here on; the weights began alike
    new_episodes = True
    interrupt.waits = world == 1  # several processes would not stop at the same step: they end at once, and go on from the last save
    bar = tqdm(total=args.steps, initial=begin, unit="step", smoothing=0.05, mininterval=1.0, disable=rank > 0)
    for step in range(begin, args.steps, args.n_envs):
        if new_episodes:  # at the start and after each save, so that a run goes on alike whether it is resumed there or not
            obs, _ = envs.reset(seed=np.random.randint(2**31))
            episode_return = np.zeros(args.n_envs)
            reward, first, last, terminal = np.zeros(args.n_envs), *(np.full(args.n_envs, b) for b in (True, False, False))
            new_episodes = False
        # 1. act and store
        collectors[first] = np.random.randint(0, 3, first.sum())
        if step < args.prefill or updates < args.policy_start or args.collect == "random":
            who = np.full(args.n_envs, RANDOM)
        elif args.collect == "mixed":
            who = collectors
        else:
            who = np.full(args.n_envs, EXPLORE if args.collect == "explore" else TASK)
        action = held_noise(action, args.hold, args.gain)
        for collector, actor_critic in ((EXPLORE, explore), (TASK, task)):
            if (who == collector).any():
                chosen = Policy(sizes, draw, actor_critic.actor)(obs["image"], obs["vector"])
                action = np.where((who == collector)[:, None], chosen, action)
        replay.add(image=obs["image"], vector=obs["vector"], action=action, reward=reward, is_first=first, is_last=last, is_terminal=terminal)
        if args.parallel_envs:
            envs.step_async(action)  # they step while the models learn

        while updates < total_updates and step + args.n_envs >= args.prefill and updates < (step + args.n_envs - args.prefill) / args.train_every:
            lr = args.lr * min(1.0, (updates + 1) / max(args.warmup, 1))
            if args.decay:
                lr *= 0.55 + 0.45 * math.cos(math.pi * updates / total_updates)
            for opt in (optimizer, ensemble_optimizer):
                opt.param_groups[0]["lr"] = lr
            # 2. world model
            data = replay.sample(args.batch, args.length, device, args.rewarded)
            soft = max(0.0, 1.0 - updates / args.soft_updates) if args.soft_updates else 0.0
            with autocast:
                loss, metrics, (embed, z, sigma) = loss_of(draw, data, args, soft)
            optimizer.zero_grad()
            loss.backward()
            average_gradients(draw.parameters())
            metrics["world_model/grad_norm"] = nn.utils.clip_grad_norm_(draw.parameters(), 1000.0)
            check(metrics, data)
            optimizer.step()
            # 3. ensemble, on what the world model just saw
            with autocast:
                ensemble_loss = ensemble.loss(sigma, z, data["action"], embed, data["is_first"])
            ensemble_optimizer.zero_grad()
            ensemble_loss.backward()
            average_gradients(ensemble.parameters())
            metrics["explore/ensemble_loss"] = ensemble_loss
            check({"ensemble": ensemble_loss, "gradient": nn.utils.clip_grad_norm_(ensemble.parameters(), 1000.0)}, data)
            ensemble_optimizer.step()
            # 4. actor-critics, from the posterior states of the same batch
            pick = torch.randperm(args.batch * args.length, device=device)[: args.starts]
            z, sigma = z.flatten(0, 1)[pick], sigma.flatten(0, 1)[pick]  # (starts, S, K)
            weight = 1.0 - data["is_terminal"].flatten()[pick].float()
            with autocast:
                if updates >= args.policy_start and updates % args.policy_every == 0:
                    policy_metrics |= {f"task/{k}": v for k, v in task.update(draw, z, sigma, weight, task_reward, check).items()}
                if updates >= args.policy_start and updates % args.explore_every == 0:
                    policy_metrics |= {f"explore/{k}": v for k, v in explore.update(draw, z, sigma, weight, explore_reward, check).items()}
            updates += 1
            if updates % args.log_every == 0 or updates == total_updates:
                metrics = metrics | policy_metrics
                if finished:
                    metrics["collect/episode_return"] = np.mean(finished)
                    finished = []
                shown = logger.log(updates, metrics)
                logger.warn(updates > min(2000, total_updates // 2) and shown["world_model/kl"] < 1.01, "the KL lies at its free nat: if prediction.gif is blurred, "
                            "the latent says nothing; then raise --image-scale and --vector-scale")
                logger.warn(shown.get("task/entropy", 0) < -0.8 * sizes.action_size, "the task policy's entropy is at its floor: raise --entropy or "
                            "--return-floor, or lower --actor-lr")  # the actor's smallest deviation, 0.1, has an entropy of -0.88 per action
                most = replay.data["reward"][:, : len(replay)].abs().max().item() / (1 - args.gamma)  # no return is larger
                logger.warn(shown.get("task/scale", 0) > max(args.return_floor, 4 * most), "the task's imagined returns spread wider than the rewards "
                            "allow: the critic is running away, or rewards are predicted that were never seen; lower --actor-lr")  # fmt: skip
                bar.set_postfix_str(
                    f"updates {updates}/{total_updates} image {shown['world_model/image']:.2f} kl {shown['world_model/kl']:.1f} "
                    f"return {shown.get('collect/episode_return', np.nan):.0f} imagined {shown.get('task/return', np.nan):.1f}"
                )
        obs, reward, terminated, truncated, _ = envs.step_wait() if args.parallel_envs else envs.step(action)
        episode_return += reward
        first, last, terminal = last, terminated | truncated, terminated
        finished += episode_return[last].tolist()
        episode_return[last] = 0.0
        bar.update(args.n_envs)
        if 10 * (step + args.n_envs) // args.steps > 10 * step // args.steps:  # ten times a run
            pictures(draw, replay, logger, updates, device)
            disagreement_map(draw, ensemble, replay, logger, updates, device)
        if (step + args.n_envs) // args.save_every > step // args.save_every or interrupt.asked:
            save(step + args.n_envs)
            new_episodes = True
            interrupt.waits = world == 1
            if interrupt.asked:
                logger.close()
                interrupt.stop(f"saved after {step + args.n_envs} steps")
    bar.close()
    envs.close()
    seed_everything(args.seed)  # a run that is resumed here ends with the same pictures and figures
    pictures(draw, replay, logger, updates, device)
    disagreement_map(draw, ensemble, replay, logger, updates, device)
    n = min(4096, len(replay) * args.n_envs) // (args.batch * args.length) + 1
    save(args.steps, source_range=source_range(draw, (replay.sample(args.batch, args.length, device) for _ in range(n))))
    logger.close()
    print(f"wrote {run_dir}/draw.pt and {run_dir}/replay after {time.time() - start:.0f} s")


if __name__ == "__main__":
    main(tyro.extras.overridable_config_cli(PRESETS, description=__doc__))
