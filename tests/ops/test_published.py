"""The definitions against the formulas as their authors wrote them, in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F

import i2v_kernels as i2v
import i2v_kernels.nn

B, T, N, H, D = 2, 8, 5, 3, 16


def test_temporal_attention_is_sdpa_over_frames():
    q, k, v = torch.randn(3, B, T, N, H, D, dtype=torch.float64)
    bias = torch.randn(H, T, T, dtype=torch.float64)

    def rows(x):
        return x.permute(0, 2, 3, 1, 4).reshape(B * N, H, T, D)

    for causal in (False, True):
        allowed = torch.full((T, T), float("-inf")).triu(1) if causal else torch.zeros(T, T)
        want = F.scaled_dot_product_attention(rows(q), rows(k), rows(v), attn_mask=bias + allowed)
        want = want.reshape(B, N, H, T, D).permute(0, 3, 1, 2, 4)
        for backend in ("reference", None):
            got = i2v.temporal_attention(q, k, v, bias=bias, causal=causal, backend=backend)
            torch.testing.assert_close(got, want)


def test_temporal_attention_is_multihead_attention_of_aim():
    """AIM runs CLIP's own nn.MultiheadAttention on ``[T, B * L, C]``."""
    attention = torch.nn.MultiheadAttention(H * D, H).double()
    x = torch.randn(B, T, N, H * D, dtype=torch.float64)
    rows = x.permute(1, 0, 2, 3).reshape(T, B * N, H * D)
    want = attention(rows, rows, rows, need_weights=False)[0].reshape(T, B, N, H * D).permute(1, 0, 2, 3)
    qkv = F.linear(x, attention.in_proj_weight, attention.in_proj_bias).unflatten(-1, (3, H, D))
    mixed = i2v.temporal_attention(*qkv.unbind(3)).flatten(3)
    torch.testing.assert_close(attention.out_proj(mixed), want)


def test_token_shift_is_tsm():
    """Lin et al., 1811.08383: the first fold comes from the next frame, the second from the frame before."""
    x = torch.randn(B, T, 24, 4, 4)
    fold = 24 // 8
    want = torch.zeros_like(x)
    want[:, :-1, :fold] = x[:, 1:, :fold]
    want[:, 1:, fold : 2 * fold] = x[:, :-1, fold : 2 * fold]
    want[:, :, 2 * fold :] = x[:, :, 2 * fold :]
    tokens = x.flatten(3).transpose(2, 3).contiguous()
    got = i2v.token_shift(tokens, [(fold, -1), (fold, 1)])
    assert torch.equal(got, want.flatten(3).transpose(2, 3))


def test_temporal_conv_is_depthwise_conv3d_of_st_adapter():
    """Pan et al., 2206.13559: patches to [B, C, T, H, W], nn.Conv3d(groups=C), and back."""
    for kernel in ((3, 1, 1), (3, 3, 3)):
        conv = torch.nn.Conv3d(20, 20, kernel, padding=[k // 2 for k in kernel], groups=20).double()
        x = torch.randn(B, T, 13, 20, dtype=torch.float64)
        want = x.clone()
        volume = x[:, :, 1:].reshape(B, T, 3, 4, 20).permute(0, 4, 1, 2, 3)
        want[:, :, 1:] = conv(volume).permute(0, 2, 3, 4, 1).reshape(B, T, 12, 20)
        for backend in ("reference", None):
            got = i2v.temporal_conv(x, conv.weight, conv.bias, grid=(3, 4), prefix=1, prefix_mode="copy", backend=backend)
            torch.testing.assert_close(got, want)


def test_st_adapter_is_the_published_module():
    """Pan et al., 2206.13559, on their ``[B*T, L, C]``; biases and convolution not zero, as after training."""
    adapter = i2v.nn.STAdapter(20, 12, (3, 3, 3)).double()
    for parameter in adapter.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x = torch.randn(B * T, 13, 20, dtype=torch.float64)
    hidden = adapter.fc1(x[:, 1:]).view(B, T, 3, 4, 12).permute(0, 4, 1, 2, 3).contiguous()
    hidden = adapter.conv(hidden).permute(0, 2, 3, 4, 1).contiguous().view(B * T, 12, 12)
    want = x.clone()
    want[:, 1:] += adapter.fc2(hidden)
    torch.testing.assert_close(adapter(x.unflatten(0, (B, T)), grid=(3, 4)).flatten(0, 1), want)
