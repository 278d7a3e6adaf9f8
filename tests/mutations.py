"""Plausible mistakes, one line each: applies each one to a temporary copy of the sources and runs
the tests that should notice it.

    python tests/mutations.py              # all of them, about half an hour
    python tests/mutations.py reward kl    # those whose name holds one of the words

Prints which mistakes survive; the exit status is their number. A mistake that no longer applies
counts too: mend its lines here.
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

# A source and the tests that should notice; then a name for each mistake, what stands there (once),
# and what stands there by mistake.
MISTAKES = r"""
== common.py | data/test_environments.py -k last_of_two_frames
sum of the reward over the repeat
-return self.observe(), float(timestep.reward),
+return self.observe(), float(timestep.reward) * self.action_repeat,

== common.py | data/test_environments.py -k never_longer or images_instead
a longer limit than the environment's
-(own is None or episode_steps < own)
+True
the newest frame first
-[*(self.frames or [grey] * self.stack)[1:], grey]
+[grey, *(self.frames or [grey] * self.stack)[:-1]]

== common.py | method/test_oracles.py -k unimix or symlog or twohot or samples or actor
unimix without the number of classes
-0.99 * probs + 0.01 / probs.shape[-1]
+0.99 * probs + 0.01
unimix dropped
-return torch.log(mix(softmax(logits)))
+return torch.log(softmax(logits))
KL the other way round
-(log_p.exp() * (log_p - log_q))
+(log_q.exp() * (log_q - log_p))
KL averaged over the variables
-(log_p.exp() * (log_p - log_q)).sum((-2, -1))
+(log_p.exp() * (log_p - log_q)).sum(-1).mean(-1)
symlog loses the sign
-return torch.sign(x) * torch.log1p(torch.abs(x))
+return torch.log1p(torch.abs(x))
two-hot weights swapped
-(1 - weight_above) * log_p_below + weight_above * log_p_above
+weight_above * log_p_below + (1 - weight_above) * log_p_above
two-hot mean in linear space
-symexp((logits.softmax(-1) * bins).sum(-1))
+(logits.softmax(-1) * symexp(bins)).sum(-1)
two-hot does not end at the range's end
-(symlog(x).clamp(-20.0, 20.0) + 20.0)
+(symlog(x).clamp(min=-20.0) + 20.0)
actor's deviation without its shift
-0.9 * torch.sigmoid(s + 2.0) + 0.1
+0.9 * torch.sigmoid(s) + 0.1
sampling from the wrong tail
-(torch.rand_like(cdf[..., :1]) > cdf[..., :-1])
+(torch.rand_like(cdf[..., :1]) < cdf[..., :-1])

== common.py | method/test_gradients.py -k straight or alone
no straight-through gradient
-return onehot + (probs - probs.detach()) if probs.requires_grad else onehot
+return onehot
slow critic that stands
-self.critic.parameters(), strict=True):
+self.slow_critic.parameters(), strict=True):

== common.py | method/test_oracles.py -k belief or residual or mean_kl
unimix on the belief
-            sigma = softmax(u)
+            sigma = mix(softmax(u))
a_t instead of a_{t-1}
-action.roll(1, 1))
+action)
z_t instead of z_{t-1}
-z.roll(1, 1))
+z)
the belief goes on over a border
-            sigma = torch.where(first[:, t, None, None], sigma0, sigma)
+            pass
the action goes on over a border
-a_prev = torch.where(first[..., None], 0.0, action.roll(1, 1))
+a_prev = action.roll(1, 1)
actions beyond the bounds
-        action = action.clamp(-1.0, 1.0)  # as
+        pass  # as
the initial z is the belief
-return F.one_hot(sigma.argmax(-1), self.sizes.K).to(sigma), sigma
+return sigma, sigma
residual added after the softmax
-return base + self.residual(z, action, sigma, base) if self.uses_delta else base
+return (softmax(base) + self.residual(z, action, sigma, base)) if self.uses_delta else base
the residual's inputs in another order
-inputs = [z.flatten(-2), action.clamp(-1.0, 1.0)]
+inputs = [action.clamp(-1.0, 1.0), z.flatten(-2)]
the residual sees the base's logits
-inputs.append(softmax(base).flatten(-2))
+inputs.append(base.flatten(-2))
replace keeps f
-self.uses_f = method != "replace"
+self.uses_f = True
unimix on the rectified prior
-return log_softmax(u) if self.uses_delta else unimix(u)
+return unimix(u)
members summed
-return self.residuals(*inputs).mean(0)
+return self.residuals(*inputs).sum(0)

