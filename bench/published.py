"""Modules as the authors of the methods wrote them (shapes, names and order of operations; the text is ours)."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

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


class XPoolAttention(nn.Module):
    """X-Pool's ``MultiHeadedAttention``."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.embed_dim, self.num_heads, self.head_dim = channels, heads, channels // heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(channels, channels) for _ in range(4))

    def forward(self, text: Tensor, video: Tensor) -> Tensor:
        """``[A, C]`` and ``[V, F, C]`` to ``[V, A, C]``."""
        q = self.q_proj(text).unflatten(1, (self.num_heads, -1)).permute(1, 2, 0)  # [H, D, A]
        k = self.k_proj(video).unflatten(2, (self.num_heads, -1)).transpose(1, 2)  # [V, H, F, D]
        v = self.v_proj(video).unflatten(2, (self.num_heads, -1)).permute(0, 2, 3, 1)  # [V, H, D, F]
        weights = (k @ q / self.head_dim**0.5).softmax(2)  # [V, H, F, A]
        return self.out_proj((v @ weights).permute(0, 3, 1, 2).flatten(2))


class XPool(nn.Module):
    """X-Pool's ``Transformer``."""

    def __init__(self, channels: int, heads: int = 1, dropout: float = 0.3) -> None:
        super().__init__()
        self.cross_attn, self.linear_proj = XPoolAttention(channels, heads), nn.Linear(channels, channels)
        self.layer_norm1, self.layer_norm2, self.layer_norm3 = (nn.LayerNorm(channels) for _ in range(3))
        self.dropout = nn.Dropout(dropout)

    def forward(self, text_embeds: Tensor, video_embeds: Tensor) -> Tensor:
        out = self.cross_attn(self.layer_norm1(text_embeds), self.layer_norm1(video_embeds))
        out = self.layer_norm2(out)
        return self.layer_norm3(out + self.dropout(self.linear_proj(out)))


class XPoolSimilarity(XPool):
    """Cosines of texts and the layer's outputs, ``[A, V]``, as X-Pool's ``sim_matrix_training`` has them."""

    def forward(self, text_embeds: Tensor, video_embeds: Tensor) -> Tensor:
        pooled = super().forward(text_embeds, video_embeds)
        pooled = pooled / pooled.norm(dim=-1, keepdim=True)
        text = text_embeds / text_embeds.norm(dim=-1, keepdim=True)
        return torch.bmm(text[:, None], pooled.permute(1, 2, 0))[:, 0]
