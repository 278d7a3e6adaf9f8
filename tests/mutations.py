"""Plausible mistakes, one line each: applies each one to a temporary copy of the sources and runs the tests that should notice it.

    python tests/mutations.py              # all of them, some minutes
    python tests/mutations.py reward kl    # those whose name holds one of the words

Prints which mistakes survive; the exit status is their number. A mistake that no longer applies counts too: mend its line here.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COMMON, STAGE_1, STAGE_2, STAGE_3, DEPLOY = "common.py", "draw_pretrain.py", "redraw_adapt.py", "train_policy.py", "deploy_duckiebot.py"

DISTRIBUTIONS = "method/test_oracles.py -k unimix or symlog or twohot or samples or actor"
BELIEF = "method/test_oracles.py -k belief"
MODEL = "method/test_oracles.py -k world_model or sides"
ENSEMBLE = "method/test_oracles.py -k ensemble"
POLICY_1 = "method/test_oracles.py -k of_stage_1"
POLICY_3 = "method/test_oracles.py -k of_stage_3"
ROWS = "method/test_alignment.py"
GRADIENTS = "method/test_gradients.py"
LOOKS = "method/test_augment.py -k clean_one or identity"
ENVIRONMENTS = "data/test_environments.py -k last_of_two_frames"
DRIVE = "robot/test_deploy.py -k kinematics_with or colours or split"
SPEED, TORCHRUN = "runs/test_speed.py -k two_processes or noticed or bfloat16_is", "runs/test_speed.py -k torchrun"

# name, file, what stands there (once), the mistake, the tests
MUTATIONS = [
    # environments
    ("sum of the reward over the repeat", COMMON, "self.observe(), float(timestep.reward),",
     "self.observe(), float(timestep.reward) * self.action_repeat,", ENVIRONMENTS),
    # distributions
    ("unimix without the number of classes", COMMON, "0.99 * probs + 0.01 / probs.shape[-1]", "0.99 * probs + 0.01", DISTRIBUTIONS),
    ("unimix dropped", COMMON, "return torch.log(mix(softmax(logits)))", "return torch.log(softmax(logits))", DISTRIBUTIONS),
    ("KL the other way round", COMMON, "(logp.exp() * (logp - logq))", "(logq.exp() * (logq - logp))", DISTRIBUTIONS),
    ("KL averaged over the variables", COMMON, "(logp.exp() * (logp - logq)).sum((-2, -1))", "(logp.exp() * (logp - logq)).sum(-1).mean(-1)", DISTRIBUTIONS),
    ("symlog loses the sign", COMMON, "return torch.sign(x) * torch.log1p(torch.abs(x))", "return torch.log1p(torch.abs(x))", DISTRIBUTIONS),
    ("two-hot weights swapped", COMMON, "(1 - weight_above) * logp_below + weight_above * logp_above",
     "weight_above * logp_below + (1 - weight_above) * logp_above", DISTRIBUTIONS),
    ("two-hot mean in linear space", COMMON, "symexp((logits.softmax(-1) * bins).sum(-1))", "(logits.softmax(-1) * symexp(bins)).sum(-1)", DISTRIBUTIONS),
    ("two-hot does not end at the range's end", COMMON, "(symlog(x).clamp(-20.0, 20.0) + 20.0)", "(symlog(x).clamp(min=-20.0) + 20.0)", DISTRIBUTIONS),
    ("actor's deviation without its shift", COMMON, "0.9 * torch.sigmoid(s + 2.0) + 0.1", "0.9 * torch.sigmoid(s) + 0.1", DISTRIBUTIONS),
    ("sampling from the wrong tail", COMMON, "(torch.rand_like(cdf[..., :1]) > cdf[..., :-1])",
     "(torch.rand_like(cdf[..., :1]) < cdf[..., :-1])", DISTRIBUTIONS),
    ("no straight-through gradient", COMMON, "return onehot + (probs - probs.detach()) if probs.requires_grad else onehot", "return onehot", GRADIENTS),
    # the belief
    ("unimix on the belief", COMMON, "sigma = softmax(u)  # fed back at t+1", "sigma = mix(softmax(u))  # fed back at t+1", BELIEF),
    ("sigma not rectified", COMMON, "sigma = softmax(u)  # fed back at t+1", "sigma = softmax(self.dynamics(z_prev, sigma, a_prev))", BELIEF),
    ("a_t instead of a_{t-1}", COMMON, "torch.where(is_first[:, t, None], 0.0, action[:, t - 1])",
     "torch.where(is_first[:, t, None], 0.0, action[:, t])", BELIEF),
    ("z_t instead of z_{t-1}", COMMON, "torch.where(first[:, t], z0, z[:, t - 1])", "torch.where(first[:, t], z0, z[:, t])", BELIEF),
    ("the belief goes on over a border", COMMON, "sigma = torch.where(first[:, t], sigma0, sigma)", "pass", BELIEF),
    ("the action goes on over a border", COMMON, "a_prev = torch.where(is_first[:, t, None], 0.0, action[:, t - 1])", "a_prev = action[:, t - 1]", BELIEF),
    ("actions beyond the bounds", COMMON, "        action = action / action.abs().clamp(min=1.0)", "        pass", BELIEF),
    # stage 1: the world model and the ensemble
    ("the encoder sees the clean frame", STAGE_1, "embed = draw.encoder(seen, data", "embed = draw.encoder(data[\"image\"], data", LOOKS),
    ("the decoder is shown the changed frame", STAGE_1, "draw, z, data[\"image\"], data[\"vector\"])  # (B, T) each",
     "draw, z, seen, data[\"vector\"])  # (B, T) each", LOOKS),
    ("no strength still changes the looks", STAGE_1, "return strength * torch.empty", "return torch.empty", LOOKS),
    ("KL balance swapped", STAGE_1, "1.5 * kl_dyn.clamp(min=1.0) + 0.5 * kl_rep.clamp(min=1.0)",
     "0.5 * kl_dyn.clamp(min=1.0) + 1.5 * kl_rep.clamp(min=1.0)", MODEL),
    ("dynamics KL without its detach", STAGE_1, "kl_categorical(q.detach(), p)", "kl_categorical(q, p)", MODEL),
    ("representation KL without its detach", STAGE_1, "kl_categorical(q, p.detach())", "kl_categorical(q, p)", MODEL),
    ("free bits dropped", STAGE_1, "0.5 * kl_rep.clamp(min=1.0)", "0.5 * kl_rep", MODEL),
    ("KL of first steps not masked", STAGE_1, "0.5 * kl_rep.clamp(min=1.0)) * ~first", "0.5 * kl_rep.clamp(min=1.0))", MODEL),
    ("the first step of a sequence not masked", STAGE_1, "    first[:, 0] = True", "    pass", MODEL),
    ("reward shifted by one", STAGE_1, 'draw.reward_head(z.flatten(-2)), data["reward"])',
     'draw.reward_head(z.flatten(-2)), data["reward"].roll(-1, 1))', MODEL),
    ("a time limit counts as an end", STAGE_1, '1.0 - data["is_terminal"].float(), reduction', '1.0 - data["is_last"].float(), reduction', MODEL),
    ("prior without unimix", STAGE_1, "p = unimix(u)  #", "p = u.log_softmax(-1)  #", MODEL),
    ("vector target without symlog", STAGE_1, '- symlog(vector)', '- vector', MODEL),
    ("the ensemble predicts the present", STAGE_1, "embed[:, 1:] @ self.projection", "embed[:, :-1] @ self.projection", ENSEMBLE),
    ("the ensemble learns over borders", STAGE_1, "* ~is_first[:, 1:]).mean()", "* ~is_first[:, :-1]).mean()", ENSEMBLE),
    ("disagreement as a variance", STAGE_1, ".std(0).mean(-1)", ".var(0).mean(-1)", ENSEMBLE),
    ("time limits recorded as ends", STAGE_1, "first, last, terminal = last, terminated | truncated, terminated",
     "first, last, terminal = last, terminated | truncated, terminated | truncated", ROWS),
    # stage 1: the actor-critic
    ("imagination without unimix", STAGE_1, "z = sample_onehot(mix(sigma))", "z = sample_onehot(sigma)", POLICY_1),
    ("imagined reward of leaving", STAGE_1, "reward_fn(zs[:-1], sigmas[:-1], actions, zs[1:])", "reward_fn(zs[:-1], sigmas[:-1], actions, zs[:-1])", POLICY_1),
    ("weights one step early", STAGE_1, "weight * discounts[:-1].detach().cumprod(0)", "weight * discounts[1:].detach().cumprod(0)", POLICY_1),
    ("wrong lambda-return index", STAGE_1, "(1 - args.lam) * values[t + 1] + args.lam * R", "(1 - args.lam) * values[t] + args.lam * R", POLICY_1),
    ("lambda swapped", STAGE_1, "(1 - args.lam) * values[t + 1] + args.lam * R", "args.lam * values[t + 1] + (1 - args.lam) * R", POLICY_1),
    ("return scale forgets", STAGE_1, "0.99 * self.scale + 0.01 * (p95 - p5)", "0.01 * self.scale + 0.99 * (p95 - p5)", POLICY_1),
    ("return scale without its floor", STAGE_1, "scale = new_scale.clamp(min=self.scale_floor)", "scale = self.scale", POLICY_1),
    ("baseline one step late", STAGE_1, "(returns - values[:-1]) / scale", "(returns - values[1:]) / scale", POLICY_1),
    ("slow critic not asked", STAGE_1, "twohot_mean(self.slow_critic(zs[:-1]))", "twohot_mean(self.critic(zs[:-1]))", POLICY_1),
    ("slow critic too quick", STAGE_1, "slow.lerp_(fast, 0.02)", "slow.lerp_(fast, 0.98)", GRADIENTS),
    ("gradients reach the world model", STAGE_1, "actor_loss.backward(inputs=list(self.actor.parameters()), ", "actor_loss.backward(", GRADIENTS),
    # stage 2
    ("residual added after the softmax", STAGE_2, "return self.draw[0].dynamics(z, sigma, action) + self.residual(z, sigma, action)",
     "return (self.draw[0].dynamics(z, sigma, action).softmax(-1) + self.residual(z, sigma, action)).clamp(min=1e-6).log()", BELIEF),
    ("free bits on the residual", STAGE_2, "rectified.log_prior(u)) * mask, mask", "rectified.log_prior(u)).clamp(min=1.0) * mask, mask", BELIEF),
    ("adaptation KL the other way round", STAGE_2, "kl_categorical(q.detach(), rectified.log_prior(u))",
     "kl_categorical(rectified.log_prior(u), q.detach())", BELIEF),
    ("adaptation KL teaches the encoder", STAGE_2, "kl_categorical(q.detach(), rectified.log_prior(u))",
     "kl_categorical(q, rectified.log_prior(u))", GRADIENTS),
    ("belief of the source in the loss", STAGE_2, "u = draw.observe(z, action, is_first, dynamics=rectified)", "u = draw.observe(z, action, is_first)", BELIEF),
    ("unimix on the rectified prior", STAGE_2, 'return sigma if self.method in ("residual", "replace") else mix(sigma)', "return mix(sigma)", BELIEF),
    ("members summed", STAGE_2, "for delta in self.delta]).mean(0)", "for delta in self.delta]).sum(0)", BELIEF),
    ("the first step is learned", STAGE_2, "    mask[:, 0] = False", "    pass", BELIEF),
    ("fine-tuning trains all", STAGE_2, "trained = list(draw.dynamics_net.requires_grad_(True).parameters())",
     "trained = list(draw.requires_grad_(True).parameters())", GRADIENTS),
    ("actions of another row", STAGE_2, "sample_onehot(q.exp()), action[t], is_first[t])", "sample_onehot(q.exp()), action[t - 1], is_first[t])", ROWS),
    ("held-out episodes are trained on", STAGE_2, 'rows = {"train": np.flatnonzero(~held_out)', 'rows = {"train": np.arange(len(held_out))', ROWS),
    ("target rows: first flag one late", STAGE_2, "first, last, terminal = last, terminated | truncated, terminated",
     "first, last, terminal = terminated | truncated, terminated | truncated, terminated", ROWS),
    # stage 3
    ("imagination without the residual", STAGE_3, "sigma = softmax(rectified(z, sigma, action))", "sigma = softmax(draw.dynamics(z, sigma, action))", POLICY_3),
    ("starts with the source's belief", STAGE_3, "draw.observe(z, data_action[t], is_first[t], dynamics=rectified)",
     "draw.observe(z, data_action[t], is_first[t])", POLICY_3),
    ("reward of the state left", STAGE_3, "reward = draw.reward(zs[1:])", "reward = draw.reward(zs[:-1])", POLICY_3),
    ("continue of the state left", STAGE_3, "discount = args.gamma * draw.cont(zs[1:])", "discount = args.gamma * draw.cont(zs[:-1])", POLICY_3),
    ("starts that have ended", STAGE_3, "alive = 1.0 - is_terminal[t].flatten().float()",
     "alive = torch.ones_like(is_terminal[t].flatten().float())", POLICY_3),
    ("wrong lambda-return index in stage 3", STAGE_3, "(1 - args.lam) * value[k + 1] + args.lam * R", "(1 - args.lam) * value[k] + args.lam * R", POLICY_3),
    ("entropy is punished", STAGE_3, "(objective + args.entropy * entropy)", "(objective - args.entropy * entropy)", POLICY_3),
    ("critic of the wrong states", STAGE_3, "twohot_log_prob(logits[:-1], returns.detach())", "twohot_log_prob(logits[1:], returns.detach())", POLICY_3),
    ("slow critic swapped", STAGE_3, "for slow, fast in zip(slow_critic.parameters(), critic.parameters()):",
     "for fast, slow in zip(slow_critic.parameters(), critic.parameters()):", GRADIENTS),
    # fast paths
    ("gradients of one's own batch alone", STAGE_1, "        dist.all_reduce(joint)\n", "", SPEED),
    ("gradients summed over the processes", STAGE_1, "(joint / dist.get_world_size())", "joint", SPEED),
    ("scale of one's own returns alone", STAGE_1, "of_all_processes(returns.detach())", "returns.detach()", SPEED),
    ("a save that one process alone finished counts", STAGE_1, 'if saved and saved["step"] > step and before.exists()', 'if saved and saved["step"] < step and before.exists()', TORCHRUN),
    ("a diverged step is taken on CUDA", COMMON, "self.diverged.copy_(torch.maximum(self.diverged, (~finite).float()))", "pass", SPEED),
    # the drive
    ("trim on the wrong wheel", DEPLOY, '(c["gain"] - c["trim"]) * (v - half)', '(c["gain"] + c["trim"]) * (v - half)', DRIVE),
    ("red and blue swapped", DEPLOY, "interpolation=cv2.INTER_AREA)[..., ::-1].copy()", "interpolation=cv2.INTER_AREA).copy()", DRIVE),
    ("late rows are kept", DEPLOY, " | late[1:] | late[:-1]", "", DRIVE),
    ("losses in bfloat16", COMMON, "return super().forward(x).float()", "return super().forward(x)", SPEED),
]  # fmt: skip


def pytest_of(folder, tests):
    """(exit status, the failed tests) of a selection such as "method/test_oracles.py -k belief" in a copy of the repository"""
    file, _, words = tests.partition(" -k ")
    command = [sys.executable, "-m", "pytest", f"tests/{file}", "-x", "-q", "-p", "no:cacheprovider", *(["-k", words] if words else [])]
    env = os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}  # bytecode could outlive a line that changed within a second
    try:
        done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=600)
    except subprocess.TimeoutExpired:
        return None, []  # a busy machine proves nothing
    return done.returncode, re.findall(r"^FAILED tests/\S*::(\S+)", done.stdout, re.M)


def main(words):
    chosen = [m for m in MUTATIONS if not words or any(w in m[0] for w in words)]
    not_caught = []
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        shutil.copytree(ROOT / "tests", folder / "tests", ignore=shutil.ignore_patterns("__pycache__"))
        for source in ROOT.glob("*.py"):
            shutil.copy(source, folder)
        for tests in dict.fromkeys(m[4] for m in chosen):  # a test that fails anyway shows nothing
            if pytest_of(folder, tests)[0] != 0:
                sys.exit(f"the tests do not pass without a mistake: {tests}")
        for name, file, line, mistake, tests in chosen:
            text, start = (ROOT / file).read_text(), time.time()
            if text.count(line) != 1:
                not_caught.append(name)
                print(f"DOES NOT APPLY  {name}: stands {text.count(line)} times in {file}", flush=True)
                continue
            (folder / file).write_text(text.replace(line, mistake))
            status, failed = pytest_of(folder, tests)
            (folder / file).write_text(text)
            if status == 1:
                print(f"caught    {name}  ({', '.join(failed)}, {time.time() - start:.0f} s)", flush=True)
            else:  # 0: all tests passed; else pytest itself failed, e.g. the changed file can't be imported, which proves nothing
                not_caught.append(name)
                print(f"{'SURVIVES' if status == 0 else 'BROKEN  '}  {name}", flush=True)
    print(f"{len(chosen) - len(not_caught)} of {len(chosen)} mistakes caught" + (f"; not: {', '.join(not_caught)}" if not_caught else ""))
    return len(not_caught)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