== common.py | data/test_dataset.py
the reward of first rows counts as unusual
-unusual = (reward != usual) & ~self.data["is_first"][:, : len(self)]
+unusual = reward != usual
actions shifted by two
-action = np.roll(dataset["action"], -1, axis=0)
+action = np.roll(dataset["action"], -2, axis=0)
the action of another episode at last rows
-action[np.roll(first, -1)] = 0.0
+action[first] = 0.0
the oldest rows instead of the newest
-array[-newest:]
+array[:newest]
unwritten rows of a chunk are read
-rows = int(chunk[1]) if chunk else None
+rows = None
ends by is_terminal alone are overlooked
-first[1:] |= dataset["is_last"][:-1] | dataset["is_terminal"][:-1]
+first[1:] |= dataset["is_last"][:-1]
hidden files are read
-glob("[!.]*.npz")
+glob("*.npz")
unusual rewards are the positive ones
-unusual = (reward != usual)
+unusual = (reward > usual)
sequences across the ring's head
-rows = (oldest + start[:, None] + np.arange(T)) % self.length
+rows = (start[:, None] + np.arange(T)) % self.length

== draw_pretrain.py | method/test_augment.py -k clean_one or identity
the encoder sees the clean frame
-embed = draw.encoder(seen, data["vector"])
+embed = draw.encoder(data["image"], data["vector"])
the decoder is shown the changed frame
-vector_loss = draw.reconstruction_errors(z, data["image"], data["vector"])
+vector_loss = draw.reconstruction_errors(z, seen, data["vector"])
no strength still changes the looks
-return strength * torch.empty
+return torch.empty

== draw_pretrain.py | method/test_oracles.py -k world_model or sides
KL balance swapped
-1.5 * kl_dyn.clamp(min=1.0) + 0.5 * kl_rep.clamp(min=1.0)
+0.5 * kl_dyn.clamp(min=1.0) + 1.5 * kl_rep.clamp(min=1.0)
dynamics KL without its detach
-kl_categorical(log_q.detach(), log_p)
+kl_categorical(log_q, log_p)
representation KL without its detach
-kl_categorical(log_q, log_p.detach())
+kl_categorical(log_q, log_p)
free bits dropped
-0.5 * kl_rep.clamp(min=1.0)
+0.5 * kl_rep
KL of first steps not masked
-0.5 * kl_rep.clamp(min=1.0)) * follows
+0.5 * kl_rep.clamp(min=1.0))
the first step of a sequence not masked
-F.pad(~data["is_first"][:, 1:], (1, 0))
+~data["is_first"]
reward shifted by one
-draw.reward_head(flat), data["reward"])
+draw.reward_head(flat), data["reward"].roll(-1, 1))
the reward of a reset teaches
-reward_loss = reward_loss * ~data["is_first"]
+reward_loss = reward_loss * 1.0
a time limit counts as an end
-goes_on = 1.0 - data["is_terminal"].float()
+goes_on = 1.0 - data["is_last"].float()
prior without unimix
-log_p = unimix(u)
+log_p = u.log_softmax(-1)

== common.py | method/test_oracles.py -k world_model or sides
vector target without symlog
-(self.vector_head(flat) - symlog(vector))
+(self.vector_head(flat) - vector)

== draw_pretrain.py | method/test_oracles.py -k ensemble
the ensemble predicts the present
-target = embed[:, 1:]
+target = embed[:, :-1]
the ensemble learns over borders
-* ~is_first[:, 1:]).mean()
+* ~is_first[:, :-1]).mean()
disagreement as a variance
-.std(0, correction=0).mean(-1)
+.var(0, correction=0).mean(-1)
disagreement of a sample
-.std(0, correction=0).mean(-1)
+.std(0).mean(-1)

