"""The op ``bottleneck_adapter``: public function, checks, backends, autograd. How it computes: README.md beside this file."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..activations import ACTIVATIONS
from ..backends import Backend, reference_backend, triton_backend
from ..base import Op, needs_gradient
from . import blocks, reference

NAME = "bottleneck_adapter"


def bottleneck_adapter(
    x: Tensor,
    down_weight: Tensor,
    down_bias: Tensor | None,
    up_weight: Tensor,
    up_bias: Tensor | None,
    *,
    activation: str | None = "gelu",
    scale: float = 1.0,
    residual: bool = True,
    norm: tuple[Tensor, Tensor | None, float] | None = None,
    recompute: bool = False,
    backend: str | None = None,
) -> Tensor:
    """The adapter of Houlsby et al. as video models use it: a narrow MLP, scaled and added to its input.

    ``out = x + scale * up(activation(down(norm(x))))``. AIM's (arXiv 2302.03024: exact GELU, C / 4, with and without the
    residual), AdaptFormer's (2205.13535: ReLU, 64, scale 0.1), MV-Adapter's (QuickGELU). For backward it keeps x and
    the bottleneck before its activation, ``[..., R]``; with ``recompute`` x alone.

    Args:
        x: ``[..., C]``, usually ``[B, T, N, C]``; float64, float32, bfloat16 or float16, last stride 1.
        down_weight, down_bias: ``[R, C]`` and ``[R]`` or None, as in ``nn.Linear(C, R)``.
        up_weight, up_bias: ``[C, R]`` and ``[C]`` or None, as in ``nn.Linear(R, C)``.
        activation: "gelu" (exact), "quick_gelu" (``x * sigmoid(1.702 x)``, CLIP's), "relu", "silu", or None for none.
        scale: a number that multiplies the update, its bias too.
        residual: add x.
        norm: ``(weight [C], bias [C] or None, eps)`` of a layer norm before ``down``; the residual is x as it comes.
        recompute: keep x alone, and compute the bottleneck again in backward: one more product.
        backend: "reference", "cpu" or "triton"; None chooses (see ``i2v_kernels.explain``).

    Returns:
        ``[..., C]`` in x's dtype, its dimensions in x's order in memory. Under ``torch.autocast`` all tensors are cast like
        those of ``nn.Linear``.

    Raises:
        TypeError, ValueError: an argument of a wrong type, dtype, shape, stride or device.
        NotImplementedError: the named backend cannot run this call; the text says why.
    """
    norm_weight, norm_bias, eps = (None, None, 0.0) if norm is None else _norm(norm)
    tensors = (x, down_weight, down_bias, up_weight, up_bias, norm_weight, norm_bias)
    x, down_weight, down_bias, up_weight, up_bias, norm_weight, norm_bias = checks.autocast(*tensors)  # type: ignore[assignment]
    if not isinstance(x, Tensor):
        raise TypeError(f"{NAME}: x must be a torch.Tensor [..., C], got {type(x).__name__}")
    if x.dim() < 1:
        raise ValueError(f"{NAME}: x.shape=(), but [..., C] is needed")
    checks.tensor(NAME, "x", x, (None,) * x.dim(), "[..., C]")
    channels = x.shape[-1]
    checks.tensor(NAME, "down_weight", down_weight, (None, channels), "[R, C]", like=x)
    width = down_weight.shape[0]
    checks.tensor(NAME, "up_weight", up_weight, (channels, width), "[C, R]", like=x)
    for name, vector, size in (
        ("down_bias", down_bias, width), ("up_bias", up_bias, channels),
        ("norm[0]", norm_weight, channels), ("norm[1]", norm_bias, channels),
    ):  # fmt: skip
        if vector is not None:
            checks.tensor(NAME, name, vector, (size,), "[R]" if name == "down_bias" else "[C]", like=x)
    if activation is not None:
        checks.one_of(NAME, "activation", activation, ACTIVATIONS)
    scale = checks.number(NAME, "scale", scale, "; multiply up_weight and up_bias by one that is learned")
    checks.flag(NAME, "residual", residual)
    checks.flag(NAME, "recompute", recompute)
    tensors = (x, down_weight, down_bias, up_weight, up_bias, norm_weight, norm_bias)
    keep = not recompute and needs_gradient(tensors)
    return _OP(*tensors, float(eps), activation or "", scale, residual, keep, backend=backend)[0]


def _norm(norm: Any) -> tuple[Tensor, Tensor | None, float]:
    if not isinstance(norm, (tuple, list)) or len(norm) != 3 or not isinstance(norm[0], Tensor):
        raise TypeError(f"{NAME}: norm={norm!r} must be (weight, bias or None, eps)")
    if checks.number(NAME, "norm[2]", norm[2], ": the layer norm's eps", finite=True) < 0:
        raise ValueError(f"{NAME}: norm[2]={norm[2]!r} must be a number of at least 0: the layer norm's eps")
    return norm  # type: ignore[return-value]


def _save(ctx: Any, inputs: tuple[Any, ...], result: Any) -> None:
    ctx.save_for_backward(*inputs[:7], result[1])
    ctx.rest = inputs[7:11]


def _cpu_can_run(x: Tensor, *_: Any) -> str | None:
    return f"the tensors are on {x.device}" if x.device.type != "cpu" else None


def _triton_limits(x: Tensor, *_: Any) -> str | None:
    return "float64: only reference and cpu compute in double precision" if x.dtype == torch.float64 else None


_ARGUMENTS = (
    "Tensor x, Tensor down_weight, Tensor? down_bias, Tensor up_weight, Tensor? up_bias, Tensor? norm_weight, "
    "Tensor? norm_bias, float eps, str activation, float scale, bool residual"
)
_OP = Op(
    name=NAME,
    schema=f"({_ARGUMENTS}, bool keep) -> (Tensor, Tensor)",
    backward_schema=f"(Tensor grad, {_ARGUMENTS}, Tensor kept, bool[7] wanted) -> ({', '.join(['Tensor'] * 7)})",
    backends=(
        reference_backend(NAME, reference.forward, through=reference.adapter),
        Backend("cpu", _cpu_can_run, blocks.forward, blocks.backward),
        triton_backend(NAME, _triton_limits),
    ),
    preference={"cpu": ("cpu",), "cuda": ("triton",)},
    fake=blocks.empty_output,
    save=_save,
    forward_args=lambda args, count: (*args[1:count], False),
)
