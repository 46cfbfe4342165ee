"""Modules as the authors of the methods wrote them (shapes, names and order of operations; the text is ours)."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn


class TemporalShift(nn.Module):
    """TSM's: ``[B * T, C, H, W]``."""

    def __init__(self, net: nn.Module, n_segment: int, n_div: int = 8, inplace: bool = False) -> None:
        super().__init__()
        self.net, self.n_segment, self.fold_div, self.inplace = net, n_segment, n_div, inplace

    def forward(self, x: Tensor) -> Tensor:
        frames, channels, height, width = x.shape
        x = x.view(-1, self.n_segment, channels, height, width)
        fold = channels // self.fold_div
        out = torch.zeros_like(x)
        out[:, :-1, :fold] = x[:, 1:, :fold]
        out[:, 1:, fold : 2 * fold] = x[:, :-1, fold : 2 * fold]
        out[:, :, 2 * fold :] = x[:, :, 2 * fold :]
        return self.net(out.view(frames, channels, height, width))


class STAdapter(nn.Module):
    """``[B * T, 1 + H * W, C]``: patches to ``[B, C, T, H, W]``, a depthwise ``Conv3d``, back, added to the input in place."""

    def __init__(self, channels: int, width: int, kernel: tuple[int, int, int] = (3, 1, 1)) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(channels, width), nn.Linear(width, channels)
        self.conv = nn.Conv3d(width, width, kernel, padding=[size // 2 for size in kernel], groups=width)
        for p in (self.conv.weight, self.conv.bias, self.fc1.bias, self.fc2.bias):
            nn.init.zeros_(p)

    def forward(self, x: Tensor, T: int) -> Tensor:
        rows, tokens, _ = x.shape
        side = round((tokens - 1) ** 0.5)
        hidden = self.fc1(x[:, 1:]).view(rows // T, T, side, side, -1).permute(0, 4, 1, 2, 3).contiguous()
        hidden = self.conv(hidden).permute(0, 2, 3, 4, 1).contiguous().view(rows, tokens - 1, -1)
        x[:, 1:] += self.fc2(hidden)
        return x


class QuickGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class EVLAttention(nn.Module):
    """Projections of all tokens, scores ``[B, Q, L, H]``, their softmax over the tokens."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(channels, channels), nn.Linear(channels, channels)
        self.v_proj, self.out_proj = nn.Linear(channels, channels), nn.Linear(channels, channels)
        self.num_heads = heads

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q = self.q_proj(q).unflatten(2, (self.num_heads, -1))
        k, v = self.k_proj(k).unflatten(2, (self.num_heads, -1)), self.v_proj(v).unflatten(2, (self.num_heads, -1))
        shares = torch.einsum("nqhc,nkhc->nqkh", q / q.shape[-1] ** 0.5, k).softmax(-2)
        return self.out_proj(torch.einsum("nqlh,nlhc->nqhc", shares, v).flatten(2))


class EVLDecoderLayer(nn.Module):
    """``x [B, Q, C]``, ``y [B, T * L, C]``."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.attn = EVLAttention(channels, heads)
        layers = (nn.Linear(channels, 4 * channels), QuickGELU(), nn.Dropout(0.0), nn.Linear(4 * channels, channels))
        self.mlp = nn.Sequential(OrderedDict(zip(("fc1", "act", "dropout", "fc2"), layers)))
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(channels), nn.LayerNorm(channels), nn.LayerNorm(channels)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        normed = self.norm3(y)
        x = x + self.attn(self.norm1(x), normed, normed)
        return x + self.mlp(self.norm2(x))
