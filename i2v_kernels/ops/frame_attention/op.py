"""The op ``frame_attention``: public function, checks, backends, autograd. Kernels: see README.md beside this file."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor

from .. import checks
from ..backends import triton_backend
from ..base import Op
from ..layout import empty_dense_like
from ..temporal_attention.packing import empty_output
from ..token_shift.op import MAX_GROUPS
from . import sdpa
from .frames import FARTHEST, head_groups

NAME = "frame_attention"
LAYOUT, KEYS, PACKED, EXTRA = "[B, T, Lq, H, D]", "[B, T, L, H, D]", "[B, T, L, 3, H, D]", "[B, T, M, H, D]"
EDGES = ("mask", "zero", "clamp")
Frames = str | Sequence[int] | Sequence[Sequence[int]]
Extra = tuple[Tensor, Tensor] | None


@overload
def frame_attention(
    q: Tensor, k: Tensor | None = ..., v: Tensor | None = ..., *, frames: Frames, edges: str = ..., extra: Extra = ...,
    mask: Tensor | None = ..., scale: float | None = ..., return_lse: Literal[False] = ..., backend: str | None = ...,
) -> Tensor: ...  # fmt: skip


@overload
def frame_attention(
    q: Tensor, k: Tensor | None = ..., v: Tensor | None = ..., *, frames: Frames, edges: str = ..., extra: Extra = ...,
    mask: Tensor | None = ..., scale: float | None = ..., return_lse: Literal[True], backend: str | None = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


def frame_attention(
    q: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    *,
    frames: Frames,
    edges: str = "mask",
    extra: Extra = None,
    mask: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention of every frame's queries to all tokens of whole frames, and to further keys of its own.

    ``out[b, t, i] = sum_j softmax_j(scale * <q[b, t, i], key_j>) * value_j`` for every head, over the L tokens of each frame
    ``t + offset`` and the M extra tokens of frame t. No key is copied: frames are read where they lie.

    X-CLIP's message token (arXiv 2208.02816, eq. 4) is ``frames=(0,)`` with one extra token; Vita-CLIP's prompts (2304.03307)
    and CLIP-ViP's proxy tokens (2209.06430, eq. 2) are extra tokens, common to the frames of a clip; Open-VCLIP's windows
    (2302.00624) ``frames=(-1, 0, 1), edges="zero"``; ZeroI2V's heads (2310.01324) one tuple each; the attention of joint
    space-time blocks ``frames="all"``.

    Args:
        q: ``[B, T, Lq, H, D]``; float64, float32, bfloat16 or float16, last stride 1.
        k, v: ``[B, T, L, H, D]`` of q's dtype. Or all three in one: ``q [B, T, L, 3, H, D]`` without k and v, the output of a
            packed projection; the gradient then comes packed too.
        frames: the frames that frame t attends to: offsets from t, such as ``(-1, 0, 1)``, where one counts as often as it
            is named; one such tuple for each head; or ``"all"`` frames of the clip.
        edges: what a frame outside the clip is. "mask": left out. "zero": L keys and values of zero within the softmax, which
            are counted, never made. "clamp": the clip's first or last frame.
        extra: ``(k_e, v_e)``, each ``[B, T, M, H, D]``, or with 1 in place of B or T for tokens common to all clips, or to all
            frames of a clip: further keys and values of frame t. Strides of 0 (``expand``) are read as they are.
        mask: ``[B, T]`` bool, True where the frame is valid as keys; of the frame read where ``edges`` clamps. A query with
            no key gives zeros.
        scale: multiplies the scores; ``D ** -0.5`` if None.
        return_lse: return ``(out, lse)`` with ``lse [B, T, Lq, H]``, the logarithm of each query's sum of exponentials of
            scores, -inf where there is no key; float32 (float64 for float64), not differentiable.
        backend: "reference", "sdpa" or "triton"; None chooses (see ``i2v_kernels.explain``).

    Returns:
        ``[B, T, Lq, H, D]`` in q's dtype, its dimensions in q's order in memory. Sums are kept in float32 (float64 for
        float64). Under ``torch.autocast`` all tensors are cast like those of ``F.scaled_dot_product_attention``.

    Raises:
        TypeError, ValueError: an argument of a wrong type, dtype, shape, stride or device.
        NotImplementedError: the named backend cannot run this call; the text says why.

    Examples:
        >>> import torch
        >>> qkv = torch.randn(2, 8, 197, 3, 12, 64)
        >>> frame_attention(qkv, frames=(-1, 0, 1), edges="zero").shape
        torch.Size([2, 8, 197, 12, 64])
        >>> message = torch.randn(2, 8, 1, 12, 64)
        >>> frame_attention(qkv, frames=(0,), extra=(message, message)).shape
        torch.Size([2, 8, 197, 12, 64])
    """
    extra_k, extra_v = (None, None) if extra is None else _pair(extra)
    q, k, v, extra_k, extra_v = checks.autocast(q, k, v, extra_k, extra_v)  # type: ignore[assignment]
    if k is None and v is None:
        checks.tensor(NAME, "q", q, (None, None, None, 3, None, None), f"{PACKED} (or k and v)")
    else:
        checks.tensor(NAME, "q", q, (None,) * 5, LAYOUT)
        batch, length, _, heads, dim = q.shape
        checks.tensor(NAME, "k", k, (batch, length, None, heads, dim), KEYS, like=q)
        checks.tensor(NAME, "v", v, tuple(k.shape), KEYS, like=q)  # type: ignore[union-attr]
    batch, length, heads, dim = *q.shape[:2], *q.shape[-2:]
    if length < 1:
        raise ValueError(f"{NAME}: q.shape={tuple(q.shape)}, but at least one frame is needed")
    offsets, counts = check_frames(frames, heads)
    checks.one_of(NAME, "edges", edges, EDGES)
    if extra_k is not None:
        extra_k, extra_v = _expanded(q, extra_k, extra_v, (batch, length, None, heads, dim))
    if mask is not None:
        mask = checks.mask(NAME, mask, "[B, T]", (batch, length), q)
    checks.flag(NAME, "return_lse", return_lse)
    scale = 1.0 / math.sqrt(max(dim, 1)) if scale is None else checks.number(NAME, "scale", scale, " or None")
    out, lse = _OP(q, k, v, extra_k, extra_v, mask, offsets, counts, edges, scale, backend=backend)
    return (out, lse) if return_lse else out


