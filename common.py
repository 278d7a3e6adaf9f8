"""What the stages of ReDRAW share: environments, the networks of DRAW, datasets, checkpoints, logs.

Notation, here and in every stage (shape comments use the same letters):

    B batch   T time in a replayed sequence   H imagination horizon   N rows of a dataset
    S categorical variables in the latent     K classes of each       Z = S*K, flat latent size
    A action size   V vector-observation size   E embedding size
    x_t observation   z_t sampled latent (B, S, K), one-hot   a_t action taken AT x_t
    u_t prior logits   sigma_t = softmax(u_t), the prior's "belief"   e_t residual logits

The algorithms are not here but in the stages.
"""

import ctypes
import dataclasses
import json
import multiprocessing
import os
import random
import signal
import sys
import warnings
import zlib
from collections import deque
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import gymnasium as gym
import imageio.v3
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

with suppress(ImportError):  # of PyTorch's CUDA build; loaded after the LLVM of Mesa's renderer it would crash the process
    import triton  # noqa: F401


class UserError(SystemExit):
    """A mistake that the user can mend: ends a script with this one line on stderr and exit status 1, without a traceback."""

    def __init__(self, message):
        super().__init__("error: " + " ".join(str(message).splitlines()))


@contextmanager
def explained(text, kinds=Exception):
    """Turns an exception of these kinds into a UserError with `text` and the exception's own words."""
    try:
        yield
    except kinds as e:
        raise UserError(f"{text} ({type(e).__name__}: {e})") from e


# ---- Environments --------------------------------------------------------------------------------


