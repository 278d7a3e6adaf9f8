"""The fast paths give what the plain ones give: several processes, parallel environments, bfloat16,
compiled updates."""

import os
import shlex
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from helpers import TINY, image_shape, read_replay
from stages import ROOT

import draw_pretrain
import redraw_adapt
import train_policy
from common import DRAW, ActorCritic, Rectified, Replay, load_checkpoint, make_envs, softmax

ARGS = draw_pretrain.Args(horizon=3, starts=4, batch=4, length=5, return_floor=0.01)
ENV = os.environ | {"PYTHONPATH": str(ROOT / "tests" / "support"), "OMP_NUM_THREADS": "1"}


def batch_of(n, T=5, sizes=TINY):
    """Replayed sequences (n, T, ...), the same each time"""
    g = torch.Generator().manual_seed(3)
    image = torch.randint(0, 256, image_shape(n, T, sizes=sizes), generator=g, dtype=torch.uint8)
    return {
        "image": image,
        "vector": torch.randn(n, T, sizes.vector_size, generator=g),
        "action": torch.rand(n, T, sizes.action_size, generator=g) * 2 - 1,
        "reward": torch.randn(n, T, generator=g),
        "is_first": torch.rand(n, T, generator=g) < 0.2,
        "is_last": torch.zeros(n, T, dtype=torch.bool),
        "is_terminal": torch.rand(n, T, generator=g) < 0.2,
    }


def without_chance(monkeypatch):
    """Samples become modes, so that a row's result does not depend on the rows beside it."""

    def mode(probs):
        onehot = F.one_hot(probs.detach().argmax(-1), probs.shape[-1]).to(probs)
        return onehot + (probs - probs.detach()) if probs.requires_grad else onehot

    for stage in (draw_pretrain, train_policy):
        monkeypatch.setattr(stage, "sample_onehot", mode)
    shifted = lambda self, *_: self.loc + 0.5 * self.scale  # noqa: E731 (of the mode itself the mean would not matter)
    monkeypatch.setattr(torch.distributions.Normal, "rsample", shifted)
    monkeypatch.setattr(torch.distributions.Normal, "sample", lambda *a: shifted(*a).detach())


def one_update(data, args=ARGS, soft=0.0):
    """(losses, gradients after averaging): of the world model, the ensemble and an actor-critic,
    with equal weights each time, from sequences `data`"""
    torch.manual_seed(0)
    draw = DRAW(TINY)
    ensemble = draw_pretrain.Ensemble(TINY, draw.encoder.embed_size, 2, 4)
    policy = ActorCritic(TINY)
    with torch.no_grad():  # these start at zero, which would hide a part of the gradients
        for module in (draw.reward_head, policy.critic):
            for p in module.parameters():
                p += 0.1 * torch.randn_like(p)
    modules = {"draw": draw, "ensemble": ensemble, "actor": policy.actor, "critic": policy.critic}
    adam = {name: torch.optim.Adam(module.parameters(), 0.0) for name, module in modules.items()}
    both = torch.optim.Adam([*policy.actor.parameters(), *policy.critic.parameters()], 0.0)
    loss, metrics, (embed, z, sigma) = draw_pretrain.world_model_loss(draw, data, args, soft)
    draw_pretrain.gradient_step(adam["draw"], loss, 1e9)
    gradients = {f"draw {name}": p.grad.clone() for name, p in draw.named_parameters()}
    ensemble_loss = ensemble.loss(sigma, z, data["action"], embed, data["is_first"])
    draw_pretrain.gradient_step(adam["ensemble"], ensemble_loss, 1e9)
    alive = 1.0 - data["is_terminal"].flatten().float()
    states = z.flatten(0, 1), sigma.flatten(0, 1)
    policy_loss, found, *_ = draw_pretrain.reinforce(
        args, draw, Rectified(draw), policy, *states, alive, lambda *now: draw.reward(now[-1])
    )
    draw_pretrain.gradient_step(both, policy_loss, 1e9)
    for name in ("ensemble", "actor", "critic"):
        parameters = modules[name].named_parameters()
        gradients |= {f"{name} {key}": p.grad.clone() for key, p in parameters}
    names = ("world_model/loss", "world_model/image", "world_model/vector", "world_model/reward")
    losses = {name: metrics[name].detach() for name in names}
    losses |= {"ensemble": ensemble_loss.detach(), "critic": found["critic_loss"].detach()}
    return losses, gradients


