"""The modules: their numbers, their names, and the examples in their docstrings."""

from __future__ import annotations

import doctest
import importlib

import pytest
import torch

from i2v_kernels import nn, temporal_attention

X = torch.arange(2 * 4 * 3 * 24, dtype=torch.float32).reshape(2, 4, 3, 24) + 1


def test_tsm_reads_next_then_previous():
    out = nn.TokenShift.tsm(24)(X)
    assert torch.equal(out[:, :-1, :, :3], X[:, 1:, :, :3]) and not out[:, -1, :, :3].any()
    assert torch.equal(out[:, 1:, :, 3:6], X[:, :-1, :, 3:6]) and not out[:, 0, :, 3:6].any()
    assert torch.equal(out[..., 6:], X[..., 6:])


def test_tsm_vit_leaves_the_class_token():
    out = nn.TokenShift.tsm_vit(24)(X)
    assert torch.equal(out[:, :, 0], X[:, :, 0])
    assert torch.equal(out[:, :, 1:], nn.TokenShift.tsm(24)(X)[:, :, 1:])


def test_tokshift_moves_the_class_token_alone():
    out = nn.TokenShift.tokshift(24)(X)
    assert torch.equal(out[:, :, 1:], X[:, :, 1:])
    assert torch.equal(out[:, :-1, 0, :6], X[:, 1:, 0, :6]) and torch.equal(out[:, 1:, 0, 6:12], X[:, :-1, 0, 6:12])


def test_side4video_keeps_nothing_of_the_class_token():
    out = nn.TokenShift.side4video(24)(X)
    assert torch.equal(out[:, :-1, 0, :12], X[:, 1:, 0, :12]) and torch.equal(out[:, 1:, 0, 12:], X[:, :-1, 0, 12:])


def test_zeroi2v_reads_previous_then_next_and_keeps_its_own_at_the_ends():
    out = nn.TokenShift.zeroi2v(24)(X)
    assert torch.equal(out[:, 1:, :, :2], X[:, :-1, :, :2]) and torch.equal(out[:, 0, :, :2], X[:, 0, :, :2])
    assert torch.equal(out[:, :-1, :, 2:4], X[:, 1:, :, 2:4]) and torch.equal(out[:, -1, :, 2:4], X[:, -1, :, 2:4])


@pytest.mark.parametrize("tokens", [50, 197, 14])
@pytest.mark.parametrize("grad", [False, True])
def test_ts2net_moves_whole_tokens_both_ways(tokens, grad):
    x = torch.randn(2, 5, tokens, 6, requires_grad=grad)
    want, step = x.clone(), tokens // 7
    want[:, 1:, 1::step] = x[:, :-1, 1::step]
    want[:, :-1, 4::step] = x[:, 1:, 4::step]
    before = x.detach().clone()
    got = nn.TS2NetShift()(x)
    assert torch.equal(got, want) and torch.equal(x.detach(), before)
    if grad:
        weight = torch.randn_like(x)
        assert torch.equal(*(torch.autograd.grad((out * weight).sum(), x)[0] for out in (got, want)))


def test_ts2net_refuses_tokens_that_would_move_twice():
    with pytest.raises(ValueError, match="n_div=7 leaves no two sets of tokens apart among N=21"):
        nn.TS2NetShift()(torch.randn(1, 2, 21, 4))


def test_token_t1d_begins_as_tokshift_and_learns():
    module = nn.TokenT1D(24)
    assert torch.equal(module(X), nn.TokenShift.tokshift(24)(X))
    assert {name: tuple(p.shape) for name, p in module.named_parameters()} == {"conv.weight": (24, 1, 3)}
    module(X).square().sum().backward()
    class_tokens = X[:, :, 0].transpose(1, 2).clone()
    weight = module.conv.weight.detach().clone().requires_grad_()
    torch.nn.functional.conv1d(class_tokens, weight, padding=1, groups=24).square().sum().backward()
    torch.testing.assert_close(module.conv.weight.grad, weight.grad)


def test_shift_refuses_a_fold_that_is_none():
    with pytest.raises(ValueError, match="n_div=8"):
        nn.TokenShift.tsm(4)


def test_temporal_conv_shares_state_dicts_with_conv3d():
    conv = torch.nn.Conv3d(24, 24, (3, 1, 1), padding=(1, 0, 0), groups=24)
    ours = nn.TemporalConv(24, (3, 1, 1))
    ours.load_state_dict(conv.state_dict())
    x = X / X.numel()
    want = conv(x.permute(0, 3, 1, 2)[..., None])[..., 0].permute(0, 2, 3, 1)
    torch.testing.assert_close(ours(x), want)
    assert list(ours.state_dict()) == list(conv.state_dict())


