"""The ops ``token_shift`` and, in place, ``token_shift_``: public functions, checks, backends, autograd.

Kernels: see README.md beside this file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

from ... import _extension
from .. import checks
from ..backends import Backend, cpu_backend, reference_backend, triton_backend
from ..base import Op
from ..layout import empty_dense_like
from . import reference

NAME = "token_shift"
IN_PLACE = "token_shift_"
PADDINGS = ("zeros", "edge", "wrap")
MAX_GROUPS = 8  # held in kernel parameters
MAX_FRAMES = 1024  # held in a program's registers by the Triton kernel in place
Tokens = tuple[int, int] | tuple[int, int, int] | None


def token_shift(
    x: Tensor,
    groups: Sequence[tuple[int, int]],
    *,
    padding: str = "zeros",
    tokens: Tokens = None,
    residual: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Groups of channels taken from neighbouring frames.

    ``out[b, t, n, c] = x[b, t - offset(c), n, c]``: offset 1 brings the previous frame, -1 the next. The shift of TSM (arXiv
    1811.08383), TokShift (2108.02432), ActionCLIP, Side4Video, ZeroI2V and TS2-Net; ``i2v_kernels.nn`` has each by name.

    Args:
        x: ``[B, T, N, C]``, float64, float32, bfloat16 or float16, last stride 1.
        groups: ``(channels, offset)`` pairs, from channel 0 on; channels not named stay.
        padding: what a frame outside the clip gives: "zeros", "edge" (the first or last frame) or "wrap" (t modulo T).
        tokens: ``(start, stop)`` or ``(start, stop, step)``: only the tokens of this range are shifted, the others stay; None
            shifts all.
        residual: ``out = x + token_shift(x)``. What stays is its own shift, so channels not named and tokens outside ``tokens``
            come out twice as large.
        backend: "reference", "cpu", "triton" or "cuda"; None chooses (see ``i2v_kernels.explain``).

    Returns:
        ``[B, T, N, C]`` in x's dtype, its dimensions in x's order in memory; bit-exact copies, or with ``residual`` sums
        in float32 (float64 for float64), rounded once. ``torch.autocast`` changes nothing. The gradient is the adjoint
        shift: no tensor is saved.

    Raises:
        TypeError, ValueError: an argument of a wrong type, dtype, shape or stride; groups that name more than C channels.
        NotImplementedError: the named backend cannot run this call; the text says why.
    """
    checks.flag(NAME, "residual", residual)
    return _OP(x, *_checked(NAME, x, groups, padding, tokens), residual, backend=backend)


def token_shift_(
    x: Tensor,
    groups: Sequence[tuple[int, int]],
    *,
    padding: str = "zeros",
    tokens: Tokens = None,
    backend: str | None = None,
) -> Tensor:
    """``token_shift`` in place, for inference: only the channels and tokens that are shifted are read and written.

    That is a quarter of the bytes for TSM, a 394th for TokShift, which shifts half of one token in 197.

    Args:
        x: as in ``token_shift``; no two of its elements may share memory, as those of an expanded tensor do.
        groups, padding, tokens: as in ``token_shift``.
        backend: "reference", "cpu" or "triton"; None chooses (see ``i2v_kernels.explain``).

    Returns:
        x itself.

    Raises:
        TypeError, ValueError: as ``token_shift``; x overlaps itself; x requires a gradient and autograd is recording.
        NotImplementedError: the named backend cannot run this call; the text says why.
    """
    arguments = _checked(IN_PLACE, x, groups, padding, tokens)
    checks.no_overlap(IN_PLACE, "x", x)
    _IN_PLACE(x, *arguments, backend=backend)
    return x