class DMCEnv(gym.Env):
    """A DeepMind Control task seen through its stock camera, with optionally changed dynamics.

    Observation: image, uint8 (image_size, image_size, 3), and vector, float32 (V,), the velocities (rad/s, m/s), which one image does not show.
    Action: float32 (A,) in [-1, 1], applied for `action_repeat` frames of physics; the reward is that of the LAST one, not the sum, so 1000
    frames return at most 500. Never terminal; the time limit that gymnasium.make adds (500 steps) truncates.

    Args:
        domain, task: names in dm_control.suite, e.g. "pendulum", "swingup".
        reverse_actions: apply -a instead of a.
        wrench: (body, (fx, fy, fz, tx, ty, tz)), a constant force in N and torque in N·m on that body, in world coordinates.
        image_size: 16, 32, 64, 128 or 256; below 64 the 64-pixel image is averaged down.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 25}

    def __init__(self, domain, task, reverse_actions=False, wrench=None, image_size=64, action_repeat=2, render_mode="rgb_array"):
        if sys.platform.startswith("linux"):
            os.environ.setdefault("MUJOCO_GL", "egl")  # render without a screen; read at import
        with explained("dm_control does not load; on Debian: apt-get install libegl1 libegl-mesa0 libgl1 libgl1-mesa-dri", ImportError):
            import mujoco  # here, not above: other environments do without, and --help stays quick
            from dm_control import suite
            from dm_control.mujoco.engine import Camera

        # The time limit is gymnasium's, so that `max_episode_steps` is the only one there is.
        self.dmc = suite.load(domain, task, task_kwargs={"time_limit": float("inf")})
        self.physics = self.dmc.physics
        self.sign = -1.0 if reverse_actions else 1.0
        self.wrench, self.action_repeat, self.image_size, self.render_mode = wrench, action_repeat, image_size, render_mode
        # Multisampling, shadows and reflections cost ten times the rest of a software-rendered frame.
        self.physics.model.vis.quality.offsamples = 0
        self.shrink = max(1, 64 // image_size)
        self.camera = Camera(self.physics, height=image_size * self.shrink, width=image_size * self.shrink, camera_id=0)
        self.camera.scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = 0
        self.camera.scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = 0

        spec = self.dmc.action_spec()
        self.low, self.high = spec.minimum, spec.maximum  # physical bounds of the actuators
        self.action_space = gym.spaces.Box(-1.0, 1.0, spec.shape, np.float32)
        self.observation_space = gym.spaces.Dict(
            image=gym.spaces.Box(0, 255, (image_size, image_size, 3), np.uint8),
            vector=gym.spaces.Box(-np.inf, np.inf, self.physics.velocity().shape, np.float32),
        )

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if seed is not None:
            self.dmc.task.random.seed(seed)
        self.dmc.reset()
        return self.observe(), {}

    def step(self, action):
        action = self.sign * np.clip(np.asarray(action, np.float64), -1.0, 1.0)
        action = self.low + (action + 1.0) / 2.0 * (self.high - self.low)
        for _ in range(self.action_repeat):
            if self.wrench is not None:  # a reset clears it
                self.physics.named.data.xfrc_applied[self.wrench[0]] = self.wrench[1]
            timestep = self.dmc.step(action)
        return self.observe(), float(timestep.reward), False, False, {}

    def observe(self):
        return {"image": self.render(), "vector": self.physics.velocity().astype(np.float32)}

    def render(self):
        image = self.camera.render()
        if self.shrink > 1:
            image = image.reshape(self.image_size, self.shrink, self.image_size, self.shrink, 3).mean((1, 3)) + 0.5
        return image.astype(np.uint8)

    def close(self):
        self.dmc.close()


# The paper's four pairs: name, domain, task; and of the target: what is added to the name, what differs
for name, *task, suffix, changes in (
    ("PendulumSwingup", "pendulum", "swingup", "Reversed", {"reverse_actions": True}),
    ("BallInCupCatch", "ball_in_cup", "catch", "Windy", {"wrench": ("ball", (-2.0, 0.0, 0.0, 0.0, 0.0, 0.0))}),
    ("FingerTurnHard", "finger", "turn_hard", "Torque", {"wrench": ("spinner", (0.0, 0.0, 0.0, 0.0, 4.0, 0.0))}),
    ("ReacherEasy", "reacher", "easy", "Reversed", {"reverse_actions": True}),
):
    for env_id, kwargs in ((f"redraw/{name}-v0", {}), (f"redraw/{name}{suffix}-v0", changes)):
        kwargs = {"domain": task[0], "task": task[1], **kwargs}
        gym.register(env_id, DMCEnv, kwargs=kwargs, max_episode_steps=500, disable_env_checker=True)


def make_env(env_id, worker=False, **kwargs):
    """gymnasium.make; it is here so that a `worker`, a process of its own, has imported this file, which registers the environments above."""
    if worker and multiprocessing.parent_process():  # AsyncVectorEnv calls it once in the parent too
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which saves first
    return gym.make(env_id, **kwargs)


def make_envs(env_id, n, image_size=None, episode_steps=None, parallel=False):
    """n copies of one environment, stepped together: a SyncVectorEnv, or, each in a process of its own, an AsyncVectorEnv. The step after the end of an episode resets that copy, ignores its action and
    returns the first observation of the next episode with reward 0. UserError: unknown id, or spaces that DRAW can't use.

    Args:
        image_size: for this project's ids; others come with a size of their own.
        episode_steps: a time limit in steps instead of the environment's own.
        parallel: step them in processes of their own, with step_async and step_wait.
    """
    kwargs = {"max_episode_steps": episode_steps} if episode_steps else {}
    if image_size and env_id.split(":")[-1].startswith("redraw/"):
        kwargs["image_size"] = image_size
    known = ", ".join(i for i in gym.registry if i.startswith("redraw/"))
    with explained(f"can't make environment '{env_id}'; this project's: {known}; any other as module:id"):
        envs = gym.vector.SyncVectorEnv([partial(make_env, env_id, **kwargs)] * (1 if parallel else n))
    obs, act = envs.single_observation_space, envs.single_action_space
    if not isinstance(obs, gym.spaces.Dict) or set(obs.spaces) != {"image", "vector"}:
        raise UserError(f"{env_id}: the observation space must be Dict(image=..., vector=...), it is {obs}")
    L, V, A = ((space.shape or (0,))[0] for space in (obs["image"], obs["vector"], act))
    if obs["image"].dtype != np.uint8 or obs["image"].shape != (L, L, 3) or L < 16 or L & (L - 1):
        raise UserError(f"{env_id}: image must be uint8 (L, L, 3) with L = 16, 32, 64, ..., it is {obs['image']}")
    if obs["vector"].dtype != np.float32 or obs["vector"].shape != (V,) or V == 0:
        raise UserError(f"{env_id}: vector must be float32 (V,), V at least 1, it is {obs['vector']}")
    if A == 0 or act not in [gym.spaces.Box(-1, 1, (A,), dtype) for dtype in (np.float16, np.float32, np.float64)]:
        raise UserError(f"{env_id}: the action space must be Box(-1, 1, (A,)), it is {act}; gymnasium.wrappers.RescaleAction can make it so")
    if parallel:  # spawned, because a fork would share the GPU and the renderer
        envs.close()
        with explained(f"can't make environment '{env_id}' in processes of their own"):
            envs = gym.vector.AsyncVectorEnv([partial(make_env, env_id, worker=True, **kwargs)] * n, context="spawn")
    return envs


def check_sizes(env_id, envs, sizes):
    """Raises UserError if an environment's observations and actions are not those of a checkpoint."""
    spaces = envs.single_observation_space
    has = (spaces["image"].shape[0], spaces["vector"].shape[0], envs.single_action_space.shape[0])
    wants = (sizes.image_size, sizes.vector_size, sizes.action_size)
    if has != wants:
        raise UserError(f"{env_id} has (image, vector, action) sizes {has}, the checkpoint was trained with {wants}")


def held_noise(previous, hold, gain=1.0):
    """Random actions, uniform over [-gain, gain], clipped to [-1, 1], that stay for `hold` steps on average; float32 (n, A) from the last ones.
    Independent noise averages out over a swing of the arm; held noise reaches far more states. With a gain of 2, half have full torque."""
    fresh = np.random.uniform(-gain, gain, previous.shape).clip(-1, 1).astype(np.float32)
    return np.where(np.random.rand(len(previous), 1) < 1.0 / hold, fresh, previous)


# ---- Distributions: categorical latents, two-hot scalars -----------------------------------------


def mix(probs):
    """0.99 probs + 0.01 / K, (..., K): no class is ever impossible, so no KL is infinite."""
    return 0.99 * probs + 0.01 / probs.shape[-1]


def softmax(logits):
    """Over the last dimension, (..., S, K) -> (..., S, K): logits.softmax(-1), on CPUs 15 times faster for so short a dimension."""
    return logits.transpose(-1, -2).softmax(-2).transpose(-1, -2)


