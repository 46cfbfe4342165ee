"""``st_adapter`` by PyTorch's matrix products and this package's convolution, a few clips at a time.

The products run over whole rows, class tokens too, so that nothing is gathered; the convolution gives those zeros.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..backends import OPS
from ..base import accumulate_dtype
from ..layout import empty_dense_like, empty_tokens, memory_order
from ..products import added, as_rows, block_count, gradient, project

PLAIN = ("zero", 1, "", False)  # of temporal_conv: prefix_mode, dilation, activation, residual


class Rows:
    """The tokens ``[b, T, N, C]`` of a block as ``[rows, C]`` in the order in which the output has them in memory, and back."""

    def __init__(self, out: Tensor) -> None:
        self.order = memory_order(out)
        self.back = [self.order.index(i) for i in range(3)]
        self.sizes = [out.shape[i] for i in self.order]

    def flat(self, x: Tensor) -> Tensor:
        """A view where x lies as the output does, else a copy of this block alone."""
        return as_rows(x if self.order == [0, 1, 2] else x.permute(*self.order, 3))

    def tokens(self, rows: Tensor) -> Tensor:
        x = rows.view(*self.sizes, rows.shape[1])
        return x if self.order == [0, 1, 2] else x.permute(*self.back, 3)


def blocks(out: Tensor, width: int, *others: Tensor) -> Iterator[tuple[Any, ...]]:
    """How the tokens of a block are laid out, and the block of ``out`` and of others: some clips, or all at once where clips do
    not lie one after the other."""
    batch, frames, tokens, _ = out.shape
    count = block_count(out.device, frames * tokens * width * out.element_size())
    if out.stride(0) < max(out.stride(1), out.stride(2)):
        count = batch
    if count >= batch > 0:
        yield Rows(out), out, *others
        return
    for first in range(0, batch, count):
        yield Rows(out[first : first + count]), *(x[first : first + count] for x in (out, *others))


def forward(
    x: Tensor, down_weight: Tensor, down_bias: Tensor | None, conv_weight: Tensor, conv_bias: Tensor | None,
    up_weight: Tensor, up_bias: Tensor | None, height: int, width: int, prefix: int, keep: bool, *, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    out = empty_dense_like(x)
    kept = empty_tokens(out, down_weight.shape[0]) if keep else x.new_empty(0)
    for rows, y, tokens, *keeping in blocks(out, down_weight.shape[0], x, *([kept] if keep else [])):
        into, flat = rows.flat(y), rows.flat(tokens)
        hidden = keeping[0] if keep else empty_tokens(y, down_weight.shape[0])
        project(flat, down_weight, down_bias, rows.flat(hidden))
        mixed = rows.flat(convolve(hidden, conv_weight, conv_bias, height, width, prefix, backend))
        if up_bias is None:
            torch.addmm(flat, mixed, up_weight.t(), out=into)
        else:
            torch.addmm(up_bias, mixed, up_weight.t(), out=into)
            into += flat
        if prefix:
            y[:, :, :prefix] = tokens[:, :, :prefix]
    return out, kept


def convolve(hidden: Tensor, weight: Tensor, bias: Tensor | None, height: int, width: int, prefix: int, backend: str) -> Tensor:
    return OPS["temporal_conv"].within(hidden, weight, bias, height, width, prefix, *PLAIN, backend)


def backward(
    grad: Tensor, x: Tensor, down_weight: Tensor, down_bias: Tensor | None, conv_weight: Tensor, conv_bias: Tensor | None,
    up_weight: Tensor, up_bias: Tensor | None, height: int, width: int, prefix: int, kept: Tensor, wanted: list[bool], *,
    backend: str,
) -> tuple[Tensor, ...]:  # fmt: skip
    """What of the seven gradients is wanted. A bottleneck that was not kept is computed again where it matters."""
    dx = empty_dense_like(x) if wanted[0] else None
    parameters = (down_weight, down_bias, conv_weight, conv_bias, up_weight, up_bias)
    dtype = accumulate_dtype(x.dtype)
    sums: list[Tensor | None] = [None] * 6  # zero until there is a first block
    want = [p is not None and w for p, w in zip(parameters, wanted[1:])]
    conv_wanted = [any(wanted[:3]), wanted[3], wanted[4]]
    like = empty_dense_like(x) if dx is None else dx
    has_kept = kept.dim() == 4
    for rows, into, tokens, g, *keeping in blocks(like, down_weight.shape[0], x, grad, *([kept] if has_kept else [])):
        flat, flat_grad = rows.flat(tokens), rows.flat(g)
        hidden = keeping[0] if has_kept else empty_tokens(into, down_weight.shape[0])
        if not has_kept and (wanted[3] or wanted[5]):
            project(flat, down_weight, down_bias, rows.flat(hidden))
        if want[4]:
            mixed = convolve(hidden, conv_weight, conv_bias, height, width, prefix, backend)
            sums[4] = added(sums[4], flat_grad.t() @ rows.flat(mixed), dtype)
        if want[5]:
            # over one dimension of a slice PyTorch is ten times as fast as over three; and asked to sum in another dtype than
            # its own, which it does anyway, it would convert all of it first
            sums[5] = added(sums[5], g[:, :, prefix:].sum(1).sum((0, 1)), dtype)
        if not any(wanted[:5]):
            continue
        d_mixed = rows.tokens(flat_grad @ up_weight)
        d_hidden, *d_kernel = OPS["temporal_conv"].derive(
            d_mixed, hidden, conv_weight, conv_bias, height, width, prefix, *PLAIN, conv_wanted, backend
        )
        for i, part in zip((2, 3), d_kernel):
            if want[i]:
                sums[i] = added(sums[i], part, dtype)
        if not conv_wanted[0]:
            continue
        flat_hidden = rows.flat(d_hidden)
        if want[0]:
            sums[0] = added(sums[0], flat_hidden.t() @ flat, dtype)
        if want[1]:
            sums[1] = added(sums[1], flat_hidden.sum(0), dtype)
        if dx is not None:
            torch.addmm(flat_grad, flat_hidden, down_weight, out=rows.flat(into))
            if prefix:  # which zeros times a weight that is not finite must not reach
                into[:, :, :prefix] = g[:, :, :prefix]
    return tuple(gradient(g, p, w, grad) for g, p, w in zip((dx, *sums), (x, *parameters), wanted))
