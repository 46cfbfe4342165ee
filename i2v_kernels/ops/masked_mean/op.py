"""The op ``masked_mean``: public function, checks, registration, autograd. Kernels: see README.md beside this file."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..backends import cpu_backend, reference_backend, triton_backend
from ..base import Op
from . import reference

NAME = "masked_mean"
WIDEST = 8192  # channels of a normalised frame, in the Triton kernels


def masked_mean(x: Tensor, mask: Tensor | None = None, *, normalize: bool = False, backend: str | None = None) -> Tensor:
    """The mean over a clip's valid frames, as CLIP4Clip and most others pool them (arXiv 2104.08860, section 3.3).

    ``out[b] = sum_t mask[b, t] * x[b, t] / sum_t mask[b, t]``. With ``normalize`` every frame is brought to unit length
    before, and the mean after, as ``F.normalize`` does (zeros stay zeros): CLIP4Clip's mean pooling, whose products with
    normalised texts are cosine similarities. For backward it keeps its inputs alone.

    Args:
        x: ``[B, T, C]``, float64, float32, bfloat16 or float16, last stride 1.
        mask: ``[B, T]``, bool, True where valid; all frames are if None. What an invalid frame holds does not matter.
        normalize: whether frames and mean are brought to unit length.
        backend: "reference", "cpu" or "triton"; None chooses (see ``i2v_kernels.explain``).

    Returns:
        ``[B, C]`` in x's dtype, contiguous; zeros for a clip without a valid frame. Sums are kept in float32 (float64 for
        float64). ``torch.autocast`` changes nothing.

    Raises:
        TypeError, ValueError: an argument of a wrong type, dtype, shape, stride or device.
        NotImplementedError: the named backend cannot run this call; the text says why.

    Examples:
        >>> import torch
        >>> x = torch.randn(2, 12, 512)
        >>> valid = torch.arange(12) < torch.tensor([[12], [7]])
        >>> pooled = masked_mean(x, valid, normalize=True)
        >>> pooled.shape, torch.allclose(pooled.norm(dim=-1), torch.ones(2))
        (torch.Size([2, 512]), True)
    """
    checks.tensor(NAME, "x", x, (None,) * 3, "[B, T, C]")
    if mask is not None:
        mask = checks.mask(NAME, mask, "[B, T]", tuple(x.shape[:2]), x)
    checks.flag(NAME, "normalize", normalize)
    return _OP(x, mask, normalize, backend=backend)


def empty_output(x: Tensor, *_: Any) -> Tensor:
    """Memory for the output."""
    return torch.empty((x.shape[0], x.shape[2]), dtype=x.dtype, device=x.device)


def _triton_limits(x: Tensor, mask: Tensor | None, normalize: bool) -> str | None:
    if x.dtype == torch.float64:
        return "float64: only reference and cpu compute in double precision"
    if normalize and x.shape[2] > WIDEST:
        return f"C={x.shape[2]}: the kernels hold at most {WIDEST} channels of a normalised frame"
    return None


_ARGUMENTS = "Tensor x, Tensor? mask, bool normalize"
_OP = Op(
    name=NAME,
    schema=f"({_ARGUMENTS}) -> Tensor",
    backward_schema=f"(Tensor grad, {_ARGUMENTS}) -> Tensor",
    backends=(reference_backend(NAME, reference.forward), cpu_backend(NAME), triton_backend(NAME, _triton_limits)),
    preference={"cpu": ("cpu",), "cuda": ("triton",)},
    fake=empty_output,
)