def unimix(logits):
    """log(0.99 softmax(logits) + 0.01 / K), normalised log-probabilities; (..., S, K) -> (..., S, K)"""
    return torch.log(mix(softmax(logits)))


def sample_onehot(probs):
    """Samples every categorical, (..., S, K) -> one-hot, with straight-through gradients (those of the probabilities)."""
    cdf = probs.detach().cumsum(-1)  # the inverse CDF, on CPUs tens of times faster than torch.multinomial
    index = (torch.rand_like(cdf[..., :1]) > cdf[..., :-1]).sum(-1, keepdim=True)
    onehot = torch.zeros_like(cdf).scatter_(-1, index, 1.0)
    return onehot + (probs - probs.detach()) if probs.requires_grad else onehot


def kl_categorical(logp, logq):
    """KL(p || q) of independent categoricals, from log-probabilities (..., S, K), summed to (...)."""
    return (logp.exp() * (logp - logq)).sum((-2, -1))


def symlog(x):
    """sign(x) log(1 + |x|): squashes large values, near-identity around zero (DreamerV3)."""
    return torch.sign(x) * torch.log1p(torch.abs(x))


def symexp(x):
    """The inverse of symlog."""
    return torch.sign(x) * torch.expm1(torch.abs(x))


BINS = 255  # of the two-hot distribution, evenly spaced over [-20, 20] in symlog space


def twohot_mean(logits):
    """Logits (..., BINS) -> mean of the distribution over symlog values, back in linear space (...)."""
    bins = torch.linspace(-20.0, 20.0, BINS, device=logits.device)
    return symexp((logits.softmax(-1) * bins).sum(-1))


def twohot_log_prob(logits, x):
    """Cross-entropy (negated) of logits (..., BINS) against the two-hot encoding of symlog(x), (...), whose mass is on the two bins around it."""
    position = (symlog(x).clamp(-20.0, 20.0) + 20.0) / 40.0 * (BINS - 1)
    below = position.floor().long().clamp(0, BINS - 2)
    weight_above = (position - below)[..., None]
    logp = logits.log_softmax(-1)
    logp_below, logp_above = logp.gather(-1, below[..., None]), logp.gather(-1, below[..., None] + 1)
    return ((1 - weight_above) * logp_below + weight_above * logp_above).squeeze(-1)


# ---- Networks ------------------------------------------------------------------------------------


@dataclass
class Sizes:
    """All sizes of a world model and its policy; stored in every checkpoint. Defaults: the paper's."""

    image_size: int = 64  # pixels, a power of two
    vector_size: int = 1  # V
    action_size: int = 1  # A
    S: int = 256
    K: int = 4
    cnn_depth: int = 32  # channels of the first convolution; each further one doubles them
    vector_units: int = 1024
    vector_layers: int = 5
    units: int = 512  # of posterior, dynamics and heads
    actor_units: int = 512  # of actor and critic

    def __post_init__(self):  # they may come from a stranger's checkpoint
        for name, value in vars(self).items():
            if type(value) is not int or not 1 <= value <= 65536 or name == "image_size" and (value < 16 or value & (value - 1)):
                raise ValueError(f"{name} can't be {value!r}: sizes are from 1 to 65536, that of images is 16, 32, 64, ...")


def init_weights(layer, scale=1.0):
    """Truncated normal of variance scale / ((fan_in + fan_out) / 2), cut at two deviations; zero bias."""
    receptive = layer.weight[0, 0].numel() if layer.weight.dim() == 4 else 1
    fan_avg = (layer.weight.shape[0] + layer.weight.shape[1]) * receptive / 2
    std = (scale / fan_avg) ** 0.5 / 0.87962566  # the deviation that the cut takes away
    nn.init.trunc_normal_(layer.weight, std=std, a=-2 * std, b=2 * std) if scale else nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


class MLP(nn.Sequential):
    """Layers whose output is float32, also where they compute in bfloat16 (--bf16): softmax, logarithms and losses want the digits."""

    def forward(self, x):
        return super().forward(x).float()


