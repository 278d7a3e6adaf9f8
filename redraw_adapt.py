"""Stage 2: fit a residual on the logits of the latent dynamics to little, offline, reward-free data
from the target system.

ReDRAW's idea: source and target look alike and differ in their dynamics. So the encoder and the
heads of the source stay, and only the latent dynamics are corrected, before the softmax:

    e_t     = delta(z_{t-1}, a_{t-1})                       a small MLP, the only thing trained
    u_t     = sg f(z_{t-1}, sigma_{t-1}, a_{t-1}) + e_t     f: the source's dynamics, frozen
    sigma_t = softmax(u_t)                                  the rectified belief, fed back, sg
    loss    = KL( sg q(z_t | x_t) || Categorical(softmax(u_t)) )    first steps masked

sg: stop-gradient, so each e_t answers for its own step, and nothing is unrolled in the graph.
q(z_t | x_t): the posterior, from the frozen encoder; each frame is encoded once, before training.
All other symbols: common.py. `Rectified` there is the first three lines, `residual_loss` here the
fourth.

    python redraw_adapt.py laptop --checkpoint runs/source/draw.pt --run-dir runs/adapted \
        --target-env-id redraw/PendulumSwingupReversed-v0

collects runs/adapted/dataset.npz (without rewards) and writes runs/adapted/best.pt (least KL on
held-out episodes) and last.pt. With --dataset it starts from data of yours, e.g. a robot's. At the
end it says how it went: report.txt, result.json, and prediction.gif, real against predicted frames.
Next: train_policy.py.
"""

import dataclasses
import json
import textwrap
import time
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import tyro
from PIL import Image, ImageDraw
from torch import nn
from tqdm import tqdm

from common import (
    Actor,
    Policy,
    Rectified,
    Run,
    UserError,
    check_range,
    check_sizes,
    explained,
    held_noise,
    kl_categorical,
    load_checkpoint,
    load_dataset,
    load_draw,
    load_module,
    load_policy,
    load_rectified,
    log_softmax,
    make_envs,
    prepare,
    sample_onehot,
    save_dataset,
    softmax,
    symlog,
    write_atomically,
)


@dataclass
class Args:
    checkpoint: str  # draw.pt of stage 1
    run_dir: str | None = (
        None  # folder for all that the run writes (default: runs/adapt-METHOD-SEED)
    )
    overwrite: bool = False  # start anew in a folder that holds a run already
    resume: bool = False  # go on from the last save in run_dir with the same flags; if none, start
    save_every: int = 10_000  # updates between saves; a kill loses at most so many
    seed: int = 1
    device: str = "auto"  # auto, cpu or cuda
    track: bool = False  # log to Weights & Biases too
    bf16: bool = False  # networks compute in bfloat16; losses and weights stay float32
    compile: bool = False  # torch.compile of the loss; the first update then takes minutes
    log_every: int = 1000  # updates between two evaluations on train and held-out episodes

    # Data of yours
    dataset: str | None = None  # a .npz file or a folder of them; else --target-env-id is recorded
    dataset_rows: int | None = None  # use the newest so many rows; the rest is not read
    actions_lead: bool = False  # row t holds the action that LED to it (DreamerV2, V-D4RL)
    holdout: float = 0.1  # share of the episodes kept out of training; with 0 best.pt is the last

    # Collecting, where the target is a simulator
    target_env_id: str | None = None  # a Gymnasium id or module:id
    collect_steps: int = 40_000  # rows of the dataset
    collect_policy: str = "zero-shot"  # the source's task policy; random, explore, or a policy.pt
    collect_noise: float = 0.0  # share of the steps, in held stretches, that act at random
    hold: float = 8.0  # a random action lasts so many steps on average
    gain: float = 1.0  # every other episode's random actions are uniform in [-gain, gain], clipped
    episode_steps: int | None = None  # shorter episodes than the environment's
    n_envs: int = 4
    look: Literal["fast", "stock"] = "fast"  # as in stage 1

    # The correction: residual (ReDRAW): u = f + e; replace: u = e, new dynamics of the same size;
    # finetune: f itself, with the loss of stage 1; none: the source's dynamics as they are.
    method: Literal["residual", "replace", "finetune", "none"] = "residual"
    hidden: int = 256  # units of delta's hidden layer; larger: can correct more, needs more data
    layers: int = 1  # delta's hidden layers
    # What delta sees beside z, a: nothing; the belief sigma_{t-1}; or f's prediction softmax(f_t).
    inputs: Literal["za", "za+sigma", "za+base"] = "za"
    members: int = 1  # deltas trained side by side, whose corrections are averaged
    lr: float = 1e-2
    finetune_lr: float = 1e-4  # of --method finetune
    updates: int = 3_000_000
    batch: int = 16  # B, sequences an update
    length: int = 64  # T, steps of a sequence


