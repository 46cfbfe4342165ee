"""On CPUs: PyTorch's own fused attention on views of whole frames, its parts joined by their log-sum-exp."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import _extension
from ..backends import OPS, Backend, reference_backend
from ..temporal_attention.packing import empty_output, unpacked
from ..temporal_attention.sdpa import finite
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
    """Heads of one clip, or of all clips: what is planned alike. ``whole``: all there is, and one piece."""

    clips: slice
    heads: slice
    plan: Plan
    whole: bool

    def of(self, x: Any) -> Any:
        """Its part of a tensor ``[B, T, N, H, ...]``."""
        return x if x is None or self.whole else x[self.clips, :, :, self.heads]


def groups(
    given: Sequence[Tensor], mask: Tensor | None, offsets: Sequence[int], counts: Sequence[int], edges: str
) -> Iterator[Group]:
    """For tensors ``[B, T, N, H, D]``: clips are frames like any others where these see their own alone, and lie so."""
    batch, frames, _, heads, _ = given[0].shape
    together = batch == 1 or all(frames == 1 or x.stride(0) == frames * x.stride(1) for x in given)
    valid = [None] * batch if mask is None else [None if all(row) else tuple(row) for row in mask.tolist()]
    for first, last, own in head_groups(offsets, counts, heads):
        plans = [plan(frames, own, edges, row) for row in valid]
        if together and all(_own_frame(p, frames) for p in plans):
            yield Group(slice(0, batch), slice(first, last), plans[0], last - first == heads)
            continue
        for b, found in enumerate(plans):
            yield Group(slice(b, b + 1), slice(first, last), found, False)


def _own_frame(found: Plan, frames: int) -> bool:
    """Every frame sees itself and no other."""
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
    given = (*unpacked(q, k, v), extra_k, extra_v)
    more = extra_k is not None and extra_k.shape[2] > 0
    for group in groups(given[:3], mask, offsets, counts, edges):
        into, sums, *own = (group.of(x) for x in (out, lse, *given))
        sound = _forward(into, sums, *own, group, scale)  # type: ignore[call-arg]
        seen = [
            (given[1].shape[2] > 0 and (some or count > 0)) or more for some, count in zip(group.plan.seen, group.plan.zeros)
        ]
        if not sound or not finite(sums if all(seen) else sums[:, seen]):
            for b in range(group.clips.start, group.clips.stop):
                call: list[Any] = [None if x is None else x[b : b + 1] for x in (q, k, v, extra_k, extra_v, mask)]
                for into, part in zip((out, lse), reference.forward(*call, *options)):  # type: ignore[call-arg]
                    into[b : b + 1, :, :, group.heads] = part[:, :, :, group.heads]
    return out, lse


def _forward(
    out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, extra_k: Tensor | None, extra_v: Tensor | None, group: Group,
    scale: float,
) -> bool:  # fmt: skip
    """Whether PyTorch's kernel has lost no NaN and no infinity, as it does where a query has nothing else: that one's
    log-sum-exp is then 0, and so it seldom is otherwise.
    """
    keys, sound, found = k.shape[2], True, group.plan
    if not all(found.seen) or keys == 0:
        out.zero_()
        lse.fill_(-math.inf)
    if keys > 0:
        windows = Windows(k, v)
        for turn, pieces in enumerate(found.rounds):
            for piece in _separate(pieces, q):
                part, part_lse = windows.attend(q, piece, scale)
                sound = sound and lost_nothing(part_lse)
                if group.whole:
                    put(out, part)
                    put(lse, part_lse)
                    continue
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
            sound = sound and lost_nothing(part_lse)
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
    packed = q.dim() == 6 and grads[0] is not None
    into = [*(unpacked(*grads[:3]) if packed else grads[:3]), *grads[3:]]
    for group in groups(given[:3], mask, offsets, counts, edges):
        group = group._replace(whole=group.whole and not packed)
        whole = [group.of(x) for x in (grad, out, lse)]
        if finite(*whole[:2]):
            _backward([group.of(x) for x in into], *whole, *map(group.of, given), group, scale)  # type: ignore[call-arg]
            continue
        for b in range(group.clips.start, group.clips.stop):
            call = [None if x is None else x[b : b + 1] for x in inputs]
            ends = (out[b : b + 1], lse[b : b + 1], wanted)
            for memory_b, part in zip(memory, EXACT.backward(grad[b : b + 1], *call, offsets, counts, edges, scale, *ends)):
                if memory_b.shape != (0,):
                    memory_b[b : b + 1, ..., group.heads, :] = part[..., group.heads, :]
    return memory


def _backward(
    grads: Sequence[Tensor | None], grad: Tensor, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor,
    extra_k: Tensor | None, extra_v: Tensor | None, group: Group, scale: float,
) -> None:  # fmt: skip
    dq, dk, dv, dextra_k, dextra_v = grads
    dq = torch.empty_like(out) if dq is None else dq
    if not all(group.plan.seen) or k.shape[2] == 0:
        dq.zero_()
    of_frames = [Frames(x) for x in (dk, dv)]
    if k.shape[2] > 0:
        windows = Windows(k, v)
        for turn, pieces in enumerate(group.plan.rounds):
            for piece in _separate(pieces, q):
                part, *of_keys = windows.derive(grad, q, out, lse, piece, scale)
                if group.whole:
                    for x, parts in zip((dq, dk, dv), (part, *of_keys)):
                        if x is not None:
                            put(x, parts.reshape(x.shape))
                    continue
                frames = slice(piece.first, piece.last)
                if turn == 0:
                    dq[:, frames] = part
                else:
                    dq[:, frames] += part
                for sums, parts in zip(of_frames, of_keys):
                    sums.add(parts, piece)
    if not group.whole:
        for sums in of_frames:
            sums.finish()
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


class Frames:
    """Gradients of keys ``[B, T, L, H, D]``, to which pieces add theirs; None where they are not wanted."""

    def __init__(self, x: Tensor | None) -> None:
        self.x, self.written = x, [False] * (0 if x is None else x.shape[1])

    def add(self, parts: Tensor, piece: Piece) -> None:
        """``[frames of queries, frames * L, H, D]``, or of several clips where the piece's frames are single."""
        if self.x is None:
            return
        if piece.frames == 1 and piece.moving:
            self._add(parts.reshape(len(self.x), -1, *self.x.shape[2:]), piece.key)
            return
        parts = parts.unflatten(1, (piece.frames, self.x.shape[2]))
        if piece.moving:
            for i in range(piece.frames):
                self._add(parts[None, :, i], piece.key + i)
        else:
            self._add(parts, piece.key)

    def _add(self, parts: Tensor, first: int) -> None:
        """``[B, frames, L, H, D]`` to the frames from the first on."""
        assert self.x is not None
        last = first + parts.shape[1]
        for known, run in groupby(range(first, last), key=lambda s: self.written[s]):
            own = list(run)
            into, part = self.x[:, own[0] : own[-1] + 1], parts[:, own[0] - first : own[-1] + 1 - first]
            if known:
                into += part
            else:
                into.copy_(part)
        self.written[first:last] = [True] * (last - first)

    def finish(self) -> None:
        """Frames that nobody sees have a gradient of zero."""
        for s, known in enumerate(self.written):
            if not known:
                assert self.x is not None
                self.x[:, s].zero_()


def put(into: Tensor, part: Tensor) -> None:
    """The memory's content: the part's own memory in its place, where both lie alike."""
    if part.stride() == into.stride():
        into.set_(part)  # type: ignore[call-overload]
    else:
        into.copy_(part)


def lost_nothing(lse: Tensor) -> bool:
    return bool((1 / lse).sum().isfinite())


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
