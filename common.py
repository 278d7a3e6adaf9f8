"""What the stages of ReDRAW share: distributions, networks, buffers, environments, the run folder.

Notation, here and in every stage (shape comments use the same letters):

    B batch of sequences, in imagination of trajectories     T time in a replayed sequence
    H imagination horizon   M candidates of lookahead   N rows of a dataset
    S categorical variables in the latent     K classes of each       Z = S*K, flat latent size
    A action size   V vector-observation size   E embedding size   C image channels, L its side
    x_t observation   a_t action taken AT x_t
    z_t sampled latent (B, S, K), one-hot, or probabilities where a docstring says so
    u_t prior logits   sigma_t = softmax(u_t), the prior's "belief"   e_t residual logits

The algorithms are not here but in the stages.
"""

import ctypes
import json
import os
import random
import re
import signal
import sys
import warnings
import zipfile
import zlib
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import connection, parent_process
from pathlib import Path

import gymnasium as gym
import imageio.v3
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

# PyTorch's CUDA build crashes the process if this comes after the LLVM of Mesa's renderer.
with suppress(ImportError):
    import triton  # noqa: F401


class UserError(SystemExit):
    """A mistake that the user can mend: one line on stderr, exit status 1, no traceback."""

    def __init__(self, message):
        super().__init__("error: " + " ".join(str(message).splitlines()))


@contextmanager
def explained(text, kinds=Exception):
    """Turns an exception of these kinds into a UserError: `text`, then the exception's words."""
    try:
        yield
    except kinds as e:
        raise UserError(f"{text} ({type(e).__name__}: {e})") from e


def check_range(args, low, high, *names):
    """Raises UserError for a flag that is not from low to high; None means "not given"."""
    for name in names:
        value = getattr(args, name)
        if value is not None and not low <= value <= high:
            flag = name.replace("_", "-")
            raise UserError(f"--{flag} must be from {low} to {high}, it is {value}")


# ---- Distributions -------------------------------------------------------------------------------


def softmax(logits):
    """logits.softmax(-1), (..., S, K); on CPUs 15 times faster for so short a last dimension."""
    return logits.transpose(-1, -2).softmax(-2).transpose(-1, -2)


def log_softmax(logits):
    """logits.log_softmax(-1), (..., S, K)"""
    return logits.transpose(-1, -2).log_softmax(-2).transpose(-1, -2)


def mix(probs):
    """0.99 probs + 0.01 / K, (..., K): no class is ever impossible, so no KL is infinite."""
    return 0.99 * probs + 0.01 / probs.shape[-1]


def unimix(logits):
    """log(0.99 softmax(logits) + 0.01 / K), log-probabilities, (..., S, K)"""
    return torch.log(mix(softmax(logits)))


def sample_onehot(probs):
    """Samples each categorical, (..., S, K) -> one-hot; the gradient is that of `probs`."""
    # The inverse CDF: on CPUs tens of times faster than torch.multinomial.
    cdf = probs.detach().cumsum(-1)
    index = (torch.rand_like(cdf[..., :1]) > cdf[..., :-1]).sum(-1, keepdim=True)
    onehot = torch.zeros_like(cdf).scatter_(-1, index, 1.0)
    return onehot + (probs - probs.detach()) if probs.requires_grad else onehot


def kl_categorical(log_p, log_q):
    """KL(p || q) of independent categoricals, (..., S, K) log-probabilities, summed to (...)"""
    return (log_p.exp() * (log_p - log_q)).sum((-2, -1))


def symlog(x):
    """sign(x) log(1 + |x|): squashes large values, near-identity around zero (DreamerV3)."""
    return torch.sign(x) * torch.log1p(torch.abs(x))


def symexp(x):
    """The inverse of symlog."""
    return torch.sign(x) * torch.expm1(torch.abs(x))


# A two-hot distribution lies on 255 bins, evenly spaced over [-20, 20] in symlog space.
BINS = 255


def twohot_mean(logits):
    """Logits (..., BINS) -> mean over symlog values, back in linear space (...)"""
    bins = torch.linspace(-20.0, 20.0, BINS, device=logits.device)
    return symexp((logits.softmax(-1) * bins).sum(-1))


def twohot_log_prob(logits, x):
    """log p of x (...) under logits (..., BINS): x's mass lies on the two bins around symlog(x)."""
    position = (symlog(x).clamp(-20.0, 20.0) + 20.0) / 40.0 * (BINS - 1)
    below = position.floor().long().clamp(0, BINS - 2)
    weight_above = (position - below)[..., None]
    log_p = logits.log_softmax(-1)
    log_p_below = log_p.gather(-1, below[..., None])
    log_p_above = log_p.gather(-1, below[..., None] + 1)
    return ((1 - weight_above) * log_p_below + weight_above * log_p_above).squeeze(-1)


# ---- Networks ------------------------------------------------------------------------------------


@dataclass
class Sizes:
    """The sizes of a world model and its policy, kept in each checkpoint. Defaults: the paper's."""

    image_size: int = 64  # L, a power of two
    vector_size: int = 1  # V, 0 if there is no vector
    action_size: int = 1  # A
    channels: int = 3  # C: 1 grey, 3 RGB, more: stacked frames
    S: int = 256
    K: int = 4
    cnn_depth: int = 32  # channels of the first convolution; each further one doubles them
    vector_units: int = 1024
    vector_layers: int = 5
    units: int = 512  # of posterior, dynamics and heads
    actor_units: int = 512  # of actor and critic

    def __post_init__(self):
        for name, value in vars(self).items():
            least = {"vector_size": 0, "image_size": 16}.get(name, 1)
            bad_side = name == "image_size" and value not in (2**i for i in range(17))
            # A stranger's checkpoint may say anything.
            if type(value) is not int or not least <= value <= 65536 or bad_side:
                raise ValueError(f"{name} can't be {value!r}")