def mlp(n_in, units, layers, n_out=None, out_scale=1.0):
    """Layers of Linear (no bias), LayerNorm, SiLU; then, if n_out is given, a Linear to n_out."""
    modules = []
    for _ in range(layers):
        modules += [init_weights(nn.Linear(n_in, units, bias=False)), nn.LayerNorm(units, eps=1e-3), nn.SiLU()]
        n_in = units
    if n_out:
        modules.append(init_weights(nn.Linear(n_in, n_out), out_scale))
    return MLP(*modules)


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of (B, C, H, W), at each pixel by itself."""

    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Encoder(nn.Module):
    """embed = [CNN(image), MLP(symlog(vector))], E = 16 * last channels + vector units."""

    def __init__(self, sizes):
        super().__init__()
        layers, channels, depth = [], 3, sizes.cnn_depth
        for _ in range(int(np.log2(sizes.image_size)) - 2):  # halve the image until it is 4x4
            layers += [init_weights(nn.Conv2d(channels, depth, 4, 2, 1, bias=False)), ChannelNorm(depth, eps=1e-3), nn.SiLU()]
            channels, depth = depth, depth * 2
        self.cnn = nn.Sequential(*layers)
        self.vector = mlp(sizes.vector_size, sizes.vector_units, sizes.vector_layers)
        self.embed_size = 16 * channels + sizes.vector_units  # E

    def forward(self, image, vector):
        """image uint8 (..., L, L, 3), vector (..., V) -> embed (..., E)"""
        batch = image.shape[:-3]
        x = image.flatten(0, -4).permute(0, 3, 1, 2).float() / 255.0 - 0.5  # (B, 3, L, L), channels-last in memory
        return torch.cat([self.cnn(x).float().flatten(1).unflatten(0, batch), self.vector(symlog(vector))], -1)


class Decoder(nn.Module):
    """image = CNN^-1(z) + 0.5, from 4x4 upwards; no sigmoid."""

    def __init__(self, sizes):
        super().__init__()
        n = int(np.log2(sizes.image_size)) - 2
        channels = sizes.cnn_depth * 2 ** (n - 1)
        linear = init_weights(nn.Linear(sizes.S * sizes.K, 16 * channels))
        self.start = nn.Sequential(linear, nn.Unflatten(-1, (4, 4, channels)), nn.LayerNorm(channels, eps=1e-3), nn.SiLU())
        layers = []
        for _ in range(n - 1):
            up = nn.ConvTranspose2d(channels, channels // 2, 4, 2, 1, bias=False)
            channels //= 2
            layers += [init_weights(up), ChannelNorm(channels, eps=1e-3), nn.SiLU()]
        self.cnn = nn.Sequential(*layers, init_weights(nn.ConvTranspose2d(channels, 3, 4, 2, 1)))

    def forward(self, z):
        """z (..., Z) -> image (..., L, L, 3), about [0, 1]"""
        x = self.start(z.flatten(0, -2)).permute(0, 3, 1, 2)
        return self.cnn(x).float().permute(0, 2, 3, 1).unflatten(0, z.shape[:-1]) + 0.5


class DRAW(nn.Module):
    """DRAW, the world model with a discrete latent state and no recurrence in it.

        posterior   q(z_t | x_t) = Categorical^S(unimix(MLP(embed_t)))
        dynamics    u_t = f(z_{t-1}, sigma_{t-1}, a_{t-1}),   sigma_t = softmax(u_t)
        prior       p(z_t | ...) = Categorical^S(unimix(u_t))
        heads       image, vector, reward, continue, each from z_t alone
    """

    def __init__(self, sizes):
        super().__init__()
        self.sizes = sizes
        Z, u = sizes.S * sizes.K, sizes.units
        self.encoder = Encoder(sizes)
        self.posterior_net = mlp(self.encoder.embed_size, u, 1, Z)
        self.dynamics_net = mlp(2 * Z + sizes.action_size, u, 3, Z)
        self.initial_logits = nn.Parameter(torch.zeros(sizes.S, sizes.K))
        self.decoder = Decoder(sizes)
        self.vector_head = mlp(Z, sizes.vector_units, sizes.vector_layers, sizes.vector_size)
        self.reward_head = mlp(Z, u, 2, BINS, out_scale=0.0)
        self.continue_head = mlp(Z, u, 2, 1)

    def posterior(self, embed):
        """embed (..., E) -> log-probabilities of q(z_t | x_t), (..., S, K), unimix included"""
        return unimix(self.posterior_net(embed).unflatten(-1, (self.sizes.S, self.sizes.K)))

    def dynamics(self, z, sigma, action):
        """f(z_{t-1}, sigma_{t-1}, a_{t-1}), (..., S, K), (..., S, K), (..., A) -> prior logits u_t (..., S, K)"""
        action = action / action.abs().clamp(min=1.0)  # as the environment would clip it
        u = self.dynamics_net(torch.cat([z.flatten(-2), sigma.flatten(-2), action], -1))
        return u.unflatten(-1, (self.sizes.S, self.sizes.K))

    def initial(self, batch):
        """The learned state before the first step: sigma = softmax(w), z = its mode; each (batch, S, K)"""
        sigma = self.initial_logits.softmax(-1)
        mode = F.one_hot(sigma.argmax(-1), self.sizes.K).to(sigma)
        z = mode + sigma - sigma.detach()
        return z.expand(batch, -1, -1), sigma.expand(batch, -1, -1)

    def observe(self, z, action, is_first, dynamics=None):
        """The recurrence of the belief over an observed sequence. Returns the prior logits u (B, T, S, K).

        Args:
            z: (B, T, S, K), sampled from the posterior.   action: (B, T, A), a_t taken AT x_t; so step t uses action[:, t-1].
            is_first: bool (B, T). There, and at t = 0, the previous state is the initial one and the previous action zero.
            dynamics: (z_{t-1}, sigma_{t-1}, a_{t-1}) -> u_t to use instead of f, e.g. the rectified one of redraw_adapt.py.
        """
        B, T = is_first.shape
        z0, sigma0 = self.initial(B)
        first = is_first[..., None, None]  # (B, T, 1, 1)
        sigma, us = sigma0, []
        for t in range(T):
            if t == 0:
                z_prev, sigma, a_prev = z0, sigma0, torch.zeros_like(action[:, 0])
            else:
                z_prev = torch.where(first[:, t], z0, z[:, t - 1])
                sigma = torch.where(first[:, t], sigma0, sigma)
                a_prev = torch.where(is_first[:, t, None], 0.0, action[:, t - 1])
            u = (dynamics or self.dynamics)(z_prev, sigma, a_prev)
            sigma = softmax(u)  # fed back at t+1
            us.append(u)
        return torch.stack(us, 1)

    def reward(self, z):
        """Predicted reward of arriving in z (..., S, K) -> (...)"""
        return twohot_mean(self.reward_head(z.flatten(-2)))

    def cont(self, z):
        """Predicted probability that the episode goes on after arriving in z (..., S, K) -> (...)"""
        return self.continue_head(z.flatten(-2)).squeeze(-1).sigmoid()


class Actor(nn.Module):
    """pi(a | z) = Normal(tanh(mu), 0.9 sigmoid(s + 2) + 0.1), not squashed. z alone, so that a deployed policy needs no dynamics."""

    def __init__(self, sizes):
        super().__init__()
        self.net = mlp(sizes.S * sizes.K, sizes.actor_units, 2, 2 * sizes.action_size)

    def forward(self, z):
        """z (..., S, K) -> torch.distributions.Normal over (..., A)"""
        mu, s = self.net(z.flatten(-2)).chunk(2, -1)
        return torch.distributions.Normal(torch.tanh(mu), 0.9 * torch.sigmoid(s + 2.0) + 0.1, validate_args=False)


class Critic(nn.Module):
    """The distribution of the return from z, two-hot; starts at zero."""

    def __init__(self, sizes):
        super().__init__()
        self.net = mlp(sizes.S * sizes.K, sizes.actor_units, 2, BINS, out_scale=0.0)

    def forward(self, z):
        """z (..., S, K) -> logits (..., BINS)"""
        return self.net(z.flatten(-2))


class Policy(nn.Module):
    """x_t -> a_t: encoder, posterior, actor. All that deployment needs. Given a world model and an actor, it shares their modules."""

    def __init__(self, sizes, draw=None, actor=None):
        super().__init__()
        self.sizes, self.actor = sizes, actor or Actor(sizes)
        self.encoder = draw.encoder if draw else Encoder(sizes)
        self.posterior_net = draw.posterior_net if draw else mlp(self.encoder.embed_size, sizes.units, 1, sizes.S * sizes.K)

    posterior = DRAW.posterior

    @torch.no_grad()
    def __call__(self, image, vector):
        """image uint8 (n, L, L, 3), vector float32 (n, V), NumPy -> sampled actions (n, A) in [-1, 1]"""
        device = next(self.parameters()).device
        embed = self.encoder(torch.as_tensor(image, device=device), torch.as_tensor(vector, device=device))
        action = self.actor(sample_onehot(self.posterior(embed).exp())).sample()
        return action.clamp(-1, 1).cpu().numpy()


# ---- Files: datasets and checkpoints -------------------------------------------------------------


def write_atomically(path, write):
    """Calls write(file) on a temporary file, then renames it: no half file is ever seen. UserError if the disk is full, ...: the old one stays."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.part")  # one name, so that killed runs leave no more than one
    with explained(f"can't write {path}", (OSError, RuntimeError)):  # torch.save turns a full disk into a RuntimeError
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())  # on the disk before the name: also a power cut leaves the old file or the new one
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def save_dataset(path, rows):
    """Writes rows, a dict of equal-length arrays (see load_dataset), as one .npz file."""
    write_atomically(path, lambda file: np.savez_compressed(file, **rows))