def test_temporal_conv_as_in_evl():
    """f = out + DWconv1d_T(out), all tokens."""
    ours = nn.TemporalConv(24, residual=True)
    x = X / X.numel()
    per_token = x.permute(0, 2, 3, 1).reshape(6, 24, 4)
    want = torch.nn.functional.conv1d(per_token, ours.weight[..., 0, 0], ours.bias, padding=1, groups=24)
    torch.testing.assert_close(ours(x), x + want.reshape(2, 3, 24, 4).permute(0, 3, 1, 2))


def test_temporal_attention_is_multihead_attention_over_frames():
    """With the state dict of ``nn.MultiheadAttention``, and with its masks turned into ours."""
    theirs = torch.nn.MultiheadAttention(24, 3, batch_first=True)
    torch.nn.init.normal_(theirs.in_proj_bias)
    ours = nn.TemporalAttention(24, 3, causal=True)
    ours.load_state_dict(theirs.state_dict())
    x, mask = torch.randn(2, 4, 3, 24), torch.tensor([[True, True, True, True], [True, True, False, False]])
    rows = x.transpose(1, 2).flatten(0, 1)  # [B * N, T, C]
    hidden = torch.nn.Transformer.generate_square_subsequent_mask(4).isinf()
    want = theirs(rows, rows, rows, key_padding_mask=~mask.repeat_interleave(3, 0), attn_mask=hidden)[0]
    torch.testing.assert_close(ours(x, mask=mask), want.unflatten(0, (2, 3)).transpose(1, 2))


def test_temporal_attention_has_the_names_of_timm_inside_other_modules_too():
    block = torch.nn.ModuleDict({"temporal_attn": nn.TemporalAttention(24, 3)})
    names = ["qkv.weight", "qkv.bias", "proj.weight", "proj.bias"]
    assert list(block.state_dict()) == [f"temporal_attn.{name}" for name in names]
    clip = {f"temporal_attn.{name}": value for name, value in torch.nn.MultiheadAttention(24, 3).state_dict().items()}
    assert block.load_state_dict(clip) == ([], [])
    assert torch.equal(block["temporal_attn"].qkv.weight, clip["temporal_attn.in_proj_weight"])
    assert "in_proj_bias" not in nn.TemporalAttention(24, 3, qkv_bias=False).state_dict()


def test_temporal_attention_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="heads=5 must divide channels=24"):
        nn.TemporalAttention(24, 5)
    with pytest.raises(ValueError, match=r"x.shape=\(2, 4, 24\)"):
        nn.TemporalAttention(24, 3)(torch.zeros(2, 4, 24))


def test_temporal_attention_passes_its_options_on():
    module = nn.TemporalAttention(24, 3, window=(1, 0), offsets=[0, -1, 1])
    assert "window=(1, 0), offsets=[0, -1, 1]" in repr(module)
    x, bias = torch.randn(2, 4, 3, 24), torch.randn(3, 4, 4)
    qkv = module.qkv(x).unflatten(3, (3, 3, 8))
    want = temporal_attention(qkv, window=(1, 0), offsets=[0, -1, 1], bias=bias)
    torch.testing.assert_close(module(x, bias=bias), module.proj(want.flatten(3)))


def test_functional_temporal_self_attention_refuses_what_does_not_fit():
    x, weight, proj = torch.zeros(2, 4, 3, 24), torch.zeros(72, 24), torch.zeros(24, 24)
    with pytest.raises(ValueError, match="heads=5"):
        nn.functional.temporal_self_attention(x, 5, weight, None, proj, None)
    with pytest.raises(ValueError, match=r"x.shape=\(2, 4, 24\)"):
        nn.functional.temporal_self_attention(x[:, :, 0], 3, weight, None, proj, None)


@pytest.mark.parametrize("module", ["functional", "temporal_attention", "token_shift", "temporal_conv"])
def test_docstring_examples(module):
    result = doctest.testmod(importlib.import_module(f"i2v_kernels.nn.{module}"))
    assert result.attempted > 0 and result.failed == 0


def test_info_reports_every_op(capsys):
    from i2v_kernels import info

    text = info.report()
    for name in ("temporal_attention", "token_shift", "temporal_conv", "torch", "instruction sets"):
        assert name in text
