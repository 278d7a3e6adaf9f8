"""Stage 2: fit a residual on the logits of the latent dynamics to little, offline, reward-free target data.

ReDRAW's idea: source and target look alike and differ in their dynamics, so the encoder and the heads
of the source stay, and only the latent dynamics are corrected, before the softmax:

    e_t = delta(z_{t-1}, a_{t-1})                              a small MLP, the only thing trained
    u_t = f(z_{t-1}, sigma_{t-1}, a_{t-1}) + e_t,   sigma_t = softmax(u_t)
    loss = KL( sg q(z_t | x_t) || Categorical(softmax(u_t)) )  first steps masked, no free bits

`Rectified` below is the first two lines, `adaptation_loss` the third. The encoder is frozen, so each
frame is encoded once, before training; no update touches an image.

    python redraw_adapt.py laptop --checkpoint runs/source/draw.pt --run-dir runs/adapted \
        --target-env-id redraw/PendulumSwingupReversed-v0

collects runs/adapted/dataset.npz (without rewards) and writes runs/adapted/best.pt (least KL on
held-out episodes) and last.pt. With --dataset it starts from data of yours, e.g. a robot's.
At the end it says how it went: report.txt, result.json, and prediction.gif, real against predicted frames.
Next: train_policy.py.
"""

import dataclasses
import json
import textwrap
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Optional

import numpy as np
import torch
import tyro
from PIL import Image, ImageDraw
from torch import nn
from tqdm import tqdm

from common import (Actor, DivergenceCheck, Interrupt, Logger, Policy, UserError, check_range, check_sizes, explained, held_noise, kl_categorical, load_checkpoint,
                    load_dataset, load_draw, load_module, load_policy, load_state, make_envs, mix, mlp, pick_device, restore, sample_onehot,
                    save_checkpoint, save_dataset, save_state, seed_everything, to_device, unimix, write_atomically)  # fmt: skip
from draw_pretrain import open_loop, reconstruction_errors


@dataclass
class Args:
    checkpoint: str  # draw.pt of stage 1
    dataset: Optional[str] = None  # target data, .npz or a folder of them; without it, data is collected in --target-env-id
    run_dir: Optional[str] = None  # folder for everything this run writes (default: runs/adapt-METHOD-SEED)
    overwrite: bool = False  # start anew in a folder that holds a run already
    resume: bool = False  # go on from the last save of the run in run_dir, given the same flags; without one, start
    save_every: int = 10_000  # updates between two saves
    seed: int = 1
    device: str = "auto"  # auto, cpu or cuda
    track: bool = False  # log to Weights & Biases too
    bf16: bool = False  # networks compute in bfloat16; distributions, losses and weights stay float32
    compile: bool = False  # torch.compile of the training loss; the first update then takes minutes

    # collecting, where the target is a simulator
    target_env_id: Optional[str] = None  # a Gymnasium id, also as module:id
    collect_steps: int = 40_000  # rows of the dataset
    # zero-shot (the source's task policy), random, explore (the source's exploration policy), or a policy checkpoint
    collect_policy: str = "zero-shot"
    collect_noise: float = 0.0  # share of the steps, in held stretches, whose action is random instead
    hold: float = 8.0  # mean number of steps that a random action is held
    gain: float = 1.0  # in every other environment random actions are uniform over [-gain, gain], clipped; in the others over [-1, 1]
    episode_steps: Optional[int] = None  # time limit while collecting (default: the environment's)
    n_envs: int = 4

    # residual: u = f + e (ReDRAW); replace: u = e, a new dynamics function of the residual's capacity; finetune: f itself; none: zero-shot
    method: Literal["residual", "replace", "finetune", "none"] = "residual"
    hidden: int = 256  # units of the residual's hidden layer
    layers: int = 1  # its hidden layers
    use_sigma: bool = False  # let the residual see sigma_{t-1} too; the authors found that without is better
    members: int = 1  # residuals trained side by side, whose corrections are averaged
    lr: float = 1e-2
    updates: int = 3_000_000
    batch: int = 16  # B, sequences per update
    length: int = 64  # T, steps per sequence
    holdout: float = 0.1  # share of the episodes kept out of training
    log_every: int = 1000  # updates between two evaluations on train and held-out episodes


