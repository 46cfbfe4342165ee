"""A depthwise ``nn.Conv3d`` for tokens."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..ops import checks, temporal_conv
from ..ops.activations import ACTIVATIONS
from ..ops.temporal_conv.op import PREFIX_MODES


class TemporalConv(nn.Module):
    """``i2v_kernels.temporal_conv`` with the parameters of ``nn.Conv3d(C, C, kernel_size, padding="same", groups=C)``.

    ``weight [C, 1, kt, kh, kw]`` and ``bias [C]`` have the names, shapes and initialisation of that module, so state dicts pass
    both ways.

    Args:
        channels: C.
        kernel_size: ``(kt, kh, kw)``, odd.
        bias: with a bias.
        prefix, prefix_mode: class tokens before the patches, and what becomes of them; see ``i2v_kernels.temporal_conv``.
        dilation, activation, residual: likewise; ``residual`` as in EVL's temporal convolution.

    Shape: ``[B, T, N, C]`` to the same; ``forward(x, grid=(H, W))``, the grid only where the kernel reaches over it.

    Examples:
        >>> import torch
        >>> conv = TemporalConv(384, (3, 1, 1), prefix=1)
        >>> conv(torch.randn(2, 8, 197, 384)).shape
        torch.Size([2, 8, 197, 384])
    """

    def __init__(
        self,
        channels: int,
        kernel_size: tuple[int, int, int] = (3, 1, 1),
        bias: bool = True,
        prefix: int = 0,
        prefix_mode: str = "zero",
        dilation: int = 1,
        activation: str | None = None,
        residual: bool = False,
    ) -> None:
        super().__init__()
        name = "TemporalConv"
        checks.integer(name, "channels", channels, low=1)
        checks.kernel(name, kernel_size)
        checks.flag(name, "bias", bias)
        checks.integer(name, "prefix", prefix, low=0)
        checks.one_of(name, "prefix_mode", prefix_mode, PREFIX_MODES)
        checks.integer(name, "dilation", dilation, low=1)
        if activation is not None:
            checks.one_of(name, "activation", activation, ACTIVATIONS)
        checks.flag(name, "residual", residual)
        conv = nn.Conv3d(channels, channels, kernel_size, groups=channels, bias=bias)
        self.weight, self.bias = conv.weight, conv.bias
        self.options: dict[str, Any] = {
            "prefix": prefix,
            "prefix_mode": prefix_mode,
            "dilation": dilation,
            "activation": activation,
            "residual": residual,
        }

    def forward(self, x: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        return temporal_conv(x, self.weight, self.bias, grid=grid, **self.options)

    def extra_repr(self) -> str:
        options = ", ".join(f"{name}={value!r}" for name, value in self.options.items())
        return f"{self.weight.shape[0]}, kernel_size={tuple(self.weight.shape[2:])}, bias={self.bias is not None}, {options}"
