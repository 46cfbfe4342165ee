"""Patched models learn as they did: 60 steps with and without, the same losses and the same weights."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from architectures import timesformer, xclip
from torch import Tensor, nn

import i2v_kernels as i2v

STEPS, CLASSES = 60, 4


def clips(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A bright bar that moves up, down, left or right: frames alone do not tell which."""
    labels = torch.randint(CLASSES, (8,), generator=generator)
    video = 0.1 * torch.randn(8, 4, 3, 32, 32, generator=generator)
    for clip, label in zip(video, labels):
        for t in range(4):
            place = 8 * (t if label % 2 else 3 - t)
            (clip[t, :, place : place + 8] if label < 2 else clip[t, :, :, place : place + 8]).add_(2)
    return video, labels


def train(model: nn.Module, flat: bool) -> tuple[list[float], nn.Module]:
    torch.manual_seed(5)
    model = nn.ModuleList([model, nn.Linear(48, CLASSES)]).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    (video, labels), losses = clips(torch.Generator().manual_seed(6)), []
    for _ in range(STEPS):
        hidden = model[0](video.flatten(0, 1) if flat else video)[0]
        pooled = hidden.mean(1).unflatten(0, (8, 4))[:, -1] if flat else hidden.mean(1)
        loss = F.cross_entropy(model[1](pooled), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, model


@pytest.mark.parametrize("name", ["timesformer", "xclip"])
def test_training_is_the_same(name: str) -> None:
    plain, _ = {"timesformer": timesformer, "xclip": xclip}[name]()
    fast = copy.deepcopy(plain)
    assert i2v.patch(fast).replaced
    expected, plain = train(plain, flat=name == "xclip")
    losses, fast = train(fast, flat=name == "xclip")
    assert sum(expected[-10:]) < 0.6 * sum(expected[:10]), "the task is not learned: nothing is shown"
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=1e-4, atol=1e-5)
    moved = torch.cat([p.detach().flatten() for p in plain.parameters()])
    got = torch.cat([p.detach().flatten() for p in fast.parameters()])
    assert (got - moved).norm() <= 1e-3 * moved.norm()
