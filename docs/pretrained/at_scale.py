"""A source model and its policy on one GPU, in minutes: some processes record, this one learns.

    python docs/pretrained/at_scale.py --env-id redraw/FingerTurnHard-v0 --minutes 8 \\
        --out runs/finger-gpu/draw.pt

The losses are those of the stages; what differs from draw_pretrain.py is the order. Recording never
waits for learning, so there are hundreds of thousands of rows, and they show where the policy goes
now. In the first part of the time world model, ensemble and both policies learn as in stage 1. In
the second part the encoder is frozen, each row is encoded once, and f, the reward head and the task
policy go on, on latents alone; half of what f learns from are its own predictions. The policies
learn by lookahead.

An update is some thousand small operations. On a GPU a CUDA graph records them once and starts them
all at once (`Graphed`). Nothing is saved on the way: an interrupted run is lost.
"""

import contextlib
import copy
import dataclasses
import json
import math
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
from collections import deque
from pathlib import Path

import numpy as np
import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import draw_pretrain as stage1  # noqa: E402
from common import (  # noqa: E402
    DRAW,
    Actor,
    ActorCritic,
    Critic,
    Policy,
    Rectified,
    Sizes,
    UserError,
    check_range,
    check_sizes,
    explained,
    follow,
    held_noise,
    kl_categorical,
    load_checkpoint,
    load_draw,
    load_module,
    make_envs,
    on_interrupt,
    prepare,
    sample_onehot,
    save_checkpoint,
    save_dataset,
    sizes_of,
    softmax,
    twohot_log_prob,
    unimix,
)

SEGMENT = 128  # rows of one environment that lie together; no sequence crosses the border
TOGETHER = 6  # environments of one recording process


@dataclasses.dataclass
class Args:
    env_id: str = "redraw/FingerTurnHard-v0"
    out: Path = Path("runs/gpu/draw.pt")  # log.json and rows.npz lie beside it
    model: Path | None = None  # go on from this checkpoint, with the second part alone
    minutes: float = 8.0  # of learning; recording the first rows is not counted
    joint: float = 0.65  # share of the time in which the encoder learns
    recorders: int = 7  # processes that record
    rate: float = 2500.0  # rows a second that are taken in at most
    rows: int = 1_200_000  # the newest so many are kept, on the GPU
    begin: int = 40_000  # rows before the first update
    start_speed: float = 8.0  # of the recorders that start fastest; others start slower or at rest
    hold: float = 6.0  # steps that a random action lasts on average
    gain: float = 1.5  # random actions lie in +-gain, then cut to +-1
    act_noise: float = 1.0  # of the task policy, where it predicts no reward
    batch: int = 64  # sequences an update in the first part
    length: int = 16  # rows of a sequence
    starts: int = 1024  # imagined trajectories an update
    states: int = 1024  # of these, states in which actions are compared
    gamma: float = 0.98
    ahead: int = 8  # steps of lookahead
    policy_every: int = 6  # updates of the model for one of the task policy
    policy_start: int = 1500  # updates before policies learn and act
    f_batch: int = 512  # sequences an update in the second part
    open_loop: float = 0.5  # second part: share of the sequences in which z is f's own prediction
    vector_scale: float = 1000.0  # weight of the vector loss
    lr: float = 2e-3  # of world model and ensemble; in the first part it falls to a tenth
    f_lr: float = 8e-4  # of f and the reward head in the second part
    seed: int = 1
    device: str = "auto"
    kept: int = 20_000  # rows written beside the checkpoint


# ---- Recording -----------------------------------------------------------------------------------