LAPTOP = Args(
    checkpoint=tyro.MISSING,
    save_every=1000,
    log_every=500,
    # collecting
    collect_policy="random",
    hold=16.0,  # as in stage 1
    gain=2.0,  # the residual needs calm actions and full ones
    episode_steps=60,
    # the correction
    hidden=512,
    lr=2e-3,
    updates=6000,
    batch=64,
    length=8,
)
DUCKIETOWN = dataclasses.replace(
    LAPTOP,
    collect_steps=10_000,
    hold=5.0,
    gain=1.0,
    episode_steps=50,
    hidden=256,
    updates=3000,
)
PRESETS = {
    "laptop": ("minutes on two CPU cores", LAPTOP),
    "duckietown": ("two minutes on one CPU core: 10,000 steps of a Duckiebot", DUCKIETOWN),
    "paper": ("the paper's sizes", Args(checkpoint=tyro.MISSING)),
}


# ---- The method ----------------------------------------------------------------------------------


def residual_loss(draw, rectified, log_q, z, action, is_first):
    """KL( sg q(z_t | x_t) || Categorical(softmax(u_t)) ) along replayed target sequences.

    Args: rectified: a Rectified that has a delta; log_q (B, T, S, K), from the frozen encoder; z,
        samples of it (B, T, S, K); action (B, T, A), taken AT x_t; is_first: bool (B, T).
    Returns: KL (B, T), 0 at first steps, and the mask (B, T) of the other steps.
    """
    z_prev, a_prev, first = draw.previous(z, action, is_first)
    # delta sees no belief, so e of all steps comes from one call; else it needs the recurrence.
    e = rectified.residual(z_prev, a_prev) if rectified.inputs == "za" else None  # (B, T, S, K)
    sigma_prev, base = unroll(draw, rectified, z_prev, a_prev, first, e)
    if e is None:
        e = rectified.residual(z_prev, a_prev, sigma_prev, base)
    u = base + e  # (B, T, S, K)
    return kl_categorical(log_q.detach(), rectified.log_prior(u)) * ~first, ~first


@torch.no_grad()
def unroll(draw, rectified, z_prev, a_prev, first, e=None):
    """The rectified belief's recurrence, without gradient: sigma_t = softmax(f_t + e_t).

    Args: as `draw.previous` returns them; e (B, T, S, K), if it is known before.
    Returns: sigma_{t-1} and f_t = f(z_{t-1}, sigma_{t-1}, a_{t-1}), (B, T, S, K) each.
    """
    _, sigma0 = draw.initial()
    sigma = sigma0
    sigmas, bases = [], []
    for t in range(first.shape[1]):
        sigma = torch.where(first[:, t, None, None], sigma0, sigma)
        base = rectified.base(z_prev[:, t], sigma, a_prev[:, t])
        sigmas.append(sigma)
        bases.append(base)
        if e is None:
            u = base + rectified.residual(z_prev[:, t], a_prev[:, t], sigma, base)
        else:
            u = base + e[:, t]
        sigma = softmax(u)
    return torch.stack(sigmas, 1), torch.stack(bases, 1)


