"""ST-Adapter's adapter."""

from __future__ import annotations

from torch import Tensor, nn

from ..ops import st_adapter


class STAdapter(nn.Module):
    """``i2v_kernels.st_adapter`` with the parameters of ST-Adapter (arXiv 2206.13559): ``x + fc2(conv(fc1(x)))`` on patches.

    ``fc1``, ``conv`` and ``fc2`` are the ``nn.Linear``, depthwise ``nn.Conv3d`` and ``nn.Linear`` of the published code, whose
    state dicts fit; as there, ``conv`` and the biases start at zero, so that a new adapter changes nothing.

    Args:
        channels: C.
        width: R, of the bottleneck.
        kernel_size: ``(kt, kh, kw)``, odd.
        prefix: class tokens before the patches.

    Shape: ``[B, T, N, C]`` to the same; ``forward(x, grid=(H, W))``, the grid only where the kernel reaches over it.

    >>> import torch
    >>> adapter = STAdapter(768, 384)
    >>> x = torch.randn(1, 8, 197, 768)
    >>> torch.equal(adapter(x), x)
    True
    """

    def __init__(
        self, channels: int, width: int = 384, kernel_size: tuple[int, int, int] = (3, 1, 1), prefix: int = 1
    ) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, width)
        self.conv = nn.Conv3d(width, width, kernel_size, padding="same", groups=width)
        self.fc2 = nn.Linear(width, channels)
        self.prefix = prefix
        for name, parameter in self.named_parameters():
            if name.startswith("conv") or name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, x: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        parts = (self.fc1.weight, self.fc1.bias, self.conv.weight, self.conv.bias, self.fc2.weight, self.fc2.bias)
        return st_adapter(x, *parts, grid=grid, prefix=self.prefix)
