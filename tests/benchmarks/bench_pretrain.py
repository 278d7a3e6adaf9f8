"""The parts of a stage-1 update: python tests/benchmarks/bench_pretrain.py [laptop | paper]

World model, the task's actor-critic, exploration (ensemble and its actor-critic), drawing a batch from the replay. The bar, for world model
and actor-critic of the laptop preset together: 35 % of the measured fp32 matmul rate, or 1.5 times their largest matmuls and convolutions.
"""

import statistics
import sys

import numpy as np
import torch
from measure import REPEATS, in_turns, machine, matmuls_of, ms, table, update_table
from torch import nn

from common import DRAW, Sizes, pick_device, seed_everything
from draw_pretrain import PRESETS, ActorCritic, Ensemble, Replay, world_model_loss


class Stage1:
    """The networks, optimisers and replay of a preset, with random rows, and one function for each part of an update."""

    def __init__(self, args):
        seed_everything(1)
        device = pick_device("cpu")
        fields = "image_size S K cnn_depth vector_units vector_layers units actor_units".split()
        sizes = Sizes(vector_size=1, action_size=1, **{name: getattr(args, name) for name in fields})
        self.args, self.device = args, device
        self.draw = DRAW(sizes).to(memory_format=torch.channels_last)
        self.ensemble = Ensemble(sizes, self.draw.encoder.embed_size, args.ensemble, args.ensemble_target)
        self.task = ActorCritic(sizes, args, args.actor_grad, scale_floor=args.return_floor, device=device)
        self.explore = ActorCritic(sizes, args, "reinforce", scale_floor=0.01, device=device)
        self.optimizer = torch.optim.Adam(self.draw.parameters(), lr=args.lr, eps=1e-8, fused=True)
        self.ensemble_optimizer = torch.optim.Adam(self.ensemble.parameters(), lr=args.lr, eps=1e-8, fused=True)
        self.replay = Replay(4000, args.n_envs, sizes)
        rng, n, L = np.random.default_rng(0), args.n_envs, args.image_size
        for t in range(1000):
            last = np.full(n, t % 60 == 59)
            self.replay.add(image=rng.integers(0, 256, (n, L, L, 3), np.uint8), vector=rng.normal(size=(n, 1)), action=rng.uniform(-1, 1, (n, 1)),
                            reward=rng.random(n) < 0.05, is_first=np.full(n, t % 60 == 0), is_last=last, is_terminal=np.zeros(n, bool))  # fmt: skip
        self.data = self.sample()
        self.world_model()

    def sample(self):
        return self.replay.sample(self.args.batch, self.args.length, self.device, self.args.rewarded)

    def world_model(self):
        loss, _, (self.embed, self.z, self.sigma) = world_model_loss(self.draw, self.data, self.args, 0.0)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.draw.parameters(), 1000.0)
        self.optimizer.step()

    def train_ensemble(self):
        loss = self.ensemble.loss(self.sigma, self.z, self.data["action"], self.embed, self.data["is_first"])
        self.ensemble_optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.ensemble.parameters(), 1000.0)
        self.ensemble_optimizer.step()

    def starts(self):
        pick = torch.randperm(self.args.batch * self.args.length)[: self.args.starts]
        return self.z.flatten(0, 1)[pick], self.sigma.flatten(0, 1)[pick], torch.ones(len(pick))

    def actor_critic(self):
        self.task.update(self.draw, *self.starts(), lambda z, sigma, action, z_next: self.draw.reward(z_next))

    def explore_actor_critic(self):
        self.explore.update(self.draw, *self.starts(), lambda z, sigma, action, z_next: self.ensemble.disagreement(sigma, z, action))

    def both(self):
        self.world_model()
        self.actor_critic()

    def exploration(self):
        self.train_ensemble()
        self.explore_actor_critic()


def main(rates, preset="laptop", repeats=REPEATS):
    """Returns {part: median seconds}."""
    stage = Stage1(PRESETS[preset][1])
    parts = {"world model": stage.world_model, "ensemble": stage.train_ensemble, "actor-critic": stage.actor_critic,
             "exploration actor-critic": stage.explore_actor_critic, "world model + actor-critic": stage.both,
             "exploration: ensemble + actor-critic": stage.exploration}  # fmt: skip
    seconds = in_turns({**parts, "replay sampling": stage.sample}, repeats)
    matmuls = {name: matmuls_of(part) for name, part in parts.items()}
    figures = update_table(f"Stage 1, preset {preset}: one update of each part", matmuls, seconds, rates, repeats)
    median = {name: statistics.median(s) for name, s in seconds.items()}
    share = median["replay sampling"] / median["world model"]
    table("Drawing a batch from the replay", ["", "ms, median (min - max)", "of a world-model update"],
          [[f"{stage.args.batch} x {stage.args.length} rows", ms(seconds["replay sampling"]), f"{100 * share:.1f} %"]])  # fmt: skip
    _, used, times = figures["world model + actor-critic"]
    print(f"\nworld model + actor-critic: {100 * used:.0f} % of the fp32 matmul rate, {times:.2f} times its matmuls (bar, laptop: 35 % or 1.5 times)")
    return median


if __name__ == "__main__":
    main(machine(), *sys.argv[1:2])