def finetune_loss(draw, rectified, log_q, z, action, is_first):
    """The baseline: f itself, with the dynamics term of stage 1, 1.5 max(1, KL(sg q || p)).

    Arguments and results as of residual_loss; here the gradient goes through f and through time.
    """
    _, _, first = draw.previous(z, action, is_first)
    u = draw.observe(z, action, is_first)
    kl = kl_categorical(log_q.detach(), rectified.log_prior(u))
    return 1.5 * kl.clamp(min=1.0) * ~first, ~first


@torch.no_grad()
def mean_kl(draw, dynamics, data, rows, length, most=2000):
    """Mean KL(q || p) in nats a step over (at most `most`) sequences of `rows`, the same each time.

    Args: dynamics: a Rectified; data: see `encode`; rows: sorted row numbers.
    """
    starts = np.arange(0, len(rows) - length + 1, length)
    starts = starts[:: -(-len(starts) // most)]
    total, steps = 0.0, 0
    with torch.random.fork_rng():
        torch.manual_seed(0)  # the same samples of z each time
        for part in np.array_split(starts, max(1, len(starts) // 256)):
            log_q, z, action, is_first = sequences(data, rows, part, length)
            _, _, first = draw.previous(z, action, is_first)
            u = draw.observe(z, action, is_first, dynamics)
            kl = kl_categorical(log_q, dynamics.log_prior(u))
            total += float((kl * ~first).sum())
            steps += int((~first).sum())
    return total / steps


def sequences(data, rows, starts, length):
    """Sequences of `length` rows that begin at the starts-th of `rows`: log_q and samples z
    (B, T, S, K), action (B, T, A), is_first (B, T)."""
    t = torch.from_numpy(rows[starts[:, None] + np.arange(length)]).to(data["log_q"].device)
    log_q = data["log_q"][t]
    return log_q, sample_onehot(log_q.exp()), data["action"][t], data["is_first"][t]


# ---- The loop ------------------------------------------------------------------------------------


def main(args):
    check(args)
    device = prepare(args)
    checkpoint = load_checkpoint(args.checkpoint, ("draw_pretrain",), device)
    draw = load_draw(checkpoint, device)
    source = source_range(checkpoint)
    inputs = [args.checkpoint] + ([args.dataset] if args.dataset else [])
    name = args.run_dir or f"runs/adapt-{args.method}-{args.seed}"
    if args.dataset:
        dataset = load_dataset(args.dataset, draw.sizes, args.dataset_rows, args.actions_lead)
        rows = split_episodes(dataset["is_first"], args)
        run = Run(name, args, inputs)
    else:
        envs = target_envs(args, draw.sizes)
        policy = collecting_policy(args, checkpoint, draw, envs)
        run = Run(name, args, inputs)
        if not run.state:
            save_dataset(run.dir / "dataset.npz", collect(args, envs, policy))
        envs.close()
        dataset = load_dataset(run.dir / "dataset.npz", draw.sizes)
        rows = split_episodes(dataset["is_first"], args)
    data = encode(draw, dataset, device)  # each frame once; no update touches an image

    options = ("method", "hidden", "layers", "inputs", "members")
    rectified = Rectified(draw, **{name: getattr(args, name) for name in options}).to(device)
    trained = list(rectified.parameters())
    lr = args.lr
    loss_of = residual_loss
    if args.method == "finetune":
        trained = [*draw.dynamics_net.parameters(), draw.initial_logits]
        lr = args.finetune_lr
        loss_of = finetune_loss
    for parameter in trained:
        parameter.requires_grad_(True)
    updates = args.updates if trained else 0
    modules = {"draw": draw, "rectified": rectified}
    if trained:
        adam = torch.optim.Adam(trained, lr, eps=1e-8, fused=True)
        modules["adam"] = adam
    if args.compile:
        loss_of = torch.compile(loss_of)

    def write(name, update):
        run.write(
            name,
            stage="redraw_adapt",
            args=dataclasses.asdict(args),
            sizes=checkpoint["sizes"],
            updates=update,
            draw=draw.state_dict(),
            rectified=rectified.state_dict(),
            rectified_options=rectified.options,
            source_actor=checkpoint.get("task_actor"),
            source_critic=checkpoint.get("task_critic"),
        )

    unchanged = Rectified(load_draw(checkpoint, device))  # the source's own dynamics
    before = {part: mean_kl(draw, unchanged, data, rows[part], args.length) for part in rows}
    judge = "held-out" if args.holdout else "train"
    saved = run.resume(modules)
    begin = saved.get("update", -1)
    best = saved.get("best", np.inf)
    start_time = time.time()
    bar = tqdm(total=updates, initial=max(begin, 0), unit="update", mininterval=1.0)
    for update in range(begin + 1, updates + 1):
        if update > 0:
            starts = np.random.randint(0, len(rows["train"]) - args.length + 1, args.batch)
            batch = sequences(data, rows["train"], starts, args.length)
            with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
                kl, mask = loss_of(draw, rectified, *batch)
            loss = kl.sum() / mask.sum().clamp(min=1)
            adam.zero_grad()
            loss.backward()
            norm = nn.utils.clip_grad_norm_(trained, 1000.0)
            adam.step()
            bar.update()

        if update % args.log_every == 0 or update == updates:
            kl = {part: mean_kl(draw, rectified, data, rows[part], args.length) for part in rows}
            metrics = {f"adapt/kl_{part}": value for part, value in kl.items()}
            run.log(
                update, metrics | ({"adapt/loss": loss, "adapt/grad_norm": norm} if update else {})
            )
            bar.set_postfix_str(
                "KL " + ", ".join(f"{k} {before[k]:.3g} -> {kl[k]:.3g}" for k in kl)
            )
            if kl[judge] < best or not args.holdout:
                best = kl[judge]
                write("best.pt", update)
        if run.interrupted or update % args.save_every == 0 or update == updates:
            run.save(update, modules, update=update, best=best)
    bar.close()
    write("last.pt", updates)
    figures = {
        "episodes": int(dataset["is_first"].sum()),
        "rows": len(dataset["is_first"]),
        "source": source,
        "before": before,
        "last": kl,
    }
    report(run, args, figures, unchanged, checkpoint, dataset, data, rows, judge, device)
    run.close()
    print(
        f"wrote best.pt, last.pt, report.txt and prediction.gif in {run.dir} "
        f"after {time.time() - start_time:.0f} s"
    )


# ---- Data ----------------------------------------------------------------------------------------


def check(args):
    """Raises UserError for a flag that makes no sense."""
    if (args.dataset is None) == (args.target_env_id is None):
        raise UserError("give --dataset, or --target-env-id to collect one, not both")
    check_range(args, 1e-9, 10**9, "gain")
    check_range(args, 1, 10**12, "hold", "episode_steps", "log_every", "save_every")
    check_range(args, 1e-9, 1, "lr", "finetune_lr")
    check_range(args, 1, 65536, "n_envs", "batch", "hidden", "layers", "members")
    check_range(args, 2, 65536, "length")  # a first step has nothing to be predicted from
    check_range(args, 2, 10**12, "dataset_rows")
    check_range(args, 0, 10**9, "updates")
    check_range(args, 0, 0.9, "holdout")
    check_range(args, 0, 1, "collect_noise")
    least = 2 * args.n_envs * args.length
    if args.dataset is None and args.collect_steps < least:
        raise UserError(f"--collect-steps must be at least 2 x n_envs x length = {least}")


def source_range(checkpoint):
    """The yardsticks of the report from draw.pt; None of an unfinished stage 1."""
    source = checkpoint.get("source_range")
    if source is None:
        return None
    with explained(f"{checkpoint['file']} is damaged: its source_range makes no sense"):
        quantiles = torch.tensor([source[name] for name in FRAME_FIGURES])
        if quantiles.shape != (3, 3) or not quantiles.isfinite().all() or not source["kl"] > 0:
            raise ValueError(source)
    return source


def target_envs(args, sizes):
    envs = make_envs(
        args.target_env_id, args.n_envs, sizes.image_size, args.episode_steps, look=args.look
    )
    check_sizes(args.target_env_id, envs, sizes)
    return envs


def collecting_policy(args, checkpoint, draw, envs):
    """A function (image, vector) -> actions (n, A); None for random actions."""
    if args.collect_policy == "random":
        return None
    if args.collect_policy in ("zero-shot", "explore"):
        key = "task_actor" if args.collect_policy == "zero-shot" else "explore_actor"
        actor = load_module(checkpoint, key, lambda: Actor(draw.sizes))
        return Policy(draw.sizes, draw, actor.to(draw.initial_logits.device))
    policy = load_policy(args.collect_policy, draw.initial_logits.device)
    check_sizes(args.target_env_id, envs, policy.sizes)
    return policy


def collect(args, envs, policy):
    """Records args.collect_steps rows, WITHOUT rewards: dict of arrays as of load_dataset, one
    environment after the other. policy: of collecting_policy."""
    n, A = args.n_envs, envs.single_action_space.shape[0]
    obs, _ = envs.reset(seed=args.seed + 10_000)
    rows = []
    first, last, terminal = np.ones(n, bool), np.zeros(n, bool), np.zeros(n, bool)
    noise, noisy = np.zeros((n, A), np.float32), np.zeros(n, bool)
    episode = np.arange(n)
    for _ in tqdm(range(args.collect_steps // n), "collecting", unit="step", unit_scale=n):
        redraw = np.random.rand(n) < 1.0 / args.hold
        noisy = np.where(redraw, np.random.rand(n) < args.collect_noise, noisy)
        # Every other episode is calm.
        gain = np.where(episode % 2, args.gain, 1.0)[:, None]
        action = noise = held_noise(noise, args.hold, gain)
        if policy is not None:
            chosen = policy(obs["image"], obs["vector"])
            action = np.where(noisy[:, None], noise, chosen).astype(np.float32)
        row = {**obs, "action": action, "is_first": first, "is_last": last, "is_terminal": terminal}
        rows.append({key: np.array(value) for key, value in row.items()})
        obs, _, terminal, truncated, _ = envs.step(action)
        first = last
        last = terminal | truncated
        episode = episode + first
    # (steps, n, ...) -> one environment after the other
    return {key: np.concatenate(np.stack([row[key] for row in rows], 1)) for key in rows[0]}


@torch.no_grad()
def encode(draw, dataset, device, chunk=1024):
    """What training needs of a dataset, on `device`: log_q, log q(z_t | x_t) of every row
    (N, S, K), action (N, A) and is_first (N,)."""
    log_q = []
    for i in tqdm(range(0, len(dataset["is_first"]), chunk), "encoding", unit="chunk"):
        image = torch.from_numpy(dataset["image"][i : i + chunk]).to(device)
        vector = torch.from_numpy(dataset["vector"][i : i + chunk]).to(device)
        log_q.append(draw.posterior(draw.encoder(image, vector)))
    arrays = {key: torch.from_numpy(dataset[key]).to(device) for key in ("action", "is_first")}
    return {"log_q": torch.cat(log_q), **arrays}


def split_episodes(is_first, args):
    """Holds out whole episodes, of a single one its last part: {"train": rows, "held-out": rows},
    sorted row numbers. UserError: too few rows in sequences of --length."""
    episode = np.cumsum(is_first) - 1  # (N,), number of the episode of each row
    lengths = np.bincount(episode)
    usable = lengths[lengths >= args.length].sum() / len(is_first)
    if usable < 0.5:
        raise UserError(
            f"only {usable:.0%} of the rows lie in sequences of --length {args.length} or more; "
            f"half of the sequences have fewer than {np.median(lengths):.0f} rows"
        )
    n = len(lengths)
    if n == 1:
        held_out = np.arange(len(is_first)) >= (1 - args.holdout) * len(is_first)
    else:
        order = np.random.default_rng(args.seed).permutation(n)
        held_out = np.isin(episode, order[: max(1, round(args.holdout * n))])
    if not args.holdout:
        return {"train": np.arange(len(is_first))}
    rows = {"train": np.flatnonzero(~held_out), "held-out": np.flatnonzero(held_out)}
    if min(map(len, rows.values())) < args.length:
        counts = ", ".join(f"{len(part)} rows {name}" for name, part in rows.items())
        raise UserError(f"too little data for sequences of --length {args.length}: {counts}")
    return rows


# ---- How did it go? ------------------------------------------------------------------------------

HORIZONS = (1, 5, 15, 40)  # steps ahead at which the open-loop error is told
FRAME_FIGURES = ("image error", "vector error", "posterior entropy")
# Held-out KL over the source's own. On the pendulum a good residual has 1.1 to 1.3, none 1.9 to 2.7.
PLATEAU = 1.7
# Share of frames beyond the source's 1 or 99 % quantile: 0.01 if nothing changed, some more because
# other states are visited.
DRIFT = 0.1


def report(run, args, figures, unchanged, checkpoint, dataset, data, rows, judge, device):
    """Measures best.pt, which stage 3 is to be given; writes report.txt, result.json and films."""
    saved = load_checkpoint(run.dir / "best.pt", ("redraw_adapt",), device)
    draw = load_draw(saved, device)
    rectified = load_rectified(saved, draw, device)
    figures["update"] = saved["updates"]
    figures["best"] = {
        part: mean_kl(draw, rectified, data, rows[part], args.length) for part in rows
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        figures["frames"] = frame_figures(draw, dataset, data, figures["source"])
        found, film = open_loop_errors(draw, unchanged, rectified, dataset, data, rows[judge])
    figures |= found
    figures["verdicts"] = verdicts(figures, args.method, judge)
    text = as_text(figures, args.method)
    write_atomically(run.dir / "report.txt", lambda file: file.write(text.encode()))
    numbers = json.dumps(figures, indent=1).encode()
    write_atomically(run.dir / "result.json", lambda file: file.write(numbers))
    frames = np.stack([labelled(film[:, :, t]) for t in range(film.shape[2])])
    run.video(saved["updates"], "prediction", frames, fps=8)
    strip = Image.fromarray(labelled(film[:, 0, ::5]))
    write_atomically(run.dir / "prediction.png", lambda file: strip.save(file, "PNG"))
    print(text, end="")


def errors_of(draw, z, image, vector):
    """Squared errors of the image, and of symlog(vector), predicted from z (..., S, K); (...)"""
    image_error = ((draw.decoder(z.flatten(-2)) - image.float() / 255.0) ** 2).sum((-3, -2, -1))
    if draw.vector_head is None:
        return torch.stack([image_error, torch.zeros_like(image_error)])
    vector_error = ((draw.vector_head(z.flatten(-2)) - symlog(vector)) ** 2).sum(-1)
    return torch.stack([image_error, vector_error])


@torch.no_grad()
def frame_figures(draw, dataset, data, source, most=4096):
    """Does the model know the target's frames? {figure: its median, and the shares of frames below
    and above the source's 1 and 99 % quantiles}; of all episodes, since none trained the encoder."""
    some = np.linspace(0, len(data["log_q"]) - 1, min(most, len(data["log_q"]))).astype(int)
    found = []
    for part in np.array_split(some, -(-len(some) // 512)):
        log_q = data["log_q"][torch.from_numpy(part)]
        z = sample_onehot(log_q.exp())
        image, vector = (
            torch.from_numpy(dataset[k][part]).to(z.device) for k in ("image", "vector")
        )
        entropy = -(log_q.exp() * log_q).sum((-2, -1))
        found.append(torch.cat([errors_of(draw, z, image, vector), entropy[None]]))
    figures = {}
    for name, value in zip(FRAME_FIGURES, torch.cat(found, 1).cpu(), strict=True):
        figures[name] = {"median": value.median().item()}
        if source:
            figures[name]["below"] = (value < source[name][0]).float().mean().item()
            figures[name]["above"] = (value > source[name][2]).float().mean().item()
    return figures


@torch.no_grad()
def open_loop_errors(draw, unchanged, rectified, dataset, data, rows, most=64, rollouts=4):
    """How far predictions from the first frame alone are off, before and after; and where the
    residual acts: KL(softmax(f) || softmax(f + e)) of each latent variable, in nats a step.

    Returns: figures, and frames in [0, 1], (3, n, H + 1, L, L, C): real, base, rectified.
    """
    # Stretches of H + 1 rows of one episode each.
    episodes = np.split(rows, np.flatnonzero(dataset["is_first"][rows])[1:])
    H = min(HORIZONS[-1], max(map(len, episodes)) - 1)
    cut = [e[i : i + H + 1] for e in episodes for i in range(0, len(e) - H, H + 1)]
    t = np.stack(cut[:: -(-len(cut) // most)])  # (n, H + 1)
    device = data["log_q"].device
    image, vector, action = (
        torch.from_numpy(dataset[key][t]).to(device) for key in ("image", "vector", "action")
    )
    z = sample_onehot(data["log_q"][torch.from_numpy(t).to(device)].exp())  # (n, H + 1, S, K)
    steps = sorted({min(h, H) for h in HORIZONS})

    u = draw.observe(z, action, torch.zeros_like(z[..., 0, 0], dtype=torch.bool), rectified)
    base = unchanged(z[:, :-1], softmax(u)[:, :-1], action[:, :-1])  # from the same beliefs
    log_f, log_u = log_softmax(base), log_softmax(u[:, 1:])  # (n, H, S, K)
    acts = (log_f.exp() * (log_f - log_u)).sum(-1).mean((0, 1))  # (S,)

    figures = {"windows": len(t), "steps": steps, "open_loop": {}, "acts": acts.tolist()}
    moving = image.float().diff(dim=1).abs().mean((1, 2, 3, 4)).argsort(descending=True)[:4]
    film = [image[moving].float() / 255.0]
    for name, dynamics in (("base", unchanged), ("rectified", rectified)):
        torch.manual_seed(0)  # the same chances for both
        errors = []
        for _ in range(rollouts):
            zs = draw.open_loop(dynamics, z[:, 0], action[:, :-1])  # (n, H + 1, S, K)
            errors.append(errors_of(draw, zs, image, vector).mean(1)[:, steps])  # (2, steps)
        errors = torch.stack(errors).mean(0).tolist()
        figures["open_loop"][name] = dict(zip(FRAME_FIGURES, errors, strict=False))
        film.append(draw.decoder(zs[moving].flatten(-2)))  # the last rollout
    return figures, torch.stack(film)


def verdicts(figures, method, judge):
    """The figures in words: a sentence for each failure that was found, or that there is none."""
    source = figures["source"]
    if not source:
        return [
            "NO VERDICT: this draw.pt is of an unfinished stage 1, without figures of the source."
        ]
    train = figures["last"]["train"] / source["kl"]
    ratio = figures["best"][judge] / source["kl"]
    found = []
    # An error smaller than at home is no harm; an unusually certain posterior is suspect.
    outside = {name: figures["frames"][name]["above"] for name in FRAME_FIGURES}
    entropy = figures["frames"]["posterior entropy"]
    outside["posterior entropy"] = max(entropy["above"], entropy["below"])
    drifted = [f"{name} in {share:.0%}" for name, share in outside.items() if share > DRIFT]
    if drifted:
        mild = ratio <= PLATEAU and outside["posterior entropy"] <= DRIFT
        well = "Here the latents hardly suffer: entropy and KL are like the source's. "
        found.append(
            f"VISUAL DRIFT: outside the source's range are {', '.join(drifted)} of the target's "
            "frames. A residual corrects the dynamics, not what the encoder misreads. "
            f"{well if mild else ''}Try: camera, light, colours and the vector's units as in the "
            "source; stage 1 anew with such looks varied; or, if the target goes where the source "
            "never was, another --collect in stage 1."
        )
    if not ratio <= PLATEAU:
        larger = "larger --hidden, --layers 2, --inputs za+sigma, more --updates"
        advice = larger if method == "residual" else "--method residual, or more --updates"
        cause = f"and train KL stayed above it too. Try: {advice}"
        if train <= PLATEAU:
            cause = "train KL is not: overfitted. Try: more target data, a smaller --hidden"
        if drifted:
            cause = "which the drift alone can cause: mend that first"
        found.append(
            f"CAPACITY PLATEAU: {judge} KL is {ratio:.2f} times the source's, more than {PLATEAU}, "
            f"{cause}."
        )
    return found or [
        f"HEALTHY: {judge} KL is {ratio:.2f} times the source's, less than {PLATEAU}, and the "
        "frames look like the source's."
    ]


def as_text(figures, method):
    """The figures as a page of text"""
    source = figures["source"] or {"kl": np.nan}
    acts = np.array(figures["acts"])
    holders = int((np.sort(acts)[::-1].cumsum() < 0.9 * acts.sum()).sum()) + 1

    def row(name, *values):
        cells = (f"{v:10.3f}" if isinstance(v, float) else f"{v:>10}" for v in values)
        return f"{name:36}" + "".join(cells)

    lines = [
        f"{method}, {figures['episodes']} episodes, {figures['rows']} rows of target data; "
        f"best.pt, of update {figures['update']}",
        row("KL(q || p), nats a step", "base", "rectified", "source"),
    ]
    for part, kl in figures["best"].items():
        lines.append(row(f"  {part}", figures["before"][part], kl, source["kl"]))
    lines.append(row("where it acts: KL(base || rectified)", acts.sum().item()))
    lines.append(f"  {holders} of {len(acts)} latent variables hold 90 % of it")
    lines.append(row(f"open loop, {figures['windows']} sequences; steps", *figures["steps"]))
    for name, errors in figures["open_loop"].items():
        lines += [row(f"  {kind}, {name}", *error) for kind, error in errors.items()]
    lines.append(row("frames of the target", "median", "source 1%", "50%", "99%", "below", "above"))
    for name, found in figures["frames"].items():
        lines.append(
            row(f"  {name}", found["median"], *source.get(name, []), *list(found.values())[1:])
        )
    lines += [textwrap.fill(text, 96, subsequent_indent="  ") for text in figures["verdicts"]]
    return "\n".join(lines) + "\n"


def labelled(frames):
    """Real, base and rectified frames (3, n, L, L, C) in [0, 1] -> a row of n frames for each,
    uint8 (height, width, 3)"""
    n, L = frames.shape[1:3]
    zoom = -(-96 // L)
    frames = frames if frames.shape[-1] == 3 else frames[..., -1:].expand(-1, -1, -1, -1, 3)
    rows = (frames.clamp(0.0, 1.0) * 255.0).byte().cpu().numpy().repeat(zoom, 2).repeat(zoom, 3)
    rows = np.pad(rows, ((0, 0), (0, 0), (2, 0), (2, 0), (0, 0)), constant_values=255)
    side = rows.shape[2]
    tiles = rows.transpose(0, 2, 1, 3, 4).reshape(3 * side, n * side, 3)
    canvas = Image.new("RGB", (64 + n * side, 3 * side), "white")
    canvas.paste(Image.fromarray(tiles), (64, 0))
    for i, name in enumerate(("real", "base", "rectified")):
        ImageDraw.Draw(canvas).text((4, i * side + side // 2 - 6), name, "black")
    return np.asarray(canvas)


if __name__ == "__main__":
    main(tyro.extras.overridable_config_cli(PRESETS, description=__doc__))
