"""The fast paths give what the plain ones give: joint batches of several processes, parallel environments, bfloat16, compiled updates."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from helpers import TINY

import draw_pretrain
from common import DRAW, load_checkpoint, make_envs

ROOT = Path(__file__).resolve().parent.parent
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

    monkeypatch.setattr(draw_pretrain, "sample_onehot", mode)
    monkeypatch.setattr(torch.distributions.Normal, "rsample", lambda self: self.loc)


def one_update(data, args=ARGS):
    """(loss terms, gradients): of the world model, the ensemble and an actor-critic, with equal weights each time, from sequences `data`"""
    torch.manual_seed(0)
    draw = DRAW(TINY)
    ensemble = draw_pretrain.Ensemble(TINY, draw.encoder.embed_size, 2, 4)
    actor_critic = draw_pretrain.ActorCritic(TINY, args, "reinforce", args.return_floor, "cpu")
    with torch.no_grad():  # these start at zero, which would hide a part of the gradients
        for module in (draw.reward_head, actor_critic.critic):
            for p in module.parameters():
                p += 0.1 * torch.randn_like(p)
    loss, metrics, (embed, z, sigma) = draw_pretrain.world_model_loss(draw, data, args, soft=0.0)
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
