"""AIM (Yang et al. 2023, arXiv 2302.03024): the block's own frozen attention, run over time as well, with adapters."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from i2v_kernels.nn import BottleneckAdapter
from i2v_models import plain
from i2v_models.backbone import Block, Method, ViT, by_clip, mlp, per_block, time_attention
from i2v_models.spatial import spatial_attention


class Adapter(BottleneckAdapter):
    """With the published sequence of operations beside the kernel."""

    def forward_plain(self, x: Tensor) -> Tensor:
        update = self.scale * self.D_fc2(F.gelu(self.D_fc1(x)))
        return x + update if self.residual else update


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
        kinds: dict[str, dict[str, Any]] = {
            "T_Adapter": {"residual": False},
            "S_Adapter": {"residual": True},
            "MLP_Adapter": {"residual": False, "scale": scale},
        }
        if adapters == 2:
            kinds["T_Adapter_in"] = {"residual": True}
        self.kernels = kernels
        self.temporal_embedding = nn.Parameter(torch.zeros(1, frames, channels))
        self.transformer = per_block(
            visual,
            lambda: nn.ModuleDict({name: Adapter(channels, hidden, **kind) for name, kind in kinds.items()}),
        )
        self.ln_post = copy.deepcopy(visual.ln_post).requires_grad_(True)

    def embed(self, x: Tensor, frames: int) -> Tensor:
        if frames != self.temporal_embedding.shape[1]:
            raise ValueError(f"this AIM was built for {self.temporal_embedding.shape[1]} frames, got {frames}")
        table = self.temporal_embedding.to(x.dtype)[:, :, None]  # [1, T, 1, C]
        return (by_clip(x, frames) + table).flatten(0, 1)

    def adapt(self, adapter: Adapter, x: Tensor) -> Tensor:
        return adapter(x) if self.kernels else adapter.forward_plain(x)

    def over_time(self, own: Any, block: Block, x: Tensor, frames: int) -> Tensor:
        """The temporal branch on the residual stream ``x [B*T, L, C]``."""

        def branch(x: Tensor, attend: Callable[[Tensor], Tensor]) -> Tensor:
            x = block.ln_1(x)
            x = self.adapt(own.T_Adapter_in, x) if "T_Adapter_in" in own else x
            return self.adapt(own.T_Adapter, attend(x))

        if self.kernels:
            return branch(x, lambda n: time_attention(block, n, frames))
        regrouped = branch(plain.frames_last(x, frames), lambda n: spatial_attention(block, n, "module"))
        return plain.tokens_last(regrouped, length=x.shape[1])

    def block(self, index: int, block: Block, x: Tensor, frames: int) -> Tensor:
        own = self.transformer.resblocks[index]
        x = x + self.over_time(own, block, x, frames)
        x = x + self.adapt(own.S_Adapter, self.attend(block, block.ln_1(x)))
        n = block.ln_2(x)
        return x + mlp(block, n) + self.adapt(own.MLP_Adapter, n)
