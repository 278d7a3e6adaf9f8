"""Stage 2: learn how the target's dynamics differ, from little, offline, reward-free data.

ReDRAW's idea: source and target look alike and differ in their dynamics. So the encoder and the
heads of the source stay, and only the latent dynamics are corrected, before the softmax:

    e_t     = delta(z_{t-1}, a_{t-1})                       a small MLP, the only thing trained
    u_t     = sg f(z_{t-1}, sigma_{t-1}, a_{t-1}) + e_t     f: the source's dynamics, frozen
    sigma_t = softmax(u_t)                                  the rectified belief, fed back, sg
    loss    = KL( sg q(z_t | x_t) || Categorical(softmax(u_t)) )    first steps masked

z: latent sample, a: action, sigma: belief, q: the frozen posterior; each frame is encoded once,
before training. sg: stop-gradient, so each e_t answers for its own step, no gradient goes through
time. The first three lines are common.Rectified, the fourth is `residual_loss` here. All symbols:
common.py. Not in the paper, and off in the preset `paper`: corrections stay small (--l2), and what
is saved is an average of the last updates' weights (--ema-decay). On a laptop policies depend on
both: docs/experiments.md.

    python redraw_adapt.py laptop --checkpoint runs/source/draw.pt --run-dir runs/adapted \
        --target-env-id redraw/PendulumSwingupReversed-v0

records runs/adapted/dataset.npz, without rewards, writes best.pt (least KL on held-out episodes)
and last.pt, and says how it went: report.txt, result.json and prediction.gif, real above predicted
frames. --dataset takes data of yours instead; with both flags dataset.npz holds yours and then the
new rows. Next: train_policy.py.
"""

import copy
import dataclasses
import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from tqdm import tqdm

from common import (
    Policy,
    Rectified,
    Run,
    UserError,
    check_range,
    check_sizes,
    explained,
    follow,
    held_noise,
    kl_categorical,
    load_checkpoint,
    load_dataset,
    load_draw,
    load_policy,
    make_envs,
    prepare,
    sample_onehot,
    save_dataset,
    softmax,
    write_atomically,
)


@dataclass
class Args:
    checkpoint: str  # draw.pt of stage 1
    run_dir: str | None = None  # folder of the run (default: runs/adapt-METHOD-SEED)
    overwrite: bool = False  # start anew in a folder that holds a run already
    # Go on from the last save in run_dir; if there is none, start. The flags must be as before,
    # but --updates may be larger: then a finished run trains on.
    resume: bool = False
    save_every: int = 10_000  # updates between saves; a kill loses at most so many
    log_every: int = 1000  # updates between two evaluations on train and held-out episodes
    seed: int = 1
    device: str = "auto"  # auto, cpu or cuda
    track: bool = False  # log to Weights & Biases too
    bf16: bool = False  # networks compute in bfloat16; losses and weights stay float32
    compile: bool = False  # torch.compile of the loss; the first update then takes minutes

    # Data of yours
    dataset: str | None = None  # a .npz file or a folder of them
    dataset_rows: int | None = None  # use the newest so many rows; the rest is not read
    actions_lead: bool = False  # row t holds the action that LED to it (DreamerV2, V-D4RL)
    holdout: float = 0.1  # share of the episodes kept out of training; with 0 best.pt is the last

    # Recording, where the target is a simulator; rows of --dataset, if it is given, come first
    target_env_id: str | None = None  # a Gymnasium id or module:id
    collect_steps: int = 40_000  # rows to record, in all environments together
    collect_policy: str = "zero-shot"  # the source's task policy; random, explore, or a policy.pt
    collect_noise: float = 0.0  # share of the steps that act at random; larger: more states seen
    hold: float = 8.0  # a random action lasts so many steps on average; larger: farther swings
    gain: float = 1.0  # every other episode's random actions lie in +-gain, cut to +-1: fuller ones
    episode_steps: int | None = None  # shorter episodes than the environment's: more start states
    n_envs: int = 4
    look: Literal["fast", "stock"] = "fast"  # as in stage 1

    # The correction. residual (ReDRAW): u = f + e; replace: u = e, new dynamics of the same size;
    # finetune: f itself, with the loss of stage 1; lowrank: f with a trained matrix of low rank
    # added to each weight, same loss; none: the source's dynamics as they are.
    method: Literal["residual", "replace", "finetune", "lowrank", "none"] = "residual"
    hidden: int = 256  # units of delta's hidden layers; larger: corrects more, needs more data
    layers: int = 1  # delta's hidden layers; more: as with hidden
    # What delta sees beside z, a: nothing; the belief sigma_{t-1}; or f's prediction softmax(f_t).
    inputs: Literal["za", "za+sigma", "za+base"] = "za"
    members: int = 1  # deltas whose corrections are averaged; more: steadier and slower
    rank: int = 16  # of what --method lowrank adds; larger: corrects more, needs more data
    lr: float = 1e-2  # of delta, and of what lowrank adds
    finetune_lr: float = 1e-4  # of --method finetune
    updates: int = 3_000_000
    batch: int = 16  # B, sequences an update
    length: int = 64  # T, steps of a sequence; longer: beliefs that have run for longer
    soft: float = 0.0  # share of sequences whose z is q itself, as lookahead of stage 3 imagines
    l2: float = 0.0  # of `residual`: weight of e's mean square; larger: nearer to the source
    ema_decay: float = 0.0  # what is saved averages some 1 / (1 - ema_decay) last updates


