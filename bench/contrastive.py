"""``python -m bench.contrastive``: ``contrastive_loss`` beside open_clip's losses, forward and backward, by turns.

Dot products of unit features, and the similarities of ``nn.TextConditionedPool`` within the loss, at once and in chunks. Peak
memory is what a step takes beyond its arguments.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import i2v_kernels as i2v
from i2v_kernels.nn import TextConditionedPool

from .__main__ import machine
from .measure import rounds, start, summary
from .memory import peak


def losses(pairs: int, channels: int = 512) -> dict[str, tuple[list[Tensor], dict[str, Callable[[], Tensor]]]]:
    """What is measured -> its leaves, and candidates by name."""
    from open_clip.loss import ClipLoss, SigLipLoss

    text, video = (x.requires_grad_() for x in F.normalize(torch.randn(2, pairs, channels), dim=-1).unbind(0))
    scale, bias = torch.tensor(50.0, requires_grad=True), torch.tensor(-10.0, requires_grad=True)
    few = max(pairs // 8, 1)
    frames, layer = torch.randn(few, 12, channels), TextConditionedPool(channels, dropout=0.0)
    ours = partial(i2v.contrastive_loss, text, video, scale=scale)
    pooled = partial(i2v.contrastive_loss, text[:few], frames, scale=scale, similarity=layer.similarity)
    return {
        f"softmax, {pairs} pairs": ([text, video, scale], {"open_clip": lambda: ClipLoss()(video, text, scale), "ours": ours}),
        f"sigmoid, {pairs} pairs": (
            [text, video, scale, bias],
            {
                "open_clip": lambda: SigLipLoss()(video, text, scale, bias),
                "ours": partial(ours, bias=bias, kind="sigmoid"),
            },
        ),
        f"softmax of X-Pool's similarities, {few} pairs": (
            [text, scale, *layer.parameters()],
            {"at once": partial(pooled, chunk=few), "64 texts at a time": partial(pooled, chunk=64)},
        ),
    }


def step(loss: Callable[[], Tensor], leaves: list[Tensor]) -> None:
    torch.autograd.grad(loss(), leaves, allow_unused=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.contrastive", description=__doc__.split("\n\n")[0])
    parser.add_argument("--pairs", type=int, default=4096, help="of the first two; X-Pool's are an eighth as many")
    parser.add_argument("--seconds", type=float, default=10.0, help="measuring time per loss")
    options = parser.parse_args(argv)
    about = machine("cpu")
    print(f"{about['device']}, {about['threads']} threads, torch {about['torch']}, load {about['load']:.1f}\n")
    print(f"{'loss':<48}{'candidate':<22}{'ms (20-80 %)':<28}peak MiB")
    torch.manual_seed(0)
    for name, (leaves, candidates) in losses(options.pairs).items():
        calls = {label: partial(step, loss, leaves) for label, loss in candidates.items()}
        times = rounds(calls, "cpu", options.seconds)
        for label, call in calls.items():
            ms = summary(times[label])
            spread = f"{ms.median:.1f} ({ms.low:.1f}-{ms.high:.1f})"
            print(f"{name:<48}{label:<22}{spread:<28}{peak(call, 'cpu'):.0f}", flush=True)
    return 0


if __name__ == "__main__":
    start(main)
