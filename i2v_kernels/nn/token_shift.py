"""The shift family by its published names."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..ops import checks, token_shift, token_shift_
from ..ops.token_shift.op import PADDINGS, check_groups
from .functional import token_t1d
from .plain import is_plain


class TokenShift(nn.Module):
    """``i2v_kernels.token_shift`` with fixed groups; no parameters.

    Args:
        groups: ``(channels, offset)`` pairs; offset 1 brings the previous frame, -1 the next.
        padding: "zeros", "edge" or "wrap".
        tokens: ``(start, stop)`` or ``(start, stop, step)``, stop None for the last token; None shifts all tokens.
        residual: add x, see ``i2v_kernels.token_shift``.

    Shape: ``[B, T, N, C]`` to the same.

    Examples:
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
        name = "TokenShift"
        self.groups = tuple(check_groups(name, groups))
        checks.one_of(name, "padding", padding, PADDINGS)
        checks.flag(name, "residual", residual)
        if tokens is not None:
            if not isinstance(tokens, (tuple, list)) or len(tokens) not in (2, 3):
                raise TypeError(f"{name}: tokens={tokens!r} must be (start, stop) or (start, stop, step)")
            for i, (place, low) in enumerate(zip(tokens, (0, 0, 1))):
                if place is not None or i != 1:
                    checks.integer(name, f"tokens[{i}]", place, low)
        self.padding = padding
        self.tokens = tokens
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        tokens = None
        if self.tokens is not None:
            start, stop, *step = self.tokens
            tokens = (start, x.shape[2] if stop is None else stop, step[0] if step else 1)
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

    @staticmethod
    def ts2net(channels: int, n_div: int = 7) -> TS2NetShift:
        """TS2-Net (2207.07852): some whole tokens from the previous frame, some from the next."""
        return TS2NetShift(channels, n_div)


class TS2NetShift(nn.Module):
    """TS2-Net's token shift (arXiv 2207.07852), which it applies to the input of the attention; no parameters.

    Of N tokens, the class token among them, with ``s = N // n_div``: tokens 1, 1 + s, 1 + 2s, ... come from the previous frame,
    tokens 4, 4 + s, ... from the next, with all of their channels. A frame without neighbour keeps its own.

    Args:
        channels: C.
        n_div: 7 as published: s is 7 for ViT-B/32, 28 for ViT-B/16.

    Shape: ``[B, T, N, C]`` to the same.

    Raises:
        ValueError: s is 0, or the two sets have tokens in common (s is 1 or 3).
    """

    def __init__(self, channels: int, n_div: int = 7) -> None:
        super().__init__()
        self.channels = checks.integer("TS2NetShift", "channels", channels, low=1)
        self.n_div = checks.integer("TS2NetShift", "n_div", n_div, low=1)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.shape[2]
        step = tokens // self.n_div
        if step in (0, 1, 3):
            raise ValueError(f"TS2NetShift: N={tokens} tokens and n_div={self.n_div} make s={step}: the sets are not disjoint")
        out = token_shift(x, [(self.channels, 1)], padding="edge", tokens=(1, tokens, step))
        second = token_shift if out.requires_grad else token_shift_  # the copy has been made
        return second(out, [(self.channels, -1)], padding="edge", tokens=(4, tokens, step))

    def extra_repr(self) -> str:
        return f"{self.channels}, n_div={self.n_div}"


class TokenT1D(nn.Module):
    """Text4Vis's (arXiv 2207.01297) and ATM's class token: a depthwise convolution over three frames that begins as a shift.

    ``conv.weight [C, 1, 3]`` is named as published, and initialised so that C/n_div channels come from the next frame, as many
    from the previous, and the others stay; zeros outside the clip. It trains, so each channel finds its own mixture.

    Args:
        channels: C.
        n_div: C/n_div channels are shifted each way.

    Shape: ``[B, T, N, C]`` to the same, with the class token first; the other tokens stay.

    Examples:
        >>> import torch
        >>> TokenT1D(768)(torch.randn(2, 8, 197, 768)).shape
        torch.Size([2, 8, 197, 768])
    """

    def __init__(self, channels: int, n_div: int = 4) -> None:
        super().__init__()
        fold = _fold(channels, n_div)
        self.conv = nn.Conv1d(channels, channels, 3, padding=1, groups=channels, bias=False)
        weight = self.conv.weight.detach().zero_()
        weight[:fold, 0, 2] = 1
        weight[fold : 2 * fold, 0, 0] = 1
        weight[2 * fold :, 0, 1] = 1

    def forward(self, x: Tensor) -> Tensor:
        if not is_plain(self.conv, kind=nn.Conv1d):
            class_token = self.conv(x[:, :, 0].transpose(1, 2)).transpose(1, 2)
            return torch.cat([class_token[:, :, None], x[:, :, 1:]], dim=2)
        return token_t1d(x, self.conv.weight)


def _fold(channels: int, n_div: int) -> int:
    if checks.integer("TokenShift", "n_div", n_div) < 2 or checks.integer("TokenShift", "channels", channels) < n_div:
        raise ValueError(f"TokenShift: n_div={n_div} must lie in [2, channels={channels}]")
    return channels // n_div
