"""On CPUs: PyTorch's own fused attention on views of whole frames, its parts joined by their log-sum-exp."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import _extension
from ..backends import OPS, Backend, reference_backend
from ..temporal_attention.packing import empty_output, unpacked
from . import reference
from .frames import head_groups
from .pieces import Piece, Plan, plan

FEW = 64  # extra keys of a frame, above which PyTorch's attention is faster than the kernel beside it
EXACT = reference_backend("frame_attention", reference.forward)
_attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_derive = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def can_run(q: Tensor, *_: Any) -> str | None:
    return None if q.is_cpu else f"the tensors are on {q.device}: it is made of PyTorch's attention for CPUs"


class Group(NamedTuple):
    """Heads [first, last) of one clip, or of all that are planned alike: ``[first clip, last clip)``."""

    clips: slice
    heads: slice
    plan: Plan


def groups(q: Tensor, mask: Tensor | None, offsets: Sequence[int], counts: Sequence[int], edges: str) -> Iterator[Group]:
    batch, frames = q.shape[:2]
    valid = [None] * batch if mask is None else [None if all(row) else tuple(row) for row in mask.tolist()]
    for first, last, own in head_groups(offsets, counts, q.shape[-2]):
        plans = [plan(frames, own, edges, row) for row in valid]
        if batch > 1 and all(p == plans[0] and _own_frame(p, frames) for p in plans):
            yield Group(slice(0, batch), slice(first, last), plans[0])
            continue
        for b, found in enumerate(plans):
            yield Group(slice(b, b + 1), slice(first, last), found)


def _own_frame(found: Plan, frames: int) -> bool:
    """Every frame alone: then clips are frames like any others."""
    return found.rounds == ((Piece(0, frames, 0, 1, True),),) and not any(found.zeros)


def forward(
    q: Tensor, k: Tensor | None, v: Tensor | None, extra_k: Tensor | None, extra_v: Tensor | None, mask: Tensor | None,
    offsets: Sequence[int], counts: Sequence[int], edges: str, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    options = (offsets, counts, edges, scale)
    out, lse = memory = empty_output(q, True)
    if out.numel() == 0:
        for into, part in zip(memory, reference.forward(q, k, v, extra_k, extra_v, mask, *options)):
            into.copy_(part)
        return memory
    q, k, v = unpacked(q, k, v)
    many = extra_k is not None and extra_k.shape[2] > 0
    for clips, heads, found in groups(q, mask, offsets, counts, edges):
        own: list[Any] = [None if x is None else x[clips, :, :, heads] for x in (q, k, v, extra_k, extra_v)]
        into, sums = out[clips, :, :, heads], lse[clips, :, :, heads]
        sound = _forward(into, sums, *own, found, scale)  # type: ignore[call-arg]
        there = [any(state) or many for state in zip(found.seen, found.zeros)] if k.shape[2] else [many] * q.shape[1]
        if not sound or not (sums if all(there) else sums[:, there]).isfinite().all():
            for b in range(clips.start, clips.stop):
                call: list[Any] = [None if x is None else x[b : b + 1] for x in (q, k, v, extra_k, extra_v, mask)]
                for memory_b, part in zip((out, lse), reference.forward(*call, *options)):  # type: ignore[call-arg]
                    memory_b[b : b + 1, :, :, heads] = part[:, :, :, heads]
    return out, lse


def _forward(
    out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, extra_k: Tensor | None, extra_v: Tensor | None, found: Plan,
    scale: float,
) -> bool:  # fmt: skip
    """Whether PyTorch's kernel has lost no NaN and no infinity, as it does where a query has nothing else: that one's
    log-sum-exp is then 0, and so it seldom is otherwise.
    """
    keys, sound = k.shape[2], True
    if not all(found.seen) or keys == 0:
        out.zero_()
        lse.fill_(-math.inf)
    if keys > 0:
        windows = Windows(k, v)
        for turn, pieces in enumerate(found.rounds):
            for piece in _separate(pieces, q):
                part, part_lse = windows.attend(q, piece, scale)
                sound = sound and bool(part_lse.all())
                frames = slice(piece.first, piece.last)
                if turn == 0:
                    out[:, frames] = part
                    lse[:, frames] = part_lse
                else:
                    join(out[:, frames], lse[:, frames], part, part_lse)
        for t, count in enumerate(found.zeros):
            if count > 0:
                joined = lse[:, t].logaddexp(lse.new_tensor(math.log(count * keys)))
                out[:, t].mul_((lse[:, t] - joined).exp()[..., None])
                lse[:, t] = joined
    if extra_k is not None and extra_v is not None and extra_k.shape[2] > 0:
        if extra_k.shape[2] > FEW or _extension.why_no_cpu() is not None:
            part, part_lse = Windows(extra_k, extra_v).attend(q, Piece(0, q.shape[1], 0, 1, True), scale)
            sound = sound and bool(part_lse.all())
            join(out, lse, part, part_lse)
        else:
            _extension.compiled("attend_extra_")(out, lse, q, extra_k, extra_v, scale)
    return sound


def backward(grad: Tensor, *args: Any) -> tuple[Tensor, ...]:
    *inputs, offsets, counts, edges, scale, out, lse, wanted = args
    memory = OPS["frame_attention"].fake_backward(grad, *args)  # type: ignore[misc]
    if out.numel() == 0:
        return EXACT.backward(grad, *args)
    q, k, v, extra_k, extra_v, mask = inputs
    given = (*unpacked(q, k, v), extra_k, extra_v)
    grads: list[Any] = [None if x.shape == (0,) else x for x in memory]
    into = [*(unpacked(*grads[:3]) if q.dim() == 6 and grads[0] is not None else grads[:3]), *grads[3:]]
    for clips, heads, found in groups(q, mask, offsets, counts, edges):

        def of(x: Any, clips: slice = clips, heads: slice = heads) -> Any:
            return None if x is None else x[clips, :, :, heads]

        whole = [of(x) for x in (grad, out, lse)]
        if all(_finite(x) for x in whole[:2]):
            _backward([of(x) for x in into], *whole, *map(of, given), found, scale)  # type: ignore[call-arg]
            continue
        for b in range(clips.start, clips.stop):
            call = [None if x is None else x[b : b + 1] for x in inputs]
            ends = (out[b : b + 1], lse[b : b + 1], wanted)
            for memory_b, part in zip(memory, EXACT.backward(grad[b : b + 1], *call, offsets, counts, edges, scale, *ends)):
                if memory_b.shape != (0,):
                    memory_b[b : b + 1, ..., heads, :] = part[..., heads, :]
    return memory


def _finite(x: Tensor) -> bool:
    """Whether all numbers are, in one pass; a sum that overflows says no, too."""
    return bool(x.sum(dtype=torch.float32 if x.dtype == torch.float16 else None).isfinite())


def _backward(
    grads: Sequence[Tensor | None], grad: Tensor, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor,
    extra_k: Tensor | None, extra_v: Tensor | None, found: Plan, scale: float,
) -> None:  # fmt: skip
    dq, dk, dv, dextra_k, dextra_v = grads
    single = _own_frame(found, q.shape[1])  # every frame of keys is read once
    dq = torch.empty_like(q) if dq is None else dq
    if not all(found.seen) or k.shape[2] == 0:
        dq.zero_()
    for x in (dk, dv):
        if x is not None and not single:
            x.zero_()
    if k.shape[2] > 0:
        windows = Windows(k, v)
        for turn, pieces in enumerate(found.rounds):
            for piece in _separate(pieces, q):
                part, *of_keys = windows.derive(grad, q, out, lse, piece, scale)
                frames = slice(piece.first, piece.last)
                if turn == 0:
                    dq[:, frames] = part
                else:
                    dq[:, frames] += part
                for x, parts in zip((dk, dv), of_keys):
                    if x is not None:
                        _to_frames(x, parts, piece, single)
    if extra_k is None or extra_v is None or extra_k.shape[2] == 0:
        return
    if extra_k.shape[2] > FEW or _extension.why_no_cpu() is not None:
        piece = Piece(0, q.shape[1], 0, 1, True)
        part, *of_keys = Windows(extra_k, extra_v).derive(grad, q, out, lse, piece, scale)
        dq += part
        for x, parts in zip((dextra_k, dextra_v), of_keys):
            if x is not None:
                x.copy_(parts.reshape(x.shape))
        return
    into = [like.new_empty(like.shape) if x is None else x for x, like in ((dextra_k, extra_k), (dextra_v, extra_v))]
    _extension.compiled("attend_extra_backward_")(dq, *into, grad, out, lse, q, extra_k, extra_v, scale)


def _to_frames(x: Tensor, parts: Tensor, piece: Piece, single: bool) -> None:
    """The gradients of a piece's views, to the frames ``x [B, T, L, H, D]`` that they are views of."""
    if single:
        x.copy_(parts.reshape(x.shape))
        return
    parts = parts.unflatten(1, (piece.frames, x.shape[2]))
    if piece.moving:
        for i in range(piece.frames):
            x[0, piece.key + i : piece.key + i + len(parts)] += parts[:, i]
    else:
        x[0, piece.key : piece.key + piece.frames] += parts[0]


