"""The op ``st_adapter``: public function, checks, backends, autograd. How it computes: see README.md beside this file."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from .. import checks
from ..backends import OPS, Backend, reference_backend
from ..base import Op, needs_gradient
from ..layout import empty_dense_like, empty_tokens
from ..temporal_conv.op import check_kernel
from . import blocks, reference

NAME = "st_adapter"


def st_adapter(
    x: Tensor,
    down_weight: Tensor,
    down_bias: Tensor | None,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    up_weight: Tensor,
    up_bias: Tensor | None,
    *,
    grid: tuple[int, int] | None = None,
    prefix: int = 1,
    recompute: bool = False,
    backend: str | None = None,
) -> Tensor:
    """The adapter of ST-Adapter, on the residual stream: a linear bottleneck with a depthwise convolution inside, added to x.

    ``out = x + up(conv(down(x)))`` on patches; class tokens pass as they are. ``down`` and ``up`` are linear, ``conv`` is
    ``temporal_conv`` (ST-Adapter, arXiv 2206.13559, eq. 4; no activation). Nothing is permuted or gathered. For backward
    it keeps x and ``down(x)``, ``[B, T, N, R]``; with ``recompute`` x alone.

    Args:
        x: ``[B, T, N, C]``, float64, float32, bfloat16 or float16, last stride 1. N = prefix + H * W.
        down_weight, down_bias: ``[R, C]`` and ``[R]`` or None, as in ``nn.Linear(C, R)``; published as ``fc1``.
        conv_weight, conv_bias: ``[R, 1, kt, kh, kw]`` and ``[R]`` or None, as in ``nn.Conv3d(R, R, ..., groups=R)``; odd sizes.
        up_weight, up_bias: ``[C, R]`` and ``[C]`` or None, as in ``nn.Linear(R, C)``; published as ``fc2``.
        grid: ``(H, W)``, the patch grid; may be left out for kernels of ``(kt, 1, 1)``.
        prefix: number of class or prompt tokens before the patches.
        recompute: keep x alone, and compute the bottleneck again in backward: one more product.
        backend: "reference", "cpu" or "triton"; None chooses (see ``i2v_kernels.explain``).

    Returns:
        ``[B, T, N, C]`` in x's dtype, its dimensions in x's order in memory. Under ``torch.autocast`` all tensors are cast
        like those of ``nn.Linear``.

    Raises:
        TypeError, ValueError: an argument of a wrong type, dtype, shape, stride or device.
        NotImplementedError: the named backend cannot run this call; the text says why.
    """
    tensors = (x, down_weight, down_bias, conv_weight, conv_bias, up_weight, up_bias)
    x, down_weight, down_bias, conv_weight, conv_bias, up_weight, up_bias = checks.autocast(*tensors)  # type: ignore[assignment]
    checks.tensor(NAME, "x", x, (None,) * 4, "[B, T, N, C]")
    channels = x.shape[3]
    checks.tensor(NAME, "down_weight", down_weight, (None, channels), "[R, C]", like=x)
    width = down_weight.shape[0]
    height, columns = check_kernel(NAME, "conv_weight", conv_weight, "R", width, x, grid, prefix)
    checks.tensor(NAME, "up_weight", up_weight, (channels, width), "[C, R]", like=x)
    for name, bias, size in (
        ("down_bias", down_bias, width), ("conv_bias", conv_bias, width), ("up_bias", up_bias, channels)
    ):  # fmt: skip
        if bias is not None:
            checks.tensor(NAME, name, bias, (size,), "[C]" if name == "up_bias" else "[R]", like=x)
    tensors = (x, down_weight, down_bias, conv_weight, conv_bias, up_weight, up_bias)
    checks.flag(NAME, "recompute", recompute)
    keep = not recompute and needs_gradient(tensors)
    return _OP(*tensors, height, columns, prefix, keep, backend=backend)[0]


def _composed(name: str) -> Backend:
    """PyTorch's products around the convolution's backend of that name."""

    def can_run(x: Tensor, *rest: Any) -> str | None:
        return OPS["temporal_conv"].why_not(name, (x, *rest[2:4], *rest[6:9], *blocks.PLAIN))

    return Backend(name, can_run, partial(blocks.forward, backend=name), partial(blocks.backward, backend=name))


def _empty(x: Tensor, down_weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """Memory for the output and, if the last argument wants it, the bottleneck."""
    return empty_dense_like(x), empty_tokens(x, down_weight.shape[0]) if rest[-1] else x.new_empty(0)


def _save(ctx: Any, inputs: tuple[Any, ...], result: Any) -> None:
    ctx.save_for_backward(*inputs[:7], result[1])
    ctx.rest = inputs[7:10]


_ARGUMENTS = (
    "Tensor x, Tensor down_weight, Tensor? down_bias, Tensor conv_weight, Tensor? conv_bias, Tensor up_weight, "
    "Tensor? up_bias, SymInt height, SymInt width, SymInt prefix"
)
_OP = Op(
    name=NAME,
    schema=f"({_ARGUMENTS}, bool keep) -> (Tensor, Tensor)",
    backward_schema=f"(Tensor grad, {_ARGUMENTS}, Tensor hidden, bool[7] wanted) -> ({', '.join(['Tensor'] * 7)})",
    backends=(
        reference_backend(NAME, reference.forward, through=reference.adapter),
        _composed("cpu"),
        _composed("triton"),
    ),
    preference={"cpu": ("cpu",), "cuda": ("triton",)},
    fake=_empty,
    save=_save,
    forward_args=lambda args, count: (*args[1:count], False),
)