LAPTOP = Args(
    checkpoint=tyro.MISSING,
    save_every=1000,
    log_every=500,
    collect_policy="random",
    hold=16.0,  # as in stage 1
    gain=2.0,  # the residual needs calm actions and full ones
    episode_steps=60,
    hidden=512,
    lr=2e-3,
    updates=6000,
    batch=64,
    length=8,
    soft=0.7,
    l2=0.03,
    ema_decay=0.997,  # the last updates' noise is what imagination exploits
)
DUCKIETOWN = dataclasses.replace(
    LAPTOP,
    collect_steps=10_000,
    hold=5.0,
    gain=1.0,
    episode_steps=50,
    hidden=256,
    updates=3000,
    soft=0.0,
)
PRESETS = {
    "laptop": ("minutes on two CPU cores", LAPTOP),
    "duckietown": ("two minutes on one CPU core: 10,000 steps of a Duckiebot", DUCKIETOWN),
    "paper": ("the paper's sizes", Args(checkpoint=tyro.MISSING)),
}


# ---- The method ----------------------------------------------------------------------------------


def residual_loss(draw, rectified, log_q, z, action, is_first, l2=0.0):
    """KL( sg q(z_t | x_t) || Categorical(softmax(u_t)) ) along replayed target sequences.

    l2, not in the paper, adds l2 times the mean square of e_t: what need not change does not.

    Args: rectified: a Rectified that has a delta; log_q (B, T, S, K), from the frozen encoder; z,
        samples of it (B, T, S, K); action (B, T, A), taken AT x_t; is_first: bool (B, T).
    Returns: loss (B, T), 0 at first steps, and the mask (B, T) of the other steps.
    """
    z_prev, a_prev, first = draw.previous(z, action, is_first)
    if rectified.inputs == "za":
        # delta sees no belief, so one call gives e of all steps.
        e = rectified.residuals(z_prev, a_prev)  # (members, B, T, S, K)
        _, base = unroll(draw, rectified, z_prev, a_prev, first, e.mean(0))
    else:
        # delta sees what the recurrence yields, which has no gradient: so e once more, with it.
        sigma_prev, base = unroll(draw, rectified, z_prev, a_prev, first)
        e = rectified.residuals(z_prev, a_prev, sigma_prev, base)  # (members, B, T, S, K)
    u = base + e  # (members, B, T, S, K), has a gradient through e alone
    # Each member by itself predicts q; the belief is that of their mean.
    kl = kl_categorical(log_q.detach(), rectified.log_prior(u)).mean(0)
    return (kl + l2 * e.square().mean((0, -2, -1))) * ~first, ~first


