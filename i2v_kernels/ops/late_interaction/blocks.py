"""``late_interaction`` on CPUs: PyTorch's matrix products give tiles of similarities that stay in the cache, and C++ what is
sought in them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ... import _extension
from .. import dispatcher
from ..backends import OPS
from ..base import accumulate_dtype
from ..products import as_rows
from . import reference

ROWS = 1024  # of a tile: tokens of texts
TILE = 1 << 20  # similarities of a tile
ATTENDED = 1 << 17  # of one that PyTorch's operators go over several times


def can_run(text: Tensor, *_: Any) -> str | None:
    return f"the tensors are on {text.device}" if text.device.type != "cpu" else _extension.why_no_cpu()


def tiles(text: Tensor, video: Tensor, size: int) -> Iterator[tuple[slice, slice]]:
    """Texts and videos whose similarities are about so many, videos outermost."""
    (texts, rows, _), (videos, columns, _) = text.shape, video.shape
    count = max(1, min(texts, min(ROWS, size) // rows))
    many = max(1, size // (count * rows * columns))
    for b in range(0, videos, many):
        for a in range(0, texts, count):
            yield slice(a, a + count), slice(b, b + many)


def part(x: Tensor | None, where: slice) -> Tensor | None:
    return None if x is None else x[where]


def valid_rows(x: Tensor, mask: Tensor | None) -> Tensor:
    """``[rows, D]`` of ``[items, tokens, D]``: a view of all if it can be one, or a copy of those that are valid."""
    return as_rows(x) if mask is None else x[mask]


def forward(
    text: Tensor, video: Tensor, text_weight: Tensor | None, video_weight: Tensor | None, text_mask: Tensor | None,
    video_mask: Tensor | None, both: bool, zero: bool, temperature: float, unit: bool, keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    from .op import begun

    given = (text, video, text_weight, video_weight, text_mask, video_mask)
    found, done = begun(*given, both, zero, temperature, unit, keep)
    if done:
        return found
    scores, text_best, video_best = found
    if temperature:
        for a, b in tiles(text, video, ATTENDED):
            given = (text[a], video[b], part(text_weight, a), part(video_weight, b), part(text_mask, a), part(video_mask, b))
            scores[a, b] = reference.forward(*given, both, zero, temperature, unit, False)[0]
        return found
    masks = (None, None) if zero else (text_mask, video_mask)  # tokens that do not count are not multiplied
    memory, columns = text.new_empty(0), video[:0]
    for a, b in tiles(text, video, TILE):
        rows = valid_rows(text[a], part(masks[0], a))
        columns = valid_rows(video[b], part(masks[1], b)) if a.start == 0 else columns
        if memory.numel() < len(rows) * len(columns):
            memory = text.new_empty(len(rows) * len(columns))
        tile = memory[: len(rows) * len(columns)].view(len(rows), len(columns))
        torch.mm(rows, columns.t(), out=tile)
        torch.ops.i2v_kernels_C.late_scores_(
            scores[a, b],
            text_best[a, b] if text_best.numel() else text_best,
            video_best[a, b] if video_best.numel() else video_best,
            tile,
            text.shape[1],
            video.shape[1],
            part(text_weight, a),
            part(video_weight, b),
            part(text_mask, a),
            part(video_mask, b),
            both,
            zero,
        )
    return found


def backward(
    grad: Tensor, text: Tensor, video: Tensor, text_weight: Tensor | None, video_weight: Tensor | None,
    text_mask: Tensor | None, video_mask: Tensor | None, both: bool, zero: bool, temperature: float, unit: bool, keep: bool,
    text_best: Tensor, video_best: Tensor, wanted: list[bool],
) -> tuple[Tensor, ...]:  # fmt: skip
    given = (text, video, text_weight, video_weight, text_mask, video_mask)
    rest = (both, zero, temperature, unit, keep, text_best, video_best, wanted)
    grads = OPS["late_interaction"].fake_backward(grad, *given, *rest)  # type: ignore[misc]
    into = [x if want and like is not None else None for x, like, want in zip(grads, given, wanted)]
    dx, dw = into[:2], into[2:]
    if text.numel() == 0 or video.numel() == 0:
        for x in grads:
            x.zero_()
    elif temperature:
        _add_attended(grad, given, (both, zero, temperature, unit, False), into)
    else:
        if text_best.numel() == 0:  # they were not asked for
            _, text_best, video_best = forward(*given, both, zero, temperature, unit, True)
        side = torch.ops.i2v_kernels_C.late_gradient_
        swapped = [x.transpose(0, 1) if x.numel() else x for x in (text_best, video_best)]
        if wanted[0] or wanted[2]:
            side(dx[0], dw[0], grad, text, video, *given[2:], text_best, video_best, both)
        if wanted[1] or wanted[3]:
            weights, masks = (video_weight, text_weight), (video_mask, text_mask)
            side(dx[1], dw[1], grad.t(), video, text, *weights, *masks, *reversed(swapped), both)
    return grads


def _add_attended(grad: Tensor, given: tuple[Any, ...], options: tuple[Any, ...], into: list[Tensor | None]) -> None:
    """By autograd through the definition, a tile at a time; sums are kept in the dtype of sums."""
    dtype = accumulate_dtype(given[0].dtype)
    totals = [None if x is None else torch.zeros(x.shape, dtype=dtype) for x in into]
    for a, b in tiles(given[0], given[1], ATTENDED):
        where = (a, b) * 3
        parts: list[Any] = [part(x, at) for x, at in zip(given, where)]
        leaves: list[Tensor] = []
        for i, total in enumerate(totals):
            if total is not None:
                parts[i] = parts[i].detach().requires_grad_()
                leaves.append(parts[i])
        with dispatcher.autograd_again():
            scores = reference.forward(*parts, *options)[0]
            found = iter(torch.autograd.grad(scores, leaves, grad[a, b]))
        for total, at in zip(totals, where):
            if total is not None:
                total[at] += next(found)
    for x, total in zip(into, totals):
        if x is not None and total is not None:
            x.copy_(total)
