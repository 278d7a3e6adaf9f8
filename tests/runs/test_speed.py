"""The fast paths give what the plain ones give: joint batches of several processes, parallel environments, bfloat16, compiled updates."""

import copy
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from helpers import TINY, user_error

import draw_pretrain
import redraw_adapt
import train_policy
from common import DRAW, Actor, Critic, DivergenceCheck, load_checkpoint, make_envs, softmax

ROOT = Path(__file__).resolve().parents[2]
ARGS = draw_pretrain.Args(horizon=3, starts=4, batch=4, length=5, return_floor=0.01)


def batch_of(n, T=5, sizes=TINY):
    """Replayed sequences (n, T, ...), the same each time"""
    g = torch.Generator().manual_seed(3)
    L = sizes.image_size
    return {
        "image": torch.randint(0, 256, (n, T, L, L, 3), generator=g, dtype=torch.uint8), "vector": torch.randn(n, T, sizes.vector_size, generator=g),
        "action": torch.rand(n, T, sizes.action_size, generator=g) * 2 - 1, "reward": torch.randn(n, T, generator=g),
        "is_first": torch.rand(n, T, generator=g) < 0.2, "is_last": torch.zeros(n, T, dtype=torch.bool), "is_terminal": torch.rand(n, T, generator=g) < 0.2,
    }  # fmt: skip


def without_chance(monkeypatch):
    """Samples become modes, so that a row's result does not depend on the rows beside it."""

    def mode(probs):
        onehot = F.one_hot(probs.detach().argmax(-1), probs.shape[-1]).to(probs)
        return onehot + (probs - probs.detach()) if probs.requires_grad else onehot

    for stage in (draw_pretrain, train_policy):
        monkeypatch.setattr(stage, "sample_onehot", mode)
    monkeypatch.setattr(torch.distributions.Normal, "rsample", lambda self: self.loc)


def one_update(data, args=ARGS, soft=0.0):
    """(loss terms, gradients): of the world model, the ensemble and an actor-critic, with equal weights each time, from sequences `data`"""
    torch.manual_seed(0)
    draw = DRAW(TINY)
    ensemble = draw_pretrain.Ensemble(TINY, draw.encoder.embed_size, 2, 4)
    actor_critic = draw_pretrain.ActorCritic(TINY, args, "reinforce", args.return_floor, "cpu")
    with torch.no_grad():  # these start at zero, which would hide a part of the gradients
        for module in (draw.reward_head, actor_critic.critic):
            for p in module.parameters():
                p += 0.1 * torch.randn_like(p)
    loss, metrics, (embed, z, sigma) = draw_pretrain.world_model_loss(draw, data, args, soft)
    loss.backward()
    draw_pretrain.average_gradients(draw.parameters())
    ensemble_loss = ensemble.loss(sigma, z, data["action"], embed, data["is_first"])
    ensemble_loss.backward()
    draw_pretrain.average_gradients(ensemble.parameters())
    weight = 1.0 - data["is_terminal"].flatten().float()
    found = {}

    def look(terms, batch):  # called when the gradients are complete
        found.update({f"actor-critic {k}": v.detach().clone() for k, v in terms.items() if v.dim() == 0})
        found.update({f"actor-critic {i}": p.grad.clone() for i, p in enumerate([*actor_critic.actor.parameters(), *actor_critic.critic.parameters()])})

    policy = actor_critic.update(draw, z.flatten(0, 1), sigma.flatten(0, 1), weight, lambda z, sigma, action, z_next: draw.reward(z_next), look)
    gradients = {name: p.grad.clone() for module in (draw, ensemble) for name, p in module.named_parameters()}
    losses = {k: metrics[k].detach() for k in ("world_model/loss", "world_model/image", "world_model/vector", "world_model/reward")}
    return losses | {"ensemble": ensemble_loss.detach(), "scale": policy["scale"]}, gradients | found


