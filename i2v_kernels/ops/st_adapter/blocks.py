"""``st_adapter`` by PyTorch's matrix products and this package's convolution, a few clips at a time.

The products run over whole rows, class tokens too, so that nothing is gathered; the convolution gives those zeros.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..base import OPS, accumulate_dtype, empty_dense_like, empty_tokens, memory_order
from ..products import add_product, block_count, project

PLAIN = ("zero", 1, "", False)  # of temporal_conv: prefix_mode, dilation, activation, residual


class Rows:
    """The tokens ``[b, T, N, C]`` of a block as ``[rows, C]`` in the order in which the output has them in memory, and back."""

    def __init__(self, out: Tensor) -> None:
        self.order = memory_order(out)
        self.back = [self.order.index(i) for i in range(3)]
        self.sizes = [out.shape[i] for i in self.order]

    def flat(self, x: Tensor) -> Tensor:
        """A view where x lies as the output does, else a copy of this block alone."""
        return (x if self.order == [0, 1, 2] else x.permute(*self.order, 3)).reshape(-1, x.shape[3])

    def tokens(self, rows: Tensor) -> Tensor:
        x = rows.view(*self.sizes, rows.shape[1])
        return x if self.order == [0, 1, 2] else x.permute(*self.back, 3)


def blocks(out: Tensor, width: int) -> Iterator[tuple[slice, Rows]]:
    """Clips to take at a time, and how their tokens are laid out; all at once where clips do not lie one after the other."""
    batch, frames, tokens, _ = out.shape
    count = block_count(out.device, frames * tokens * width * out.element_size())
    if out.stride(0) < max(out.stride(1), out.stride(2)):
        count = batch
    for first in range(0, batch, count):
        block = slice(first, min(first + count, batch))
        yield block, Rows(out[block])


def forward(
    x: Tensor, down_weight: Tensor, down_bias: Tensor | None, conv_weight: Tensor, conv_bias: Tensor | None,
    up_weight: Tensor, up_bias: Tensor | None, height: int, width: int, prefix: int, keep: bool, *, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    out = empty_dense_like(x)
    kept = empty_tokens(out, down_weight.shape[0]) if keep else x.new_empty(0)
    for block, rows in blocks(out, down_weight.shape[0]):
        into, flat = rows.flat(out[block]), rows.flat(x[block])
        hidden = kept[block] if keep else empty_tokens(out[block], down_weight.shape[0])
        project(flat, down_weight, down_bias, rows.flat(hidden))
        mixed = rows.flat(convolve(hidden, conv_weight, conv_bias, height, width, prefix, backend))
        if up_bias is None:
            torch.addmm(flat, mixed, up_weight.t(), out=into)
        else:
            torch.addmm(up_bias, mixed, up_weight.t(), out=into)
            into += flat
        out[block, :, :prefix] = x[block, :, :prefix]
    return out, kept


def convolve(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, height: int, width: int, prefix: int, backend: str
) -> Tensor:
    return OPS["temporal_conv"].within(hidden, weight, bias, height, width, prefix, *PLAIN, backend)


def backward(
    grad: Tensor, x: Tensor, down_weight: Tensor, down_bias: Tensor | None, conv_weight: Tensor, conv_bias: Tensor | None,
    up_weight: Tensor, up_bias: Tensor | None, height: int, width: int, prefix: int, kept: Tensor, wanted: list[bool], *,
    backend: str,
) -> tuple[Tensor, ...]:  # fmt: skip
    """What of the seven gradients is wanted. A bottleneck that was not kept is computed again where it matters."""
    dx = empty_dense_like(x) if wanted[0] else None
    parameters = (down_weight, down_bias, conv_weight, conv_bias, up_weight, up_bias)
    sums = [
        torch.zeros(p.shape, dtype=accumulate_dtype(p.dtype), device=p.device) if p is not None and want else None
        for p, want in zip(parameters, wanted[1:])
    ]
    d_down, d_down_bias, d_conv, d_conv_bias, d_up, d_up_bias = sums
    conv_wanted = [any(wanted[:3]), wanted[3], wanted[4]]
    like = empty_dense_like(x) if dx is None else dx
    for block, rows in blocks(like, down_weight.shape[0]):
        flat, flat_grad = rows.flat(x[block]), rows.flat(grad[block])
        hidden = kept[block] if kept.dim() == 4 else empty_tokens(like[block], down_weight.shape[0])
        if kept.dim() != 4 and (wanted[3] or wanted[5]):
            project(flat, down_weight, down_bias, rows.flat(hidden))
        if d_up is not None:
            mixed = convolve(hidden, conv_weight, conv_bias, height, width, prefix, backend)
            add_product(d_up, flat_grad.t(), rows.flat(mixed))
        if d_up_bias is not None:
            # over one dimension of a slice PyTorch is ten times as fast as over three; and asked to sum in another dtype than
            # its own, which it does anyway, it would convert all of it first
            d_up_bias += grad[block, :, prefix:].sum(1).sum((0, 1))
        if not any(wanted[:5]):
            continue
        d_mixed = rows.tokens(flat_grad @ up_weight)
        d_hidden, *d_kernel = OPS["temporal_conv"].derive(
            d_mixed, hidden, conv_weight, conv_bias, height, width, prefix, *PLAIN, conv_wanted, backend
        )
        for total, part in zip((d_conv, d_conv_bias), d_kernel):
            if total is not None:
                total += part
        if not conv_wanted[0]:
            continue
        flat_hidden = rows.flat(d_hidden)
        if d_down is not None:
            add_product(d_down, flat_hidden.t(), flat)
        if d_down_bias is not None:
            d_down_bias += flat_hidden.sum(0)
        if dx is not None:
            torch.addmm(flat_grad, flat_hidden, down_weight, out=rows.flat(dx[block]))
    nothing = torch.empty(0, dtype=grad.dtype, device=grad.device)
    return tuple(nothing if total is None else total.to(grad.dtype) for total in (dx, *sums))

