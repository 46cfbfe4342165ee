"""Modules as the authors of the methods wrote them (shapes, names and order of operations; the text is ours)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bench.published import STAdapter, TemporalShift

__all__ = ["STAdapter", "TemporalShift"]


class QuickGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class LayerNorm(nn.LayerNorm):
    """CLIP's: in float32, whatever comes in."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float() if x.dtype == torch.float16 else x).type(x.dtype)


class DropPath(nn.Module):
    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        return x / (1 - self.p) * torch.rand(len(x), *[1] * (x.dim() - 1)).add(1 - self.p).floor()


def perceptron(channels: int) -> nn.Sequential:
    layers = {"c_fc": nn.Linear(channels, 4 * channels), "gelu": QuickGELU(), "c_proj": nn.Linear(4 * channels, channels)}
    model = nn.Sequential()
    for name, layer in layers.items():
        model.add_module(name, layer)
    return model


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


class XCLIPBlock(nn.Module):
    def __init__(self, channels: int, heads: int, frames: int, drop: float = 0.0) -> None:
        super().__init__()
        self.T, self.attn_mask = frames, None
        self.message_fc, self.message_ln = nn.Linear(channels, channels), LayerNorm(channels)
        self.message_attn, self.attn = nn.MultiheadAttention(channels, heads), nn.MultiheadAttention(channels, heads)
        self.ln_1, self.ln_2, self.mlp = LayerNorm(channels), LayerNorm(channels), perceptron(channels)
        self.drop_path = DropPath(drop) if drop else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        tokens, rows, channels = x.shape
        message = self.message_fc(x[0]).view(-1, self.T, channels).transpose(0, 1)  # [T, B, C]
        normed = self.message_ln(message)
        message = message + self.drop_path(self.message_attn(normed, normed, normed, need_weights=False)[0])
        x = torch.cat((x, message.transpose(0, 1).reshape(1, rows, channels)))
        normed = self.ln_1(x)
        x = x + self.drop_path(self.attn(normed, normed, normed, need_weights=False)[0])
        x = x[:tokens]
        return x + self.drop_path(self.mlp(self.ln_2(x)))


class OpenVCLIPAttention(nn.Module):
    """Keys and values of the next frames, those before and the frame's own; zeros of k's dtype (theirs are float32)."""

    def __init__(self, channels: int, heads: int, frames: int, shift: str = "expand_temporal_view", drop: float = 0.0) -> None:
        super().__init__()
        self.embed_dim, self.num_heads, self.dropout, self.batch_first = channels, heads, drop, False
        self._qkv_same_embed_dim, self.bias_k, self.bias_v, self.add_zero_attn = True, None, None, False
        self.in_proj_weight = nn.Parameter(torch.empty(3 * channels, channels))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * channels))
        self.out_proj = nn.modules.linear.NonDynamicallyQuantizableLinear(channels, channels)
        self.temporal_shift, self.T = shift, frames
        nn.init.xavier_uniform_(self.in_proj_weight)

    def window(self, x: Tensor) -> Tensor:
        """``[B * T * H, L, D]`` -> ``[B * T * H, frames * L, D]``."""
        rows, tokens, width = x.shape
        x = x.view(-1, self.T, self.num_heads, tokens, width)
        reach = {"w": 1, "2": 2, "3": 3}[self.temporal_shift[-1]]  # ..._view, ..._step2, ..._step3
        parts = [torch.zeros_like(x) for _ in range(2 * reach)]
        for i in range(reach):
            parts[i][:, : -i - 1] = x[:, i + 1 :]
            parts[reach + i][:, i + 1 :] = x[:, : -i - 1]
        return torch.cat([*parts, x], 3).view(rows, -1, width)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Any = None, need_weights: bool = True,
        attn_mask: Any = None, average_attn_weights: bool = True,
    ) -> Any:  # fmt: skip
        length, rows, channels = query.shape
        parts = zip((query, key, value), self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3))
        q, k, v = (
            nn.functional.linear(*part).view(length, rows * self.num_heads, -1).transpose(0, 1).contiguous() for part in parts
        )
        scores = torch.bmm(q / q.shape[-1] ** 0.5, self.window(k).transpose(1, 2))
        if attn_mask is not None:
            scores = scores + attn_mask
        weights = nn.functional.dropout(scores.softmax(-1), self.dropout, self.training)
        mixed = torch.bmm(weights, self.window(v)).transpose(0, 1).reshape(length, rows, channels)
        out = nn.functional.linear(mixed, self.out_proj.weight, self.out_proj.bias)
        return out, weights.unflatten(0, (rows, -1)).mean(1) if need_weights else None