@torch.no_grad()
def unroll(draw, rectified, z_prev, a_prev, first, e=None):
    """The rectified belief's recurrence, sigma_t = softmax(f_t + e_t), without gradient.

    Args: e (B, T, S, K), where it is known already; else it is computed on the way.
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
    """The baselines: f itself or its change of low rank learns, with the dynamics term of stage 1,
    1.5 max(1, KL(sg q || p)). Arguments and results as of residual_loss; the gradient goes through
    f and through time."""
    _, _, first = draw.previous(z, action, is_first)
    u = draw.observe(z, action, is_first, rectified)  # (B, T, S, K)
    kl = kl_categorical(log_q.detach(), rectified.log_prior(u))
    return 1.5 * kl.clamp(min=1.0) * ~first, ~first


def what_learns(args, draw, rectified):
    """A method's loss, the parameters that learn from it, and their learning rate"""
    if rectified.uses_delta:
        # e is a correction in `residual` alone; in `replace` it is all there is.
        l2 = args.l2 if args.method == "residual" else 0.0
        return partial(residual_loss, l2=l2), list(rectified.parameters()), args.lr
    if args.method == "lowrank":
        return finetune_loss, list(rectified.parameters()), args.lr
    # finetune, and none, which makes no update
    trained = [*draw.dynamics_net.parameters(), draw.initial_logits]
    return finetune_loss, trained, args.finetune_lr