def process(rank, folder):
    """One of two processes with half of the joint batch each"""
    where = f"file://{folder}/meet"
    dist.init_process_group("gloo", init_method=where, rank=rank, world_size=2)
    with pytest.MonkeyPatch.context() as monkeypatch:
        without_chance(monkeypatch)
        half = {key: value[2 * rank : 2 * rank + 2] for key, value in batch_of(4).items()}
        losses, gradients = one_update(half)
    torch.save((losses, gradients), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_have_the_mean_gradient(tmp_path, monkeypatch):
    """of their batches: for what is a mean over the batch, the gradient of the joint batch"""
    torch.multiprocessing.spawn(process, (str(tmp_path),), nprocs=2)
    halves = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    without_chance(monkeypatch)
    losses, gradients = one_update(batch_of(4))
    for name, gradient in gradients.items():
        assert torch.equal(halves[0][1][name], halves[1][1][name])
        # The actor's advantages are divided by each process's own range of returns.
        if not name.startswith("actor"):
            torch.testing.assert_close(halves[0][1][name], gradient, rtol=1e-4, atol=1e-6, msg=name)
    for name in losses:
        mean = (halves[0][0][name] + halves[1][0][name]) / 2
        torch.testing.assert_close(mean, losses[name], rtol=1e-4, atol=1e-6, msg=name)
    name = "world_model/loss"
    assert not torch.equal(halves[0][0][name], halves[1][0][name])  # the halves did differ


def test_torchrun_trains_one_model(tmp_path):
    """Two processes, each with environments and a replay of its own, average their gradients;
    process 0 saves. After a kill both go on from process 0's weights and their own replays."""
    flags = shlex.split(
        """laptop --env-id toy_env:Toy-v0 --steps 400 --prefill 200 --n-envs 2 --hold 4
        --replay-size 1000 --S 4 --K 4 --cnn-depth 2 --vector-units 8 --vector-layers 1 --units 8
        --actor-units 8 --batch 4 --length 4 --train-every 8 --horizon 2 --starts 4
        --policy-start 4 --policy-every 1 --explore-every 1 --ensemble 2 --ensemble-target 4
        --log-every 5 --save-every 80 --device cpu --run-dir run"""
    )
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    command = [*torchrun, "2", str(ROOT / "draw_pretrain.py"), *flags]
    run = tmp_path / "run"
    with open(tmp_path / "stderr", "w") as stderr:
        stopped = subprocess.Popen(command, cwd=tmp_path, env=ENV, stderr=stderr)
    while (
        not (run / "state.pt").exists()
        or load_checkpoint(run / "state.pt", ("state",))["step"] < 160
    ):
        assert stopped.poll() is None, (tmp_path / "stderr").read_text()[-3000:]
        time.sleep(0.05)
    stopped.terminate()
    stopped.wait()
    step = load_checkpoint(run / "state.pt", ("state",))["step"]
    again = {"cwd": tmp_path, "env": ENV, "capture_output": True, "text": True, "timeout": 300}
    done = subprocess.run([*command, "--resume"], **again)
    assert done.returncode == 0, done.stderr[-3000:]
    checkpoint = load_checkpoint(run / "draw.pt", ("draw_pretrain",))
    state = load_checkpoint(run / "state.pt", ("state",))
    assert checkpoint["updates"] == 25 and state["step"] == 400 > step  # flags count per process
    rows = [read_replay(run / name) for name in ("replay", "replay-rank1")]
    for data in rows:
        assert 200 <= len(data["reward"]) <= 400
    n = min(len(data["reward"]) for data in rows)
    assert not np.array_equal(rows[0]["vector"][:n], rows[1]["vector"][:n])
    assert len(rows[0]["reward"]) == 400


@pytest.mark.parametrize("env_id", ["toy_env:Toy-v0", "redraw/PendulumSwingup-v0"])
def test_parallel_environments_do_the_same(env_id):
    """Also at the borders of episodes"""
    seen = []
    for parallel in (False, True):
        envs = make_envs(env_id, 2, 16, episode_steps=7, parallel=parallel)
        rng, rows = np.random.default_rng(0), [envs.reset(seed=5)[0]]
        for _ in range(20):
            action = rng.uniform(-1, 1, (2, 1)).astype(np.float32)
            if parallel:
                envs.step_async(action)
            obs, *rest, _ = envs.step_wait() if parallel else envs.step(action)
            rows += [obs, *rest]
        envs.close()
        seen.append([x for row in rows for x in (row.values() if isinstance(row, dict) else [row])])
    assert all(np.array_equal(a, b) for a, b in zip(*seen, strict=True))


def test_ctrl_c_saves_with_parallel_environments(tmp_path):
    """The terminal sends it to all processes; those of the environments must live until the run has
    saved."""
    flags = shlex.split(
        """laptop --env-id toy_env:ToySlow-v0 --parallel-envs --n-envs 2 --steps 100000
        --prefill 90000 --save-every 60 --device cpu --run-dir run"""
    )
    run = subprocess.Popen(
        [sys.executable, ROOT / "draw_pretrain.py", *flags],
        cwd=tmp_path,
        env=ENV,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while not (tmp_path / "run" / "state.pt").exists():  # the first save, after 60 steps
        assert run.poll() is None
        time.sleep(0.1)
    time.sleep(1)  # now it waits for the environments
    os.killpg(run.pid, signal.SIGINT)
    stderr = run.communicate(timeout=100)[1]
    assert run.returncode == 130 and "saved after" in stderr, stderr[-2000:]
    assert "Traceback" not in stderr and "ERROR" not in stderr, stderr[-2000:]


def near(fast, plain, rtol, atol):
    for name in plain:
        torch.testing.assert_close(fast[name], plain[name], rtol=rtol, atol=atol, msg=name)


def far(fast, plain):
    """The distance of two gradients, in lengths of the second"""
    fast, plain = (torch.cat([g.flatten() for g in all.values()]) for all in (fast, plain))
    return (fast - plain).norm() / plain.norm()


def residual_update(data):
    """({"kl": loss of stage 2}, gradients of the residual)"""
    torch.manual_seed(0)
    draw = DRAW(TINY).requires_grad_(False)
    rectified = Rectified(draw, "residual", 8)
    for p in rectified.parameters():
        p.data += 0.3 * torch.randn_like(p)
    log_q = draw.posterior(draw.encoder(data["image"], data["vector"]))  # (B, T, S, K)
    z = F.one_hot(log_q.argmax(-1), log_q.shape[-1]).float()
    kl, mask = redraw_adapt.residual_loss(
        draw, rectified, log_q, z, data["action"], data["is_first"], l2=0.03
    )
    loss = kl.sum() / mask.sum()
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in rectified.named_parameters()}
    return {"kl": loss.detach()}, gradients


def policy_update(data):
    """(losses of stage 3, gradients of actor and critic)"""
    torch.manual_seed(0)
    draw = DRAW(TINY).requires_grad_(False)
    rectified = Rectified(draw, "residual", 8).requires_grad_(False)
    policy = ActorCritic(TINY)
    for module in (rectified, draw.reward_head, policy):
        for p in module.parameters():
            p.data += 0.1 * torch.randn_like(p)
    z = F.one_hot(torch.randint(0, TINY.K, (20, TINY.S)), TINY.K).float()
    sigma, alive = softmax(torch.randn(20, TINY.S, TINY.K)), (torch.arange(20) % 5 > 0).float()
    args = train_policy.Args("", "", horizon=3, return_floor=0.01)
    loss, metrics, *_ = train_policy.reinforce(
        args, draw, rectified, policy, z, sigma, alive, lambda *now: draw.reward(now[-1])
    )
    loss.backward()
    learns = [*policy.actor.named_parameters(), *policy.critic.named_parameters()]
    gradients = {f"{i} {name}": p.grad.clone() for i, (name, p) in enumerate(learns)}
    return {"all": loss.detach(), "critic": metrics["critic_loss"].detach()}, gradients


UPDATES = [
    (lambda data: one_update(data, soft=1.0), draw_pretrain, "world_model_loss"),
    (residual_update, redraw_adapt, "residual_loss"),
    (policy_update, train_policy, "reinforce"),
]
NAMES = ["stage 1", "stage 2", "stage 3"]


@pytest.mark.parametrize("update, module, name", UPDATES, ids=NAMES)
def test_bfloat16_is_near_float32(monkeypatch, update, module, name):
    """Losses within 2 %, the gradient within 10 % of its length; of stage 1 without the jumps of
    samples (soft latents)"""
    without_chance(monkeypatch)
    plain, gradients = update(batch_of(4))
    with torch.autocast("cpu", torch.bfloat16):
        fast, fast_gradients = update(batch_of(4))
        # What a softmax is taken of
        assert DRAW(TINY).reward_head(torch.zeros(1, TINY.S * TINY.K)).dtype == torch.float32
    assert all(v.dtype == torch.float32 for v in [*fast.values(), *fast_gradients.values()])
    near(fast, plain, rtol=0.02, atol=1e-3)
    if module is draw_pretrain:  # imagined samples jump
        for found in (gradients, fast_gradients):
            for key in [key for key in found if key.startswith(("actor", "critic"))]:
                del found[key]
    assert 0 < far(fast_gradients, gradients) <= 0.1  # above 0: it was switched on


@pytest.mark.parametrize("update, module, name", UPDATES[:2], ids=NAMES[:2])
def test_compiled_losses_are_the_plain_ones(monkeypatch, update, module, name):
    without_chance(monkeypatch)
    plain, gradients = update(batch_of(4))
    torch._dynamo.reset()
    monkeypatch.setattr(module, name, torch.compile(getattr(module, name)))
    fast, fast_gradients = update(batch_of(4))
    near(fast, plain, rtol=1e-4, atol=1e-5)
    near(fast_gradients, gradients, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_no_update_waits_for_the_gpu():
    replay = Replay(100, 1, TINY)
    no = np.zeros(1, bool)
    for _ in range(60):
        row = {"image": np.zeros(image_shape(1), np.uint8), "vector": np.ones((1, 2))}
        row |= {"action": np.ones((1, 1)), "reward": np.ones(1)}
        replay.add(**row, is_first=no, is_last=no, is_terminal=no)
    draw = DRAW(TINY).cuda()
    policy = ActorCritic(TINY).cuda()
    for mode in ("default", "error"):  # the first time may allocate
        torch.cuda.set_sync_debug_mode(mode)
        data = replay.sample(4, 5, "cuda", 0.5)
        loss, _, (embed, z, sigma) = draw_pretrain.world_model_loss(draw, data, ARGS, 0.0)
        loss.backward()
        states = z.flatten(0, 1), sigma.flatten(0, 1), torch.ones(20, device="cuda")
        imagined = (ARGS, draw, Rectified(draw), policy, *states)
        draw_pretrain.reinforce(*imagined, lambda *now: draw.reward(now[-1]))
        draw_pretrain.lookahead(*imagined, lambda *now: draw.reward(now[-1]))
    torch.cuda.set_sync_debug_mode("default")
