"""The shift family by its published names."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..ops import temporal_conv, token_shift, token_shift_


class TokenShift(nn.Module):
    """``i2v_kernels.token_shift`` with fixed groups; no parameters.

    Args:
        groups: ``(channels, offset)`` pairs; offset 1 brings the previous frame, -1 the next.
        padding: "zeros", "edge" or "wrap".
        tokens: ``(start, stop)`` or ``(start, stop, step)``, stop None for the last token; None shifts all tokens.
        residual: add x.

    Shape: ``[B, T, N, C]`` to the same.

    >>> import torch
    >>> shift = TokenShift.tsm(768)
    >>> shift(torch.randn(2, 8, 197, 768)).shape
    torch.Size([2, 8, 197, 768])
    """

    def __init__(
        self,
        groups: Sequence[tuple[int, int]],
        padding: str = "zeros",
        tokens: tuple[int, int | None] | tuple[int, int | None, int] | None = None,
        residual: bool = False,
    ) -> None:
        super().__init__()
        self.groups = tuple((channels, offset) for channels, offset in groups)
        self.padding = padding
        self.tokens = tokens
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        tokens: tuple[int, ...] | None = None
        if self.tokens is not None:
            start, stop, *step = self.tokens
            tokens = (start, x.shape[2] if stop is None else stop, *step)
        return token_shift(x, self.groups, padding=self.padding, tokens=tokens, residual=self.residual)

    def extra_repr(self) -> str:
        return f"groups={self.groups}, padding={self.padding!r}, tokens={self.tokens}, residual={self.residual}"

    @classmethod
    def tsm(cls, channels: int, n_div: int = 8) -> TokenShift:
        """TSM (arXiv 1811.08383): C/n_div channels from the next frame, C/n_div from the previous; zeros outside."""
        fold = _fold(channels, n_div)
        return cls([(fold, -1), (fold, 1)])

    @classmethod
    def tsm_vit(cls, channels: int, n_div: int = 8) -> TokenShift:
        """ActionCLIP (2109.08472), ATM: TSM on the patches; the class token, token 0, stays."""
        fold = _fold(channels, n_div)
        return cls([(fold, -1), (fold, 1)], tokens=(1, None))

    @classmethod
    def tokshift(cls, channels: int, n_div: int = 4) -> TokenShift:
        """TokShift (2108.02432): the class token alone, C/n_div channels each way; zeros outside."""
        fold = _fold(channels, n_div)
        return cls([(fold, -1), (fold, 1)], tokens=(0, 1))

    @classmethod
    def side4video(cls, channels: int) -> TokenShift:
        """Side4Video (2311.15769): the class token alone, half of it from the next frame and half from the previous."""
        fold = _fold(channels, 2)
        return cls([(fold, -1), (fold, 1)], tokens=(0, 1))

    @classmethod
    def zeroi2v(cls, channels: int, n_div: int = 12) -> TokenShift:
        """ZeroI2V (2310.01324), for keys and values: C/n_div from the previous frame, C/n_div from the next, all tokens;
        a frame without neighbour keeps its own."""
        fold = _fold(channels, n_div)
        return cls([(fold, 1), (fold, -1)], padding="edge")


class TS2NetShift(nn.Module):
    """TS2-Net's token shift (arXiv 2207.07852), on what enters the attention: whole tokens, no parameters.

    With ``s = N // n_div``: tokens 1, 1 + s, 1 + 2s, ... come from the previous frame, tokens 4, 4 + s, ... from the next; a
    frame without neighbour keeps its own. ``N`` counts the class token, which stays.

    Shape: ``[B, T, N, C]`` to the same.
    """

    def __init__(self, n_div: int = 7) -> None:
        super().__init__()
        self.n_div = n_div

    def forward(self, x: Tensor) -> Tensor:
        tokens, channels = x.shape[2], x.shape[3]
        step = tokens // self.n_div
        if step in (0, 1, 3):
            raise ValueError(f"TS2NetShift: n_div={self.n_div} leaves no two sets of tokens apart among N={tokens}")
        once = token_shift(x, [(channels, 1)], padding="edge", tokens=(1, tokens, step))
        again = token_shift if once.requires_grad else token_shift_
        return again(once, [(channels, -1)], padding="edge", tokens=(4, tokens, step))

    def extra_repr(self) -> str:
        return f"n_div={self.n_div}"


class TokenT1D(nn.Module):
    """Text4Vis's (arXiv 2207.01297) and ATM's: a depthwise convolution of the class token over the frames; the patches stay.

    ``conv.weight [C, 1, 3]``, as published without bias, begins as the shift ``TokenShift.tokshift`` does.

    Shape: ``[B, T, N, C]`` to the same.
    """

    def __init__(self, channels: int, n_div: int = 4) -> None:
        super().__init__()
        fold = _fold(channels, n_div)
        self.conv = nn.Conv1d(channels, channels, 3, padding=1, groups=channels, bias=False)
        with torch.no_grad():
            self.conv.weight.zero_()
            self.conv.weight[:fold, 0, 2] = 1  # from the next frame
            self.conv.weight[fold : 2 * fold, 0, 0] = 1  # from the previous
            self.conv.weight[2 * fold :, 0, 1] = 1

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([temporal_conv(x[:, :, :1], self.conv.weight[..., None, None]), x[:, :, 1:]], dim=2)


def _fold(channels: int, n_div: int) -> int:
    if n_div < 2 or channels < n_div:
        raise ValueError(f"TokenShift: n_div={n_div} must lie in [2, channels={channels}]")
    return channels // n_div