class DRAW(nn.Module):
    """The world model, with a discrete latent state and no recurrence in it.

    posterior   q(z_t | x_t) = Categorical^S(unimix(MLP(embed_t)))
    dynamics    u_t = f(z_{t-1}, sigma_{t-1}, a_{t-1}),   sigma_t = softmax(u_t)
    prior       p(z_t | ...) = Categorical^S(unimix(u_t))
    heads       image, vector, reward, continue, each from z_t alone
    """

    def __init__(self, sizes):
        super().__init__()
        self.sizes = sizes
        Z = sizes.S * sizes.K
        units = sizes.units
        self.encoder = Encoder(sizes)
        self.posterior_net = mlp(self.encoder.embed_size, units, 1, Z)
        self.dynamics_net = mlp(2 * Z + sizes.action_size, units, 3, Z)
        self.initial_logits = nn.Parameter(torch.zeros(sizes.S, sizes.K))
        self.decoder = Decoder(sizes)
        self.vector_head = None
        if sizes.vector_size:
            self.vector_head = mlp(Z, sizes.vector_units, sizes.vector_layers, sizes.vector_size)
        self.reward_head = mlp(Z, units, 2, BINS, out_scale=0.0)
        self.continue_head = mlp(Z, units, 2, 1)

    def posterior(self, embed):
        """embed (..., E) -> log q(z_t | x_t), (..., S, K), unimix included"""
        return unimix(self.posterior_net(embed).unflatten(-1, (self.sizes.S, self.sizes.K)))

    def dynamics(self, z, sigma, action, change=()):
        """f: z, sigma (..., S, K) and action (..., A) of step t-1 -> logits u_t (..., S, K).
        change: see MLP."""
        action = action.clamp(-1.0, 1.0)  # as an environment clips it
        inputs = torch.cat([z.flatten(-2), sigma.flatten(-2), action], -1)
        return self.dynamics_net(inputs, change).unflatten(-1, z.shape[-2:])

    def initial(self):
        """z and sigma (S, K) that precede a first step: sigma is learned, z is its mode, one-hot
        and without gradient."""
        sigma = self.initial_logits.softmax(-1)
        return F.one_hot(sigma.argmax(-1), self.sizes.K).to(sigma), sigma

    def previous(self, z, action, is_first):
        """z_{t-1} (B, T, S, K) and a_{t-1} (B, T, A) of each t; and first (B, T), which is is_first
        but True at t = 0. Where it is True the previous state is `initial`, the action 0."""
        z0, _ = self.initial()
        first = torch.cat([torch.ones_like(is_first[:, :1]), is_first[:, 1:]], 1)
        z_prev = torch.where(first[..., None, None], z0, z.roll(1, 1))
        a_prev = torch.where(first[..., None], 0.0, action.roll(1, 1))
        return z_prev, a_prev, first

    def observe(self, z, action, is_first, dynamics=None):
        """The recurrence of the belief along an observed sequence -> prior logits u (B, T, S, K).

        Args: z (B, T, S, K), samples of the posterior; action (B, T, A), a_t taken AT x_t; is_first
            bool (B, T); dynamics: (z_{t-1}, sigma_{t-1}, a_{t-1}) -> u_t, a Rectified or, without
            it, f.
        """
        dynamics = dynamics or self.dynamics
        z_prev, a_prev, first = self.previous(z, action, is_first)
        _, sigma0 = self.initial()
        sigma = sigma0
        us = []
        for t in range(z.shape[1]):
            sigma = torch.where(first[:, t, None, None], sigma0, sigma)
            u = dynamics(z_prev[:, t], sigma, a_prev[:, t])
            sigma = softmax(u)
            us.append(u)
        return torch.stack(us, 1)

    def open_loop(self, dynamics, z, action):
        """A rollout of a Rectified from z_0 (n, S, K), a sample of the posterior, with the actions
        that were really taken, a_0 .. a_{H-1} (n, H, A) -> z_0 .. z_H (n, H+1, S, K)."""
        z_before, sigma_before = (x.expand(len(z), -1, -1) for x in self.initial())
        nothing = torch.zeros(len(z), action.shape[-1], device=z.device)
        sigma = softmax(dynamics(z_before, sigma_before, nothing))  # sigma_0, as in `observe`
        zs = [z]
        for a in action.unbind(1):
            sigma = softmax(dynamics(zs[-1], sigma, a))
            zs.append(sample_onehot(dynamics.prior(sigma)))
        return torch.stack(zs, 1)

    def reconstruction_errors(self, z, image, vector):
        """Squared errors of image, summed over pixels and channels, and of symlog(vector), summed
        over V, as predicted from z (..., S, K) alone; (...) each."""
        flat = z.flatten(-2)
        image_error = ((self.decoder(flat) - image.float() / 255.0) ** 2).sum((-3, -2, -1))
        if self.vector_head is None:
            return image_error, torch.zeros_like(image_error)
        return image_error, ((self.vector_head(flat) - symlog(vector)) ** 2).sum(-1)

    def reward(self, z):
        """Predicted reward of arriving in z (..., S, K) -> (...)"""
        return twohot_mean(self.reward_head(z.flatten(-2)))

    def cont(self, z):
        """Predicted probability that the episode goes on after arriving in z (..., S, K)"""
        return self.continue_head(z.flatten(-2)).squeeze(-1).sigmoid()


class Rectified(nn.Module):
    """The latent dynamics of the target, one function (z, sigma, a) -> u (ReDRAW):

    e_t = delta(z_{t-1}, a_{t-1}),   u_t = f(z_{t-1}, sigma_{t-1}, a_{t-1}) + e_t

    Args: draw, the frozen world model; method: "residual", "replace" (u_t = e_t), "none" and
        "finetune" (u_t = f), or "lowrank" (u_t = f, each weight W of f is W + B A); hidden and
        layers of delta; inputs, what delta sees: "za", "za+sigma" (sigma_{t-1} too) or "za+base"
        (softmax(f_t) too); members: deltas that are averaged; rank of B A.
    """

    def __init__(self, draw, method="none", hidden=256, layers=1, inputs="za", members=1, rank=16):
        super().__init__()
        numbers = {"hidden": hidden, "layers": layers, "members": members, "rank": rank}
        self.options = {"method": method, "inputs": inputs, **numbers}
        known = method in ("residual", "replace", "none", "finetune", "lowrank")
        known = known and inputs in ("za", "za+sigma", "za+base")
        if not known or any(type(n) is not int or not 0 < n <= 65536 for n in numbers.values()):
            raise ValueError(f"no such residual: {self.options}")
        self.inputs = inputs
        # A bound method: f's weights do not count as this module's.
        self.f = draw.dynamics
        self.uses_f = method != "replace"
        self.uses_delta = method in ("residual", "replace")
        Z = draw.sizes.S * draw.sizes.K
        n_in = Z + draw.sizes.action_size + (0 if inputs == "za" else Z)
        # A residual starts at zero, so training starts from the source's dynamics.
        scale = 0.0 if method == "residual" else 1.0
        n = members if self.uses_delta else 0
        self.delta = nn.ModuleList(mlp(n_in, hidden, layers, Z, scale) for _ in range(n))
        linear = [layer for layer in draw.dynamics_net if isinstance(layer, nn.Linear)]
        self.change = nn.ModuleList(low_rank(x, rank) for x in linear if method == "lowrank")

    def base(self, z, sigma, action):
        """f(z_{t-1}, sigma_{t-1}, a_{t-1}), (..., S, K); zeros where the method leaves f out"""
        return self.f(z, sigma, action, self.change) if self.uses_f else torch.zeros_like(z)

    def residuals(self, z, action, sigma=None, base=None):
        """e_t of each member, (members, ..., S, K), from z and action of step t-1; if `inputs` asks
        for it, sigma of t-1 or base, f's own logits of t, (..., S, K)."""
        inputs = [z.flatten(-2), action.clamp(-1.0, 1.0)]
        if self.inputs == "za+sigma":
            inputs.append(sigma.flatten(-2))
        if self.inputs == "za+base":
            inputs.append(softmax(base).flatten(-2))
        x = torch.cat(inputs, -1)
        return torch.stack([delta(x).unflatten(-1, z.shape[-2:]) for delta in self.delta])

    def residual(self, *inputs):
        """e_t, the mean over members; (..., S, K)"""
        return self.residuals(*inputs).mean(0)

    def forward(self, z, sigma, action):
        """u_t = f(z_{t-1}, sigma_{t-1}, a_{t-1}) + e_t, (..., S, K)"""
        base = self.base(z, sigma, action)
        return base + self.residual(z, action, sigma, base) if self.uses_delta else base

    def log_prior(self, u):
        """log p(z_t | ...), (..., S, K): no unimix on a rectified distribution, DRAW's keeps it."""
        return log_softmax(u) if self.uses_delta else unimix(u)

    def prior(self, sigma):
        """p(z_t | ...), the same as probabilities, from sigma_t = softmax(u_t), (..., S, K)"""
        return sigma if self.uses_delta else mix(sigma)