def record(number, args, sizes, folder):
    """A process that records segments, with the newest policies, until folder/stop exists."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that learns says when to stop
    os.nice(5)
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    torch.manual_seed(args.seed * 1000 + number)
    np.random.seed(args.seed * 1000 + number)
    steps = [None, 25, 40, 80, 40, 150, 25][number % 7]
    # Of every seven the first one starts as the environment does.
    speed = args.start_speed * [0.0, 1.0, 0.5, 1.0, 0.25, 0.5, 0.75][number % 7]
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        envs = make_envs(args.env_id, TOGETHER, sizes.image_size, steps, start_speed=speed)
    draw = DRAW(sizes)
    policies = {
        "task": Policy(sizes, draw, by_mean=True, noise=args.act_noise),
        "explore": Policy(sizes, draw, by_mean=True),
    }
    # How the episodes of this process begin; the first one only looks at the policy as it is.
    names = ["task"] if number == 0 else ["random", "explore", "task", "noisy", "noisy", "task"]
    who = np.full(TOGETHER, "random", "<U8")
    noise = held_noise(np.zeros((TOGETHER, sizes.action_size), np.float32), 1.0, args.gain)
    obs, _ = envs.reset(seed=args.seed * 100_000 + number * 1000)
    reward = np.zeros(TOGETHER)
    first = np.ones(TOGETHER, bool)
    last = terminal = np.zeros(TOGETHER, bool)
    known = 0.0
    count = 0
    weights = folder / "weights.pt"
    learner = multiprocessing.parent_process()
    while learner.is_alive() and not (folder / "stop").exists():
        if weights.exists() and weights.stat().st_mtime > known:
            known = weights.stat().st_mtime
            contents = torch.load(weights, weights_only=True)
            draw.load_state_dict(contents["draw"])
            for name, policy in policies.items():
                policy.actor.load_state_dict(contents[name])
        if len(list(folder.glob("*.npz"))) > 12:  # the learner wants no more
            time.sleep(0.1)
            continue
        rows = []
        for _ in range(SEGMENT):
            new = np.random.choice(names, TOGETHER) if known else np.full(TOGETHER, "random")
            who = np.where(first, new, who)
            noise = held_noise(noise, args.hold, args.gain)
            action = noise.copy()
            for name, policy in policies.items():
                mine = (who == name) | ((who == "noisy") & (name == "task"))
                if mine.any():
                    action[mine] = policy(obs["image"][mine], obs["vector"][mine])
            noisy = (who == "noisy") | (who == "explore")
            action = np.where(noisy[:, None], np.clip(action + 0.3 * noise, -1.0, 1.0), action)
            flags = {"is_first": first, "is_terminal": terminal, "quiet": who == "task"}
            rows.append({**obs, "action": action, "reward": reward, **flags})
            obs, reward, terminal, truncated, _ = envs.step(action)
            first = last
            last = terminal | truncated
        count += 1
        chunk = {key: np.stack([row[key] for row in rows], 1) for key in rows[0]}
        part = folder / f"{number:02d}-{count:06d}.part"
        with open(part, "wb") as file:
            np.savez(file, **chunk)
        part.rename(part.with_suffix(".npz"))
    envs.close()


class Rows:
    """The newest recorded segments, on the device; else as the replay of stage 1."""

    def __init__(self, args, sizes, device):
        self.size = args.rows // SEGMENT
        self.added = 0
        L = sizes.image_size
        shapes = {
            "image": ((L, L, sizes.channels), torch.uint8),
            "vector": ((sizes.vector_size,), torch.float32),
            "action": ((sizes.action_size,), torch.float32),
            "reward": ((), torch.float32),
            "is_first": ((), torch.bool),
            "is_terminal": ((), torch.bool),
        }
        self.data = {
            key: torch.zeros(self.size, SEGMENT, *shape, dtype=kind, device=device)
            for key, (shape, kind) in shapes.items()
        }
        self.paid = None  # (n,), numbers of rows with a reward
        self.encode = None  # in the second part: numbers of segments -> their log_q

    def __len__(self):
        return min(self.added, self.size)

    def read(self, folder, real, most=8):
        """Takes in up to `most` recorded files; appends the rewards of quiet steps of the first
        recorder to `real`."""
        files = sorted(folder.glob("*.npz"), key=lambda file: file.name[3:])[:most]
        for file in files:
            with np.load(file) as npz:
                chunk = dict(npz)
            file.unlink()
            quiet = chunk.pop("quiet")
            if file.name.startswith("00-") and quiet.any():
                real.append(float(chunk["reward"][quiet].mean()))
            n = len(quiet)
            place = (self.added + torch.arange(n)) % self.size
            place = place.to(self.data["reward"].device)
            for key, value in chunk.items():
                self.data[key][place] = torch.from_numpy(value).to(self.data[key])
            if self.encode is not None:
                self.data["log_q"][place] = self.encode(place)
            self.added += n
        if files:
            unusual = (self.data["reward"][: len(self)] != 0) & ~self.data["is_first"][: len(self)]
            self.paid = unusual.flatten().nonzero().squeeze(1)
        return len(files)

    def places(self, B, T, rewarded=0.0):
        """Numbers of rows (B, T), of random sequences; a share `rewarded` holds a paid row."""
        device = self.data["reward"].device
        segment = torch.randint(len(self), (B,), device=device)
        start = torch.randint(SEGMENT - T + 1, (B,), device=device)
        n = round(rewarded * B) if self.paid is not None and len(self.paid) else 0
        if n:
            pick = self.paid[torch.randint(len(self.paid), (n,), device=device)]
            before = torch.randint(T, (n,), device=device)
            segment[:n] = pick // SEGMENT
            start[:n] = (pick % SEGMENT - before).clamp(0, SEGMENT - T)
        return (segment * SEGMENT + start)[:, None] + torch.arange(T, device=device)

    def take(self, place, *keys):
        """A dict of the arrays `keys` at the rows `place` (...), (..., *shape of a row)"""
        return {key: self.data[key].flatten(0, 1)[place] for key in keys}

    def sample(self, B, T, device=None, rewarded=0.0):
        """As Replay.sample"""
        keys = ("image", "vector", "action", "reward", "is_first", "is_terminal")
        return self.take(self.places(B, T, rewarded), *keys)


# ---- Learning ------------------------------------------------------------------------------------


class Graphed:
    """function(*tensors) -> tensors, dicts of them or nothing, a CUDA graph from the first call on.

    The results lie where the last call's did, so they are to be copied or used before the next.
    Where there is no GPU, or recording fails, the function is simply called.
    """

    def __init__(self, name, function, device):
        self.name = name
        self.function = function
        self.graph = None
        self.failed = device.type != "cuda"

    def __call__(self, *tensors):
        if self.failed:
            return self.function(*tensors)
        if self.graph is None:
            self.record(tensors)
            if self.failed:
                return self.function(*tensors)
        for mine, given in zip(self.inputs, tensors, strict=True):
            mine.copy_(given)
        self.graph.replay()
        return self.outputs

    def record(self, tensors):
        """Three calls to warm up, which count like any other, and the graph"""
        self.inputs = [x.clone() for x in tensors]
        try:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(3):
                    self.function(*self.inputs)
            torch.cuda.current_stream().wait_stream(stream)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self.outputs = self.function(*self.inputs)
            self.graph = graph
            print(f"{self.name}: recorded", flush=True)
        except Exception as e:  # slower, but it works
            self.failed = True
            torch.cuda.synchronize()
            print(f"{self.name}: no graph, {type(e).__name__}: {str(e)[:300]}", flush=True)


def compile_cnn(cnn):
    """Compiles encoder or decoder, for updates; without gradients it stays as it is. LayerNorm over
    few channels is slow on a GPU otherwise."""
    eager = cnn.forward
    fast = torch.compile(eager, dynamic=False)
    torch._dynamo.config.suppress_errors = True  # what does not compile runs as it is
    cnn.forward = lambda x: fast(x) if torch.is_grad_enabled() else eager(x)


def adam_of(groups, device):
    """Adam whose learning rates are tensors, so that a graph reads what they are now"""
    on_gpu = device.type == "cuda"
    for group in groups:
        group["params"] = list(group["params"])
        if on_gpu:
            group["lr"] = torch.tensor(float(group["lr"]), device=device)
    return torch.optim.Adam(groups, eps=1e-8, fused=True, capturable=on_gpu)


def set_rate(adam, *rates):
    """A learning rate for each of the parameter groups"""
    for group, rate in zip(adam.param_groups, rates, strict=True):
        if torch.is_tensor(group["lr"]):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


class Learner:
    """A policy that learns by lookahead, as stage1.improve, with larger batches and graphs"""

    def __init__(self, name, settings, draw, dynamics, reward_of, device):
        self.policy = ActorCritic(draw.sizes).to(device)
        self.mean_actor = copy.deepcopy(self.policy.actor)
        p = self.policy
        groups = [{"params": p.actor.parameters(), "lr": 1e-3}]
        self.adam = adam_of([*groups, {"params": p.critic.parameters(), "lr": 3e-3}], device)
        self.memory = deque(maxlen=20)
        self.settings = settings
        self.ends = None

        def compare(z, sigma, alive):
            given = (settings, draw, dynamics, p)
            return stage1.lookahead(*given, z, sigma, alive, reward_of)

        def learn(z, a, R, w):
            loss = stage1.lesson_loss(p, z, a, R, w)
            stage1.gradient_step(self.adam, loss, 100.0)
            p.update_slow_critic(0.05)
            follow(self.mean_actor, p.actor, 0.003)

        self.compare = Graphed(f"{name} lookahead", compare, device)
        self.learn = Graphed(f"{name} lessons", learn, device)

    def improve(self, z, sigma, alive):
        """One update, from z, sigma (B, S, K) and alive (B,)"""
        start = stage1.continued(self.settings, self.ends, z, sigma, alive)
        lessons, metrics, ends = self.compare(*start)
        self.ends = tuple(x.clone() for x in ends)
        self.memory.append({name: value.clone() for name, value in lessons.items()})
        for _ in range(self.settings.lesson_steps):
            lessons = self.memory[np.random.randint(len(self.memory))]
            pick = torch.randint(len(lessons["w"]), (512,), device=z.device)
            self.learn(*(lessons[name][pick] for name in ("z", "a", "R", "w")))
        return metrics


def latent_loss(draw, dynamics, log_q, z, data, open_loop):
    """1.5 KL(q || p), which teaches f, and the reward head's loss, on sequences of latents. No free
    nats: they keep a latent from collapsing, and here it is fixed.

    In the first `open_loop` sequences z_{t-1} is f's own prediction, with the gradient through
    time, where the sequence does not begin anew.

    Args: log_q, z (B, T, S, K), z samples of q; data: action (B, T, A), reward, is_first (B, T).
    Returns: loss, KL and the reward's loss, ().
    """
    first = torch.cat([torch.ones_like(data["is_first"][:, :1]), data["is_first"][:, 1:]], 1)
    z0, sigma0 = draw.initial()
    own = torch.arange(len(z), device=z.device)[:, None, None] < open_loop
    sigma, before = sigma0, z0
    us = []
    for t in range(z.shape[1]):
        begins = first[:, t, None, None]
        sigma = torch.where(begins, sigma0, sigma)
        before = torch.where(begins, z0, before)
        action = torch.where(first[:, t, None], 0.0, data["action"][:, t - 1])
        u = dynamics(before, sigma, action)
        sigma = softmax(u)
        us.append(u)
        # The first prediction of a sequence rests on nothing.
        before = torch.where(own & ~begins, dynamics.prior(sigma), z[:, t])
    u = torch.stack(us, 1)
    kl = kl_categorical(log_q, unimix(u)) * ~first  # (B, T)
    reward = -twohot_log_prob(draw.reward_head(z.flatten(-2)), data["reward"])
    reward = reward * ~data["is_first"]
    mean_kl = kl.sum() / (~first).sum().clamp(min=1)
    return 1.5 * mean_kl + reward.mean(), mean_kl, reward.mean()


class Training:
    """What both parts share: the networks, the rows, the clock and the log"""

    def __init__(self, args, settings, sizes, folder, recorders, device):
        self.args = args
        self.recorders = recorders
        self.settings = settings
        self.folder = folder
        self.device = device
        self.draw = DRAW(sizes).to(device, memory_format=torch.channels_last)
        if device.type == "cuda":
            compile_cnn(self.draw.encoder.cnn)
            compile_cnn(self.draw.decoder.cnn)
        self.dynamics = Rectified(self.draw)
        embed_size = self.draw.encoder.embed_size
        self.ensemble = stage1.Ensemble(sizes, embed_size, settings.ensemble, 64).to(device)
        starts = min(512, args.starts)
        less = dataclasses.replace(settings, ahead=2, states=512, starts=starts, lesson_steps=5)
        given = (self.draw, self.dynamics)
        self.task = Learner("task", settings, *given, self.task_reward, device)
        self.explore = Learner("explore", less, *given, self.explore_reward, device)
        self.rows = Rows(args, sizes, device)
        self.real = deque(maxlen=20)  # mean rewards of the newest segments of the policy alone
        self.updates = 0
        self.metrics = {}
        self.lines = []
        self.shown = self.published = self.begin = time.time()

    def task_reward(self, z, sigma, action, z_next):
        reward = self.draw.reward(z_next)
        return torch.where(reward.abs() < self.settings.least_reward, 0.0, reward)

    def explore_reward(self, z, sigma, action, z_next):
        return self.ensemble.disagreement(sigma, z, action)

    def go_on_from(self, checkpoint):
        """Takes the networks of a checkpoint of stage 1, or of this script"""
        sizes = self.draw.sizes
        self.draw.load_state_dict(load_draw(checkpoint).state_dict())
        for learner, name in ((self.task, "task"), (self.explore, "explore")):
            found = load_module(checkpoint, f"{name}_actor", lambda: Actor(sizes)).state_dict()
            learner.policy.actor.load_state_dict(found)
            learner.mean_actor.load_state_dict(found)
        found = load_module(checkpoint, "task_critic", lambda: Critic(sizes)).state_dict()
        self.task.policy.critic.load_state_dict(found)
        self.task.policy.slow_critic.load_state_dict(found)
        self.publish()

    def read(self):
        """Takes in what was recorded: how many files"""
        if not all(process.is_alive() for process in self.recorders):
            raise UserError("a process that records has ended; above it says why")
        return self.rows.read(self.folder, self.real)

    def wait_for_rows(self):
        """Until --begin rows are there; the clock of the log starts then."""
        while len(self.rows) * SEGMENT < self.args.begin:
            if not self.read():
                time.sleep(0.2)
        print(f"{len(self.rows) * SEGMENT} rows", flush=True)
        self.begin = time.time()

    def publish(self):
        """Writes the weights for the recorders."""
        networks = {"draw": self.draw, "task": self.task.mean_actor}
        networks["explore"] = self.explore.mean_actor
        contents = {}
        for name, network in networks.items():
            contents[name] = {key: w.cpu() for key, w in network.state_dict().items()}
        part = self.folder / "weights.part"
        torch.save(contents, part)
        part.rename(self.folder / "weights.pt")
        self.published = time.time()

    def serve(self, part, by_policies=True):
        """After an update: new rows, weights for the recorders, a line in the log"""
        self.updates += 1
        now = time.time()
        wanted = self.args.begin + self.args.rate * (now - self.begin)
        if self.updates % 4 == 0 and self.rows.added * SEGMENT < wanted:
            self.read()
        if by_policies and now - self.published > 8:
            self.publish()
        if now - self.shown > 10:
            self.show(part)

    def show(self, part):
        """A line of figures. UserError: one is not finite, so there is nothing to save."""
        self.shown = time.time()
        line = {"seconds": round(self.shown - self.begin), "part": part, "updates": self.updates}
        line["rows"] = self.rows.added * SEGMENT
        line |= {name: float(f"{float(value):.4g}") for name, value in self.metrics.items()}
        wrong = [name for name, value in line.items() if name != "part" and not np.isfinite(value)]
        if wrong:
            raise UserError(f"{wrong[0]} is not finite; nothing was saved")
        if self.real:
            line["real return of 500 steps"] = round(500 * float(np.mean(self.real)), 1)
        self.lines.append(line)
        print(json.dumps(line), flush=True)
        (self.args.out.parent / "log.json").write_text(json.dumps(self.lines))


def imagined(metrics):
    """The metrics of a policy's update, by the names in the log"""
    return {f"imagined {name}": value for name, value in metrics.items()}