def join(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Another attention of the same queries, with its log-sum-exp, joined to out and lse, in place."""
    if _extension.why_no_cpu() is None:
        _extension.compiled("join_attention_")(out, lse, part, part_lse)
        return
    joined = lse.logaddexp(part_lse)
    from_zero = joined.masked_fill(joined == -math.inf, 0.0)
    out.copy_(out * (lse - from_zero).exp()[..., None] + part * (part_lse - from_zero).exp()[..., None])
    lse.copy_(joined)


def _separate(pieces: Sequence[Piece], q: Tensor) -> Iterator[Piece]:
    """Frames of queries that see the same frames are one sequence, or each a piece of its own where they do not lie so."""
    for piece in pieces:
        if piece.moving or _sequence(q):
            yield piece
        else:
            for t in range(piece.first, piece.last):
                yield piece._replace(first=t, last=t + 1)


def _sequence(x: Tensor) -> bool:
    """Whether all tokens of a clip ``[B, T, N, H, D]`` have one stride."""
    return x.shape[1] == 1 or x.shape[2] == 1 or x.stride(1) == x.shape[2] * x.stride(2)


class Windows:
    """Keys and values ``[B, T, L, H, D]`` of which runs of frames are attended to; B is 1 unless these are single frames.

    Runs are views: windows that overlap in memory. Where a clip's frames do not follow each other there it is copied once.
    """

    def __init__(self, k: Tensor, v: Tensor) -> None:
        self.given = k, v
        self.lying: tuple[Tensor, Tensor] | None = None

    def views(self, piece: Piece) -> tuple[Tensor, Tensor]:
        """``[frames, count * L, H, D]`` of a piece, or 1 for frames."""
        k, v = self.given
        if piece.frames > 1:
            if self.lying is None:
                self.lying = (k if _sequence(k) else k.contiguous(), v if _sequence(v) else v.contiguous())
            k, v = self.lying
        return _window(k, piece), _window(v, piece)

    def attend(self, q: Tensor, piece: Piece, scale: float) -> tuple[Tensor, Tensor]:
        """``[B, frames, Lq, H, D]`` and its log-sum-exp."""
        queries = _queries(q, piece)
        out, lse = _attend(*(x.transpose(1, 2) for x in (queries, *self.views(piece))), scale=scale)
        shape = (q.shape[0], piece.last - piece.first, q.shape[2])
        return out.transpose(1, 2).reshape(*shape, *out.shape[1::2]), lse.transpose(1, 2).reshape(*shape, -1)

    def derive(
        self, grad: Tensor, q: Tensor, out: Tensor, lse: Tensor, piece: Piece, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of a piece's queries ``[B, frames, Lq, H, D]`` and of its views."""
        g, queries, whole, sums = (_queries(x, piece).transpose(1, 2) for x in (grad, q, out, lse))
        keys, values = (x.transpose(1, 2) for x in self.views(piece))
        dq, dk, dv = _derive(g, queries, keys, values, whole, sums, 0.0, False, scale=scale)
        shape = (q.shape[0], piece.last - piece.first, *q.shape[2:])
        return dq.transpose(1, 2).reshape(shape), dk.transpose(1, 2), dv.transpose(1, 2)


def _window(x: Tensor, piece: Piece) -> Tensor:
    frames = piece.last - piece.first if piece.moving else 1
    if piece.frames == 1:
        return _flat(x[:, piece.key : piece.key + frames])
    step = x.stride(1) if x.shape[2] == 1 else x.stride(2)
    start = x.storage_offset() + piece.key * x.stride(1)
    sizes = (frames, piece.frames * x.shape[2], *x.shape[3:])
    return x.as_strided(sizes, (x.stride(1), step, *x.stride()[3:]), start)


def _queries(x: Tensor, piece: Piece) -> Tensor:
    """``[frames, Lq, ...]``, or ``[1, frames * Lq, ...]`` where all see the same."""
    x = x[:, piece.first : piece.last]
    return _flat(x) if piece.moving else x.flatten(1, 2)


def _flat(x: Tensor) -> Tensor:
    """Frames of clips as frames; a copy only where clips of more than one do not follow each other."""
    return x.flatten(0, 1)


BACKEND = Backend("sdpa", can_run, forward, backward, formula=reference.forward)