== draw_pretrain.py | method/test_alignment.py -k stage_1 or ensemble
first steps one late
-first = last  # the step after an episode's end resets
+first = terminal | truncated  # the step after an episode's end resets
time limits recorded as ends
-is_last=last, is_terminal=terminal
+is_last=last, is_terminal=last
starts that have ended
-alive = 1.0 - data["is_terminal"].flatten()[pick].float()
+alive = torch.ones_like(data["is_terminal"].flatten()[pick].float())

== draw_pretrain.py | method/test_oracles_policy.py -k draw_pretrain
imagination without unimix
-prior = dynamics.prior(sigma)
+prior = sigma
imagined reward of leaving
-reward = reward_of(zs[:-1], sigmas[:-1], action, zs[1:])
+reward = reward_of(zs[:-1], sigmas[:-1], action, zs[:-1])
continue of the state left
-        cont = draw.cont(zs[1:])  # (H, B)
+        cont = draw.cont(zs[:-1])
wrong lambda-return index
-((1 - lam) * value[t + 1] + lam * R)
+((1 - lam) * value[t] + lam * R)
lambda swapped
-((1 - lam) * value[t + 1] + lam * R)
+(lam * value[t + 1] + (1 - lam) * R)
return range forgets
-0.99 * policy.range + 0.01 * (high - low)
+0.01 * policy.range + 0.99 * (high - low)
return scale without its floor
-scale = new_range.clamp(min=args.return_floor)
+scale = new_range
slow critic not asked
-slow_logits = policy.slow_critic(zs[:-1])
+slow_logits = policy.critic(zs[:-1])

== redraw_adapt.py | method/test_oracles.py -k residual or finetune or mean_kl
gradient through f and time
-@torch.no_grad()
-def unroll(
+def unroll(
the belief of the source in the loss
-u = base + e[:, t]
+u = base
free bits on the residual
-rectified.log_prior(u)).mean(0)
+rectified.log_prior(u)).clamp(min=1.0).mean(0)
adaptation KL the other way round
-kl = kl_categorical(log_q.detach(), rectified.log_prior(u)).mean(0)
+kl = kl_categorical(rectified.log_prior(u), log_q.detach().expand_as(u)).mean(0)
members share the KL of their mean
-u = base + e  # (members
+u = (base + e).mean(0, keepdim=True)  # (members
the residual's belief goes on over a border
-        sigma = torch.where(first[:, t, None, None], sigma0, sigma)
+        pass
the first step is learned
-return (kl + l2 * e.square().mean((0, -2, -1))) * ~first, ~first
+return kl + l2 * e.square().mean((0, -2, -1)), ~first
large corrections cost nothing
-return (kl + l2 * e.square().mean((0, -2, -1))) * ~first, ~first
+return kl * ~first, ~first
the change of low rank is not in its loss
-u = draw.observe(z, action, is_first, rectified)  # (B, T, S, K)
+u = draw.observe(z, action, is_first)  # (B, T, S, K)
fine-tuning without its free nat
-return 1.5 * kl.clamp(min=1.0) * ~first, ~first
+return 1.5 * kl * ~first, ~first
fine-tuning without its scale
-return 1.5 * kl.clamp(min=1.0) * ~first, ~first
+return kl.clamp(min=1.0) * ~first, ~first

== common.py | method/test_networks.py -k low_rank
the change of low rank forgets a layer
-x = layer(x) if change_of is None else layer(x) + change_of(x)
+x = layer(x) if change_of is None or layer is self[0] else layer(x) + change_of(x)
the change of low rank is not zero at first
-B = init_weights(nn.Linear(rank, layer.out_features, bias=False), scale=0.0)
+B = init_weights(nn.Linear(rank, layer.out_features, bias=False))

== redraw_adapt.py | method/test_gradients.py -k stage_2
the last weights are saved, not their average
-"rectified": mean_rectified.state_dict(),
+"rectified": rectified.state_dict(),
adaptation KL teaches the encoder
-kl = kl_categorical(log_q.detach(), rectified.log_prior(u)).mean(0)
+kl = kl_categorical(log_q, rectified.log_prior(u)).mean(0)
fine-tuning leaves the initial state out
-trained = [*draw.dynamics_net.parameters(), draw.initial_logits]
+trained = list(draw.dynamics_net.parameters())
fine-tuning at the residual's learning rate
-return finetune_loss, trained, args.finetune_lr
+return finetune_loss, trained, args.lr