def learn_all(t, args, settings):
    """The first part: stage 1, but for the order"""
    draw_adam = adam_of([{"params": t.draw.parameters(), "lr": args.lr}], t.device)
    ensemble_adam = adam_of([{"params": t.ensemble.parameters(), "lr": args.lr}], t.device)
    names = ("image", "vector", "action", "reward", "is_first", "is_terminal")

    def model_step(soft, *tensors):
        data = dict(zip(names, tensors, strict=True))
        loss, found, (embed, z, sigma) = stage1.world_model_loss(t.draw, data, settings, soft)
        stage1.gradient_step(draw_adam, loss, 1000.0)
        error = t.ensemble.loss(sigma, z, data["action"], embed, data["is_first"])
        stage1.gradient_step(ensemble_adam, error, 100.0)
        return {key: value.detach() for key, value in found.items()}, z, sigma

    model_step = Graphed("world model", model_step, t.device)
    began = time.time()
    while (p := (time.time() - began) / (60 * args.minutes * args.joint)) < 1.0:
        rate = args.lr * min(1.0, (t.updates + 1) / 300) * (0.55 + 0.45 * math.cos(math.pi * p))
        set_rate(draw_adam, rate)
        set_rate(ensemble_adam, rate)
        soft = torch.tensor(max(0.0, 1.0 - t.updates / settings.soft_updates), device=t.device)
        data = t.rows.sample(args.batch, args.length, rewarded=settings.rewarded)
        found, z, sigma = model_step(soft, *(data[name] for name in names))
        t.metrics |= found
        by_policies = t.updates >= args.policy_start
        for learner, every in ((t.task, args.policy_every), (t.explore, 2 * args.policy_every)):
            if by_policies and t.updates % every == 0:
                pick = torch.randperm(args.batch * args.length, device=t.device)
                pick = pick[: learner.settings.starts]
                alive = 1.0 - data["is_terminal"].flatten()[pick].float()
                start = (z.flatten(0, 1)[pick], sigma.flatten(0, 1)[pick], alive)
                result = learner.improve(*start)
                t.metrics |= imagined(result) if learner is t.task else {}
        t.serve(1, by_policies)
    t.show(1)