def _checked(
    op: str, x: Tensor, groups: Sequence[tuple[int, int]], padding: str, tokens: Tokens
) -> tuple[list[int], list[int], str, int, int, int]:
    """The arguments that both ops take, as their schemas have them."""
    checks.tensor(op, "x", x, (None,) * 4, "[B, T, N, C]")
    checks.one_of(op, "padding", padding, PADDINGS)
    pairs = check_groups(op, groups)
    channels, offsets = [count for count, _ in pairs], [offset for _, offset in pairs]
    if sum(channels) > x.shape[3]:
        raise ValueError(f"{op}: groups={pairs!r} name {sum(channels)} channels, but x has C={x.shape[3]}")
    if any(abs(offset) > checks.LARGEST for offset in offsets):  # which the registered ops do not take: the same shift, nearer
        frames = max(x.shape[1], 1)
        offsets = [o % frames if padding == "wrap" else min(max(o, -frames), frames) for o in offsets]
    start, stop, step = 0, x.shape[2], 1
    if tokens is not None:
        if not isinstance(tokens, (tuple, list)) or len(tokens) not in (2, 3):
            raise TypeError(f"{op}: tokens={tokens!r} must be (start, stop) or (start, stop, step)")
        start = checks.integer(op, "tokens[0]", tokens[0], low=0, high=stop)
        stop = checks.integer(op, "tokens[1]", tokens[1], low=start, high=stop)
        if len(tokens) == 3:
            step = min(checks.integer(op, "tokens[2]", tokens[2], low=1), max(stop - start, 1))
    return channels, offsets, padding, start, stop, step


def check_groups(op: str, groups: object) -> list[tuple[int, int]]:
    """``(channels, offset)`` pairs."""
    pairs = checks.items(op, "groups", groups, "a list of pairs (channels, offset)")
    for i, group in enumerate(pairs):
        if not isinstance(group, (tuple, list)) or len(group) != 2:
            raise TypeError(f"{op}: groups[{i}]={group!r} must be a pair (channels, offset)")
        checks.integer(op, f"groups[{i}][0]", group[0], low=0)
        checks.integer(op, f"groups[{i}][1]", group[1])
    return [(count, offset) for count, offset in pairs]


def _cuda(x: Tensor, channels: Any, offsets: Any, padding: str, *rest: Any, adjoint: bool) -> Tensor:
    out = empty_dense_like(x)
    _extension.compiled("token_shift")(x, out, channels, offsets, PADDINGS.index(padding), *rest, adjoint)
    return out


def _triton_limits(x: Tensor, channels: Any, *_: Any) -> str | None:
    if len(channels) > MAX_GROUPS:
        return f"{len(channels)} groups: the kernels take at most {MAX_GROUPS}"
    return None


def _triton_in_place_limits(x: Tensor, channels: Any, *_: Any) -> str | None:
    if x.shape[1] > MAX_FRAMES:
        return f"T={x.shape[1]}: the kernel in place takes at most {MAX_FRAMES} frames"
    return _triton_limits(x, channels)


def _triton_in_place(*args: Any) -> None:
    from . import triton_kernels

    triton_kernels.shift_in_place(*args)


def _cuda_can_run(x: Tensor, channels: Any, *_: Any) -> str | None:
    if x.device.type != "cuda":
        return f"the tensor is on {x.device}"
    return _triton_limits(x, channels) or _extension.why_no_cuda()


def _save(ctx: Any, inputs: tuple[Any, ...], _: Any) -> None:
    ctx.rest = inputs[1:]  # no tensor: the adjoint needs none


_ARGUMENTS = "int[] channels, int[] offsets, str padding, SymInt start, SymInt stop, SymInt step"

_OP = Op(
    name=NAME,
    schema=f"(Tensor x, {_ARGUMENTS}, bool residual) -> Tensor",
    backward_schema=f"(Tensor grad, {_ARGUMENTS}, bool residual) -> Tensor",
    backends=(
        reference_backend(NAME, reference.forward, reference.adjoint),
        cpu_backend(NAME),
        triton_backend(NAME, _triton_limits),
        Backend("cuda", _cuda_can_run, partial(_cuda, adjoint=False), partial(_cuda, adjoint=True)),
    ),
    preference={"cpu": ("cpu",), "cuda": ("triton",)},
    by_name_only={"cuda": "not yet verified on a GPU (proof step 7): ask for it by name"},
    fake=lambda x, *_: empty_dense_like(x),
    fake_backward=lambda grad, *_: empty_dense_like(grad),
    save=_save,
    forward_args=lambda args, count: args,
    again=lambda ctx, grad: (reference.adjoint(grad, *ctx.rest), *[None] * len(ctx.rest)),
)

_IN_PLACE = Op(
    name=IN_PLACE,
    schema=f"(Tensor(a!) x, {_ARGUMENTS}) -> ()",
    backends=(
        Backend("reference", lambda *args: None, reference.shift_in_place, formula=reference.shift_in_place),
        cpu_backend(IN_PLACE),
        replace(triton_backend(NAME, _triton_in_place_limits), forward=_triton_in_place),
    ),
    preference={"cpu": ("cpu",), "cuda": ("triton",)},
    fake=lambda *args: None,
)