== redraw_adapt.py | method/test_alignment.py -k stage_2
actions of another row
-return log_q, z, data["action"][t],
+return log_q, z, data["action"][t - 1],
the penalty does not reach the loss
-return partial(residual_loss, l2=l2),
+return partial(residual_loss, l2=0.0),
held-out episodes are trained on
-"train": np.flatnonzero(~held_out)
+"train": np.arange(len(held_out))
target rows: first flag one late
-        first = last
+        first = terminal | truncated

== redraw_adapt.py | runs/test_field.py -k calm
gain goes by the environment
-np.where(episode % 2, args.gain, 1.0)
+np.where(np.arange(n) % 2, args.gain, 1.0)

== train_policy.py | method/test_oracles_policy.py -k train_policy or stage_3
starts with the source's belief
-data["is_first"][t], rectified))
+data["is_first"][t]))
reward of the state left
-reward = reward_of(zs[:-1], sigmas[:-1], action, zs[1:])
+reward = reward_of(zs[:-1], sigmas[:-1], action, zs[:-1])
starts of stage 3 that have ended
-alive = 1.0 - data["is_terminal"][t].flatten()[pick].float()
+alive = torch.ones_like(data["is_terminal"][t].flatten()[pick].float())
wrong lambda-return index in stage 3
-((1 - lam) * value[t + 1] + lam * R)
+((1 - lam) * value[t] + lam * R)
entropy is punished
-(log_pi * advantage + entropy_weight * entropy)
+(log_pi * advantage - entropy_weight * entropy)
baseline one step late
-advantage = (returns - value[:-1]) / scale
+advantage = (returns - value[1:]) / scale
return range of stage 3 forgets
-0.99 * policy.range + 0.01 * (high - low)
+0.01 * policy.range + 0.99 * (high - low)