ARRAYS = {  # of a dataset
    "image": np.uint8, "vector": np.float32, "action": np.float32, "reward": np.float32, "is_first": bool, "is_last": bool, "is_terminal": bool,
}  # fmt: skip


def read_npz(file, keys):
    """Those of `keys` that a .npz file holds, as arrays; the authors' names are put right."""
    renamed = {"image_complement": "vector", "yaw_and_forward_vel": "vector"}
    with explained(f"{file} can't be read as a .npz dataset; is it complete?"), np.load(file, allow_pickle=False) as npz:
        return {renamed.get(k, k): np.asarray(npz[k]) for k in npz.files if renamed.get(k, k) in keys}


def load_dataset(path, image_size=None, vector_size=None, action_size=None):
    """Reads a dataset: one .npz file, or a folder of .npz files, each the start of a new sequence.

    Row t holds x_t, the reward on ARRIVING at x_t, and the action taken AT x_t (DreamerV3's convention); the models clip it to [-1, 1], as an
    environment would. The authors' key names `image_complement` and `yaw_and_forward_vel` are read as `vector`; unknown keys are ignored.

    Returns: dict of image uint8 (N, L, L, 3), vector float32 (N, V), action float32 (N, A), is_first, is_last, is_terminal bool (N,),
    and reward float32 (N,) if every file has one. UserError: no such file, not a dataset, other sizes than asked for, NaN.
    """
    path = Path(path)
    files = sorted(path.glob("*.npz")) if os.path.isdir(path) else [path]
    if not files or not all(map(os.path.isfile, files)):
        raise UserError(f"no dataset at {path}: expected a .npz file or a folder of them")
    rows = sum(read_npz(f, ["is_first"]).get("is_first", np.zeros(0)).size for f in files)
    dataset, filled = {}, 0
    for file in files:
        chunk = read_npz(file, ARRAYS)
        if missing := {"image", "vector", "action", "is_first"} - set(chunk):
            raise UserError(f"{file} lacks {', '.join(sorted(missing))}; it has {', '.join(sorted(chunk)) or 'nothing of use'}")
        n = chunk["is_first"].size
        if n < 1 or rows < 2:
            raise UserError(f"{file}: a dataset needs 2 rows at least and each file 1, is_first has {n}")
        chunk = {"is_last": np.zeros(n, bool), "is_terminal": np.zeros(n, bool)} | chunk
        # Sizes that were not asked for are the first file's; 0, which is refused, where an array has no such dimension.
        image_size, vector_size, action_size = (
            size or (*chunk[key].shape, 0, 0)[1] for key, size in (("image", image_size), ("vector", vector_size), ("action", action_size))
        )
        shapes = {"image": (n, image_size, image_size, 3), "vector": (n, vector_size), "action": (n, action_size)}
        for key, value in chunk.items():
            dtype, shape = ARRAYS[key], shapes.get(key, (n,))
            number = value.dtype == np.uint8 if key == "image" else value.dtype.kind in "biuf"
            if not number or value.shape != shape or 0 in shape:
                raise UserError(f"{file}: {key} must be {np.dtype(dtype)} {shape}, it is {value.dtype} {value.shape}")
            with np.errstate(over="ignore"):  # what is too large for float32 becomes infinite
                chunk[key] = value.astype(dtype, copy=False)
            if key != "image" and not (finite := np.isfinite(value) & np.isfinite(chunk[key])).all():
                raise UserError(f"{file}: {key} holds NaN or infinity, first in row {np.argwhere(~finite)[0][0]}")
        # A reset follows the end of an episode, whether the recorder marked it or not.
        chunk["is_first"] = chunk["is_first"] | np.append(True, chunk["is_last"][:-1])
        if len(files) == 1:
            return chunk
        if filled == 0:  # one array for all files, so that the images are in memory only once
            dataset = {k: np.empty((rows, *v.shape[1:]), v.dtype) for k, v in chunk.items()}
        dataset = {k: v for k, v in dataset.items() if k in chunk}
        for key, value in dataset.items():
            value[filled : filled + n] = chunk[key]
        filled += n
    return dataset


