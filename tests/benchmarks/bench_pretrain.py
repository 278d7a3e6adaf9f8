"""The parts of a stage-1 update: python tests/benchmarks/bench_pretrain.py [laptop | paper]

World model, the task's actor-critic, exploration (ensemble and its actor-critic), drawing a batch
from the replay. The bar, for world model and actor-critic of the laptop preset together: 35 % of
the measured fp32 matmul rate, or 1.5 times their largest matmuls and convolutions.
"""

import dataclasses
import statistics
import sys
from collections import deque

import numpy as np
import torch
from measure import REPEATS, in_turns, machine, matmuls_of, ms, sizes_of, table, update_table

from common import DRAW, ActorCritic, Rectified, Replay, prepare
from draw_pretrain import (
    PRESETS,
    Ensemble,
    gradient_step,
    improve,
    policy_adam,
    world_model_loss,
)


class Stage1:
    """The networks, optimisers and replay of a preset, with random rows, and one function for each
    part of an update."""

    def __init__(self, args, device="cpu"):
        self.args = dataclasses.replace(args, device=device)
        self.device = prepare(self.args)
        sizes = sizes_of(args)
        self.autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=args.bf16)
        self.draw = DRAW(sizes).to(self.device, memory_format=torch.channels_last)
        self.dynamics = Rectified(self.draw)
        embed_size = self.draw.encoder.embed_size
        self.ensemble = Ensemble(sizes, embed_size, args.ensemble, args.ensemble_target)
        self.ensemble.to(self.device)
        self.task = ActorCritic(sizes).to(self.device)
        self.explore = ActorCritic(sizes).to(self.device)
        self.draw_adam = torch.optim.Adam(self.draw.parameters(), args.lr, fused=True)
        self.ensemble_adam = torch.optim.Adam(self.ensemble.parameters(), args.lr, fused=True)
        self.adams = {policy: policy_adam(args, policy) for policy in (self.task, self.explore)}
        self.loss = torch.compile(world_model_loss) if args.compile else world_model_loss
        self.memories = {policy: deque(maxlen=20) for policy in self.adams}
        self.replay = Replay(4000, args.n_envs, sizes)
        rng, n, L = np.random.default_rng(0), args.n_envs, args.image_size
        for t in range(1000):
            self.replay.add(
                image=rng.integers(0, 256, (n, L, L, 3), np.uint8),
                vector=rng.normal(size=(n, 1)),
                action=rng.uniform(-1, 1, (n, 1)),
                reward=rng.random(n) < 0.05,
                is_first=np.full(n, t % 60 == 0),
                is_last=np.full(n, t % 60 == 59),
                is_terminal=np.zeros(n, bool),
            )
        self.data = self.sample()
        self.world_model()

    def sample(self):
        args = self.args
        return self.replay.sample(args.batch, args.length, self.device, args.rewarded)

    def world_model(self):
        with self.autocast:
            loss, _, found = self.loss(self.draw, self.data, self.args, 0.0)
        self.embed, self.z, self.sigma = found
        gradient_step(self.draw_adam, loss, 1000.0)

    def train_ensemble(self):
        seen = (self.sigma, self.z, self.data["action"], self.embed, self.data["is_first"])
        with self.autocast:
            loss = self.ensemble.loss(*seen)
        gradient_step(self.ensemble_adam, loss, 100.0)

    def train_policy(self, policy, reward_of):
        n = self.args.batch * self.args.length
        pick = torch.randperm(n, device=self.device)[: self.args.starts]
        alive = torch.ones(len(pick), device=self.device)
        start = self.z.flatten(0, 1)[pick], self.sigma.flatten(0, 1)[pick], alive
        learner = (policy, self.adams[policy], self.memories[policy])
        improve(self.args, self.draw, self.dynamics, *learner, *start, reward_of)

    def actor_critic(self):
        self.train_policy(self.task, lambda z, sigma, action, z_next: self.draw.reward(z_next))

    def explore_actor_critic(self):
        def reward_of(z, sigma, action, z_next):
            return self.ensemble.disagreement(sigma, z, action)

        self.train_policy(self.explore, reward_of)

    def both(self):
        self.world_model()
        self.actor_critic()

    def exploration(self):
        self.train_ensemble()
        self.explore_actor_critic()


def main(rates, preset="laptop", repeats=REPEATS):
    """Returns {part: median seconds}."""
    stage = Stage1(PRESETS[preset][1])
    parts = {
        "world model": stage.world_model,
        "ensemble": stage.train_ensemble,
        "actor-critic": stage.actor_critic,
        "exploration actor-critic": stage.explore_actor_critic,
        "world model + actor-critic": stage.both,
        "exploration: ensemble + actor-critic": stage.exploration,
    }
    seconds = in_turns({**parts, "replay sampling": stage.sample}, repeats)
    matmuls = {name: matmuls_of(part) for name, part in parts.items()}
    figures = update_table(
        f"Stage 1, preset {preset}: one update of each part", matmuls, seconds, rates, repeats
    )
    median = {name: statistics.median(s) for name, s in seconds.items()}
    share = median["replay sampling"] / median["world model"]
    table(
        "Drawing a batch from the replay",
        ["", "ms, median (min - max)", "of a world-model update"],
        [
            [
                f"{stage.args.batch} x {stage.args.length} rows",
                ms(seconds["replay sampling"]),
                f"{100 * share:.1f} %",
            ]
        ],
    )
    _, used, times = figures["world model + actor-critic"]
    print(
        f"\nworld model + actor-critic: {100 * used:.0f} % of the fp32 matmul rate, {times:.2f} "
        "times its matmuls (bar, laptop: 35 % or 1.5 times)"
    )
    return median


if __name__ == "__main__":
    main(machine(), *sys.argv[1:2])
