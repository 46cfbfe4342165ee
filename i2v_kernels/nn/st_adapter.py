"""ST-Adapter's adapter."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from ..ops import checks, st_adapter
from .plain import is_plain


class STAdapter(nn.Module):
    """``i2v_kernels.st_adapter`` with the parameters of ST-Adapter (arXiv 2206.13559): ``x + fc2(conv(fc1(x)))`` on patches.

    ``fc1``, ``conv`` and ``fc2`` are the ``nn.Linear``, depthwise ``nn.Conv3d`` and ``nn.Linear`` of the published code, whose
    state dicts fit; as there, ``conv`` and the biases start at zero, so that a new adapter changes nothing.

    Children that are more than that, by LoRA, hooks, offloading or quantised weights, are called one after the other.

    Args:
        channels: C.
        width: R, of the bottleneck.
        kernel_size: ``(kt, kh, kw)``, odd.
        prefix: class tokens before the patches.

    Shape: ``[B, T, N, C]`` to the same; ``forward(x, grid=(H, W))``, the grid only where the kernel reaches over it.

    Examples:
        >>> import torch
        >>> adapter = STAdapter(768, 384)
        >>> x = torch.randn(1, 8, 197, 768)
        >>> torch.equal(adapter(x), x)
        True
    """

    def __init__(self, channels: int, width: int = 384, kernel_size: tuple[int, int, int] = (3, 1, 1), prefix: int = 1) -> None:
        super().__init__()
        for name, size, low in (("channels", channels, 1), ("width", width, 1), ("prefix", prefix, 0)):
            checks.integer("STAdapter", name, size, low)
        checks.kernel("STAdapter", kernel_size)
        self.fc1 = nn.Linear(channels, width)
        self.conv = nn.Conv3d(width, width, kernel_size, padding="same", groups=width)
        self.fc2 = nn.Linear(width, channels)
        self.prefix, self.wide = prefix, tuple(kernel_size[1:]) != (1, 1)
        for name, parameter in self.named_parameters():
            if name.startswith("conv") or name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, x: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        if not (is_plain(self.fc1, self.fc2, kind=nn.Linear) and is_plain(self.conv, kind=nn.Conv3d)):
            return self._call_children(x, grid)
        parts = (self.fc1.weight, self.fc1.bias, self.conv.weight, self.conv.bias, self.fc2.weight, self.fc2.bias)
        return st_adapter(x, *parts, grid=grid, prefix=self.prefix)

    def _call_children(self, x: Tensor, grid: tuple[int, int] | None) -> Tensor:
        if grid is None:
            if self.wide:
                raise ValueError("STAdapter: grid=None, but the kernel reaches over the grid: (H, W) is needed")
            grid = (1, x.shape[2] - self.prefix)
        x = cast(Tensor, checks.autocast(x)[0])  # as the op does, so that the sum's dtype is the same
        patches = x[:, :, self.prefix :]
        planes = self.fc1(patches).movedim(3, 1).unflatten(3, grid)  # [B, R, T, H, W]
        update = self.fc2(self.conv(planes).flatten(3).movedim(1, 3))
        return torch.cat([x[:, :, : self.prefix], patches + update], dim=2)
