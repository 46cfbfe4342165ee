"""AIM (Yang et al. 2023, arXiv 2302.03024): the block's own frozen attention, run over time as well, with adapters."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from i2v_models import plain
from i2v_models.backbone import Block, Method, ViT, by_clip, mlp, per_block, time_attention
from i2v_models.spatial import spatial_attention


class Adapter(nn.Module):
    """``D_fc2(gelu(D_fc1(x)))``, plus ``x`` if ``skip``; ``D_fc2`` starts at zero."""

    def __init__(self, channels: int, width: int, *, skip: bool) -> None:
        super().__init__()
        self.D_fc1 = nn.Linear(channels, width)
        self.D_fc2 = nn.Linear(width, channels)
        self.skip = skip
        nn.init.trunc_normal_(self.D_fc1.weight, std=0.02)
        for zero in (self.D_fc1.bias, self.D_fc2.weight, self.D_fc2.bias):
            nn.init.zeros_(zero)

    def forward(self, x: Tensor) -> Tensor:
        update = self.D_fc2(F.gelu(self.D_fc1(x)))
        return x + update if self.skip else update


class AIM(Method):
    """``adapters=1`` as for Kinetics, ``adapters=2`` with ``T_Adapter_in`` as for Something-Something; ``scale``
    multiplies the adapter beside the MLP (0.5 and 1 there); ``width`` defaults to C / 4. 10.659 M parameters for
    ViT-B/16 at 8 frames, among them the image model's ``ln_post``, which AIM trains: a copy, so that the image
    model stays as it is.

    The published training also drops whole residual branches (``drop_path``); that is left out.
    """

    head_std = 0.01
    head_dropout = 0.5

    def __init__(
        self,
        visual: ViT,
        *,
        frames: int,
        kernels: bool = True,
        width: int | None = None,
        adapters: int = 1,
        scale: float = 0.5,
    ) -> None:
        super().__init__()
        if adapters not in (1, 2):
            raise ValueError(f"adapters per block in time must be 1 or 2, got {adapters}")
        for block in visual.transformer.resblocks:
            if not isinstance(block.attn, nn.MultiheadAttention):
                raise NotImplementedError(f"AIM needs nn.MultiheadAttention in each block, got {type(block.attn)}")
        channels = visual.transformer.width
        hidden = channels // 4 if width is None else width
        skips = {"T_Adapter": False, "S_Adapter": True, "MLP_Adapter": False}
        if adapters == 2:
            skips["T_Adapter_in"] = True
        self.kernels, self.scale = kernels, scale
        self.temporal_embedding = nn.Parameter(torch.zeros(1, frames, channels))
        self.transformer = per_block(
            visual,
            lambda: nn.ModuleDict({name: Adapter(channels, hidden, skip=skip) for name, skip in skips.items()}),
        )
        self.ln_post = copy.deepcopy(visual.ln_post).requires_grad_(True)

    def embed(self, x: Tensor, frames: int) -> Tensor:
        if frames != self.temporal_embedding.shape[1]:
            raise ValueError(f"this AIM was built for {self.temporal_embedding.shape[1]} frames, got {frames}")
        table = self.temporal_embedding.to(x.dtype)[:, :, None]  # [1, T, 1, C]
        return (by_clip(x, frames) + table).flatten(0, 1)

    def over_time(self, own: Any, block: Block, x: Tensor, frames: int) -> Tensor:
        """The temporal branch on the residual stream ``x [B*T, L, C]``."""

        def branch(x: Tensor, attend: Callable[[Tensor], Tensor]) -> Tensor:
            x = block.ln_1(x)
            x = own.T_Adapter_in(x) if "T_Adapter_in" in own else x
            return own.T_Adapter(attend(x))

        if self.kernels:
            return branch(x, lambda n: time_attention(block, n, frames))
        regrouped = branch(plain.frames_last(x, frames), lambda n: spatial_attention(block, n, "module"))
        return plain.tokens_last(regrouped, length=x.shape[1])

    def block(self, index: int, block: Block, x: Tensor, frames: int) -> Tensor:
        own = self.transformer.resblocks[index]
        x = x + self.over_time(own, block, x, frames)
        x = x + own.S_Adapter(self.attend(block, block.ln_1(x)))
        n = block.ln_2(x)
        return x + mlp(block, n) + self.scale * own.MLP_Adapter(n)