def learn_on_latents(t, args, settings):
    """The second part: f, the reward head and the task policy; the encoder is frozen."""
    draw, rows, device = t.draw, t.rows, t.device
    t.metrics = {}

    @torch.no_grad()
    def encode(place):
        images, vectors = rows.data["image"][place], rows.data["vector"][place]
        return draw.posterior(draw.encoder(images, vectors)).half()

    shape = (rows.size, SEGMENT, draw.sizes.S, draw.sizes.K)
    rows.data["log_q"] = torch.zeros(shape, dtype=torch.float16, device=device)
    for i in range(0, len(rows), 16):
        place = torch.arange(i, min(i + 16, len(rows)), device=device)
        rows.data["log_q"][place] = encode(place)
    rows.encode = encode
    learns = [*draw.dynamics_net.parameters(), draw.initial_logits, *draw.reward_head.parameters()]
    f_adam = adam_of([{"params": learns, "lr": args.f_lr}], device)
    names = ("log_q", "action", "reward", "is_first")

    def f_step(*tensors):
        data = dict(zip(names, tensors, strict=True))
        log_q = data["log_q"].float()
        z = sample_onehot(log_q.exp())
        own = round(args.open_loop * len(z))
        loss, kl, reward = latent_loss(draw, t.dynamics, log_q, z, data, own)
        stage1.gradient_step(f_adam, loss, 1000.0)
        return {"f/kl": kl.detach(), "f/reward": reward.detach()}

    @torch.no_grad()
    def begin_states(log_q, action, is_first):
        z = sample_onehot(log_q.float().exp())
        sigma = softmax(draw.observe(z, action, is_first))
        return log_q.float().exp(), sigma  # lookahead starts from q itself, as in stage 3

    f_step = Graphed("f", f_step, device)
    begin_states = Graphed("starts", begin_states, device)
    began = time.time()
    seconds = 60 * args.minutes * (1.0 if args.model else 1.0 - args.joint)
    while (p := (time.time() - began) / seconds) < 1.0:
        fall = 0.5 + 0.5 * math.cos(math.pi * p)
        set_rate(f_adam, args.f_lr * (0.02 + 0.98 * fall))
        set_rate(t.task.adam, 1e-3 * fall, 3e-3 * fall)
        place = rows.places(args.f_batch, args.length, settings.rewarded)
        t.metrics |= f_step(*rows.take(place, *names).values())
        if t.updates % max(1, args.policy_every // 2) == 0:
            place = rows.places(args.starts, 4, 0.1)
            data = rows.take(place, *names, "is_terminal")
            z, sigma = begin_states(data["log_q"], data["action"], data["is_first"])
            pick = torch.randperm(4 * args.starts, device=device)[: args.starts]
            alive = 1.0 - data["is_terminal"].flatten()[pick].float()
            start = (z.flatten(0, 1)[pick], sigma.flatten(0, 1)[pick], alive)
            t.metrics |= imagined(t.task.improve(*start))
        t.serve(2)


def save(t, args, settings, sizes):
    """The checkpoint, as of stage 1, and some rows"""
    pick = torch.randperm(len(t.rows), device=t.device)[: max(1, args.kept // SEGMENT)]
    kept = {}
    for key, value in t.rows.data.items():
        if key != "log_q":
            kept[key] = value[pick].flatten(0, 1).cpu().numpy()
    kept["is_first"][::SEGMENT] = True
    save_dataset(args.out.parent / "rows.npz", kept)
    save_checkpoint(
        args.out,
        stage="draw_pretrain",
        args=dataclasses.asdict(settings),
        sizes=dataclasses.asdict(sizes),
        updates=t.updates,
        draw=t.draw.state_dict(),
        task_actor=t.task.mean_actor.state_dict(),
        task_critic=t.task.policy.critic.state_dict(),
        explore_actor=t.explore.mean_actor.state_dict(),
        source_range=stage1.source_range(t.draw, t.rows, settings, t.device),
    )
    print(f"wrote {args.out}", flush=True)


def check(args):
    """Raises UserError for a flag that makes no sense."""
    check_range(args, 1e-3, 10**5, "minutes")
    check_range(args, 0.01, 0.99, "joint")
    check_range(args, 1, 1000, "recorders")
    check_range(args, 1e-9, 10**9, "rate", "hold", "gain")
    check_range(args, SEGMENT * TOGETHER, 10**9, "rows")
    check_range(args, 1, args.rows // SEGMENT * SEGMENT, "begin")
    check_range(args, 2, SEGMENT, "length")
    check_range(args, 1, 65536, "batch", "f_batch", "states", "ahead", "policy_every")
    check_range(args, 1, args.batch * args.length, "starts")
    check_range(args, 0, 10**9, "policy_start", "start_speed", "act_noise", "vector_scale", "kept")
    check_range(args, 0, 1, "gamma", "open_loop", "lr", "f_lr")


def interrupted(*_):
    """Ends the script from a signal handler, where print is not allowed."""
    os.write(2, b"\ninterrupted; nothing was saved\n")
    raise SystemExit(130)


def main(args: Args):
    device = prepare(args)
    on_interrupt(interrupted)
    check(args)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.set_float32_matmul_precision("high")
    flags = {"image_size": 64, "S": 96, "units": 256, "image_scale": 100.0}
    given = "env_id seed hold gain start_speed batch length starts states gamma ahead lr "
    given += "vector_scale policy_every policy_start"
    flags |= {name: getattr(args, name) for name in given.split()}
    settings = dataclasses.replace(stage1.LAPTOP, run_dir=None, **flags)
    envs = make_envs(args.env_id, 1, settings.image_size)
    networks = ("S", "K", "cnn_depth", "vector_units", "vector_layers", "units", "actor_units")
    sizes = sizes_of(envs, **{name: getattr(settings, name) for name in networks})
    checkpoint = None
    if args.model is not None:
        checkpoint = load_checkpoint(args.model, ("draw_pretrain",), device)
        with explained(f"{args.model} is damaged: its sizes make no sense"):
            sizes = Sizes(**checkpoint["sizes"])
        check_sizes(args.env_id, envs, sizes)
    envs.close()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    in_memory = os.path.isdir("/dev/shm") and shutil.disk_usage("/dev/shm").free > 2**31
    folder = Path(tempfile.mkdtemp(dir="/dev/shm" if in_memory else None))
    spawn = multiprocessing.get_context("spawn")
    recorders = []
    for number in range(args.recorders):
        given = (number, args, sizes, folder)
        recorders.append(spawn.Process(target=record, args=given, daemon=True))
        recorders[-1].start()
    try:
        training = Training(args, settings, sizes, folder, recorders, device)
        if checkpoint is not None:
            training.go_on_from(checkpoint)
        training.wait_for_rows()
        if args.model is None:
            learn_all(training, args, settings)
        learn_on_latents(training, args, settings)
        training.show(2)
        save(training, args, settings, sizes)
    finally:
        (folder / "stop").touch()
        for process in recorders:
            process.join(20)
            process.kill()
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main(tyro.cli(Args))