== train_policy.py | method/test_oracles_policy.py -k continued
what ended is imagined on
- & ends[2]
+
a terminal start goes on
-    ends = (zs[-1], sigmas[-1], alive * cont.prod(0) > 0.5)
-    metrics = {"return": returns[0
+    ends = (zs[-1], sigmas[-1], cont.prod(0) > 0.5)
+    metrics = {"return": returns[0

== common.py | method/test_networks.py -k noise
noise where reward is predicted
-unpaid = (1.0 - 2.0 * self.reward(q))
+unpaid = (2.0 * self.reward(q))
noise without an end
-(1.0 - 2.0 * self.reward(q)).clamp(0.0, 1.0)
+(1.0 - 2.0 * self.reward(q)).abs()

== train_policy.py | method/test_losses.py -k what_acts
the actor of the last update acts
-Policy(draw.sizes, draw, mean_actor,
+Policy(draw.sizes, draw, policy.actor,
the actor's average never forgets
-max(1.0 / update, 1.0 - args.ema_decay)
+1.0 / update

== train_policy.py | method/test_oracles_policy.py -k lookahead or lesson
the worst action teaches
-p = ((Q - Q.amax(1, keepdim=True))
+p = ((Q.amin(1, keepdim=True) - Q)
candidate 0 is noisy too
-deviation = torch.linspace(0.0, 1.0, M, device=z.device)[:, None]
+deviation = torch.linspace(0.3, 1.0, M, device=z.device)[:, None]
no action is better than the actor's, and it is taught all the same
-w = (better / (0.5 * d + near)).clamp(0.0, 1.0)
+w = torch.ones_like(better)
lessons behind an end
- * reached.flatten()[pick]
+
returns of noisy trajectories
-torch.where(pick % B < quiet, returns.flatten()[pick], Q[:, 0])
+returns.flatten()[pick]
what is tried lasts undiminished
-fade = 0.5 **
+fade = 1.0 **
the critic's value at the end of a rollout
-value = twohot_mean(policy.slow_critic(zs))
+value = twohot_mean(policy.critic(zs))

== train_policy.py | method/test_oracles_policy.py -k recorded
recorded returns run over an end
-goes_on = goes_on & ~data["is_first"][row] & (t + k <= last)
+goes_on = goes_on & torch.ones_like(data["is_first"][row]) & (t + k <= last)
what led to less than usual is imitated too
-w = (better / (better.std() + 0.03 * args.return_floor)).clamp(0.0, 1.0)
+w = (better / (better.std() + 0.03 * args.return_floor)).abs().clamp(0.0, 1.0)
the reward of leaving a recorded row
-        reward = data["reward"][row]
+        reward = data["reward"][row - 1]
the critic is a mean over recorded actions
-w_critic = torch.where(better > 0.0, 0.7, 0.3)
+w_critic = torch.where(better > 0.0, 0.5, 0.5)

== draw_pretrain.py | runs/test_speed.py -k two_processes
gradients of one's own batch alone
-            dist.all_reduce(parameter.grad)
+            pass
gradients summed over the processes
-            parameter.grad /= dist.get_world_size()
+            pass

== common.py | runs/test_speed.py -k bfloat16
losses in bfloat16
-return x.float()
+return x

== deploy_duckiebot.py | robot/test_deploy.py -k kinematics_with or colours or split
trim on the wrong wheel
-left = (c["gain"] - c["trim"])
+left = (c["gain"] + c["trim"])
"""


def mistakes():
    """[(name, file, what stands there, the mistake, the tests)]"""
    found = []
    name = None
    for section in re.split(r"^== ", MISTAKES, flags=re.M)[1:]:
        head, *lines = section.strip().splitlines()
        file, tests = head.split(" | ")
        block = {"-": [], "+": []}
        for line in [*lines, "end"]:
            if line[:1] in block:
                block[line[0]].append(line[1:])
            elif line:
                if block["-"]:
                    there, mistake = ("\n".join(block[sign]) for sign in "-+")
                    found.append((name, file, there, mistake, tests))
                name = line
                block = {"-": [], "+": []}
    return found


def pytest_of(folder, tests):
    """(exit status, the failed tests) of a selection such as "method/test_oracles.py -k belief" in
    a copy of the repository"""
    file, _, words = tests.partition(" -k ")
    command = [sys.executable, "-m", "pytest", f"tests/{file}", "-x", "-q"]
    command += ["-p", "no:cacheprovider", *(["-k", words] if words else [])]
    # Bytecode could outlive a line that changed within a second.
    env = os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    options = {"cwd": folder, "env": env, "capture_output": True, "text": True, "timeout": 900}
    try:
        done = subprocess.run(command, **options)
    except subprocess.TimeoutExpired:
        return None, []  # a busy machine proves nothing
    return done.returncode, re.findall(r"^FAILED tests/\S*::(\S+)", done.stdout, re.M)


def copy_of_the_repository(folder):
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "tests", folder / "tests", ignore=ignore)
    for source in (*ROOT.glob("*.py"), ROOT / "pyproject.toml"):
        shutil.copy(source, folder)


def main(words):
    chosen = [m for m in mistakes() if not words or any(w in m[0] for w in words)]
    not_caught = []
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        copy_of_the_repository(folder)
        for tests in dict.fromkeys(m[4] for m in chosen):  # a test that fails anyway shows nothing
            if pytest_of(folder, tests)[0] != 0:
                sys.exit(f"the tests do not pass without a mistake: {tests}")
        for name, file, there, mistake, tests in chosen:
            begun = time.time()
            text = (folder / file).read_text()
            if text.count(there) != 1:
                not_caught.append(name)
                print(f"DOES NOT APPLY  {name}: stands {text.count(there)} times in {file}")
                continue
            (folder / file).write_text(text.replace(there, mistake))
            status, failed = pytest_of(folder, tests)
            (folder / file).write_text(text)
            # 0: all tests passed; 1: one failed; else pytest itself did, e.g. because the changed
            # file can't be imported, which proves nothing.
            told = {0: "SURVIVES", 1: "caught  "}.get(status, "BROKEN  ")
            print(f"{told}  {name}  {', '.join(failed)} {time.time() - begun:.0f} s", flush=True)
            if status != 1:
                not_caught.append(name)
    left = f"; not: {', '.join(not_caught)}" if not_caught else ""
    print(f"{len(chosen) - len(not_caught)} of {len(chosen)} mistakes caught{left}")
    return len(not_caught)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