class Actor(nn.Module):
    """pi(a | z) = Normal(tanh(mu), 0.9 sigmoid(s + 2) + 0.1), not squashed."""

    def __init__(self, sizes):
        super().__init__()
        self.net = mlp(sizes.S * sizes.K, sizes.actor_units, 2, 2 * sizes.action_size)

    def forward(self, z):
        """z (..., S, K) -> torch.distributions.Normal over (..., A)"""
        mu, s = self.net(z.flatten(-2)).chunk(2, -1)
        std = 0.9 * torch.sigmoid(s + 2.0) + 0.1
        return torch.distributions.Normal(torch.tanh(mu), std, validate_args=False)


class Critic(nn.Module):
    """The distribution of the return from z, two-hot; starts at zero."""

    def __init__(self, sizes):
        super().__init__()
        self.net = mlp(sizes.S * sizes.K, sizes.actor_units, 2, BINS, out_scale=0.0)

    def forward(self, z):
        """z (..., S, K) -> logits (..., BINS)"""
        return self.net(z.flatten(-2))


@torch.no_grad()
def follow(average, module, rate):
    """Moves the trained weights of `average` towards those of module by the share `rate`."""
    for slow, fast in zip(average.parameters(), module.parameters(), strict=True):
        if fast.requires_grad:
            slow.lerp_(fast, rate)


class ActorCritic(nn.Module):
    """What is trained in imagination: actor, critic, the critic's slow copy, the returns' range."""

    def __init__(self, sizes):
        super().__init__()
        self.actor = Actor(sizes)
        self.critic = Critic(sizes)
        self.slow_critic = Critic(sizes)
        self.slow_critic.load_state_dict(self.critic.state_dict())
        self.register_buffer("range", torch.zeros(()))

    @torch.no_grad()
    def update_slow_critic(self, rate=0.02):
        """slow = (1 - rate) slow + rate critic, after each update"""
        for slow, fast in zip(self.slow_critic.parameters(), self.critic.parameters(), strict=True):
            slow.lerp_(fast, rate)


class Policy(nn.Module):
    """x_t -> a_t, all that deployment needs: encoder and posterior, shared with `draw`, and actor.
    It samples z and a, or `by_mean` takes the mean of both. It may add normal noise, of deviation
    `noise` where the predicted reward is 0 or less, falling to 0 at 0.5; then it needs the reward
    head too. `act` is for tensors; calling the policy takes and gives NumPy arrays."""

    def __init__(self, sizes, draw=None, actor=None, by_mean=False, noise=0.0):
        super().__init__()
        self.sizes = sizes
        self.by_mean = by_mean
        self.noise = noise
        self.actor = actor or Actor(sizes)
        draw = draw or DRAW(sizes)
        self.encoder = draw.encoder
        self.posterior_net = draw.posterior_net
        if noise:
            self.reward_head = draw.reward_head

    posterior = DRAW.posterior  # needs posterior_net and sizes alone
    reward = DRAW.reward  # needs reward_head alone

    def act(self, image, vector):
        """image uint8 (n, L, L, C), vector (n, V), tensors -> actions (n, A) in [-1, 1]"""
        q = self.posterior(self.encoder(image, vector)).exp()
        action = self.actor(q).mean if self.by_mean else self.actor(sample_onehot(q)).rsample()
        if self.noise:
            unpaid = (1.0 - 2.0 * self.reward(q)).clamp(0.0, 1.0)  # (n,)
            action = action + self.noise * unpaid[:, None] * torch.randn_like(action)
        return action.clamp(-1, 1)

    @torch.no_grad()
    def __call__(self, image, vector):
        """`act` for NumPy arrays"""
        device = next(self.parameters()).device
        image = torch.as_tensor(image, device=device)
        vector = torch.as_tensor(vector, device=device)
        return self.act(image, vector).cpu().numpy()


class Encoder(nn.Module):
    """embed = [CNN(image), MLP(symlog(vector))], E = 16 * last channels + vector units."""

    def __init__(self, sizes):
        super().__init__()
        layers = []
        channels = sizes.channels
        depth = sizes.cnn_depth
        # Each convolution halves the image, until it is 4 x 4.
        for _ in range(int(np.log2(sizes.image_size)) - 2):
            layers.append(init_weights(nn.Conv2d(channels, depth, 4, 2, 1, bias=False)))
            layers += [ChannelNorm(depth, eps=1e-3), nn.SiLU()]
            channels = depth
            depth *= 2
        self.cnn = nn.Sequential(*layers)
        self.embed_size = 16 * channels  # E
        self.vector = None
        if sizes.vector_size:
            self.vector = mlp(sizes.vector_size, sizes.vector_units, sizes.vector_layers)
            self.embed_size += sizes.vector_units

    def forward(self, image, vector):
        """image uint8 (..., L, L, C), vector (..., V) -> embed (..., E)"""
        x = image.flatten(0, -4).permute(0, 3, 1, 2).float() / 255.0 - 0.5  # (B, C, L, L)
        embed = self.cnn(x).float().flatten(1).unflatten(0, image.shape[:-3])
        if self.vector is None:
            return embed
        return torch.cat([embed, self.vector(symlog(vector))], -1)


