"""The op ``late_interaction``: public function, checks, backends, autograd. Kernels: see README.md beside this file."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import checks
from ..backends import Backend, reference_backend, triton_backend
from ..base import Op, accumulate_dtype, needs_gradient
from ..temporal_attention.sdpa import finite
from . import blocks, reference
from .reference import place_dtype

NAME = "late_interaction"
MOST_ATTENDED = 128  # tokens of an item, in the Triton kernels
TEXT, VIDEO = "[A, Nt, D]", "[V, Nv, D]"
MODES, MASKED = ("wti", "ti", "maxsim", "softmax"), ("ignore", "zero")


def late_interaction(
    text: Tensor,
    video: Tensor,
    *,
    text_weight: Tensor | None = None,
    video_weight: Tensor | None = None,
    text_mask: Tensor | None = None,
    video_mask: Tensor | None = None,
    mode: Literal["wti", "ti", "maxsim", "softmax"] = "wti",
    masked: Literal["ignore", "zero"] = "ignore",
    temperature: float | None = None,
    unit: bool = False,
    normalize: bool = False,
    backend: str | None = None,
) -> Tensor:
    """How well each text goes with each video, from the similarities of their tokens, none of which is stored.

    With ``s[a, b, t, v] = <text[a, t], video[b, v]>`` over tokens that are valid:

    * ``"wti"``: ``1/2 * (sum_t w[a, t] * max_v s + sum_v w[b, v] * max_t s)``, DRL's weighted token-wise interaction
      (arXiv 2203.07111); without weights they are 1 / number of valid tokens;
    * ``"ti"``: the same with those means on both sides (FILIP, 2111.07783), and no weights;
    * ``"maxsim"``: ``sum_t w[a, t] * max_v s`` (ColBERT, 2004.12832), of a weight 1 without ``text_weight``;
    * ``"softmax"``: "wti" with ``sum_v softmax_v(s / temperature) * s`` for each maximum over v, and over t alike (the
      attention over similarities of X-CLIP, 2207.07285, and TS2-Net, 2207.07852).

    Both directions come from one pass over tiles of s. For backward the inputs are kept and, for maxima, the place of each, a
    byte for up to 256 tokens: ``A * V * (Nt + Nv)`` bytes. Equal maxima go to the first token, as in ``torch.max``.

    Args:
        text: ``[A, Nt, D]``; float64, float32, bfloat16 or float16, last stride 1.
        video: ``[V, Nv, D]``, of text's dtype, last stride 1.
        text_weight, video_weight: ``[A, Nt]`` and ``[V, Nv]``, of any floating-point dtype; those of tokens that are not valid
            do not count.
        text_mask, video_mask: ``[A, Nt]`` and ``[V, Nv]`` bool, True where the token is valid. A pair of which the text or the
            video has no valid token scores 0.
        mode: see above.
        masked: "ignore" leaves tokens out that are not valid; "zero" multiplies their similarities by 0, as DRL and PyLate do,
            so that they win where all others are negative.
        temperature: of "softmax", above 0; 0.01 in X-CLIP, 0.25 with ``unit`` in TS2-Net. No other mode takes one.
        unit: in "softmax", similarities are divided by their length over those that the softmax sees, as in TS2-Net.
        normalize: divide features by their length first, so that s is a cosine.
        backend: "reference", "cpu" or "triton"; None chooses (see ``i2v_kernels.explain``).

    Returns:
        ``[A, V]`` float32 (float64 for float64). Under ``torch.autocast`` the features are cast like those of a matrix product.

    Raises:
        TypeError, ValueError: an argument of a wrong type, dtype, shape, stride or device, or one that the mode does not take.
        NotImplementedError: the named backend cannot run this call, and the text says why.

    Examples:
        >>> import torch
        >>> text, video = torch.randn(4, 32, 512), torch.randn(6, 12, 512)
        >>> valid = torch.arange(32) < torch.tensor([[5], [32], [9], [17]])
        >>> late_interaction(text, video, text_mask=valid, mode="ti", normalize=True).shape
        torch.Size([4, 6])
    """
    text, video = checks.autocast(text, video)  # type: ignore[assignment]
    checks.tensor(NAME, "text", text, (None,) * 3, TEXT)
    checks.tensor(NAME, "video", video, (None, None, text.shape[2]), VIDEO, like=text)
    checks.one_of(NAME, "mode", mode, MODES)
    checks.one_of(NAME, "masked", masked, MASKED)
    text_mask = _mask("text_mask", text_mask, text, "[A, Nt]")
    video_mask = _mask("video_mask", video_mask, video, "[V, Nv]")
    text_weight = _weight("text_weight", text_weight, text, "[A, Nt]", mode)
    video_weight = _weight("video_weight", video_weight, video, "[V, Nv]", mode)
    checks.flag(NAME, "unit", unit)
    if checks.flag(NAME, "normalize", normalize):
        text, video = F.normalize(text, dim=2), F.normalize(video, dim=2)
    if mode == "softmax":
        temperature = checks.number(NAME, "temperature", temperature, ' with mode="softmax"')
        if not temperature > 0:
            raise ValueError(f"{NAME}: temperature={temperature} must be above 0")
    elif temperature is not None or unit:
        name, value = ("unit", unit) if temperature is None else ("temperature", temperature)
        raise ValueError(f'{NAME}: {name}={value!r} is of mode="softmax", not of {mode!r}')
    both = mode != "maxsim"
    if both:
        text_weight = _mean_weight(text, text_mask) if text_weight is None else text_weight
        video_weight = _mean_weight(video, video_mask) if video_weight is None else video_weight
    keep = temperature is None and needs_gradient((text, video, text_weight, video_weight))
    options = (both, masked == "zero", temperature or 0.0, unit, keep)
    return _OP(text, video, text_weight, video_weight, text_mask, video_mask, *options, backend=backend)[0]


def _mask(name: str, value: Tensor | None, x: Tensor, layout: str) -> Tensor | None:
    return None if value is None else checks.mask(NAME, value, layout, tuple(x.shape[:2]), x, name)


def _weight(name: str, value: Tensor | None, x: Tensor, layout: str, mode: str) -> Tensor | None:
    """Contiguous, in the dtype of sums."""
    if value is None:
        return None
    if mode == "ti" or (mode == "maxsim" and name == "video_weight"):
        raise ValueError(f"{NAME}: {name} of shape {tuple(getattr(value, 'shape', ()))} is given, but mode={mode!r} takes none")
    checks.tensor(NAME, name, value, tuple(x.shape[:2]), layout, any_stride=True)
    checks.same_place(NAME, name, value, x)
    return value.to(accumulate_dtype(x.dtype)).contiguous()


def _mean_weight(x: Tensor, mask: Tensor | None) -> Tensor:
    """1 / number of valid tokens, where they are valid."""
    dtype = accumulate_dtype(x.dtype)
    if mask is None:
        return torch.full(x.shape[:2], 1 / max(x.shape[1], 1), dtype=dtype, device=x.device)
    return mask.to(dtype) / mask.sum(1, keepdim=True, dtype=dtype).clamp_min(1)


def empty_output(
    text: Tensor, video: Tensor, text_weight: Tensor | None, video_weight: Tensor | None, text_mask: Tensor | None,
    video_mask: Tensor | None, both: bool, zero: bool, temperature: float, unit: bool, keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Memory for the scores and, where they are kept, for the places of the maxima: ``[A, V, Nt]`` and ``[A, V, Nv]``."""
    (texts, rows, _), (videos, columns, _) = text.shape, video.shape
    scores = torch.empty(texts, videos, dtype=accumulate_dtype(text.dtype), device=text.device)

    def places(tokens: int, among: int, kept: bool) -> Tensor:
        shape, dtype = ((texts, videos, tokens), place_dtype(among)) if kept else ((0,), torch.uint8)
        return torch.empty(shape, dtype=dtype, device=text.device)

    keep = keep and not temperature and rows > 0 and columns > 0
    return scores, places(rows, columns, keep), places(columns, rows, keep and both)