def save_checkpoint(path, **contents):
    """Writes weights (state dicts) and plain data (numbers, strings, lists, dicts) to one file."""
    write_atomically(path, lambda file: torch.save(contents, file))


def load_checkpoint(path, stages, device="cpu"):
    """Reads a checkpoint of one of `stages`, e.g. ("draw_pretrain",), with weights_only=True: a stranger's file can't run code.
    UserError: no such file, not a checkpoint of this project, or one of another stage."""
    makers = " or ".join(f"{s}.py" for s in stages)
    with explained(f"{path} is not a checkpoint of this project, or it is damaged; make one with {makers}"):
        with warnings.catch_warnings(action="ignore"):  # of a foreign file
            checkpoint = {"args": {}, **torch.load(path, map_location=device, weights_only=True), "file": str(path)}
        stage = checkpoint["stage"]
    if stage not in stages:
        raise UserError(f"{path} was written by {stage}.py; this needs one from {makers}")
    return checkpoint


def load_module(checkpoint, key, make, device):
    """The network make() with the weights that a checkpoint holds as `key`, frozen. UserError if they don't fit or are not finite."""
    with explained(f"{checkpoint['file']} is damaged: '{key}' is missing, does not fit the sizes or is not finite"):
        with torch.device("meta"):  # takes no memory, whatever sizes the file asks for
            wants = make().state_dict()
        weights = checkpoint[key]
        for name in {**wants, **weights}:
            if (weights[name].shape, weights[name].dtype) != (wants[name].shape, wants[name].dtype) or not weights[name].isfinite().all():
                raise ValueError(name)
    module = make().to(device)
    module.load_state_dict(weights)
    return module.requires_grad_(False).eval()


def load_draw(checkpoint, device):
    """The world model of a checkpoint, frozen."""
    return load_module(checkpoint, "draw", lambda: DRAW(Sizes(**checkpoint["sizes"])), device)


def load_policy(path, device="cpu"):
    """The policy of a checkpoint of train_policy.py, ready to act."""
    checkpoint = load_checkpoint(path, ("train_policy",), device)
    policy = load_module(checkpoint, "policy", lambda: Policy(Sizes(**checkpoint["sizes"])), device)
    return policy.to(memory_format=torch.channels_last)  # the faster one for a single image


# ---- Runs: seeds, devices, logs ------------------------------------------------------------------


def seed_everything(seed):
    """Seeds Python, NumPy and PyTorch; environments are seeded in their reset."""
    if not 0 <= seed < 2**31:  # environments get sums of it and other numbers, which must stay below 2^32
        raise UserError(f"--seed must be from 0 to 2^31 - 1, it is {seed}")
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def pick_device(name):
    """'auto' is CUDA where there is one, else the CPU."""
    torch.set_flush_denormal(True)  # CPUs are many times slower on the tiny numbers that Adam leaves behind
    if os.name == "posix" and hasattr(libc := ctypes.CDLL(None), "mallopt"):  # glibc would give back, and fault in again, each large tensor
        M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
        libc.mallopt(M_TRIM_THRESHOLD, 1 << 30), libc.mallopt(M_MMAP_THRESHOLD, 32 << 20)
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"  # torchrun gives each process a GPU of its own
    with explained(f"--device {name} can't be used here, try auto or cpu"):
        torch.zeros((), device=name).item()  # the device "meta" holds no numbers
        if torch.device(name).type == "cuda":
            torch.cuda.set_device(name)
    return torch.device(name)


