"""ST-Adapter (Pan et al. 2022, arXiv 2206.13559): a linear bottleneck with a depthwise 3-D convolution inside."""

from __future__ import annotations

from torch import Tensor, nn

import i2v_kernels.nn as i2v_nn
from i2v_models import plain
from i2v_models.backbone import Block, Method, ViT, by_clip, mlp, per_block


class Adapter(i2v_nn.STAdapter):
    """On the backbone's ``[B*T, 1 + H*W, C]``, with the published sequence of operations beside the kernels."""

    def forward_frames(self, x: Tensor, frames: int, grid: tuple[int, int]) -> Tensor:
        return self(by_clip(x, frames), grid).view(x.shape)

    def forward_plain(self, x: Tensor, frames: int, grid: tuple[int, int]) -> Tensor:
        """Like the published code it changes ``x`` in place."""
        x[:, 1:] += self.fc2(plain.temporal_conv(self.fc1(x[:, 1:]), self.conv, frames, grid))
        return x


class STAdapter(Method):
    """``adapters=1`` puts an adapter before the MLP of every block (12x384), ``adapters=2`` one before the
    attention as well (24x384, for Something-Something). 7.110 M or 14.220 M parameters for ViT-B/16.
    """

    mean_before_norm = True
    head_dropout = 0.5

    def __init__(
        self,
        visual: ViT,
        *,
        frames: int,
        kernels: bool = True,
        width: int = 384,
        adapters: int = 1,
        kernel_size: tuple[int, int, int] = (3, 1, 1),
    ) -> None:
        super().__init__()
        if adapters not in (1, 2):
            raise ValueError(f"adapters per block must be 1 or 2, got {adapters}")
        self.kernels, self.grid = kernels, tuple(visual.grid_size)
        places = ("adapter_pre_mlp", "adapter_pre_attn")[:adapters]
        channels = visual.transformer.width
        self.transformer = per_block(
            visual, lambda: nn.ModuleDict({place: Adapter(channels, width, kernel_size) for place in places})
        )

    def adapt(self, adapter: Adapter, x: Tensor, frames: int) -> Tensor:
        forward = adapter.forward_frames if self.kernels else adapter.forward_plain
        return forward(x, frames, self.grid)

    def block(self, index: int, block: Block, x: Tensor, frames: int) -> Tensor:
        own = self.transformer.resblocks[index]
        if "adapter_pre_attn" in own:
            # the plain form writes into its input, which gradient checkpointing still needs
            x = self.adapt(own.adapter_pre_attn, x if self.kernels else x.clone(), frames)
        x = x + self.attend(block, block.ln_1(x))
        x = self.adapt(own.adapter_pre_mlp, x, frames)
        return x + mlp(block, block.ln_2(x))
