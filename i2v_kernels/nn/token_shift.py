"""The shift family by its published names."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from ..ops import token_shift


class TokenShift(nn.Module):
    """``i2v_kernels.token_shift`` with fixed groups; no parameters.

    Args:
        groups: ``(channels, offset)`` pairs; offset 1 brings the previous frame, -1 the next.
        padding: "zeros", "edge" or "wrap".
        tokens: ``(start, stop)``, stop None for the last token; None shifts all tokens.

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
        tokens: tuple[int, int | None] | None = None,
    ) -> None:
        super().__init__()
        self.groups = tuple((channels, offset) for channels, offset in groups)
        self.padding = padding
        self.tokens = tokens

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.tokens
        if tokens is not None:
            start, stop = tokens
            tokens = (start, x.shape[2] if stop is None else stop)
        return token_shift(x, self.groups, padding=self.padding, tokens=tokens)

    def extra_repr(self) -> str:
        return f"groups={self.groups}, padding={self.padding!r}, tokens={self.tokens}"

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


def _fold(channels: int, n_div: int) -> int:
    if n_div < 2 or channels < n_div:
        raise ValueError(f"TokenShift: n_div={n_div} must lie in [2, channels={channels}]")
    return channels // n_div