def to_device(value, device):
    """A CPU tensor on `device`; on CUDA through pinned memory, so that the host goes on while it is copied."""
    pinned = torch.device(device).type == "cuda" and value.device.type == "cpu"
    return (value.pin_memory() if pinned else value).to(device, non_blocking=True)


def check_range(args, low, high, *names):
    """Raises UserError for a flag that is not from low to high, or is NaN; one that is None was not given."""
    for name in names:
        if (value := getattr(args, name)) is not None and not low <= value <= high:
            raise UserError(f"--{name.replace('_', '-')} must be from {low} to {high}, it is {value}")


class Interrupt:
    """Ctrl-C and SIGTERM end the script with one line; while `waits` is true they only set `asked`, so that a training loop can save."""

    def __init__(self):
        self.waits = self.asked = False
        signal.signal(signal.SIGINT, self.handle)
        signal.signal(signal.SIGTERM, self.handle)

    def handle(self, *_):
        if not self.waits or self.asked:  # a second one does not wait
            self.stop("interrupted")
        self.asked = True

    def stop(self, text):
        os.write(2, f"\n{text}; the same command with --resume goes on from the last save\n".encode())  # print is not for signal handlers
        raise SystemExit(130)


def save_state(logger, modules, **contents):
    """Saves a run in progress for --resume: modules (dict of name -> what has a state dict), contents, the logs' length, all random generators."""
    _, keys, *position = np.random.get_state()  # plain numbers: files are read with weights_only=True
    rng = {"python": random.getstate(), "numpy": (keys.tolist(), *position), "torch": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all()}
    logger.file.flush()
    os.fsync(logger.file.fileno())  # the state counts on what was logged so far
    states = {name: module.state_dict() for name, module in modules.items()}
    save_checkpoint(logger.dir / "state.pt", stage="state", rng=rng, logged=logger.file.tell(), **states, **contents)


def settings(args):
    """The flags, as JSON gives them back, and a check sum of what --checkpoint and --dataset hold (of .npz files their names and sizes)."""
    paths = [Path(p) for p in (getattr(args, "checkpoint", None), getattr(args, "dataset", None)) if p]
    files = [f for p in paths for f in (sorted(p.glob("*.npz")) if os.path.isdir(p) else [p]) if os.path.isfile(f)]
    found = [zlib.crc32(f.read_bytes()) if f.suffix == ".pt" else (f.name, f.stat().st_size) for f in files]
    return json.loads(json.dumps(dataclasses.asdict(args) | {"check sum of the inputs": zlib.crc32(repr(found).encode())}))


def load_state(run_dir, args, device):
    """What save_state wrote; None without --resume, or if the run was killed before its first save. UserError: it had other flags or inputs."""
    if args.resume and args.overwrite:
        raise UserError("give --resume or --overwrite, not both")
    if not args.resume or not (Path(run_dir) / "args.json").exists():
        return None
    with explained(f"{run_dir}/args.json is damaged; start anew with --overwrite"):
        before, now = dict(json.loads((Path(run_dir) / "args.json").read_text())), settings(args)
    for name in now:
        if name not in ("resume", "overwrite", "track", "device", "run_dir") and before.get(name, now[name]) != now[name]:
            raise UserError(f"--resume needs the flags and inputs of the start: {name} was {before[name]}, now it is {now[name]}")
    path = Path(run_dir) / "state.pt"
    return load_checkpoint(path, ("state",), device) if path.exists() else None


def restore(state, modules):
    """Modules and random generators as they were at save_state."""
    for name, module in modules.items():
        module.load_state_dict(state[name])
    random.setstate(state["rng"]["python"])
    np.random.set_state(("MT19937", *state["rng"]["numpy"]))
    torch.set_rng_state(state["rng"]["torch"].cpu())
    for i in range(min(len(state["rng"]["cuda"]), torch.cuda.device_count())):
        torch.cuda.set_rng_state(state["rng"]["cuda"][i].cpu(), i)


