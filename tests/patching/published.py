"""Modules as the authors of the methods wrote them (shapes, names and order of operations; the text is ours)."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from bench.published import (
    CLIPViPAttention,
    CLIPViPLayer,
    DropPath,
    LayerNorm,
    OpenVCLIPAttention,
    OpenVCLIPBlock,
    QuickGELU,
    STAdapter,
    TemporalShift,
    XCLIPBlock,
    XPool,
    perceptron,
)

__all__ = [
    "CLIPViPAttention",
    "CLIPViPLayer",
    "OpenVCLIPAttention",
    "OpenVCLIPBlock",
    "STAdapter",
    "TemporalShift",
    "XCLIPBlock",
    "XPool",
]


class AIMAdapter(nn.Module):
    def __init__(self, channels: int, skip_connect: bool = True) -> None:
        super().__init__()
        self.skip_connect = skip_connect
        self.act = nn.GELU()
        self.D_fc1, self.D_fc2 = nn.Linear(channels, channels // 4), nn.Linear(channels // 4, channels)
        nn.init.zeros_(self.D_fc2.weight)
        nn.init.zeros_(self.D_fc2.bias)

    def forward(self, x: Tensor) -> Tensor:
        out = self.D_fc2(self.act(self.D_fc1(x)))
        return x + out if self.skip_connect else out


class AIMBlock(nn.Module):
    def __init__(self, channels: int, heads: int, frames: int, adapters: int = 1, drop: float = 0.0) -> None:
        super().__init__()
        self.attn, self.ln_1, self.ln_2 = nn.MultiheadAttention(channels, heads), LayerNorm(channels), LayerNorm(channels)
        self.mlp, self.attn_mask, self.n_head = perceptron(channels), None, heads
        self.MLP_Adapter, self.S_Adapter = AIMAdapter(channels, False), AIMAdapter(channels)
        self.T_Adapter, self.scale = AIMAdapter(channels, False), 0.5
        if adapters == 2:
            self.T_Adapter_in = AIMAdapter(channels)
        self.num_tadapter, self.num_frames = adapters, frames
        self.drop_path = DropPath(drop) if drop else nn.Identity()

    def attention(self, x: Tensor) -> Tensor:
        return self.attn(x, x, x, need_weights=False, attn_mask=self.attn_mask)[0]

    def forward(self, x: Tensor) -> Tensor:
        tokens, rows, channels = x.shape
        time = x.unflatten(1, (-1, self.num_frames)).permute(2, 1, 0, 3).reshape(self.num_frames, -1, channels)
        time = self.ln_1(time)
        if self.num_tadapter == 2:
            time = self.T_Adapter_in(time)
        time = self.T_Adapter(self.attention(time))
        time = time.unflatten(1, (-1, tokens)).permute(2, 1, 0, 3).reshape(tokens, rows, channels)
        x = x + self.drop_path(time)
        x = x + self.S_Adapter(self.attention(self.ln_1(x)))
        normed = self.ln_2(x)
        return x + self.mlp(normed) + self.drop_path(self.scale * self.MLP_Adapter(normed))


class STBlock(nn.Module):
    """``forward(x, T)``: its adapter writes into x, which comes from an addition."""

    def __init__(self, channels: int, kernel: tuple[int, int, int] = (3, 1, 1)) -> None:
        super().__init__()
        self.ln, self.mlp, self.adapter = LayerNorm(channels), perceptron(channels), STAdapter(channels, channels // 2, kernel)

    def forward(self, x: Tensor, T: int = 4) -> Tensor:
        return self.adapter(x + self.mlp(self.ln(x)), T)


class Attention(nn.Module):
    """TimeSformer's."""

    def __init__(self, channels: int, heads: int, drop: float = 0.0) -> None:
        super().__init__()
        self.num_heads, self.scale = heads, (channels // heads) ** -0.5
        self.qkv, self.proj = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)
        self.attn_drop, self.proj_drop = nn.Dropout(drop), nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        weights = self.attn_drop((q @ k.transpose(-2, -1) * self.scale).softmax(-1))
        return self.proj_drop(self.proj((weights @ v).transpose(1, 2).reshape(x.shape)))