PRESETS = {
    "laptop": (
        "minutes on two CPU cores",
        Args(checkpoint=tyro.MISSING, collect_policy="random", hold=16.0, gain=2.0, episode_steps=60, hidden=512, lr=2e-3, updates=6000, batch=64, length=8,
             log_every=500, save_every=1000),
    ),  # fmt: skip
    "duckietown": (
        "two minutes on one CPU core: 10,000 steps of a Duckiebot, or of the simulator's",
        Args(checkpoint=tyro.MISSING, collect_steps=10_000, collect_policy="random", hold=5.0, episode_steps=50, hidden=256, lr=2e-3, updates=3000,
             batch=64, length=8, log_every=500, save_every=1000),
    ),  # fmt: skip
    "paper": ("the paper's sizes", Args(checkpoint=tyro.MISSING)),
}


class Rectified(nn.Module):
    """The latent dynamics of the target: f of the source plus the residual, one function (z, sigma, a) -> u.

    A drop-in for DRAW.dynamics, used here and by train_policy.py. `draw` is the frozen world model; the rest see Args."""

    def __init__(self, draw, method="none", hidden=256, layers=1, use_sigma=False, members=1):
        super().__init__()
        self.options = {"method": method, "hidden": hidden, "layers": layers, "use_sigma": use_sigma, "members": members}
        known = method in ("residual", "replace", "finetune", "none") and use_sigma in (False, True)
        if not known or not all(0 < n <= 65536 for n in (hidden, layers, members)):  # they may come from a stranger's checkpoint
            raise ValueError(f"no such residual: {self.options}")
        self.draw = [draw]  # in a list, so that the world model's weights are not counted as this module's
        self.method, self.use_sigma = method, use_sigma
        S, K, A = draw.sizes.S, draw.sizes.K, draw.sizes.action_size
        n = members if method in ("residual", "replace") else 0
        # A residual starts at zero, so that training starts from the source's dynamics.
        self.delta = nn.ModuleList(
            mlp(S * K * (2 if use_sigma else 1) + A, hidden, layers, S * K, out_scale=0.0 if method == "residual" else 1.0) for _ in range(n)
        )

    def residual(self, z, sigma, action):
        """e_t = delta(z_{t-1}, a_{t-1}), the mean over members; (..., S, K) from (..., S, K), (..., S, K), (..., A)"""
        if any(p.requires_grad for p in self.delta.parameters()):  # in stage 2 the inputs of delta carry no gradient;
            z, sigma = z.detach(), sigma.detach()  # in stage 3 the return's gradient must pass through the residual too
        inputs = [z.flatten(-2)] + [sigma.flatten(-2)] * self.use_sigma + [action / action.abs().clamp(min=1.0)]
        x = torch.cat(inputs, -1)
        return torch.stack([delta(x) for delta in self.delta]).mean(0).unflatten(-1, z.shape[-2:])

    def forward(self, z, sigma, action):
        """u_t = f(z_{t-1}, sigma_{t-1}, a_{t-1}) + e_t, (..., S, K)"""
        if self.method == "residual":
            return self.draw[0].dynamics(z, sigma, action) + self.residual(z, sigma, action)
        if self.method == "replace":
            return self.residual(z, sigma, action)
        return self.draw[0].dynamics(z, sigma, action)

    def log_prior(self, u):
        """log p(z_t | ...), (..., S, K). The rectified distribution has no unimix; DRAW's own keeps it."""
        return u.transpose(-1, -2).log_softmax(-2).transpose(-1, -2) if self.method in ("residual", "replace") else unimix(u)

    def prior(self, sigma):
        """p(z_t | ...), the same as probabilities, from sigma_t = softmax(u_t) (..., S, K)"""
        return sigma if self.method in ("residual", "replace") else mix(sigma)


def adaptation_loss(draw, rectified, q, z, action, is_first):
    """KL( sg q(z_t | x_t) || Categorical(softmax(u_t)) ) along replayed target sequences.

    Args:
        q: log-probabilities of the posterior (B, T, S, K), from the frozen encoder.   z: samples of it (B, T, S, K).
        action: (B, T, A), taken AT x_t.   is_first: bool (B, T).
    Returns: (B, T), 0 at first steps, and the mask (B, T) of the other steps.
    """
    mask = ~is_first.clone()
    mask[:, 0] = False
    u = draw.observe(z, action, is_first, dynamics=rectified)  # (B, T, S, K); sigma fed back is the rectified one
    return kl_categorical(q.detach(), rectified.log_prior(u)) * mask, mask