def process(rank, folder):
    """One of two processes with half of the joint batch each"""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    with pytest.MonkeyPatch.context() as monkeypatch:
        without_chance(monkeypatch)
        losses, gradients = one_update({k: v[2 * rank : 2 * rank + 2] for k, v in batch_of(4).items()})
    torch.save((losses, gradients), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_have_the_gradients_of_the_joint_batch(tmp_path, monkeypatch):
    torch.multiprocessing.spawn(process, (str(tmp_path),), nprocs=2)
    halves = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    without_chance(monkeypatch)
    losses, gradients = one_update(batch_of(4))
    assert gradients and all(g.abs().sum() > 0 for name, g in gradients.items() if "loss" not in name)
    for rank in range(2):
        for name, gradient in gradients.items():
            if name not in ("actor-critic actor_loss", "actor-critic critic_loss"):  # each process has its own; only gradients are averaged
                torch.testing.assert_close(halves[rank][1][name], gradient, rtol=1e-4, atol=1e-6, msg=f"{name}, process {rank}")
    for name in losses:
        torch.testing.assert_close((halves[0][0][name] + halves[1][0][name]) / 2, losses[name], rtol=1e-4, atol=1e-6, msg=name)
    assert not torch.equal(halves[0][0]["world_model/loss"], halves[1][0]["world_model/loss"])  # the halves did differ


def test_torchrun_trains_one_model(tmp_path):
    """Two processes end with the same weights, but for the collected rows; also if they were killed after only one of them had saved once more"""
    flags = """laptop --env-id toy_env:Toy-v0 --steps 400 --prefill 200 --n-envs 2 --hold 4 --replay-size 1000 --S 4 --K 4 --cnn-depth 2 --vector-units 8
        --vector-layers 1 --units 8 --actor-units 8 --batch 4 --length 4 --train-every 8 --horizon 2 --starts 4 --policy-start 4 --policy-every 1 --explore-every 1
        --ensemble 2 --ensemble-target 4 --log-every 5 --save-every 80 --device cpu""".split()
    env = os.environ | {"PYTHONPATH": str(ROOT / "tests" / "support"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(ROOT / "draw_pretrain.py"), *flags, "--run-dir"]
    undisturbed = subprocess.run([*command, "whole"], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=200)
    assert undisturbed.returncode == 0, undisturbed.stderr[-3000:]
    stopped = subprocess.Popen([*command, "run"], cwd=tmp_path, env=env, stderr=subprocess.DEVNULL)
    names = "run", "run-rank1"
    while not all((tmp_path / name / "state-before.pt").exists() for name in names):  # both have saved twice
        assert stopped.poll() is None
        time.sleep(0.01)
    stopped.terminate()
    stopped.wait()
    states = [tmp_path / name / "state.pt" for name in names]
    steps = [load_checkpoint(state, ("state",))["step"] for state in states]
    if steps[0] == steps[1]:
        os.replace(states[1].with_name("state-before.pt"), states[1])
    steps = [load_checkpoint(state, ("state",))["step"] for state in states]
    assert abs(steps[0] - steps[1]) == 40 and max(steps) <= 200  # one of them is a save behind
    done = subprocess.run([*command, "run", "--resume"], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second, whole = (load_checkpoint(tmp_path / name / "draw.pt", ("draw_pretrain",)) for name in (*names, "whole"))
    assert first["updates"] == second["updates"] == 25  # (400 - 200) / 8, as of one process
    for part in ("draw", "task_actor", "explore_actor"):
        for name, value in first[part].items():
            for other in (second, whole):
                torch.testing.assert_close(value, other[part][name], rtol=0, atol=0, msg=name)
    rows = [np.load(next((tmp_path / name / "replay").glob("*.npz")))["vector"] for name in names]
    assert len(rows[0]) == 200 and not np.array_equal(*rows)  # half of the steps each, and other ones


def test_processes_that_can_not_share(tmp_path):
    env = os.environ | {"RANK": "0", "WORLD_SIZE": "3"}
    done = subprocess.run([sys.executable, ROOT / "draw_pretrain.py", "laptop", "--run-dir", tmp_path / "run"], env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "3 processes can't share --n-envs 4" in done.stderr, done.stderr


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
    """The terminal sends it to all processes; those of the environments must live until the run has saved."""
    flags = "laptop --env-id toy_env:ToySlow-v0 --parallel-envs --n-envs 2 --steps 100000 --prefill 90000 --save-every 60 --device cpu --run-dir run".split()
    env = os.environ | {"PYTHONPATH": str(ROOT / "tests" / "support"), "OMP_NUM_THREADS": "1"}
    run = subprocess.Popen([sys.executable, ROOT / "draw_pretrain.py", *flags], cwd=tmp_path, env=env, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while not (tmp_path / "run" / "replay").exists():  # the first save, after 60 steps
        assert run.poll() is None
        time.sleep(0.1)
    time.sleep(1)  # now it waits for the environments
    os.killpg(run.pid, signal.SIGINT)
    stderr = run.communicate(timeout=100)[1]
    assert run.returncode == 130 and "saved after" in stderr and "Traceback" not in stderr and "ERROR" not in stderr, stderr[-2000:]
    assert (tmp_path / "run" / "state.pt").exists()


def test_bfloat16_is_near_float32(monkeypatch):
    """Losses within 2 %, the gradient of world model and ensemble within 10 % of its length, without the jumps of samples (soft latents)"""
    without_chance(monkeypatch)
    plain, gradients = one_update(batch_of(4), soft=1.0)
    with torch.autocast("cpu", torch.bfloat16):
        fast, fast_gradients = one_update(batch_of(4), soft=1.0)
        assert DRAW(TINY).reward_head(torch.zeros(1, TINY.S * TINY.K)).dtype == torch.float32  # what a softmax is taken of
    assert all(v.dtype == torch.float32 for v in [*fast.values(), *fast_gradients.values()])
    for name in set(plain) - {"scale"}:
        torch.testing.assert_close(fast[name], plain[name], rtol=0.02, atol=1e-3, msg=name)
    joint, fast_joint = (torch.cat([g.flatten() for name, g in all.items() if "actor-critic" not in name]) for all in (gradients, fast_gradients))
    assert 0 < (fast_joint - joint).norm() <= 0.1 * joint.norm()  # above 0: it was switched on


def test_compiled_losses_are_the_plain_ones(monkeypatch):
    without_chance(monkeypatch)
    plain, gradients = one_update(batch_of(4))
    torch._dynamo.reset()
    monkeypatch.setattr(draw_pretrain, "world_model_loss", torch.compile(draw_pretrain.world_model_loss))
    monkeypatch.setattr(draw_pretrain.ActorCritic, "losses", torch.compile(draw_pretrain.ActorCritic.losses))
    fast, fast_gradients = one_update(batch_of(4))
    for a, b in ((plain, fast), (gradients, fast_gradients)):
        for name in a:
            torch.testing.assert_close(b[name], a[name], rtol=1e-4, atol=1e-5, msg=name)


def residual_update(data):
    """({"kl": loss of stage 2}, gradients of the residual)"""
    torch.manual_seed(0)
    draw = DRAW(TINY).requires_grad_(False)
    rectified = redraw_adapt.Rectified(draw, "residual", 8)
    for p in rectified.parameters():
        p.data += 0.3 * torch.randn_like(p)
    q = draw.posterior(draw.encoder(data["image"], data["vector"]))  # (B, T, S, K)
    z = F.one_hot(q.argmax(-1), q.shape[-1]).float()
    kl, mask = redraw_adapt.adaptation_loss(draw, rectified, q, z, data["action"], data["is_first"])
    loss = kl.sum() / mask.sum()
    loss.backward()
    return {"kl": loss.detach()}, {name: p.grad.clone() for name, p in rectified.named_parameters()}


def policy_update(data):
    """(losses of stage 3, gradients of actor and critic)"""
    torch.manual_seed(0)
    draw = DRAW(TINY).requires_grad_(False)
    rectified, modules = redraw_adapt.Rectified(draw, "residual", 8).requires_grad_(False), [Actor(TINY), Critic(TINY), Critic(TINY)]
    for p in [p for module in (rectified, draw.reward_head, *modules) for p in module.parameters()]:
        p.data += 0.1 * torch.randn_like(p)
    z = F.one_hot(torch.randint(0, TINY.K, (20, TINY.S)), TINY.K).float()
    sigma, alive = softmax(torch.randn(20, TINY.S, TINY.K)), (torch.arange(20) % 5 > 0).float()
    args = train_policy.Args("", "", horizon=3, return_floor=0.01)
    actor_loss, critic_loss, *_ = train_policy.losses(args, draw, rectified, *modules, torch.zeros(()), z, sigma, alive)
    (actor_loss + critic_loss).backward()
    gradients = {f"{i} {name}": p.grad.clone() for i, module in enumerate(modules[:2]) for name, p in module.named_parameters()}
    return {"actor": actor_loss.detach(), "critic": critic_loss.detach()}, gradients


@pytest.mark.parametrize("update, module, name", [(residual_update, redraw_adapt, "adaptation_loss"), (policy_update, train_policy, "losses")])
def test_stages_2_and_3_compiled_and_in_bfloat16(monkeypatch, update, module, name):
    """Compiled the same to 1e-4; in bfloat16 losses within 2 %, the gradient within 10 % of its length"""
    without_chance(monkeypatch)
    monkeypatch.setattr(torch.distributions.Normal, "rsample", lambda self: self.loc + 0.5 * self.scale)  # of the mode itself the mean would not matter
    plain, gradients = update(batch_of(4))
    assert gradients and all(g.abs().sum() > 0 for g in gradients.values())
    with torch.autocast("cpu", torch.bfloat16):
        rounded, rounded_gradients = update(batch_of(4))
    torch._dynamo.reset()
    monkeypatch.setattr(module, name, torch.compile(getattr(module, name)))
    compiled, compiled_gradients = update(batch_of(4))
    for a, b in ((plain, compiled), (gradients, compiled_gradients)):
        for key in a:
            torch.testing.assert_close(b[key], a[key], rtol=1e-4, atol=1e-5, msg=key)
    for key in plain:
        torch.testing.assert_close(rounded[key], plain[key], rtol=0.02, atol=1e-3, msg=key)
    joint, rounded_joint = (torch.cat([g.flatten() for g in all.values()]) for all in (gradients, rounded_gradients))
    assert rounded_joint.dtype == torch.float32 and 0 < (rounded_joint - joint).norm() <= 0.1 * joint.norm()


@pytest.mark.parametrize("lag", [0, 3])
def test_divergence_is_noticed_later_but_changes_nothing(tmp_path, lag):
    """With a lag, as on CUDA: the optimiser itself leaves the weights as they were before the bad step, and the run ends within `lag` calls."""
    layer = torch.nn.Linear(2, 1)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.1, fused=True)
    check = DivergenceCheck(tmp_path, {"layer": layer, "optimizer": optimizer}, lag)
    weights, calls = [], 0
    with user_error("loss, gradient", "update 3"):
        for update in range(10):
            x = torch.ones(4, 2) * (float("nan") if update == 2 else 1.0)
            loss = layer(x).sum()
            optimizer.zero_grad()
            loss.backward()
            check(update, {"loss": loss, "gradient": layer.weight.grad.norm()}, x=x)
            weights.append(copy.deepcopy(layer.state_dict()))  # before the step
            optimizer.step()
            calls += 1
    assert calls == 2 + lag
    saved = torch.load(tmp_path / "diverged.pt")
    assert saved["batch"]["x"].isnan().all()
    for name, value in (weights[2] if lag else layer.state_dict()).items():
        assert torch.equal(saved["weights"]["layer"][name], value) and value.isfinite().all()
    assert not torch.equal(weights[0]["weight"], saved["weights"]["layer"]["weight"])  # the steps before it were taken


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_no_update_waits_for_the_gpu():
    """and the images of a replay that fits lie there"""
    replay = draw_pretrain.Replay(100, 1, TINY, "cuda")
    no = np.zeros(1, bool)
    for _ in range(60):
        replay.add(image=np.zeros((1, 16, 16, 3), np.uint8), vector=np.ones((1, 2)), action=np.ones((1, 1)), reward=np.ones(1), is_first=no, is_last=no, is_terminal=no)
    assert replay.data["image"].is_cuda
    draw = DRAW(TINY).cuda()
    actor_critic = draw_pretrain.ActorCritic(TINY, ARGS, "reinforce", 0.01, "cuda")
    check = DivergenceCheck("", {"optimizer": actor_critic.optimizer}, lag=100)
    for mode in ("default", "error"):  # the first time may allocate
        torch.cuda.set_sync_debug_mode(mode)
        loss, metrics, (embed, z, sigma) = draw_pretrain.world_model_loss(draw, replay.sample(4, 5, "cuda", 0.5), ARGS, 0.0)
        loss.backward()
        check(0, metrics)
        weight = torch.ones(20, device="cuda")
        actor_critic.update(draw, z.flatten(0, 1), sigma.flatten(0, 1), weight, lambda z, sigma, a, z_next: draw.reward(z_next), lambda terms, batch: check(0, terms, **batch))
    torch.cuda.set_sync_debug_mode("default")
