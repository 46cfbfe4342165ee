"""The op ``frame_pool``: public function, checks, registration, autograd. Kernels: see README.md beside this file."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..backends import reference_backend, triton_backend
from ..base import Op
from ..layout import empty_dense_like
from . import reference

NAME = "frame_pool"


def frame_pool(x: Tensor, *, backend: str | None = None) -> Tensor:
    """The mean over frames: ``out[b, n] = sum_t x[b, t, n] / T``, as ViFi-CLIP and CLIP4Clip pool (arXiv 2104.08860).

    Args:
        x: ``[B, T, N, C]``, float64, float32, bfloat16 or float16, last stride 1; at least one frame.
        backend: "reference" or "triton"; None chooses (see ``i2v_kernels.explain``).

    Returns:
        ``[B, N, C]`` in x's dtype, its dimensions in x's order in memory. Sums are kept in float32. ``torch.autocast`` changes
        nothing.

    Raises:
        TypeError, ValueError: x of a wrong type, dtype, shape or stride.
        NotImplementedError: the named backend cannot run this call; the text says why.
    """
    checks.tensor(NAME, "x", x, (None,) * 4, "[B, T, N, C]")
    if x.shape[1] == 0:
        raise ValueError(f"{NAME}: x.shape={tuple(x.shape)}, but at least one frame is needed")
    return _OP(x, backend=backend)


def _triton_limits(x: Tensor, *_: Any) -> str | None:
    return "float64: only reference computes in double precision" if x.dtype == torch.float64 else None


_OP = Op(
    name=NAME,
    schema="(Tensor x) -> Tensor",
    backward_schema="(Tensor grad, Tensor x) -> Tensor",
    backends=(reference_backend(NAME, reference.forward), triton_backend(NAME, _triton_limits)),
    fake=lambda x: empty_dense_like(x[:, 0]),
    preference={"cuda": ("triton",)},
)