@torch.no_grad()
def encode_dataset(draw, dataset, device, chunk=1024):
    """log q(z_t | x_t) of every row, once: (N, S, K) on `device`"""
    out = []
    for i in tqdm(range(0, len(dataset["is_first"]), chunk), desc="encoding", unit="chunk", mininterval=1.0):
        image = torch.from_numpy(dataset["image"][i : i + chunk]).to(device)
        vector = torch.from_numpy(dataset["vector"][i : i + chunk]).to(device)
        out.append(draw.posterior(draw.encoder(image, vector)))
    return torch.cat(out)


def load_rectified(checkpoint, draw, device):
    """The dynamics of a checkpoint of stage 1 (f alone) or 2 (rectified), frozen."""
    if checkpoint["stage"] == "draw_pretrain":
        return Rectified(draw)
    return load_module(checkpoint, "rectified", lambda: Rectified(draw, **checkpoint["rectified_options"]), device)


def collect(args, envs, policy):
    """Records args.collect_steps rows in the target, WITHOUT rewards: dict of arrays as in common.load_dataset, one environment after the other.
    policy: function (image, vector) -> actions (n, A), or None for random actions."""
    n, A = args.n_envs, envs.single_action_space.shape[0]
    obs, _ = envs.reset(seed=args.seed + 10_000)
    rows = {k: [] for k in ("image", "vector", "action", "is_first", "is_last", "is_terminal")}
    first, last, terminal = np.ones(n, bool), np.zeros(n, bool), np.zeros(n, bool)
    noise, noisy = np.zeros((n, A), np.float32), np.zeros(n, bool)
    gain = np.where(np.arange(n) % 2, args.gain, 1.0)[:, None]  # the residual needs both small and full actions
    for _ in tqdm(range(args.collect_steps // n), desc="collecting", unit="step", unit_scale=n, mininterval=1.0):
        redraw = np.random.rand(n) < 1.0 / args.hold
        noisy = np.where(redraw, np.random.rand(n) < args.collect_noise, noisy)
        noise = held_noise(noise, args.hold, gain)
        action = noise if policy is None else np.where(noisy[:, None], noise, policy(obs["image"], obs["vector"])).astype(np.float32)
        if not np.isfinite(obs["vector"]).all():
            raise UserError(f"{args.target_env_id} returns NaN or infinity in the vector")
        for key, value in zip(rows, (obs["image"], obs["vector"], action, first, last, terminal)):
            rows[key].append(value)
        obs, _, terminated, truncated, _ = envs.step(action)
        first, last, terminal = last, terminated | truncated, terminated
    envs.close()
    # (steps, n, ...) -> one environment after the other
    return {k: np.concatenate(np.stack(v, 1)) for k, v in rows.items()}


def split_episodes(is_first, holdout, length, seed):
    """Holds out whole episodes. Returns {"train": rows, "held-out": rows}, sorted row numbers, so that sequences can be
    cut from each; UserError if a part has no sequence of `length` rows."""
    episode = np.cumsum(is_first) - 1  # (N,), number of the episode of each row
    n = episode[-1] + 1
    if n < 2:
        raise UserError("the dataset holds one episode, so none can be held out; record at least two")
    held_out = np.isin(episode, np.random.default_rng(seed).permutation(n)[: max(1, round(holdout * n))])
    rows = {"train": np.flatnonzero(~held_out), "held-out": np.flatnonzero(held_out)}
    if min(map(len, rows.values())) < length or is_first[rows["train"]].all() or is_first[rows["held-out"]].all():
        raise UserError(f"too little data for sequences of --length {length}: { {k: len(v) for k, v in rows.items()} } rows, or only first ones")
    return rows


# ---- How did it go? ------------------------------------------------------------------------------

HORIZONS = 1, 5, 15, 40  # steps ahead at which the open-loop error is told
PLATEAU = 1.7  # held-out KL / the source's own; measured on the pendulum: a good residual 1.1 to 1.3, none 1.9 to 2.7
DRIFT = 0.1  # share of the target's frames beyond the source's 1 or 99 % quantile; 0.01 if nothing changed, room for other states to be visited


def windows(rows, is_first, most=64):
    """Stretches of one episode each, (n, H + 1) row numbers, H = 40 or as far as the longest episode among `rows` goes; n <= most."""
    episodes = np.split(rows, np.flatnonzero(is_first[rows])[1:])
    H = min(HORIZONS[-1], max(map(len, episodes)) - 1)
    cut = [e[i : i + H + 1] for e in episodes for i in range(0, len(e) - H, H + 1)]
    return np.stack(cut[:: -(-len(cut) // most)])


def where_it_acts(draw, base, rectified, z, action):
    """KL( softmax(f) || softmax(f + e) ) of each latent variable, mean nats per step, (S,), along observed sequences z (n, T, S, K),
    action (n, T, A), without their first steps."""
    moved = []

    def dynamics(z, sigma, a):
        u = rectified(z, sigma, a)
        logp, logq = base(z, sigma, a).log_softmax(-1), u.log_softmax(-1)  # (n, S, K), from the same belief
        moved.append((logp.exp() * (logp - logq)).sum(-1))
        return u

    draw.observe(z, action, torch.zeros(z.shape[:2], dtype=torch.bool, device=z.device), dynamics)
    return torch.stack(moved[1:]).mean((0, 1))


@torch.random.fork_rng()
@torch.no_grad()
def diagnose(draw, base, rectified, dataset, posterior, held_out, source, rollouts=4):
    """Measures all of the report but the KL; the same figures for the same weights, and nobody's random numbers are touched.

    Args:
        base, rectified: the dynamics before and after, each a Rectified.   held_out: row numbers.
        dataset, posterior: all rows, and log q(z_t | x_t) of them, (N, S, K).   source: of draw_pretrain.source_range, or None.
        rollouts: from each start. The open-loop error is that of single rollouts, averaged; not that of their mean.
    Returns: dict of plain figures, and frames in [0, 1], (3, n, H + 1, L, L, 3): n sequences real, base, rectified.
    """
    torch.manual_seed(0)
    device, t = posterior.device, windows(held_out, dataset["is_first"])  # (n, H + 1)
    image, vector, action = (torch.from_numpy(dataset[k][t]).to(device) for k in ("image", "vector", "action"))
    z = sample_onehot(posterior[torch.from_numpy(t)].exp())  # (n, H + 1, S, K)
    steps = sorted({min(h, t.shape[1] - 1) for h in HORIZONS})
    figures = {"acts": where_it_acts(draw, base, rectified, z, action).tolist(), "windows": len(t), "steps": steps, "open_loop": {}, "frames": {}}
    shown = image.float().diff(dim=1).abs().mean((1, 2, 3, 4)).argsort(descending=True)[:4]  # where the real picture moves most
    film = [image[shown].float() / 255.0]
    for name, dynamics in (("base", base), ("rectified", rectified)):
        torch.manual_seed(0)  # the same chances for both
        errors = []
        for _ in range(rollouts):
            zs = open_loop(draw, z[:, 0], action[:, :-1], dynamics, dynamics.prior)
            errors.append(torch.stack(reconstruction_errors(draw, zs, image, vector)).mean(1)[:, steps])  # (2, steps)
        figures["open_loop"][name] = dict(zip(("image error", "vector error"), torch.stack(errors).mean(0).tolist()))
        film.append(draw.decoder(zs[shown].flatten(-2)))  # the last rollout

    # Does the model know the target's frames? Of all episodes: neither encoder nor heads were trained on any of them.
    some, frames = np.linspace(0, len(posterior) - 1, min(4096, len(posterior))).astype(int), []
    for part in np.array_split(some, -(-len(some) // 512)):
        q = posterior[torch.from_numpy(part)]
        errors = reconstruction_errors(draw, sample_onehot(q.exp()), *(torch.from_numpy(dataset[k][part]).to(device) for k in ("image", "vector")))
        frames.append(torch.stack([*errors, -(q.exp() * q).sum((-2, -1))]))  # (3, rows)
    for name, value in zip(("image error", "vector error", "posterior entropy"), torch.cat(frames, 1).cpu()):
        outside = {"below": value < source[name][0], "above": value > source[name][2]} if source else {}
        figures["frames"][name] = {"median": value.median().item()} | {k: v.float().mean().item() for k, v in outside.items()}
    return figures, torch.stack(film)


def verdicts(figures, method):
    """The figures in words: a sentence for each failure that was found, or one that says that there is none."""
    source, train, held_out = figures["source"], figures["last"]["train"], figures["best"]["held-out"]
    if not source:
        return ["NO VERDICT: this draw.pt is of an unfinished or older stage 1 and holds no figures of the source to compare with."]
    found, limit, kl = [], PLATEAU * source["kl"], f"held-out KL is {held_out / source['kl']:.2f} times the source's"
    # An error that is smaller than at home is no harm, an unusually certain posterior is suspect.
    outside = {k: max(v["above"], v["below"] if k == "posterior entropy" else 0.0) for k, v in figures["frames"].items()}
    if drifted := [f"{k} in {v:.0%}" for k, v in outside.items() if v > DRIFT]:
        mild = held_out <= limit and outside["posterior entropy"] <= DRIFT
        well = "Here the latents hardly suffer: entropy and KL are like the source's. " if mild else ""
        found.append(f"VISUAL DRIFT: outside the source's range are {', '.join(drifted)} of the target's frames. A residual corrects the dynamics, "
                     f"not what the encoder misreads. {well}Try: camera, light, colours and the vector's units as in the source; stage 1 anew with such "
                     "looks varied; or, if the target goes where the source never was, another --collect in stage 1.")  # fmt: skip
    if not held_out <= limit:
        advice = "larger --hidden, --layers 2, --use-sigma, more --updates" if method == "residual" else "--method residual, or more --updates"
        cause = f"and train KL stayed above it too. Try: {advice}"
        if train <= limit:
            cause = "train KL is not: overfitted. Try: more target data, a smaller --hidden"
        if drifted:
            cause = "which the drift alone can cause: mend that first"
        found.append(f"CAPACITY PLATEAU: {kl}, more than {PLATEAU}, {cause}.")
    return found or [f"HEALTHY: {kl}, less than {PLATEAU}, and the frames look like the source's."]


def report(figures, method):
    """The figures as a page of text"""
    source, steps, acts = figures["source"], figures["steps"], np.array(figures["acts"])
    order, total = acts.argsort()[::-1], acts.sum()
    holders = (acts[order].cumsum() < 0.9 * total).sum() + 1 if total > 0 else 0

    def row(name, *values):
        return f"{name:40s}" + "".join(f"{v:>10.3f}" if isinstance(v, float) else f"{v:>10}" for v in values)

    lines = [
        f"{method}, {figures['episodes']} episodes, {figures['rows']} rows of target data; best.pt, of update {figures['update']}",
        row("KL(q || p), nats a step", "base", "rectified", *["source"] * bool(source)),
        *(row(f"  {part}", figures["before"][part], kl, *([source["kl"]] if source else [])) for part, kl in figures["best"].items()),
        row("where it acts: KL(base || rectified)", total, f"   {holders} of {len(acts)} variables hold 90 % of it"),
        "  most in variable " + ", ".join(f"{i} ({acts[i] / max(total, 1e-9):.0%})" for i in order[:5]),
        row(f"open loop, {figures['windows']} held-out sequences; steps", *steps),
        *(row(f"  {k}, {name}", *error[k]) for k in ("image error", "vector error") for name, error in figures["open_loop"].items()),
        row("frames of the target", "median", *("source 1%", "50%", "99%", "below", "above") * bool(source)),
        *(row(f"  {k}", v["median"], *(source[k] + [v["below"], v["above"]] if source else [])) for k, v in figures["frames"].items()),
    ]
    return "\n".join(lines + [textwrap.fill(v, 120, subsequent_indent="  ") for v in verdicts(figures, method)]) + "\n"


def picture(frames):
    """Real, base and rectified frames (3, n, L, L, 3) in [0, 1] -> one labelled row of n frames each, uint8 (height, width, 3)"""
    n, L = frames.shape[1:3]
    rows = (frames.clamp(0.0, 1.0) * 255.0).byte().cpu().numpy().repeat(-(-96 // L), 2).repeat(-(-96 // L), 3)
    rows = np.pad(rows, ((0, 0), (0, 0), (2, 0), (2, 0), (0, 0)), constant_values=255)  # thin white lines
    side = rows.shape[2]
    canvas = Image.new("RGB", (64 + n * side, 3 * side), "white")
    canvas.paste(Image.fromarray(rows.transpose(0, 2, 1, 3, 4).reshape(3 * side, n * side, 3)), (64, 0))
    for i, name in enumerate(("real", "base", "rectified")):
        ImageDraw.Draw(canvas).text((4, i * side + side // 2 - 6), name, "black")
    return np.asarray(canvas)


def main(args):
    if (args.dataset is None) == (args.target_env_id is None):
        raise UserError("give --dataset, or --target-env-id to collect one, not both")
    check_range(args, 1e-9, 10**9, "gain")
    check_range(args, 1, 10**12, "hold", "episode_steps", "log_every", "save_every")
    check_range(args, 1e-9, 1, "lr")
    check_range(args, 1, 65536, "n_envs", "batch", "hidden", "layers", "members")
    check_range(args, 2, 65536, "length")  # a first step has nothing to be predicted from
    check_range(args, 0, 10**9, "updates")
    check_range(args, 0, 1, "holdout", "collect_noise")
    if args.dataset is None and args.collect_steps < 2 * args.n_envs * args.length:
        raise UserError(f"--collect-steps must be at least 2 x n_envs x length = {2 * args.n_envs * args.length}, it is {args.collect_steps}")
    interrupt = Interrupt()
    seed_everything(args.seed)
    device = pick_device(args.device)
    checkpoint = load_checkpoint(args.checkpoint, ("draw_pretrain",), device)
    draw = load_draw(checkpoint, device)
    sizes = draw.sizes
    source = checkpoint.get("source_range")  # the yardsticks of the report; None of an unfinished stage 1
    if source is not None:  # looked at before the training, not after it
        with explained(f"{args.checkpoint} is damaged: its source_range makes no sense; make one with draw_pretrain.py"):
            quantiles = torch.tensor([source[k] for k in ("image error", "vector error", "posterior entropy")])  # (3, 3)
            if quantiles.shape != (3, 3) or not quantiles.isfinite().all() or not 0 < source["kl"] < np.inf:
                raise ValueError(source)
    run_dir = Path(args.run_dir or f"runs/adapt-{args.method}-{args.seed}")
    saved = load_state(run_dir, args, device)
    path = run_dir / "dataset.npz" if args.dataset is None else args.dataset
    if args.dataset or saved:
        dataset = load_dataset(path, sizes.image_size, sizes.vector_size, sizes.action_size)
        rows = split_episodes(dataset["is_first"], args.holdout, args.length, args.seed)
        logger = Logger(run_dir, args, saved)
    else:
        envs = make_envs(args.target_env_id, args.n_envs, sizes.image_size, args.episode_steps)
        check_sizes(args.target_env_id, envs, sizes)
        if args.collect_policy == "random":
            policy = None
        elif args.collect_policy in ("zero-shot", "explore"):
            key = "task_actor" if args.collect_policy == "zero-shot" else "explore_actor"
            actor = load_module(checkpoint, key, lambda: Actor(sizes), device)
            policy = Policy(sizes, draw, actor)
        else:
            policy = load_policy(args.collect_policy, device)
            check_sizes(args.target_env_id, envs, policy.sizes)
        logger = Logger(run_dir, args)
        dataset = collect(args, envs, policy)
        save_dataset(path, dataset)
        rows = split_episodes(dataset["is_first"], args.holdout, args.length, args.seed)

    # Each frame is encoded once, ever; no update touches an image, only the report at the end does.
    posterior = encode_dataset(draw, dataset, device)  # log q(z_t | x_t), (N, S, K)
    action = torch.from_numpy(dataset["action"]).to(device)  # (N, A)
    is_first = torch.from_numpy(dataset["is_first"]).to(device)  # (N,)

    rectified = Rectified(draw, args.method, args.hidden, args.layers, args.use_sigma, args.members).to(device)
    trained = list(rectified.parameters())
    if args.method == "finetune":
        trained = list(draw.dynamics_net.requires_grad_(True).parameters())
    optimizer = torch.optim.Adam(trained, lr=args.lr, eps=1e-8, fused=True) if trained else None
    modules = {"draw": draw, "rectified": rectified} | ({"optimizer": optimizer} if trained else {})
    check = DivergenceCheck(run_dir, modules, lag=4 if device.type == "cuda" else 0)

    training_loss = torch.compile(adaptation_loss) if args.compile else adaptation_loss

    def loss_of(part, start, dynamics=rectified, loss=adaptation_loss):
        """(kl, mask), (B, T) each, of sequences that begin at the `start`-th rows (B,) of a part of the data"""
        t = to_device(torch.from_numpy(rows[part][start[:, None] + np.arange(args.length)]), device)  # (B, T)
        q = posterior[t]  # (B, T, S, K)
        return loss(draw, dynamics, q, sample_onehot(q.exp()), action[t], is_first[t])

    @torch.no_grad()
    def mean_kl(part, dynamics=rectified, most=2000):
        """Mean KL in nats over (at most `most`) consecutive sequences of a part; the same ones each time."""
        starts = np.arange(0, len(rows[part]) - args.length + 1, args.length)
        starts = starts[:: -(-len(starts) // most)]
        with torch.random.fork_rng():
            torch.manual_seed(0)  # the same samples of z each time
            pairs = [loss_of(part, s, dynamics) for s in np.array_split(starts, max(1, len(starts) // 256))]
        return float(sum(kl.sum() for kl, _ in pairs) / sum(mask.sum() for _, mask in pairs))

    def save(name):
        save_checkpoint(
            run_dir / name, stage="redraw_adapt", args=dataclasses.asdict(args), sizes=checkpoint["sizes"], draw=draw.state_dict(),
            rectified=rectified.state_dict(), rectified_options=rectified.options, source_args=checkpoint["args"], updates=update,
        )  # fmt: skip

    update, best, start_time = 0, np.inf, time.time()
    before = {part: mean_kl(part, Rectified(draw, "none")) for part in rows}  # of the source's own dynamics
    if saved:
        update, best = saved["update"], saved["best"]
        restore(saved, modules)
    interrupt.waits = True
    bar = tqdm(total=args.updates if optimizer else 0, initial=update, unit="update", mininterval=1.0)
    while True:
        if update % args.save_every == 0 or update == args.updates or interrupt.asked:
            check.look()
            save_state(logger, modules, update=update, purge_step=update, best=best)
            if interrupt.asked:
                logger.close()
                interrupt.stop(f"saved after {update} updates")
        if update % args.log_every == 0 or update == args.updates:
            kl = {part: mean_kl(part) for part in rows}
            logger.log(update, {f"adapt/kl_{part}": v for part, v in kl.items()})
            bar.set_postfix_str(f"KL train {before['train']:.2f} -> {kl['train']:.2f}, held-out {before['held-out']:.2f} -> {kl['held-out']:.2f}")
            if not kl["held-out"] >= best:
                best = kl["held-out"]
                save("best.pt")
        if optimizer is None or update == args.updates:
            break
        sequences = np.random.randint(0, len(rows["train"]) - args.length + 1, args.batch)
        with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
            kl_t, mask = loss_of("train", sequences, loss=training_loss)
        loss = kl_t.sum() / mask.sum().clamp(min=1)
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(trained, 1000.0)
        check(update, {"kl": loss, "gradient": norm}, rows=torch.from_numpy(rows["train"][sequences]))
        optimizer.step()
        update += 1
        bar.update()
    bar.close()
    interrupt.waits = False
    save("last.pt")

    # How it went, of best.pt, which is what stage 3 is to be given
    saved = load_checkpoint(run_dir / "best.pt", ("redraw_adapt",), device)
    base, adapted = Rectified(load_draw(checkpoint, device)), load_rectified(saved, load_draw(saved, device), device)
    figures = {"episodes": int(is_first.sum()), "rows": len(is_first), "update": saved["updates"], "source": source,
               "before": before, "last": kl, "best": {part: mean_kl(part, adapted) for part in rows}}  # fmt: skip
    more, film = diagnose(draw, base, adapted, dataset, posterior, rows["held-out"], source)
    figures |= more
    figures["verdicts"] = verdicts(figures, args.method)
    text = report(figures, args.method)
    write_atomically(run_dir / "report.txt", lambda file: file.write(text.encode()))
    write_atomically(run_dir / "result.json", lambda file: file.write(json.dumps(figures, indent=1).encode()))
    logger.video(update, "prediction", np.stack([picture(film[:, :, t]) for t in range(film.shape[2])]), fps=8)
    write_atomically(run_dir / "prediction.png", lambda file: Image.fromarray(picture(film[:, 0, ::5])).save(file, "PNG"))
    logger.close()
    print(text, end="")
    print(f"wrote best.pt, last.pt, report.txt, prediction.gif and .png in {run_dir} after {time.time() - start_time:.0f} s")


if __name__ == "__main__":
    main(tyro.extras.overridable_config_cli(PRESETS, description=__doc__))
