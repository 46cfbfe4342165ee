"""The op ``temporal_conv``: public function, checks, backends, autograd. Kernels: see README.md beside this file."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..activations import ACTIVATIONS
from ..backends import Backend, cpu_backend, reference_backend, triton_backend
from ..base import Op
from ..layout import empty_dense_like
from . import cuda, reference

NAME = "temporal_conv"
PREFIX_MODES = ("zero", "copy")


def temporal_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    grid: tuple[int, int] | None = None,
    prefix: int = 0,
    prefix_mode: str = "zero",
    dilation: int = 1,
    activation: str | None = None,
    residual: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Depthwise convolution over the frames, and the patch grid if asked, of tokens that stay channels-last.

    ``out[b, t, n, c] = bias[c] + sum_k weight[c, 0, k] * x[b, t + (k - kt // 2) * dilation, n, c]`` for ``(kt, 1, 1)``; with a
    grid the sum runs over the neighbours in it too. Zero padding keeps every size. ``activation`` of that, and ``residual``,
    x added to it, cost no pass of their own. The convolution of ST-Adapter (arXiv 2206.13559, eq. 4), EVL (2208.03550, with
    the residual), UniFormerV2 and Side4Video, without their two permutes and copies around ``nn.Conv3d``.

    Args:
        x: ``[B, T, N, C]``, float64, float32, bfloat16 or float16, last stride 1. N = prefix + H * W.
        weight: ``[C, 1, kt, kh, kw]`` as in ``nn.Conv3d(C, C, (kt, kh, kw), groups=C)``; odd sizes.
        bias: ``[C]``.
        grid: ``(H, W)``, the patch grid; may be left out for ``(kt, 1, 1)``.
        prefix: number of class or prompt tokens before the patches; they take no part.
        prefix_mode: what the output holds for prefix tokens: "zero", or "copy" of the input; with ``residual`` always the copy.
        dilation: frames from one tap in time to the next.
        activation: "gelu" (exact), "quick_gelu" (``x * sigmoid(1.702 x)``), "relu", "silu", or None for none. Backward then
            convolves once more, since what is before it is not kept.
        residual: add x.
        backend: "reference", "cpu", "triton" or "cuda"; None chooses (see ``i2v_kernels.explain``).

    Returns:
        ``[B, T, N, C]`` in x's dtype, its dimensions in x's order in memory. Sums are kept in float32 (float64 for
        float64). Under ``torch.autocast`` the inputs are cast like those of ``nn.Conv3d``.

    Raises:
        TypeError, ValueError: an argument of a wrong type, dtype, shape, stride or device.
        NotImplementedError: the named backend cannot run this call; the text says why.
    """
    x, weight, bias = checks.autocast(x, weight, bias)  # type: ignore[assignment]
    checks.tensor(NAME, "x", x, (None,) * 4, "[B, T, N, C]")
    channels = x.shape[3]
    height, width = check_kernel(NAME, "weight", weight, "C", channels, x, grid, prefix)
    if bias is not None:
        checks.tensor(NAME, "bias", bias, (channels,), "[C]", like=x)
    checks.one_of(NAME, "prefix_mode", prefix_mode, PREFIX_MODES)
    if checks.integer(NAME, "dilation", dilation, low=1) > 1:
        dilation = min(dilation, max(x.shape[1], 1))  # beyond the clip all taps but the middle one meet zeros
    if activation is not None:
        checks.one_of(NAME, "activation", activation, ACTIVATIONS)
    checks.flag(NAME, "residual", residual)
    rest = (height, width, prefix, "copy" if residual else prefix_mode, dilation, activation or "", residual)
    return _OP(x, weight, bias, *rest, backend=backend)


def check_kernel(
    op: str, name: str, weight: object, symbol: str, channels: int, x: Tensor, grid: tuple[int, int] | None, prefix: int
) -> tuple[int, int]:
    """Checks a depthwise kernel over the tokens of ``x``, their grid and prefix; returns the grid, ``(1, H*W)`` for None."""
    if not isinstance(weight, Tensor):
        raise TypeError(f"{op}: {name} must be a torch.Tensor [{symbol}, 1, kt, kh, kw], got {type(weight).__name__}")
    if weight.dim() != 5 or weight.shape[:2] != (channels, 1):
        shape, wanted = tuple(weight.shape), f"[{symbol}, 1, kt, kh, kw] with {symbol}={channels}"
        raise ValueError(f"{op}: {name}.shape={shape}, but {wanted} is needed")
    checks.same_place(op, name, weight, x)
    if weight.dtype != x.dtype:
        raise TypeError(f"{op}: {name}.dtype={weight.dtype}, but x has {x.dtype}")
    _, _, *sizes = weight.shape
    if not (sizes[0] % 2 and sizes[1] % 2 and sizes[2] % 2):
        raise ValueError(f"{op}: {name}.shape={tuple(weight.shape)}, but kt, kh and kw must be odd")
    tokens = x.shape[2]
    checks.integer(op, "prefix", prefix, low=0, high=tokens)
    if grid is None:
        if sizes[1:] != [1, 1]:
            raise ValueError(f"{op}: grid=None, but {name}.shape={tuple(weight.shape)} reaches over the grid: pass (H, W)")
        return 1, tokens - prefix
    height, width = checks.sizes(op, "grid", grid, "H, W")
    if prefix + height * width != tokens:
        raise ValueError(f"{op}: prefix={prefix} + H*W of grid={tuple(grid)} is not N={tokens}")
    return height, width


def _triton_limits(x: Tensor, weight: Tensor, *_: Any) -> str | None:
    if x.dtype == torch.float64:
        return "float64: only reference and cpu compute in double precision"
    if (taps := weight.shape[1:].numel()) > 343:
        return f"{taps} taps: the kernels are unrolled over at most 343"
    return None


_ARGUMENTS = (
    "Tensor x, Tensor weight, Tensor? bias, SymInt height, SymInt width, SymInt prefix, str prefix_mode, "
    "SymInt dilation, str activation, bool residual"
)
_OP = Op(
    name=NAME,
    schema=f"({_ARGUMENTS}) -> Tensor",
    backward_schema=f"(Tensor grad, {_ARGUMENTS}, bool[3] wanted) -> (Tensor, Tensor, Tensor)",
    backends=(
        reference_backend(NAME, reference.forward),
        cpu_backend(NAME),
        triton_backend(NAME, _triton_limits),
        Backend("cuda", cuda.can_run, cuda.forward, cuda.backward),
    ),
    by_name_only={"cuda": "not yet verified on a GPU (proof step 7): ask for it by name"},
    preference={"cpu": ("cpu",), "cuda": ("triton",)},
    fake=lambda x, *_: empty_dense_like(x),
)