def begun(*args: Any) -> tuple[tuple[Tensor, Tensor, Tensor], bool]:
    """Memory for what the op returns, and whether it is done: without a number in texts or videos the definition fills it."""
    found, done = empty_output(*args), args[0].numel() == 0 or args[1].numel() == 0
    if done:
        for into, result in zip(found, reference.forward(*args)):
            into.copy_(result)
    return found, done


def _save(ctx: Any, inputs: tuple[Any, ...], result: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:6], *result[1:])
    ctx.rest = inputs[6:11]


def _triton_limits(text: Tensor, video: Tensor, *rest: Any) -> str | None:
    if text.dtype == torch.float64:
        return "float64: only reference and cpu compute in double precision"
    longest, temperature = max(text.shape[1], video.shape[1]), rest[6]
    if temperature and longest > MOST_ATTENDED:
        return f"{longest} tokens: with a softmax the kernel holds at most {MOST_ATTENDED} of a text and of a video"
    return None


# what is not finite, times the zeros of all that was not the largest, goes through the definition
def _forward(*args: Any) -> Any:
    return (blocks.forward if finite(*args[:2]) else _EXACT.forward)(*args)


def _backward(*args: Any) -> Any:
    return (blocks.backward if finite(*args[:3]) else _EXACT.backward)(*args)


_EXACT = reference_backend(NAME, reference.forward)
_ARGUMENTS = (
    "Tensor text, Tensor video, Tensor? text_weight, Tensor? video_weight, Tensor? text_mask, Tensor? video_mask, "
    "bool both, bool zero, float temperature, bool unit, bool keep"
)
_OP = Op(
    name=NAME,
    schema=f"({_ARGUMENTS}) -> (Tensor, Tensor, Tensor)",
    backward_schema=(
        f"(Tensor grad, {_ARGUMENTS}, Tensor text_best, Tensor video_best, bool[4] wanted) -> (Tensor, Tensor, Tensor, Tensor)"
    ),
    backends=(_EXACT, Backend("cpu", blocks.can_run, _forward, _backward), triton_backend(NAME, _triton_limits)),
    preference={"cpu": ("cpu",), "cuda": ("triton",)},
    fake=empty_output,
    save=_save,
)
