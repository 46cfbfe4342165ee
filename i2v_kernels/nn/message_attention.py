"""X-CLIP's block, whose frames tell each other what they show by a message token."""

from __future__ import annotations

from torch import Tensor, nn

from .frame_attention import FrameAttention
from .tokens import in_order, perceptron


class MessageAttentionBlock(nn.Module):
    """A block of X-CLIP (arXiv 2208.02816, eq. 4), ``CrossFramelAttentionBlock`` in its code, under the same names.

    A message is made of every frame's class token and attends to those of the other frames; tokens attend to their frame and
    to its message, which is read as one key and value more: it is joined to nothing. In the published block it asks, too, and
    the answer is dropped.

    ``message_fc``, ``message_ln``, ``message_attn``, ``attn``, ``ln_1``, ``mlp.c_fc``, ``mlp.c_proj``, ``ln_2``; ``gelu`` is
    QuickGELU. There is no stochastic depth.

    Args:
        channels: C.
        heads: H, a divisor of C.

    Shape: ``[B, T, N, C]``, the class token first, to the same.

    Examples:
        >>> import torch
        >>> block = MessageAttentionBlock(768, heads=12)
        >>> tokens = torch.randn(197, 2 * 8, 768)  # CLIP's [L, B * T, C], seen as frames
        >>> block(tokens.unflatten(1, (2, 8)).permute(1, 2, 0, 3)).shape
        torch.Size([2, 8, 197, 768])
    """

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        attn = FrameAttention(channels, heads)  # refuses what does not fit
        self.message_fc, self.message_ln = nn.Linear(channels, channels), nn.LayerNorm(channels)
        self.message_attn, self.attn = FrameAttention(channels, heads, "all"), attn
        self.ln_1, self.mlp = nn.LayerNorm(channels), perceptron(channels, "c_fc", "gelu", "c_proj")
        self.ln_2 = nn.LayerNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        message = self.message_fc(x[:, :, :1])  # [B, T, 1, C]
        message = message + self.message_attn(self.message_ln(message))
        x = x + self.attn(in_order(self.ln_1, x), extra=self.ln_1(message))
        return x + in_order(lambda tokens: self.mlp(self.ln_2(tokens)), x)
