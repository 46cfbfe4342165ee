"""TokShift (Zhang et al. 2021, arXiv 2108.02432): the class token borrows channels from the neighbouring frames."""

from __future__ import annotations

from torch import Tensor

import i2v_kernels as i2v
from i2v_models import plain
from i2v_models.backbone import Block, Method, ViT, by_clip, mlp


class TokShift(Method):
    """No new parameters: the head trains, and the image tower if asked.

    Before the attention and again before the MLP of every block the residual stream itself is shifted: of the class
    token's channels the first ``C / shift_div`` come from frame t + 1, the next as many from frame t - 1, zeros
    beyond the ends.
    """

    head_std = 0.0

    def __init__(self, visual: ViT, *, frames: int, kernels: bool = True, shift_div: int = 4) -> None:
        super().__init__()
        if shift_div < 2:
            raise ValueError(f"shift_div must be at least 2: two parts of C / shift_div channels move; got {shift_div}")
        self.fold = visual.transformer.width // shift_div
        self.kernels = kernels

    def shift(self, x: Tensor, frames: int) -> Tensor:
        """``x [B*T, L, C]``."""
        if not self.kernels:
            return plain.shift_class_token(x, frames, self.fold)
        groups, clips = ((self.fold, -1), (self.fold, 1)), by_clip(x, frames)
        if x.requires_grad:
            return i2v.token_shift(clips, groups, tokens=(0, 1)).flatten(0, 1)
        i2v.token_shift_(clips, groups, tokens=(0, 1))  # a view: the class token alone is written
        return x

    def block(self, index: int, block: Block, x: Tensor, frames: int) -> Tensor:
        x = self.shift(x, frames)
        x = x + self.attend(block, block.ln_1(x))
        x = self.shift(x, frames)
        return x + mlp(block, block.ln_2(x))