class Decoder(nn.Module):
    """image = CNN^-1(z) + 0.5, from 4x4 upwards; no sigmoid."""

    def __init__(self, sizes):
        super().__init__()
        n = int(np.log2(sizes.image_size)) - 2
        channels = sizes.cnn_depth * 2 ** (n - 1)
        linear = init_weights(nn.Linear(sizes.S * sizes.K, 16 * channels))
        self.start = nn.Sequential(linear, nn.Unflatten(-1, (4, 4, channels)))
        layers = []
        for _ in range(n - 1):
            up = nn.ConvTranspose2d(channels, channels // 2, 4, 2, 1, bias=False)
            channels //= 2
            layers += [init_weights(up), ChannelNorm(channels, eps=1e-3), nn.SiLU()]
        layers.append(init_weights(nn.ConvTranspose2d(channels, sizes.channels, 4, 2, 1)))
        self.cnn = nn.Sequential(*layers)

    def forward(self, z):
        """z (..., Z) -> image (..., L, L, C), about [0, 1]"""
        x = self.start(z.flatten(0, -2)).permute(0, 3, 1, 2)
        return self.cnn(x).float().permute(0, 2, 3, 1).unflatten(0, z.shape[:-1]) + 0.5


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of (B, C, H, W), at each pixel by itself."""

    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class MLP(nn.Sequential):
    """Layers whose output is float32, also under --bf16: losses want all digits."""

    def forward(self, x, change=()):
        """change: for each Linear a module whose output is added to the Linear's; or none"""
        changes = iter(change)
        for layer in self:
            change_of = next(changes, None) if isinstance(layer, nn.Linear) else None
            x = layer(x) if change_of is None else layer(x) + change_of(x)
        return x.float()


def mlp(n_in, units, layers, n_out=None, out_scale=1.0):
    """Layers of Linear (no bias), LayerNorm, SiLU; then, if n_out is given, a Linear to n_out."""
    modules = []
    for _ in range(layers):
        modules.append(init_weights(nn.Linear(n_in, units, bias=False)))
        modules += [nn.LayerNorm(units, eps=1e-3), nn.SiLU()]
        n_in = units
    if n_out:
        modules.append(init_weights(nn.Linear(n_in, n_out), out_scale))
    return MLP(*modules)


def low_rank(layer, rank):
    """x -> B A x, which adds B A to the weight of a Linear; B is zero at first (Hu et al. 2021)"""
    A = init_weights(nn.Linear(layer.in_features, rank, bias=False))
    B = init_weights(nn.Linear(rank, layer.out_features, bias=False), scale=0.0)
    return nn.Sequential(A, B)


def init_weights(layer, scale=1.0):
    """Truncated normal of variance scale / ((fan_in + fan_out) / 2), cut at two deviations."""
    weight = layer.weight
    fan_average = (weight.shape[0] + weight.shape[1]) * weight[0, 0].numel() / 2
    # The cut makes the deviation smaller by the factor 0.8796.
    std = (scale / fan_average) ** 0.5 / 0.87962566
    nn.init.zeros_(weight)
    if scale:
        nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


# ---- Buffers: datasets, the replay, checkpoints --------------------------------------------------


def write_atomically(path, write):
    """Calls write(file) on a temporary file, then renames it. Fails with UserError and leaves the
    old file as it was."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.part")
    # torch.save turns a full disk into a RuntimeError.
    with explained(f"can't write {path}", (OSError, RuntimeError)):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "wb") as file:
                write(file)
                file.flush()
                # On the disk before the name: a power cut leaves the old file or the new one.
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def save_dataset(path, rows):
    """Writes rows, a dict of equal-length arrays (see load_dataset), as one .npz file."""
    write_atomically(path, lambda file: np.savez_compressed(file, **rows))


# The ReDRAW authors' names for `vector`; in a file that has `vector` too, they mean something else.
VECTOR_NAMES = ("vector", "image_complement", "yaw_and_forward_vel")


def empty_rows(sizes, *rows):
    """The arrays of a dataset, zeros of shape (*rows, ...); they take no memory until written."""
    L = sizes.image_size
    flags = {key: np.zeros(rows, bool) for key in ("is_first", "is_last", "is_terminal")}
    return {
        "image": np.zeros((*rows, L, L, sizes.channels), np.uint8),
        "vector": np.zeros((*rows, sizes.vector_size), np.float32),
        "action": np.zeros((*rows, sizes.action_size), np.float32),
        **flags,
    }


def dataset_files(path):
    """The files of a dataset, oldest first; hidden ones are no part of it."""
    return sorted(Path(path).glob("[!.]*.npz")) if os.path.isdir(path) else [Path(path)]


def read_npz(file, keys):
    """Those of `keys` that a .npz file holds, as arrays. Of a DreamerV3 chunk, named
    TIME-UUID-SUCCESSOR-ROWS.npz, only the first ROWS rows hold data."""
    chunk = re.fullmatch(r"\d{8}T\w+-\w+-\w+-(\d+)", Path(file).stem)
    rows = int(chunk[1]) if chunk else None
    arrays = {}
    problem = f"{file} can't be read as a .npz dataset; is it complete?"
    with explained(problem), np.load(file, allow_pickle=False) as npz:
        for key in keys:
            names = VECTOR_NAMES if key == "vector" else (key,)
            found = [name for name in names if name in npz.files]
            if found:
                arrays[key] = np.asarray(npz[found[0]])[:rows]
    return arrays


def read_rows(file, into):
    """Copies the rows of a file to the arrays of `into`. UserError: some lack or don't fit, NaN."""
    rows = read_npz(file, into)
    has = ", ".join(rows) or "nothing of use"
    if into["vector"].shape[1] == 0:  # the model reads none
        rows["vector"] = into["vector"]
    missing = into.keys() - rows.keys() - {"is_last", "is_terminal"}
    if missing:
        raise UserError(f"{file} lacks {', '.join(sorted(missing))}; it has {has}")
    for key, value in rows.items():
        target = into[key]
        number = value.dtype == np.uint8 if key == "image" else value.dtype.kind in "biuf"
        if not number or value.shape != target.shape:
            it_is = f"it is {value.dtype} {value.shape}"
            raise UserError(f"{file}: {key} must be {target.dtype} {target.shape}; {it_is}")
        with np.errstate(over="ignore"):  # what is too large for float32 becomes infinite
            target[:] = value
        finite = np.isfinite(value) & np.isfinite(target)
        if not finite.all():
            row = np.argwhere(~finite)[0][0]
            raise UserError(f"{file}: {key} is NaN or infinite, first in row {row}")
    into["is_first"][:1] = True


def load_dataset(path, sizes, newest=None, actions_lead=False):
    """Reads a dataset: a .npz file, or a folder of them, each the start of a new sequence. Row t
    holds x_t and the action taken AT x_t (DreamerV3's convention). Other arrays are not read.

    Args: sizes, the Sizes that the arrays must have; newest: at most so many rows, from the end,
        without reading files before them; actions_lead: row t holds the action that LED to x_t.
    Returns: dict of arrays: image uint8 (N, L, L, C), vector float32 (N, V), action float32 (N, A),
        is_first, is_last, is_terminal bool (N,).
    Raises UserError: no such file, not a dataset, other sizes, NaN, another convention of actions.
    """
    files = dataset_files(path)
    if not files or not all(os.path.isfile(file) for file in files):
        raise UserError(f"no dataset at {path}: expected a .npz file or a folder of them")
    counts = {}  # rows of each file, the newest first
    for file in reversed(files):
        if not newest or sum(counts.values()) < newest:
            counts[file] = read_npz(file, ["is_first"]).get("is_first", np.zeros(0)).size
    end = sum(counts.values())
    dataset = empty_rows(sizes, end)  # one for all files: the images are in memory only once
    for file, count in counts.items():
        read_rows(file, {key: array[end - count : end] for key, array in dataset.items()})
        end -= count
    if newest:
        dataset = {key: array[-newest:] for key, array in dataset.items()}
    first = dataset["is_first"]
    if len(first) < 2:
        raise UserError(f"{path}: a dataset needs 2 rows at least")
    # A reset follows the end of an episode, whether the recorder marked it or not.
    first[0] = True
    first[1:] |= dataset["is_last"][:-1] | dataset["is_terminal"][:-1]
    if actions_lead:
        action = np.roll(dataset["action"], -1, axis=0)
        action[np.roll(first, -1)] = 0.0  # nothing follows a last row
        dataset["action"] = action
    check_actions(path, dataset["action"], first)
    return dataset


def check_actions(path, action, first):
    """UserError if actions seem to be those that LED to their row; a warning if many are large."""
    last = np.roll(first, -1)
    if first.sum() >= 3 and not action[first][1:].any() and action[last].any():
        why = "all first rows' actions are 0, so rows seem to hold the action that LED to them"
        raise UserError(f"{path}: {why}, not the one taken AT them; --actions-lead reads such data")
    size = np.abs(action).max(-1)
    share = np.mean(size > 1.0 + 1e-6)
    if share > 0.01:
        large = f"{share:.0%} of the actions lie outside [-1, 1], up to {size.max():.3g}"
        print(f"warning: {path}: {large}, and are clipped; are they in other units?")


class Replay:
    """A ring of rows per environment, in the convention of load_dataset, with rewards."""

    def __init__(self, rows, n_envs, sizes):
        self.length = max(rows // n_envs, 2)
        self.data = empty_rows(sizes, n_envs, self.length)
        self.data["reward"] = np.zeros((n_envs, self.length), np.float32)
        self.added = 0  # rows ever written, per environment
        self.saved = 0  # of these, rows that are in files

    def __len__(self):
        return min(self.added, self.length)

    def add(self, **row):
        """One row of every environment; each value (n_envs, ...)."""
        for key, value in row.items():
            self.data[key][:, self.added % self.length] = value
        self.added += 1

    def sample(self, B, T, device, rewarded=0.0):
        """Random sequences, dict of tensors (B, T, ...). They may cross episode borders. A share
        `rewarded` of them holds a row with another reward than the usual one, if there is any;
        first rows, whose reward says nothing, do not count."""
        oldest = self.added - len(self)
        env = np.random.randint(0, len(self.data["reward"]), B)
        start = np.random.randint(0, len(self) - T + 1, B)
        n = round(rewarded * B)
        if n:
            reward = self.data["reward"][:, : len(self)]
            usual = np.median(reward[:, :: max(1, len(self) // 1000)])
            unusual = (reward != usual) & ~self.data["is_first"][:, : len(self)]
            paid_env, paid_row = np.nonzero(unusual)
            if len(paid_row):
                pick = np.random.randint(0, len(paid_row), n)
                age = (paid_row[pick] - oldest) % self.length  # rows since the oldest one
                env[:n] = paid_env[pick]
                start[:n] = np.clip(age - np.random.randint(0, T, n), 0, len(self) - T)
        rows = (oldest + start[:, None] + np.arange(T)) % self.length  # (B, T)
        flat = torch.from_numpy((env[:, None] * self.length + rows).flatten())
        batch = {}
        for key, data in self.data.items():
            # index_select is a memory copy a row, many times faster than NumPy's indexing.
            value = torch.from_numpy(data).flatten(0, 1).index_select(0, flat)
            if torch.device(device).type == "cuda":
                value = value.pin_memory()  # so that the host goes on
            batch[key] = value.to(device, non_blocking=True).unflatten(0, (B, T))
        return batch

    def save(self, folder):
        """Writes the rows since the last save, a file per environment named by its first row.
        Deletes files whose rows had all left the ring at the LAST save already: until Run.save is
        done, a killed run goes on from that one."""
        needed = self.saved - self.length  # the oldest row of the last save
        begin = max(self.saved, self.added - len(self))
        rows = np.arange(begin, self.added) % self.length
        for env in range(len(self.data["reward"]) if len(rows) else 0):
            chunk = {key: data[env, rows] for key, data in self.data.items()}
            save_dataset(Path(folder) / f"env{env:03d}-{begin:010d}.npz", chunk)
        self.saved = self.added
        files = sorted(Path(folder).glob("env*.npz"))
        for file, newer in zip(files[:-1], files[1:], strict=True):
            same_env = file.stem[:6] == newer.stem[:6]
            if same_env and int(newer.stem[7:]) <= needed:
                file.unlink()

    def load(self, folder, added):
        """Reads back what `save` wrote by the time that `added` rows had been added. Less, if this
        process of several was killed before its save. Deletes what was written after that time."""
        ends = [0] * len(self.data["reward"])
        for file in sorted(Path(folder).glob("env*.npz")):
            env = int(file.stem[3:6])
            begin = int(file.stem[7:])
            if begin >= added:
                file.unlink()
                continue
            chunk = read_npz(file, self.data)
            ends[env] = begin + len(chunk["reward"])
            rows = np.arange(begin, ends[env]) % self.length
            for key, data in self.data.items():
                data[env, rows] = chunk[key]
        self.added = self.saved = min(ends)


def save_checkpoint(path, **contents):
    """Writes weights (state dicts) and plain data (numbers, strings, lists, dicts) to one file."""
    write_atomically(path, lambda file: torch.save(contents, file))


def load_checkpoint(path, stages, device="cpu"):
    """Reads a checkpoint of one of `stages`; weights_only, so a stranger's file can't run code.
    UserError: no such file, not a checkpoint of this project, or of another stage."""
    makers = " or ".join(f"{stage}.py" for stage in stages)
    problem = f"{path} is not a checkpoint of this project; make one with {makers}"
    with explained(problem), warnings.catch_warnings(action="ignore"):
        checkpoint = torch.load(path, map_location=device, weights_only=True)
        checkpoint = {"args": {}, **checkpoint, "file": str(path)}
        stage = checkpoint["stage"]
    if stage not in stages:
        raise UserError(f"{path} was written by {stage}.py; this needs one from {makers}")
    return checkpoint


def load_module(checkpoint, key, make, device="cpu"):
    """The network make() with the weights that a checkpoint holds as `key`, frozen.
    UserError: they don't fit or are not finite."""
    file = checkpoint["file"]
    with explained(f"{file} is damaged: '{key}' is missing, does not fit or is not finite"):
        # On "meta" a network takes no memory, whatever sizes the file asks for.
        with torch.device("meta"):
            wanted = make().state_dict()
        weights = checkpoint[key]
        for name in {**wanted, **weights}:
            fits = weights[name].shape == wanted[name].shape and not weights[name].is_complex()
            if not fits or not weights[name].isfinite().all():
                raise ValueError(name)
    module = make().to(device)
    module.load_state_dict(weights)
    return module.requires_grad_(False).eval()


def load_draw(checkpoint, device="cpu"):
    """The world model of a checkpoint, frozen."""
    return load_module(checkpoint, "draw", lambda: DRAW(Sizes(**checkpoint["sizes"])), device)


def load_rectified(checkpoint, draw, device="cpu"):
    """The dynamics of a checkpoint of stage 1 (f alone) or 2 (rectified), frozen."""
    if checkpoint["stage"] == "draw_pretrain":
        return Rectified(draw)
    options = checkpoint.get("rectified_options", {})
    return load_module(checkpoint, "rectified", lambda: Rectified(draw, **options), device)


def load_policy(path, device="cpu"):
    """The policy of a checkpoint of train_policy.py, ready to act."""
    file = load_checkpoint(path, ("train_policy",), device)
    with explained(f"{file['file']} is damaged: how its policy acts makes no sense"):
        by_mean, noise = (float(file.get(name, 0)) for name in ("by_mean", "noise"))
        if by_mean not in (0.0, 1.0) or not 0.0 <= noise <= 10.0:
            raise ValueError(f"by_mean {by_mean}, noise {noise}")
        acts = {"by_mean": bool(by_mean), "noise": noise}
    policy = load_module(file, "policy", lambda: Policy(Sizes(**file["sizes"]), **acts), device)
    return policy.to(memory_format=torch.channels_last)  # the faster one for a single image


# ---- Environments --------------------------------------------------------------------------------


class DMCEnv(gym.Env):
    """A task of dm_control.suite through its stock camera, with optionally changed dynamics.

    Observation: image, uint8 (L, L, 3), and vector, float32 (V,), the velocities (rad/s, m/s);
    with `stack` image alone: the last `stack` frames in grey, uint8 (L, L, stack).
    Action: (A,) in [-1, 1], held for `action_repeat` frames of physics. The reward is that of the
    LAST frame, so 1000 frames return at most 500. Never terminal.

    Args: reverse_actions: apply -a instead of a; wrench: (body, constant force in N and torque in
        N·m, 6 numbers); image_size: L, below 64 the 64-pixel image is averaged down; look: "fast"
        leaves out multisampling, shadows and reflections, nine tenths of a "stock" frame's time;
        start_speed: half of the episodes start with velocities drawn from +-this, not at rest.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 25}

    def __init__(
        self, domain, task, reverse_actions=False, wrench=None, image_size=64, action_repeat=2,
        look="fast", stack=0, start_speed=0.0, render_mode="rgb_array",
    ):  # fmt: skip
        if sys.platform.startswith("linux"):
            os.environ.setdefault("MUJOCO_GL", "egl")  # renders without a screen
        needs = "apt-get install libegl1 libegl-mesa0 libgl1 libgl1-mesa-dri"
        with explained(f"dm_control does not load; on Debian: {needs}", ImportError):
            from dm_control import suite  # slow to import, and other environments do without
            from dm_control.mujoco.engine import Camera

        # The time limit is gymnasium's alone.
        self.dmc = suite.load(domain, task, task_kwargs={"time_limit": float("inf")})
        self.physics = self.dmc.physics
        self.sign = -1.0 if reverse_actions else 1.0
        self.wrench = wrench
        self.action_repeat = action_repeat
        self.render_mode = render_mode
        self.shrink = max(1, 64 // image_size)
        self.stack = stack
        self.start_speed = start_speed
        side = image_size * self.shrink
        if look == "fast":
            self.physics.model.vis.quality.offsamples = 0
        self.camera = Camera(self.physics, height=side, width=side, camera_id=0)
        if look == "fast":
            SHADOW, REFLECTION = 0, 2  # mujoco.mjtRndFlag
            self.camera.scene.flags[[SHADOW, REFLECTION]] = 0
        image = gym.spaces.Box(0, 255, (image_size, image_size, stack or 3), np.uint8)
        vector = gym.spaces.Box(-np.inf, np.inf, self.physics.velocity().shape, np.float32)
        spaces = {"image": image} if stack else {"image": image, "vector": vector}
        self.observation_space = gym.spaces.Dict(spaces)
        self.action_space = gym.spaces.Box(-1.0, 1.0, self.dmc.action_spec().shape, np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if seed is not None:
            self.dmc.task.random.seed(seed)
        self.dmc.reset()
        if self.start_speed and self.np_random.random() < 0.5:
            velocity = self.physics.data.qvel
            velocity[:] = self.np_random.uniform(-self.start_speed, self.start_speed, len(velocity))
            self.physics.forward()
        self.frames = []
        return self.observe(), {}

    def step(self, action):
        action = self.sign * np.clip(np.asarray(action, np.float64), -1.0, 1.0)
        for _ in range(self.action_repeat):
            if self.wrench is not None:  # a reset clears it
                self.physics.named.data.xfrc_applied[self.wrench[0]] = self.wrench[1]
            timestep = self.dmc.step(action)
        return self.observe(), float(timestep.reward), False, False, {}

    def observe(self):
        image = self.render()
        if self.stack == 0:
            return {"image": image, "vector": self.physics.velocity().astype(np.float32)}
        grey = image.mean(-1).astype(np.uint8)
        self.frames = [*(self.frames or [grey] * self.stack)[1:], grey]
        return {"image": np.stack(self.frames, -1)}

    def render(self):
        image = self.camera.render()
        if self.shrink > 1:
            L = len(image) // self.shrink
            image = image.reshape(L, self.shrink, L, self.shrink, 3).mean((1, 3)) + 0.5
        return image.astype(np.uint8)

    def close(self):
        self.dmc.close()


REVERSED = {"reverse_actions": True}
WINDY = {"wrench": ("ball", (-2.0, 0.0, 0.0, 0.0, 0.0, 0.0))}
TORQUE = {"wrench": ("spinner", (0.0, 0.0, 0.0, 0.0, 4.0, 0.0))}
# The paper's four pairs: name, domain, task; the target's suffix and what differs there. Then the
# pendulum without velocities, which can be seen in three frames, and not in one.
for name, domain, task, suffix, change, options in (
    ("PendulumSwingup", "pendulum", "swingup", "Reversed", REVERSED, {}),
    ("BallInCupCatch", "ball_in_cup", "catch", "Windy", WINDY, {}),
    ("FingerTurnHard", "finger", "turn_hard", "Torque", TORQUE, {}),
    ("ReacherEasy", "reacher", "easy", "Reversed", REVERSED, {}),
    ("PendulumSwingupImages", "pendulum", "swingup", "Reversed", REVERSED, {"stack": 3}),
    ("PendulumSwingupImage", "pendulum", "swingup", "Reversed", REVERSED, {"stack": 1}),
):
    source = {"domain": domain, "task": task, **options}
    limits = {"max_episode_steps": 500, "disable_env_checker": True}
    gym.register(f"redraw/{name}-v0", DMCEnv, kwargs=source, **limits)
    gym.register(f"redraw/{name}{suffix}-v0", DMCEnv, kwargs=source | change, **limits)


NO_VECTOR = gym.spaces.Box(-1.0, 1.0, (0,), np.float32)


class Plain(gym.Wrapper):
    """An environment without infos, which nobody reads, and with an empty vector if it has none.
    UserError if a vector, a reward or an action is NaN or infinite."""

    def __init__(self, env, env_id):
        super().__init__(env)
        self.env_id = env_id
        self.steps = 0
        self.observation_space = gym.spaces.Dict({"vector": NO_VECTOR, **env.observation_space})

    def reset(self, **kwargs):
        obs, _ = self.env.reset(**kwargs)
        return self.checked(obs), {}

    def step(self, action):
        self.steps += 1
        self.checked({}, action=action)
        obs, reward, terminated, truncated, _ = self.env.step(action)
        return self.checked(obs, reward=reward), reward, terminated, truncated, {}

    def checked(self, obs, **numbers):
        obs = {"vector": np.zeros(0, np.float32), **obs}
        for name, value in {"vector": obs["vector"], **numbers}.items():
            if not np.isfinite(value).all():
                when = f"after {self.steps} steps"
                raise UserError(f"{self.env_id}: {name} is NaN or infinite {when}")
        return obs


class ParallelEnvs(gym.vector.AsyncVectorEnv):
    """Environments in processes of their own. One that raises a UserError prints it and ends."""

    def step_wait(self, timeout=None):
        try:
            return super().step_wait(timeout)
        except EOFError:
            connection.wait([process.sentinel for process in self.processes], 5)
            if any(process.exitcode == 1 for process in self.processes):
                raise SystemExit(1) from None
            raise UserError("the process of an environment was killed") from None

    def __del__(self):
        """Does not wait for a step: the processes end with the script."""


def make_env(env_id, worker=False, **kwargs):
    """gymnasium.make; a worker process finds it here, so it has this file's registrations."""
    if worker and parent_process():
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, which saves first
    return Plain(gym.make(env_id, **kwargs), env_id)


def check_env(env_id, env):
    """UserError unless the spaces suit DRAW, and one reset and one step keep to them."""
    observation = env.observation_space
    action = env.action_space
    try:
        spaces = {"vector": NO_VECTOR, **observation}
        L, width, C = spaces["image"].shape
        (V,) = spaces["vector"].shape
        (A,) = action.shape
        Sizes(image_size=L, channels=C, vector_size=V, action_size=A)  # ValueError
        types = (spaces["image"].dtype, spaces["vector"].dtype, action.dtype.kind)
        fits = len(spaces) == 2 and width == L and types == (np.uint8, np.float32, "f")
        fits = fits and action == gym.spaces.Box(-1, 1, (A,), action.dtype)
    except (TypeError, ValueError, KeyError):
        fits = False
    if not fits:
        raise UserError(
            f"{env_id}: observations must be a Dict of image, uint8 (L, L, C) with L = 16, 32, 64, "
            "..., and, if there is one, vector, float32 (V,); actions a Box(-1, 1, (A,)), which "
            f"gymnasium.wrappers.RescaleAction can make; they are {observation} and {action}"
        )
    with explained(f"{env_id}: reset must return 2 values and step 5, the second one a number"):
        first, _ = env.reset(seed=0)
        second, reward, _, _, _ = env.step(np.zeros(A, action.dtype))
        if np.shape(reward) != ():
            raise ValueError(f"reward of shape {np.shape(reward)}")
    for obs in (first, second):
        if obs not in observation:
            found = {key: f"{x.dtype} {x.shape} {x.min()}..{x.max()}" for key, x in obs.items()}
            raise UserError(f"{env_id}: {found} is not in its own space, {observation}")


def make_envs(env_id, n, image_size=None, episode_steps=None, parallel=False, **options):
    """n copies of one environment, stepped together. The step after the end of an episode resets
    that copy, ignores its action and returns the next episode's first observation with reward 0.

    Args: image_size and options (of DMCEnv) of this project's environments, others have their own;
        episode_steps, a shorter time limit than the environment's; parallel: each in a process.
    Raises UserError: unknown id, or it does not suit DRAW.
    """
    kwargs = {"disable_env_checker": True}  # check_env does it
    if env_id.split(":")[-1].startswith("redraw/"):
        kwargs["image_size"] = image_size or 64
        if "Duckietown" not in env_id:
            kwargs |= options
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # where a user's module may lie
    try:
        env = gym.make(env_id, **kwargs)
    except Exception as e:
        known = ", ".join(name for name in gym.registry if name.startswith("redraw/"))
        why = f"can't make environment '{env_id}': {type(e).__name__}: {e}"
        yours = "yours is module:id, with the module here or in PYTHONPATH"
        raise UserError(f"{why}; this project's are {known}; {yours}") from e
    check_env(env_id, env)
    env.close()
    own = env.spec.max_episode_steps
    if episode_steps and (own is None or episode_steps < own):
        print(f"episodes end after {episode_steps} steps; the environment's own limit is {own}")
        kwargs["max_episode_steps"] = episode_steps
    make = partial(make_env, env_id, worker=parallel, **kwargs)
    with explained(f"can't make {n} copies of '{env_id}'; try --n-envs 1"):
        if parallel:  # spawned, because a fork would share the GPU and the renderer
            return ParallelEnvs([make] * n, context="spawn")
        return gym.vector.SyncVectorEnv([make] * n)


def sizes_of(envs, **networks):
    """The Sizes of an environment's observations and actions, and of `networks`"""
    L, _, C = envs.single_observation_space["image"].shape
    (V,) = envs.single_observation_space["vector"].shape
    (A,) = envs.single_action_space.shape
    return Sizes(image_size=L, channels=C, vector_size=V, action_size=A, **networks)


def check_sizes(env_id, envs, sizes):
    """UserError if an environment's observations and actions are not those of a checkpoint."""
    for name in ("image_size", "channels", "vector_size", "action_size"):
        here = getattr(sizes_of(envs), name)
        there = getattr(sizes, name)
        if here != there:
            raise UserError(f"{env_id}: {name} is {here}, the checkpoint was trained with {there}")


def held_noise(previous, hold, gain=1.0):
    """Random actions, uniform over [-gain, gain], clipped to [-1, 1], each held for `hold` steps on
    average; float32 (n, A) from the last ones. Drawn anew each step they cancel out in a swing."""
    fresh = np.random.uniform(-gain, gain, previous.shape).clip(-1, 1).astype(np.float32)
    return np.where(np.random.rand(len(previous), 1) < 1.0 / hold, fresh, previous)


# ---- Runs ----------------------------------------------------------------------------------------


def seed_everything(seed):
    """Seeds Python, NumPy and PyTorch; environments are seeded in their reset."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def prepare(args):
    """Seeds with args.seed and returns the torch.device of args.device; "auto" is CUDA where there
    is one, else the CPU. From here on Ctrl-C ends the script with one line."""
    check_range(args, 0, 2**31 - 1, "seed")
    seed_everything(args.seed)
    on_interrupt(stop)
    # CPUs are many times slower on the tiny numbers that Adam leaves behind.
    torch.set_flush_denormal(True)
    if os.name == "posix" and hasattr(ctypes.CDLL(None), "mallopt"):
        # glibc would give back each large tensor and fault it in again.
        M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
        ctypes.CDLL(None).mallopt(M_TRIM_THRESHOLD, 1 << 30)
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 32 << 20)
    name = args.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"  # torchrun: each process has its own
    with explained(f"--device {name} can't be used here, try auto or cpu"):
        torch.zeros((), device=name).item()  # the device "meta" holds no numbers
    return torch.device(name)


def on_interrupt(handler):
    signal.signal(signal.SIGINT, handler)
    signal.signal(signal.SIGTERM, handler)


def stop(*_, text="interrupted"):
    """Ends the script, maybe from a signal handler, where print is not allowed."""
    os.write(2, f"\n{text}; the same command with --resume goes on from the last save\n".encode())
    raise SystemExit(130)


def checksum(path):
    """A number from the contents of a checkpoint or a dataset, wherever they lie"""
    sums = []
    for file in filter(zipfile.is_zipfile, dataset_files(path)):  # a .pt file is one, too
        sums += [(item.filename, item.CRC) for item in zipfile.ZipFile(file).infolist()]
    return zlib.crc32(repr(sums).encode())


class Run:
    """A run's folder: arguments, logs, pictures, saves; and Ctrl-C.

    At each save all generators are seeded anew from (seed, step), in the run that goes on as in the
    one that resumes there. So both go on alike, bit for bit on a CPU; but in stage 1 the one that
    resumes begins new episodes. Under torchrun process 0 alone logs and saves.

    Args: folder, its name; args, the stage's; inputs: checkpoints and datasets that the run reads;
        free: names of further flags that may differ when it resumes.
    Raises UserError: the folder holds files already or another run, or can't be written.
    """

    # Flags that may differ when a run resumes; of its inputs the contents are compared.
    FREE = ("resume", "overwrite", "track", "device", "run_dir", "checkpoint", "dataset")

    def __init__(self, folder, args, inputs=(), free=()):
        if args.resume and args.overwrite:
            raise UserError("give --resume or --overwrite, not both")
        self.dir = Path(folder)
        self.seed = args.seed
        self.free = {*self.FREE, *free}
        self.rank = int(os.environ.get("RANK", 0))
        self.state = {}  # of the last save, if the run resumes
        self.interrupted = False
        self.warned = set()
        settings = asdict(args) | {"checksums": [checksum(path) for path in inputs]}
        self.settings = json.loads(json.dumps(settings))  # as they will be read back
        with explained(f"can't use --run-dir {folder}", OSError):
            if args.resume and (self.dir / "args.json").exists():
                self.go_on()
            elif self.rank == 0:
                self.begin(args.overwrite, inputs)
            if self.rank == 0:
                self.open_logs(args)
        if torch.distributed.is_initialized():  # nobody writes before process 0 has seen the folder
            torch.distributed.barrier()

    def begin(self, overwrite, inputs):
        """Makes the folder; with --overwrite, without what an older run left for later stages."""
        if any(self.dir.glob("[!.]*")) and not overwrite:
            todo = "choose another --run-dir, or add --overwrite, or --resume if it is this run"
            raise UserError(f"{self.dir} holds files already; {todo}")
        keep = {Path(path).resolve() for path in inputs}
        for pattern in ("*.pt", "replay*/env*.npz", "events.out.tfevents.*"):
            for old in self.dir.glob(pattern):
                if not {old.resolve(), old.parent.resolve()} & keep:
                    old.unlink()
        self.dir.mkdir(parents=True, exist_ok=True)
        self.write_args()

    def write_args(self):
        text = json.dumps(self.settings, indent=1).encode()
        write_atomically(self.dir / "args.json", lambda file: file.write(text))

    def go_on(self):
        """Reads the last save. UserError if the run had other flags or inputs."""
        with explained(f"{self.dir}/args.json is damaged; start anew with --overwrite"):
            before = dict(json.loads((self.dir / "args.json").read_text()))
        for name in before.keys() & self.settings.keys() - self.free:
            if before[name] != self.settings[name]:
                change = f"{name} was {before[name]}, now it is {self.settings[name]}"
                if name == "checksums":
                    change = "the contents of the checkpoint or of the dataset have changed"
                raise UserError(f"--resume needs the flags and inputs of the start: {change}")
        if (self.dir / "state.pt").exists():
            self.state = load_checkpoint(self.dir / "state.pt", ("state",))

    def open_logs(self, args):
        """metrics.csv, without what was logged after the last save; TensorBoard; --track."""
        from torch.utils.tensorboard import SummaryWriter  # slow to import

        if args.track:
            with explained("--track needs Weights & Biases: pip install wandb", ImportError):
                import wandb
            wandb.init(project="redraw", name=self.dir.name, dir=self.dir, sync_tensorboard=True)
            wandb.config.update(asdict(args))
        self.tensorboard = SummaryWriter(str(self.dir))
        if self.state:
            os.truncate(self.dir / "metrics.csv", self.state["logged"])
        else:
            (self.dir / "metrics.csv").write_text("step,metric,value\n")

    def finite(self, step, values):
        """UserError if one of values, a dict of name -> number or tensor, is NaN or infinite."""
        for name, value in values.items():
            if not torch.as_tensor(value).isfinite().all():
                what = f"the training diverged: {name} is not finite at {step}"
                raise UserError(f"{what}; the last save is intact; try a smaller learning rate")

    def log(self, step, metrics):
        """Writes metrics, a dict of name -> number or 0-d tensor, and returns them as numbers.
        UserError: one is NaN or infinite."""
        self.finite(step, metrics)
        metrics = {k: float(v.detach() if torch.is_tensor(v) else v) for k, v in metrics.items()}
        if self.rank == 0:
            with explained(f"can't write the logs in {self.dir}", OSError):
                with open(self.dir / "metrics.csv", "a") as file:
                    file.writelines(f"{step},{name},{v:.6g}\n" for name, v in metrics.items())
                for name, value in metrics.items():
                    self.tensorboard.add_scalar(name, value, step)
        return metrics

    def warn(self, when, text):
        """Prints the text the first time that `when` is true."""
        if when and text not in self.warned:
            self.warned.add(text)
            tqdm.write(f"warning: {text}")

    def video(self, step, name, frames, fps=12):
        """frames: uint8 (T, height, width, C), to NAME.gif and TensorBoard; unless C is 3, its last
        channel is shown."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        if self.rank:
            return
        if frames.shape[-1] != 3:
            frames = frames[..., -1:].repeat(3, -1)
        gif = imageio.v3.imwrite("<bytes>", frames, extension=".gif", duration=1000 / fps, loop=0)
        write_atomically(self.dir / f"{name}.gif", lambda file: file.write(gif))
        _, height, width, _ = frames.shape
        image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=gif)
        summary = Summary(value=[Summary.Value(tag=name, image=image)])
        self.tensorboard.file_writer.add_summary(summary, step)

    @staticmethod
    def due(step, every, stride=1):
        """Whether a multiple of `every` was passed on the way from step - stride to step."""
        return step // every > (step - stride) // every

    def resume(self, modules):
        """Loads modules (dict of name -> what has a state dict) from the last save, if there is
        one, and returns its other contents, else {}. From here on Ctrl-C waits for a save."""
        with explained(f"{self.dir}/state.pt does not fit this version; start anew: --overwrite"):
            for name, module in modules.items() if self.state else ():
                module.load_state_dict(self.state[name])
        # torchrun: up to here all processes drew the same weights, from here on other noise.
        if self.state or self.rank:
            self.seed_anew(self.state.get("step", 0))
        if "WORLD_SIZE" not in os.environ:  # its processes would stop at different steps
            on_interrupt(self.interrupt)
        return self.state

    @staticmethod
    def no_more_saves():
        """After the loop Ctrl-C ends the script at once again."""
        on_interrupt(stop)

    def interrupt(self, *_):
        self.interrupted = True
        on_interrupt(stop)  # a second one does not wait

    def seed_anew(self, step):
        seed_everything((self.seed + 1000 * self.rank + 7919 * step) % 2**31)

    def write(self, name, **contents):
        """Saves a checkpoint for later stages into the folder."""
        if self.rank == 0:
            save_checkpoint(self.dir / name, **contents)

    def save(self, step, modules, **contents):
        """Saves the run for --resume; after Ctrl-C it ends here. UserError: a weight is NaN."""
        states = {name: module.state_dict() for name, module in modules.items()}
        for name, state in states.items():
            tensors = {f"{name}.{k}": v for k, v in state.items() if torch.is_tensor(v)}
            self.finite(step, tensors)
        if self.rank == 0:
            with open(self.dir / "metrics.csv", "a") as file:
                os.fsync(file.fileno())  # the state counts on what was logged so far
                contents |= {"step": step, "logged": file.tell(), **states}
            save_checkpoint(self.dir / "state.pt", stage="state", **contents)
            self.write_args()  # of a run that resumed, the flags that may differ
        self.seed_anew(step)
        if self.interrupted:
            self.close()
            stop(text=f"saved after {step}")

    def close(self):
        """Draws metrics.csv as curves.png, a panel a metric."""
        on_interrupt(stop)
        if self.rank:
            return
        from matplotlib.figure import Figure

        self.tensorboard.close()
        curves = {}
        for line in (self.dir / "metrics.csv").read_text().splitlines()[1:]:
            step, name, value = line.split(",")
            curves.setdefault(name, []).append((int(step), float(value)))
        curves = {name: points for name, points in curves.items() if len(points) > 1}
        rows = -(-len(curves) // 4)
        figure = Figure(figsize=(14, 2.2 * max(rows, 1)), layout="constrained")
        for i, (name, points) in enumerate(curves.items()):
            axes = figure.add_subplot(rows, 4, i + 1, title=name)
            axes.plot(*zip(*points, strict=True), color="#0072B2", linewidth=1)
        write_atomically(self.dir / "curves.png", lambda file: figure.savefig(file, dpi=70))