class TimeSformerBlock(nn.Module):
    def __init__(self, channels: int, heads: int, drop: float = 0.0, drop_path: float = 0.0) -> None:
        super().__init__()
        self.attention_type = "divided_space_time"
        self.norm1, self.attn = nn.LayerNorm(channels, eps=1e-6), Attention(channels, heads, drop)
        self.temporal_norm1, self.temporal_attn = nn.LayerNorm(channels, eps=1e-6), Attention(channels, heads, drop)
        self.temporal_fc, self.norm2 = nn.Linear(channels, channels), nn.LayerNorm(channels, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(channels, 2 * channels), nn.GELU(), nn.Linear(2 * channels, channels))
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        nn.init.zeros_(self.temporal_fc.weight)
        nn.init.zeros_(self.temporal_fc.bias)

    def forward(self, x: Tensor, B: int = 2, T: int = 4, W: int = 2) -> Tensor:
        channels = x.shape[2]
        patches = x[:, 1:].reshape(-1, T, channels)
        time = self.drop_path(self.temporal_attn(self.temporal_norm1(patches))).reshape(B, -1, channels)
        patches = x[:, 1:] + self.temporal_fc(time)
        own = x[:, :1]
        rows = patches.unflatten(1, (-1, T)).transpose(1, 2).flatten(0, 1)  # [B * T, P, C]
        rows = torch.cat((own.repeat(1, T, 1).reshape(-1, 1, channels), rows), 1)
        space = self.drop_path(self.attn(self.norm1(rows))).unflatten(0, (B, T))
        moved = space[:, :, 1:].transpose(1, 2).reshape(patches.shape)
        x = torch.cat((own, patches), 1) + torch.cat((space[:, :, 0].mean(1, True), moved), 1)
        return x + self.drop_path(self.mlp(self.norm2(x)))


class EVLAttention(nn.Module):
    def __init__(self, channels: int, heads: int, return_all_features: bool = False) -> None:
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(channels, channels), nn.Linear(channels, channels)
        self.v_proj, self.out_proj = nn.Linear(channels, channels), nn.Linear(channels, channels)
        self.num_heads, self.return_all_features = heads, return_all_features

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Any:
        q, k, v = (
            layer(x).unflatten(2, (self.num_heads, -1))
            for layer, x in zip((self.q_proj, self.k_proj, self.v_proj), (q, k, v))
        )
        weights = torch.einsum("nqhc,nkhc->nqkh", q / q.shape[-1] ** 0.5, k).softmax(-2)
        out = self.out_proj(torch.einsum("nqlh,nlhc->nqhc", weights, v).flatten(2))
        return {"q": q, "k": k, "v": v, "aff": weights, "out": out} if self.return_all_features else out


def evl_perceptron(channels: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(channels, 2 * channels), QuickGELU(), nn.Dropout(0.0), nn.Linear(2 * channels, channels))


class EVLEncoderLayer(nn.Module):
    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.return_all_features, self.attn = True, EVLAttention(channels, heads, True)
        self.mlp, self.norm1, self.norm2 = evl_perceptron(channels), LayerNorm(channels), LayerNorm(channels)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        normed = self.norm1(x)
        out = self.attn(normed, normed, normed)
        x = x + out["out"]
        x = x + self.mlp(self.norm2(x))
        return {"q": out["q"], "k": out["k"], "v": out["v"], "attn_out": out["out"], "out": x}


class EVLDecoderLayer(nn.Module):
    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.attn, self.mlp = EVLAttention(channels, heads), evl_perceptron(channels)
        self.norm1, self.norm2, self.norm3 = LayerNorm(channels), LayerNorm(channels), LayerNorm(channels)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        normed = self.norm3(y)
        x = x + self.attn(self.norm1(x), normed, normed)
        return x + self.mlp(self.norm2(x))


class EVLCrossAttention(nn.Module):
    """Between frames; ``device`` is where the authors' class makes its output, whatever its input is on."""

    def __init__(self, spatial_size: tuple[int, int], channels: int, device: str = "cuda") -> None:
        super().__init__()
        (height, width), self.spatial_size, self.place = spatial_size, spatial_size, device
        self.w1, self.w2 = (nn.Parameter(torch.zeros((2 * height - 1) * (2 * width - 1), channels)) for _ in range(2))
        row, column = torch.arange(height * width) // width, torch.arange(height * width) % width
        self.idx_tensor = (row[:, None] - row + height - 1) * (2 * width - 1) + column[:, None] - column + width - 1

    def forward_half(self, q: Tensor, k: Tensor, weight: Tensor) -> Tensor:
        scores = torch.einsum("ntqhd,ntkhd->ntqkh", q[:, :, 1:] / q.shape[-1] ** 0.5, k[:, :, 1:])
        self.idx_tensor = self.idx_tensor.to(weight.device)
        return torch.einsum("ntqk,qkc->ntqc", scores.softmax(-2).mean(-1), weight[self.idx_tensor])

    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        out = torch.zeros([*q.shape[:3], self.w1.shape[-1]], device=self.place)
        out[:, 1:, 1:] += self.forward_half(q[:, 1:], k[:, :-1], self.w1)
        out[:, :-1, 1:] += self.forward_half(q[:, :-1], k[:, 1:], self.w2)
        return out


