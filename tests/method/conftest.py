"""What is random in the sources, recorded as it is drawn, so that slow versions can be given it."""

from types import SimpleNamespace

import pytest
import torch


@pytest.fixture
def noise(monkeypatch):
    """Records the noise of every sample: .uniform of the latents (..., S, 1), .normal of the
    actions (..., A)"""
    drawn, rand_like = SimpleNamespace(uniform=[], normal=[]), torch.rand_like

    def uniform(x):
        drawn.uniform.append(rand_like(x))
        return drawn.uniform[-1]

    def rsample(self):
        drawn.normal.append(torch.randn_like(self.mean))
        return self.mean + self.stddev * drawn.normal[-1]

    def sample(self):
        return rsample(self).detach()

    monkeypatch.setattr(torch, "rand_like", uniform)
    monkeypatch.setattr(torch.distributions.Normal, "rsample", rsample)
    monkeypatch.setattr(torch.distributions.Normal, "sample", sample)
    return drawn