def check_frames(frames: object, heads: int) -> tuple[list[int], list[int]]:
    """Offsets, and of how many each head has; no offsets: all frames; no numbers: all heads have the same."""
    if isinstance(frames, str):
        checks.one_of(NAME, "frames", frames, ("all",))
        return [], []
    what = 'a tuple of offsets, one such tuple for each head, or "all"'
    found = checks.items(NAME, "frames", frames, what)
    if not found:
        raise ValueError(f"{NAME}: frames={frames!r} names no frame, but must be {what}")
    if not isinstance(found[0], (tuple, list)):
        return [_offset(f"frames[{i}]", offset) for i, offset in enumerate(found)], []
    if len(found) != heads:
        raise ValueError(f"{NAME}: frames={frames!r} has tuples for {len(found)} heads, but there are H={heads}")
    offsets: list[int] = []
    for h, own in enumerate(found):
        if not isinstance(own, (tuple, list)) or not own:
            raise ValueError(f"{NAME}: frames[{h}]={own!r} must be a tuple of at least one offset, as those of other heads")
        offsets += [_offset(f"frames[{h}][{i}]", offset) for i, offset in enumerate(own)]
    counts = [len(own) for own in found]
    first = tuple(found[0])
    return ([*first], []) if all(tuple(own) == first for own in found) else (offsets, counts)


def _offset(name: str, value: object) -> int:
    return min(max(checks.integer(NAME, name, value), -FARTHEST), FARTHEST)


def _pair(extra: object) -> tuple[Any, Any]:
    if not isinstance(extra, (tuple, list)) or len(extra) != 2:
        raise TypeError(f"{NAME}: extra={type(extra).__name__} must be a pair (k_e, v_e) of tensors {EXTRA}, or None")
    for i, x in enumerate(extra):
        if not isinstance(x, Tensor):
            raise TypeError(f"{NAME}: extra[{i}] must be a torch.Tensor {EXTRA}, got {type(x).__name__}")
    return extra[0], extra[1]


def _expanded(q: Tensor, extra_k: Any, extra_v: Any, sizes: tuple[int | None, ...]) -> tuple[Tensor, Tensor]:
    """Extra keys and values of every frame."""
    for i, x in enumerate((extra_k, extra_v)):
        common = [1 if x.dim() == 5 and x.shape[axis] == 1 else sizes[axis] for axis in (0, 1)]
        checks.tensor(NAME, f"extra[{i}]", x, (*common, *sizes[2:]), EXTRA, like=q)
    if extra_k.shape[2] != extra_v.shape[2]:
        raise ValueError(
            f"{NAME}: extra[1].shape={tuple(extra_v.shape)}, but extra[0] has M={extra_k.shape[2]} tokens for each frame"
        )
    shape = (*q.shape[:2], *extra_k.shape[2:])
    return extra_k.expand(shape), extra_v.expand(shape)


def _empty_output(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return empty_output(q, True)


def _empty_grads(grad: Tensor, *args: Any) -> tuple[Tensor, ...]:
    return tuple(grad.new_empty(0) if x is None or not want else empty_dense_like(x) for x, want in zip(args[:5], args[-1]))


def _triton_limits(q: Tensor, *rest: Any) -> str | None:
    if q.dtype == torch.float64:
        return "float64: only reference and sdpa compute in double precision"
    if q.shape[-1] > 256:
        return f"D={q.shape[-1]}: the kernels hold at most D=256"
    groups = len(head_groups(rest[5], rest[6], q.shape[-2]))
    return f"frames of {groups} runs of heads: the kernels take at most {MAX_GROUPS}" if groups > MAX_GROUPS else None


def _save(ctx: Any, inputs: tuple[Any, ...], result: Any) -> None:
    ctx.save_for_backward(*inputs[:6], *result)
    ctx.rest = inputs[6:]


_ARGUMENTS = (
    "Tensor q, Tensor? k, Tensor? v, Tensor? extra_k, Tensor? extra_v, Tensor? mask, int[] offsets, int[] counts, str edges, "
    "float scale"
)
_OP = Op(
    name=NAME,
    schema=f"({_ARGUMENTS}) -> (Tensor, Tensor)",
    backward_schema=(
        f"(Tensor grad, {_ARGUMENTS}, Tensor out, Tensor lse, bool[5] wanted) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
    backends=(sdpa.EXACT, sdpa.BACKEND, triton_backend(NAME, _triton_limits)),
    preference={"cpu": ("sdpa",), "cuda": ("triton",)},
    fake=_empty_output,
    fake_backward=_empty_grads,
    save=_save,
)