class DivergenceCheck:
    """Called before an optimiser's step: if a term is NaN or infinite, saves batch and modules as diverged.pt and ends the run. On CUDA a look would
    make the host wait; there the optimisers among `modules` skip this step and all that follow by themselves, and the look comes `lag` calls later."""

    def __init__(self, run_dir, modules, lag):
        self.path, self.modules, self.lag, self.pending = Path(run_dir) / "diverged.pt", modules, lag, deque()
        for module in modules.values():
            if lag and isinstance(module, torch.optim.Optimizer):  # fused ones ask for it
                device = module.param_groups[0]["params"][0].device
                self.diverged = module.found_inf = getattr(self, "diverged", torch.zeros((), device=device))

    def __call__(self, update, terms, **batch):
        """terms: dict of name -> tensor, losses and norms of gradients; batch: tensors to save with the weights"""
        terms = {name: v.detach() for name, v in terms.items()}
        finite, ready = torch.isfinite(sum(v.sum() for v in terms.values())), None
        if self.lag:
            self.diverged.copy_(torch.maximum(self.diverged, (~finite).float()))
        if finite.is_cuda:
            finite, ready = torch.empty((), dtype=torch.bool, pin_memory=True).copy_(finite, non_blocking=True), torch.cuda.Event()
            ready.record()
        self.pending.append((finite, ready, update, terms, batch))
        self.look(self.lag)

    def look(self, most=0):
        """Looks at the oldest calls, until `most` are left; before a save at all of them."""
        while len(self.pending) > most:
            finite, ready, update, terms, batch = self.pending.popleft()
            if ready:
                ready.synchronize()
            if not finite:
                bad = [name for name, v in terms.items() if not torch.isfinite(v).all()] or list(terms)
                weights = {name: module.state_dict() for name, module in self.modules.items()}
                save_checkpoint(self.path, stage="diverged", update=update, terms=bad, batch=batch, weights=weights)
                raise UserError(f"{', '.join(bad)} is not finite in update {update + 1}; batch and weights before it are in {self.path}; try a smaller "
                                "learning rate")  # fmt: skip


class Logger:
    """Scalars to TensorBoard (with --track to Weights & Biases too) and metrics.csv; videos; learning curves at the end. Goes on from
    `state`, of load_state. UserError: the run folder holds files already, or the disk is full."""

    def __init__(self, run_dir, args, state=None):
        import matplotlib.backends.backend_agg  # noqa: F401  now, so that a run has its memory from the start
        from torch.utils.tensorboard import SummaryWriter

        if args.track:
            with explained("--track needs Weights & Biases: pip install wandb", ImportError):
                import wandb
        self.dir, self.warned = Path(run_dir), set()
        with explained(f"can't write into --run-dir {run_dir}", OSError):
            there = {p.name for p in self.dir.glob("[!.]*")}
            begun = args.resume and "args.json" in there and not list(self.dir.glob("*.pt"))  # killed before its first save
            if there and not (args.overwrite or state or begun):
                raise UserError(f"{run_dir} holds files already; choose another --run-dir, or add --overwrite (or --resume, if it holds this run)")
            self.dir.mkdir(parents=True, exist_ok=True)
            if state:  # what was logged after the save comes again
                os.truncate(self.dir / "metrics.csv", state["logged"])
            else:
                for old in [*self.dir.glob("events.out.tfevents.*"), *self.dir.glob("state*.pt")]:
                    old.unlink(missing_ok=True)
                write_atomically(self.dir / "args.json", lambda file: file.write(json.dumps(settings(args), indent=1).encode()))
                (self.dir / "metrics.csv").write_text("step,metric,value\n")
            self.file = open(self.dir / "metrics.csv", "a")
            if args.track:  # before the writer, which it listens to
                wandb.init(project="redraw", name=self.dir.name, config=dataclasses.asdict(args), dir=str(self.dir), sync_tensorboard=True)
            self.tensorboard = SummaryWriter(str(self.dir), purge_step=state["purge_step"] if state else None)

    def log(self, step, metrics):
        """metrics: dict of name -> number or 0-d tensor"""
        metrics = {k: float(v.detach() if torch.is_tensor(v) else v) for k, v in metrics.items()}
        with explained(f"can't write the logs in {self.dir}", OSError):
            self.file.writelines(f"{step},{name},{value:.6g}\n" for name, value in metrics.items())
            self.file.flush()
            for name, value in metrics.items():
                self.tensorboard.add_scalar(name, value, step)
        return metrics

    def warn(self, when, text):
        """Prints the text the first time that `when` is true."""
        if when and text not in self.warned:
            self.warned.add(text)
            tqdm.write(f"warning: {text}")

    def video(self, step, name, frames, fps=12):
        """frames: uint8 (T, height, width, 3), to NAME.gif in the run folder and, as a moving picture, to TensorBoard"""
        from tensorboard.compat.proto.summary_pb2 import Summary

        gif = imageio.v3.imwrite("<bytes>", frames, extension=".gif", duration=1000 / fps, loop=0)
        write_atomically(self.dir / f"{name}.gif", lambda file: file.write(gif))
        image = Summary.Image(height=frames.shape[1], width=frames.shape[2], colorspace=3, encoded_image_string=gif)
        self.tensorboard.file_writer.add_summary(Summary(value=[Summary.Value(tag=name, image=image)]), step)

    def close(self):
        """Draws metrics.csv as curves.png, a panel a metric, and closes the files."""
        from matplotlib.figure import Figure

        self.file.close()
        self.tensorboard.close()
        rows = np.array([line.split(",") for line in (self.dir / "metrics.csv").read_text().splitlines()[1:]]).reshape(-1, 3)  # as texts
        names = [name for name in dict.fromkeys(rows[:, 1]) if (rows[:, 1] == name).sum() > 1]
        if names:
            figure = Figure(figsize=(14, 2.2 * -(-len(names) // 4)), layout="constrained")
            for i, name in enumerate(names):
                axes, own = figure.add_subplot(-(-len(names) // 4), 4, i + 1), rows[rows[:, 1] == name]
                axes.plot(own[:, 0].astype(int), own[:, 2].astype(float), color="#0072B2", linewidth=1)
                axes.set_title(name, fontsize=9)
            write_atomically(self.dir / "curves.png", lambda file: figure.savefig(file, dpi=70))