@torch.no_grad()
def mean_kl(draw, dynamics, data, rows, length):
    """Mean KL(q || p), nats a step, of some 256 sequences of rows at most, the same each time.
    dynamics: a Rectified; data: of `encode`; rows: sorted row numbers."""
    starts = np.arange(0, len(rows) - length + 1, max(length, len(rows) // 256))
    with torch.random.fork_rng():
        torch.manual_seed(0)  # the same samples of z each time
        log_q, z, action, is_first = sequences(data, rows, starts, length)
    _, _, first = draw.previous(z, action, is_first)
    u = draw.observe(z, action, is_first, dynamics)
    return kl_categorical(log_q, dynamics.log_prior(u))[~first].mean().item()


def sequences(data, rows, starts, length, soft=0.0):
    """Sequences of `length` rows that begin at the starts-th of `rows`: log_q and samples z
    (B, T, S, K), action (B, T, A), is_first (B, T). In a share `soft` of them z is q itself. They
    may cross borders of episodes, where is_first is true."""
    t = torch.from_numpy(rows[starts[:, None] + np.arange(length)]).to(data["log_q"].device)
    log_q = data["log_q"][t]
    z = sample_onehot(log_q.exp())
    if soft:
        is_soft = torch.rand(len(t), 1, 1, 1, device=z.device) < soft
        z = torch.where(is_soft, log_q.exp(), z)
    return log_q, z, data["action"][t], data["is_first"][t]


# ---- The loop ------------------------------------------------------------------------------------


def main(args):
    check(args)
    device = prepare(args)
    checkpoint = load_checkpoint(args.checkpoint, ("draw_pretrain",), device)
    source_range(checkpoint)  # what is wrong with it is found now
    draw = load_draw(checkpoint, device)
    shape = (args.hidden, args.layers, args.inputs, args.members, args.rank)
    rectified = Rectified(draw, args.method, *shape)
    rectified.to(device)
    # What is judged and saved: copies of both that average the trained weights. They are copied
    # together, so that f of the one is the other's.
    means = mean_draw, mean_rectified = copy.deepcopy((draw, rectified))

    # Mistakes in flags and data are found before the folder is made.
    folder = args.run_dir or f"runs/adapt-{args.method}-{args.seed}"
    path = Path(folder) / "dataset.npz"
    recorded_before = args.resume and path.exists()
    recording = args.target_env_id is not None and not recorded_before
    if recording and args.dataset and Path(args.dataset).resolve() == path.resolve():
        raise UserError(f"{path} would be replaced; choose another --run-dir")
    dataset = None
    if args.target_env_id and recorded_before:
        dataset = load_dataset(path, draw.sizes)
    elif args.dataset:
        dataset = load_dataset(args.dataset, draw.sizes, args.dataset_rows, args.actions_lead)
    if recording:
        envs, policy = open_target(args, checkpoint, draw)
    else:
        rows = split_episodes(dataset["is_first"], args)
    inputs = [file for file in (args.checkpoint, args.dataset) if file]
    run = Run(folder, args, inputs, free=["updates"])
    if recording:
        path.unlink(missing_ok=True)  # an older run's, which --resume must not take
        recorded = collect(args, envs, policy)
        del envs, policy  # and the renderers' memory
        if dataset is not None:
            recorded = {k: np.concatenate([dataset[k], new]) for k, new in recorded.items()}
        dataset = recorded
        save_dataset(path, dataset)
        rows = split_episodes(dataset["is_first"], args)
    data = encode(draw, dataset, device)  # each frame once; no update touches an image

    loss_of, trained, lr = what_learns(args, draw, rectified)
    for parameter in trained:
        parameter.requires_grad_(True)
    adam = torch.optim.Adam(trained, lr, eps=1e-8, fused=True)
    if args.compile:
        loss_of = torch.compile(loss_of)
    result = {
        "stage": "redraw_adapt",
        "args": dataclasses.asdict(args),
        "sizes": checkpoint["sizes"],
        # State dicts share the memory of the weights, so they are always up to date.
        "draw": mean_draw.state_dict(),
        "rectified": mean_rectified.state_dict(),
        "rectified_options": rectified.options,
        "source_actor": checkpoint.get("task_actor"),  # for --warm-start of stage 3
        "source_critic": checkpoint.get("task_critic"),
    }

    modules = {"draw": draw, "rectified": rectified, "adam": adam}
    modules |= {"mean_draw": mean_draw, "mean_rectified": mean_rectified}
    saved = run.resume(modules)
    best = saved.get("best", np.inf)
    updates = 0 if args.method == "none" else args.updates
    if saved.get("update", 0) > updates:
        done = f"{run.dir} has made {saved['update']} updates already"
        raise UserError(f"{done}, more than --updates {updates}")
    bar = tqdm(range(saved.get("update", -1) + 1, updates + 1), unit="update", mininterval=1.0)
    for update in bar:
        if update > 0:  # 0 only evaluates
            starts = np.random.randint(0, len(rows["train"]) - args.length + 1, args.batch)
            batch = sequences(data, rows["train"], starts, args.length, args.soft)
            with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
                losses, mask = loss_of(draw, rectified, *batch)
            loss = losses.sum() / mask.sum().clamp(min=1)
            adam.zero_grad()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(trained, 1000.0)
            adam.step()
            rate = max(1.0 / update, 1.0 - args.ema_decay)  # at first a plain mean
            follow(mean_draw, draw, rate)
            follow(mean_rectified, rectified, rate)

        if update % args.log_every == 0 or update == updates:
            kls = {part: mean_kl(*means, data, rows[part], args.length) for part in rows}
            bar.set_postfix(kls)
            run.log(update, {f"adapt/kl_{part}": kl for part, kl in kls.items()})
            if update > 0:
                run.log(update, {"adapt/loss": loss, "adapt/grad_norm": norm})
            if not args.holdout or kls["held-out"] < best:
                best = kls.get("held-out", best)
                run.write("best.pt", updates=update, **result)
        if run.interrupted or update % args.save_every == 0 or update == updates:
            run.save(update, modules, update=update, best=best)
    run.no_more_saves()
    run.write("last.pt", updates=updates, **result)
    report(run, args, checkpoint, *means, dataset, data, rows)
    run.close()
    print(f"wrote best.pt, last.pt, report.txt, result.json and prediction.gif in {run.dir}")


# ---- Data ----------------------------------------------------------------------------------------


def check(args):
    """Raises UserError for a flag that makes no sense."""
    if args.dataset is None and args.target_env_id is None:
        raise UserError("give --dataset, or --target-env-id to record one, or both")
    if args.target_env_id:  # enough for two parts of each environment's rows
        check_range(args, 2 * args.n_envs * args.length, 10**12, "collect_steps")
    if args.dataset is None and (args.dataset_rows or args.actions_lead):
        raise UserError("--dataset-rows and --actions-lead need a --dataset")
    check_range(args, 1e-9, 10**9, "gain")
    check_range(args, 1, 10**12, "hold", "episode_steps", "log_every", "save_every")
    check_range(args, 1e-9, 1, "lr", "finetune_lr")
    check_range(args, 1, 65536, "n_envs", "batch", "hidden", "layers", "members", "rank")
    check_range(args, 2, 65536, "length")  # a first step has nothing to be predicted from
    check_range(args, 2, 10**12, "dataset_rows")
    check_range(args, 0, 10**9, "updates", "l2")
    check_range(args, 0, 0.9, "holdout")
    check_range(args, 0, 1, "collect_noise", "soft")
    check_range(args, 0, 1 - 1e-9, "ema_decay")


def source_range(checkpoint):
    """What stage 1 measured of itself, for the report: "kl", and for each of FRAME_FIGURES its 1,
    50 and 99 % quantiles over frames; None if it was not finished."""
    home = checkpoint.get("source_range")
    with explained(f"{checkpoint['file']} is damaged: its source_range makes no sense"):
        if home is not None and not home["kl"] > 0:
            raise ValueError(home)
        for name in FRAME_FIGURES if home is not None else ():
            low, median, high = home[name]
            if not low <= median <= high:
                raise ValueError(home)
    return home


def open_target(args, checkpoint, draw):
    """The target's environments and who acts in them: (image, vector) -> actions (n, A), or None
    for random actions. UserError: they don't fit the source or --length."""
    env_id = args.target_env_id
    envs = make_envs(env_id, args.n_envs, draw.sizes.image_size, args.episode_steps, look=args.look)
    check_sizes(env_id, envs, draw.sizes)
    limit = envs.envs[0].spec.max_episode_steps
    if limit and limit + 1 < args.length:
        raise UserError(f"an episode of {env_id} has {limit + 1} rows, fewer than --length")
    policy = None
    if args.collect_policy in ("zero-shot", "explore"):
        by_mean = checkpoint["args"].get("learn", "reinforce") != "reinforce"  # as in stage 1
        policy = Policy(draw.sizes, draw, by_mean=by_mean).to(draw.initial_logits.device)
        actor = "task_actor" if args.collect_policy == "zero-shot" else "explore_actor"
        with explained(f"{args.checkpoint} holds no '{actor}' that fits"):
            policy.actor.load_state_dict(checkpoint[actor])
    elif args.collect_policy != "random":
        policy = load_policy(args.collect_policy, draw.initial_logits.device)
        check_sizes(env_id, envs, policy.sizes)
    return envs, policy


def collect(args, envs, policy):
    """Records args.collect_steps rows, WITHOUT rewards: dict of arrays as of load_dataset, one
    environment after the other. envs, policy: of open_target."""
    n = args.n_envs
    obs, _ = envs.reset(seed=args.seed + 10_000)
    noise = held_noise(np.zeros(envs.action_space.shape, np.float32), hold=1.0)
    noisy = last = terminal = np.zeros(n, bool)
    first = np.ones(n, bool)
    episode = np.arange(n)
    rows = []
    for _ in tqdm(range(args.collect_steps // n), "recording", unit="step", unit_scale=n):
        fresh = np.random.rand(n) < 1.0 / args.hold
        # A share --collect-noise of a policy's steps is random, --hold steps at a time.
        noisy = np.where(fresh, np.random.rand(n) < args.collect_noise, noisy)
        gain = np.where(episode % 2, args.gain, 1.0)[:, None]  # every other episode is calm
        noise = held_noise(noise, args.hold, gain)
        action = noise
        if policy is not None:
            action = np.where(noisy[:, None], noise, policy(obs["image"], obs["vector"]))
        flags = {"is_first": first, "is_last": last, "is_terminal": terminal}
        rows.append({**obs, "action": action, **flags})
        obs, _, terminal, truncated, _ = envs.step(action)
        first = last
        last = terminal | truncated
        episode = episode + first
    envs.close()
    return {key: np.concatenate(np.stack([row[key] for row in rows], 1)) for key in rows[0]}


@torch.no_grad()
def encode(draw, dataset, device):
    """What training needs of a dataset: log_q, log q(z_t | x_t) of every row (N, S, K), action
    (N, A) and is_first (N,)."""
    log_q = []
    for i in tqdm(range(0, len(dataset["is_first"]), 1024), "encoding"):
        image = torch.from_numpy(dataset["image"][i : i + 1024]).to(device)
        vector = torch.from_numpy(dataset["vector"][i : i + 1024]).to(device)
        log_q.append(draw.posterior(draw.encoder(image, vector)))
    arrays = {key: torch.from_numpy(dataset[key]).to(device) for key in ("action", "is_first")}
    return {"log_q": torch.cat(log_q), **arrays}


def split_episodes(is_first, args):
    """Holds out whole episodes, of a single one its last part: {"train": rows, "held-out": rows},
    sorted row numbers. UserError: too few rows in sequences of --length."""
    N = len(is_first)
    T = args.length
    episode = np.cumsum(is_first) - 1  # (N,), number of the episode of each row
    lengths = np.bincount(episode)
    usable = lengths[lengths >= T].sum() / N
    if usable < 0.5:
        raise UserError(f"only {usable:.0%} of the rows lie in sequences of --length {T} or more")
    if not args.holdout:
        return {"train": np.arange(N)}
    order = np.random.default_rng(args.seed).permutation(len(lengths))
    order = order[lengths[order] >= T]
    n = max(1, round(args.holdout * len(order)))
    held_out = np.isin(episode, order[:n])
    if n == len(order):
        held_out = np.arange(N) >= N - max(T, round(args.holdout * N))
    rows = {"train": np.flatnonzero(~held_out), "held-out": np.flatnonzero(held_out)}
    if len(rows["train"]) < T:
        raise UserError(f"{N} rows are too few to hold some out and train on --length {T}")
    return rows


# ---- How did it go? ------------------------------------------------------------------------------

# KL over the source's own. On the pendulum a good residual has 0.8 to 1.3, none 1.9 to 2.7.
PLATEAU = 1.7
# Share of frames outside the source's range: 0.01 if nothing changed, more in states new to it.
DRIFT = 0.1
FRAME_FIGURES = ("image error", "vector error", "posterior entropy")


@torch.no_grad()
def report(run, args, checkpoint, draw, rectified, dataset, data, rows):
    """Measures best.pt, which stage 3 is to be given: report.txt, result.json, prediction.gif."""
    saved = load_checkpoint(run.dir / "best.pt", ("redraw_adapt",))
    draw.load_state_dict(saved["draw"])
    rectified.load_state_dict(saved["rectified"])
    source = load_draw(checkpoint, data["log_q"].device)
    base = Rectified(source)
    home = source_range(checkpoint)
    figures = {"data": {"rows": len(dataset["is_first"]), "best.pt of update": saved["updates"]}}
    for part in rows:
        kl = {"base": mean_kl(source, base, data, rows[part], args.length)}
        kl["rectified"] = mean_kl(draw, rectified, data, rows[part], args.length)
        figures[f"KL {part}"] = kl | ({"source": home["kl"]} if home else {})
    models = {"base": (source, base), "rectified": (draw, rectified)}
    held_out = rows.get("held-out", rows["train"])
    found, film = measure(models, home, dataset, data, held_out)
    figures |= found
    words = verdicts(figures, args.method) if home else ["NO VERDICT: stage 1 was not finished"]
    text = f"{args.method}; KL in nats a step, squared errors, shares\n"
    for name, numbers in figures.items():
        words_of = [f"{k} {v if isinstance(v, int) else f'{v:.4g}'}" for k, v in numbers.items()]
        text += f"{name}: {', '.join(words_of)}\n"
    text += "\n".join(words) + "\n"
    print(text, end="")
    result = json.dumps({**figures, "verdicts": words}, indent=1)
    write_atomically(run.dir / "report.txt", lambda file: file.write(text.encode()))
    write_atomically(run.dir / "result.json", lambda file: file.write(result.encode()))
    run.video(saved["updates"], "prediction", film, fps=8)


def measure(models, home, dataset, data, rows):
    """From sequences of 41 rows: how far predictions from the first frame alone are off, where the
    residual acts, and which frames lie outside the source's range (home).

    Returns: figures; a film uint8 (H + 1, height, width, C), real above base above rectified.
    """
    episodes = np.split(rows, np.flatnonzero(dataset["is_first"][rows]))
    H = min(40, max(map(len, episodes)) - 1)
    starts = np.concatenate([e[: max(0, len(e) - H) : H + 1] for e in episodes])
    stride = -(-len(starts) // 64)  # at most 64 sequences
    t = starts[::stride, None] + np.arange(H + 1)  # (n, H + 1)
    log_q = data["log_q"][t]  # (n, H + 1, S, K)
    keys = ("image", "vector", "action")
    image, vector, action = (torch.from_numpy(dataset[key][t]).to(log_q.device) for key in keys)
    z = sample_onehot(log_q.exp())
    figures = {}
    film = [image[:4] / 255.0]
    for name, (draw, dynamics) in models.items():
        torch.manual_seed(0)  # the same chances for both
        zs = draw.open_loop(dynamics, z[:, 0], action[:, :-1])
        film.append(draw.decoder(zs[:4].flatten(-2)))
        errors = draw.reconstruction_errors(zs, image, vector)  # (n, H + 1) each
        for kind, error in zip(("image", "vector"), errors, strict=True):
            error = error.mean(0).tolist()
            steps = {f"step {h}": error[h] for h in (1, 5, 15, 40) if h <= H}
            figures[f"{kind} error, {name}"] = steps
    film = torch.cat(film, 2).permute(1, 2, 0, 3, 4).flatten(2, 3)  # (H + 1, 3 L, 4 L, C)
    film = (film.clamp(0.0, 1.0) * 255.0).byte().cpu().numpy()

    # The residual, from the rectified beliefs; KL of each latent variable.
    draw, dynamics = models["rectified"]
    u = draw.observe(z, action, torch.zeros_like(data["is_first"][t]), dynamics)
    base = models["base"][1](z[:, :-1], softmax(u)[:, :-1], action[:, :-1]).log_softmax(-1)
    acts = (base.exp() * (base - u[:, 1:].log_softmax(-1))).sum(-1).mean((0, 1))  # (S,)
    most = acts.argsort(descending=True)[:5].tolist()
    largest = {f"variable {i}": acts[i].item() for i in most}
    figures["KL(base || rectified)"] = {**largest, "all": acts.sum().item()}
    if home:
        entropy = -(log_q.exp() * log_q).sum((-2, -1))
        values = [*draw.reconstruction_errors(z, image, vector), entropy]
        shares = {}
        for name, value in zip(FRAME_FIGURES, values, strict=True):
            low, _, high = home[name]
            # An error smaller than at home is no harm, an unusually certain posterior is suspect.
            outside = (value > high) | ((value < low) & (name == "posterior entropy"))
            shares[name] = outside.float().mean().item()
        figures["frames outside the source's range"] = shares
    return figures, film.repeat(3, 1).repeat(3, 2)


def verdicts(figures, method):
    """What the figures of a --method mean: a sentence for each failure that they show"""
    found = []
    shares = figures["frames outside the source's range"]
    drifted = [f"{name} in {share:.0%}" for name, share in shares.items() if share > DRIFT]
    if drifted:
        found.append(
            f"VISUAL DRIFT: outside the source's range are {', '.join(drifted)} of the frames. A "
            "residual can't correct what the encoder misreads. Try: camera, light and the vector's "
            "units as in the source; stage 1 anew with --augment, or for new states --collect."
        )
    kl = figures.get("KL held-out", figures["KL train"])
    ratio = kl["rectified"] / kl["source"]
    if not ratio <= PLATEAU:
        advice = "larger --hidden, --layers 2, --inputs za+sigma, more --updates"
        if method in ("none", "finetune"):
            advice = "--method residual"
        elif method == "lowrank":
            advice = "larger --rank, more --updates, or --method residual"
        elif drifted:
            advice = "mend the drift first, which alone can cause it"
        elif figures["KL train"]["rectified"] <= PLATEAU * kl["source"]:
            advice = "train KL is lower, so it is overfitted: more target data, a smaller --hidden"
        found.append(f"CAPACITY PLATEAU: KL is {ratio:.2f} times the source's. Try: {advice}.")
    return found or [
        f"HEALTHY: KL is {ratio:.2f} times the source's, frames are like the source's."
    ]


if __name__ == "__main__":
    main(tyro.extras.overridable_config_cli(PRESETS, description=__doc__))