class EVLDecoder(nn.Module):
    """At first without cross attention between frames, which the authors' code makes on a GPU alone."""

    def __init__(self, channels: int, heads: int, frames: int, layers: int) -> None:
        super().__init__()
        self.num_layers = layers
        self.enable_temporal_conv, self.enable_temporal_pos_embed, self.enable_temporal_cross_attention = True, True, False
        self.decoder_layers = nn.ModuleList(EVLDecoderLayer(channels, heads) for _ in range(layers))
        self.temporal_conv = nn.ModuleList(
            nn.Conv1d(channels, channels, 3, padding=1, groups=channels) for _ in range(layers)
        )
        self.temporal_pos_embed = nn.ParameterList(torch.zeros(frames, channels) for _ in range(layers))
        self.cls_token = nn.Parameter(torch.zeros(channels))

    def forward(self, in_features: list[dict[str, Tensor]]) -> Tensor:
        clips, frames, tokens, channels = in_features[0]["out"].shape
        x = self.cls_token.view(1, 1, -1).repeat(clips, 1, 1)
        for i, layer in enumerate(self.decoder_layers):
            seen = in_features[i]["out"]
            rows = seen.permute(0, 2, 3, 1).contiguous().flatten(0, 1)  # [B * L, C, T]
            rows = self.temporal_conv[i](rows).view(clips, tokens, channels, frames).permute(0, 3, 1, 2).contiguous()
            seen += rows
            seen += self.temporal_pos_embed[i].view(1, frames, 1, channels)
            if self.enable_temporal_cross_attention:
                seen += self.cross_attention[i](in_features[i]["q"], in_features[i]["k"])
            x = layer(x, seen.flatten(1, 2))
        return x


class Extractor(nn.Module):
    """UniFormerV2's global block: one query and all tokens of a clip, sequence-first."""

    def __init__(self, channels: int, heads: int, dropout: float = 0.0, drop: float = 0.0) -> None:
        super().__init__()
        self.attn, self.attn_mask = nn.MultiheadAttention(channels, heads), None
        self.ln_1, self.ln_2, self.ln_3 = (nn.LayerNorm(channels) for _ in range(3))
        layers = {
            "c_fc": nn.Linear(channels, 4 * channels), "gelu": QuickGELU(), "dropout": nn.Dropout(dropout),
            "c_proj": nn.Linear(4 * channels, channels),
        }  # fmt: skip
        self.mlp = nn.Sequential(OrderedDict(layers))
        self.drop_path = DropPath(drop) if drop else nn.Identity()
        nn.init.zeros_(self.attn.out_proj.weight)

    def attention(self, x: Tensor, y: Tensor) -> Tensor:
        weights, biases = self.attn.in_proj_weight.chunk(3), self.attn.in_proj_bias.chunk(3)
        q, k, v = (
            (each @ weight.T + bias).unflatten(2, (self.attn.num_heads, -1)).permute(1, 2, 0, 3)
            for each, weight, bias in zip((x, y, y), weights, biases)
        )
        scores = q @ k.transpose(-2, -1) / self.attn.head_dim**0.5
        return self.attn.out_proj((scores.softmax(-1) @ v).permute(2, 0, 1, 3).flatten(2))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x = x + self.drop_path(self.attention(self.ln_1(x), self.ln_3(y)))
        return x + self.drop_path(self.mlp(self.ln_2(x)))


class EVL(nn.Module):
    """Two layers of the image model and two of the decoder: ``[B, T, L, C]`` to a token for each clip."""

    def __init__(self, channels: int = 48, heads: int = 3, frames: int = 4) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(EVLEncoderLayer(channels, heads) for _ in range(2))
        self.decoder = EVLDecoder(channels, heads, frames, 2)

    def forward(self, x: Tensor) -> Tensor:
        features, shape = [], x.shape
        x = x.flatten(0, 1)
        for block in self.blocks:
            found = block(x)
            x = found["out"]
            features.append({name: found[name].clone().unflatten(0, shape[:2]) for name in ("q", "k", "out")})
        return self.decoder(features)