class OpenVCLIPBlock(nn.Module):
    def __init__(self, channels: int, heads: int, frames: int, shift: str = "expand_temporal_view") -> None:
        super().__init__()
        self.attn, self.mlp = OpenVCLIPAttention(channels, heads, frames, shift), perceptron(channels)
        self.ln_1, self.ln_2, self.attn_mask = LayerNorm(channels), LayerNorm(channels), None

    def forward(self, x: Tensor) -> Tensor:
        normed = self.ln_1(x)
        x = x + self.attn(normed, normed, normed, need_weights=False, attn_mask=self.attn_mask)[0]
        return x + self.mlp(self.ln_2(x))


class CLIPViPAttention(nn.Module):
    """transformers' of CLIP, with another way for clips: M tokens of all frames, and P of each."""

    def __init__(self, channels: int, heads: int, drop: float = 0.0) -> None:
        super().__init__()
        self.embed_dim, self.num_heads, self.scale, self.dropout = channels, heads, (channels // heads) ** -0.5, drop
        self.k_proj, self.v_proj = nn.Linear(channels, channels), nn.Linear(channels, channels)
        self.q_proj, self.out_proj = nn.Linear(channels, channels), nn.Linear(channels, channels)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = torch.bmm(q, k.transpose(1, 2)).softmax(-1)
        return torch.bmm(nn.functional.dropout(weights, self.dropout, self.training), v)

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.num_heads, -1)).transpose(1, 2).reshape(len(x) * self.num_heads, x.shape[1], -1)

    def forward(
        self, hidden_states: Tensor, inputs_size: Any, attention_mask: Any = None, causal_attention_mask: Any = None,
        output_attentions: bool = False,
    ) -> Any:  # fmt: skip
        if inputs_size is not None:
            return self.forward2(hidden_states, inputs_size), None
        parts = (self.q_proj(hidden_states) * self.scale, self.k_proj(hidden_states), self.v_proj(hidden_states))
        mixed = self.attend(*map(self.split, parts)).unflatten(0, (len(hidden_states), -1))
        return self.out_proj(mixed.transpose(1, 2).flatten(2)), None

    def forward2(self, hidden_states: Tensor, inputs_size: Any) -> Tensor:
        common, frames, patches = inputs_size
        parts = (self.q_proj(hidden_states) * self.scale, self.k_proj(hidden_states), self.v_proj(hidden_states))
        q, k, v = map(self.split, parts)
        width, own = q.shape[-1], []
        for x in (k, v):
            repeated = x[:, :common].repeat(1, frames, 1).reshape(-1, common, width)
            own.append(torch.cat([repeated, x[:, common:].reshape(-1, patches, width)], 1))
        rows = self.attend(q[:, common:].reshape(-1, patches, width), *own)
        rows = rows.view(len(hidden_states), self.num_heads, frames * patches, width).transpose(1, 2).flatten(2)
        token = self.attend(q[:, :common], k, v).unflatten(0, (len(hidden_states), -1)).transpose(1, 2).flatten(2)
        return self.out_proj(torch.cat([token, rows], 1))


class CLIPViPLayer(nn.Module):
    """Of three frames of four patches, and two tokens."""

    def __init__(self, channels: int, heads: int, size: tuple[int, int, int] = (2, 3, 4)) -> None:
        super().__init__()
        self.self_attn, self.mlp, self.size = CLIPViPAttention(channels, heads), perceptron(channels), size
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(channels), nn.LayerNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.layer_norm1(x)
        x = x + self.self_attn(hidden_states=normed, inputs_size=self.size, attention_mask=None)[0]
        return x + self.mlp(self.layer_norm2(x))


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
