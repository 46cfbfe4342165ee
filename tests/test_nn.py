"""The modules: their numbers, their names, and the examples in their docstrings."""

from __future__ import annotations

import doctest
import importlib
import timeit

import pytest
import torch
import torch.nn.utils.prune

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


@pytest.mark.parametrize("tokens", [17, 50, 197, 257])
def test_ts2net_moves_whole_tokens_of_two_sets(tokens):
    """Token by token as published, with and without autograd; ViT-L/14's 257 tokens are no multiple of the step and one."""
    x = torch.randn(2, 4, tokens, 6)
    step, want = tokens // 7, x.clone()
    for t in range(4):
        for first, source in ((1, max(t - 1, 0)), (4, min(t + 1, 3))):
            for token in range(first, tokens, step):
                want[:, t, token] = x[:, source, token]
    shift, kept = nn.TokenShift.ts2net(6), x.clone()
    assert torch.equal(shift(x), want) and torch.equal(x, kept)
    x.requires_grad_()
    out = shift(x)
    assert torch.equal(out, want)
    # every shift is a 0-1 matrix over the frames: the gradient of ones counts how often each frame was read
    assert torch.autograd.grad(out.sum(), x)[0].sum(1).eq(4).all()


def test_ts2net_refuses_sets_with_tokens_in_common():
    for tokens in (5, 10, 26):
        with pytest.raises(ValueError, match=f"N={tokens}"):
            nn.TokenShift.ts2net(24)(torch.zeros(1, 4, tokens, 24))


@pytest.mark.parametrize("sequence_first", [False, True])
def test_token_t1d_is_a_conv1d_over_the_class_token(sequence_first):
    """As published: ``[B, C, T]`` of the class token through ``nn.Conv1d``; at first TokShift's shift."""
    module, x = nn.TokenT1D(24), X / X.numel()
    assert list(module.state_dict()) == ["conv.weight"] and module.conv.weight.shape == (24, 1, 3)
    if sequence_first:
        x = x.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3)
    torch.testing.assert_close(module(x), nn.TokenShift.tokshift(24)(x))
    torch.nn.init.normal_(module.conv.weight)
    x.requires_grad_()
    want = torch.cat([module.conv(x[:, :, 0].transpose(1, 2)).transpose(1, 2)[:, :, None], x[:, :, 1:]], dim=2)
    got = module(x)
    torch.testing.assert_close(got, want)
    assert got.stride() == x.stride()
    grad, inputs = torch.randn_like(want), (x, module.conv.weight)
    for g, w in zip(torch.autograd.grad(got, inputs, grad), torch.autograd.grad(want, inputs, grad)):
        torch.testing.assert_close(g, w)


def test_token_shift_passes_its_options_on():
    module = nn.TokenShift([(3, 1)], "edge", (0, None, 2), residual=True)
    assert "tokens=(0, None, 2), residual=True" in repr(module)
    shifted = X.clone()
    shifted[:, 1:, ::2, :3] = X[:, :-1, ::2, :3]
    assert torch.equal(module(X), X + shifted)


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


@pytest.mark.parametrize("grid, frames, prefix", [((3, 4), 4, 1), ((2, 2), 2, 0), ((4, 3), 1, 1)], ids=str)
def test_temporal_cross_attention_by_the_pair(grid, frames, prefix):
    """EVL's formula as the paper has it, one pair of patches at a time, with gradients of all that learns."""
    torch.manual_seed(0)
    (height, width), heads = grid, 3
    module = nn.TemporalCrossAttention(6, grid, prefix).double()
    assert [name for name, _ in module.named_parameters()] == ["w1", "w2"] and not any(w.any() for w in module.parameters())
    for weight in module.parameters():
        torch.nn.init.normal_(weight)
    q, k = (torch.randn(2, frames, prefix + height * width, heads, 8, dtype=torch.float64, requires_grad=True) for _ in "qk")
    want = torch.zeros(2, frames, prefix + height * width, 6, dtype=torch.float64)
    for t in range(frames):
        for other, weight in ((t - 1, module.w1), (t + 1, module.w2)):
            if not 0 <= other < frames:
                continue
            for a in range(height * width):
                scores = torch.einsum("bhd,bkhd->bhk", q[:, t, prefix + a], k[:, other, prefix:]) / 8**0.5
                mean = scores.softmax(-1).mean(1)  # over heads
                for b in range(height * width):
                    row, column = a // width - b // width + height - 1, a % width - b % width + width - 1
                    want = want.index_put(
                        (torch.arange(2), torch.tensor(t), torch.tensor(prefix + a)),
                        mean[:, b, None] * weight[row * (2 * width - 1) + column],
                        accumulate=True,
                    )
    got, leaves = module(q, k), (q, k, module.w1, module.w2)
    torch.testing.assert_close(got, want)
    grad = torch.randn_like(got)
    if frames > 1:
        torch.testing.assert_close(torch.autograd.grad(got, leaves, grad), torch.autograd.grad(want, leaves, grad))


def test_functional_temporal_self_attention_refuses_what_does_not_fit():
    x, weight, proj = torch.zeros(2, 4, 3, 24), torch.zeros(72, 24), torch.zeros(24, 24)
    with pytest.raises(ValueError, match="heads=5"):
        nn.functional.temporal_self_attention(x, 5, weight, None, proj, None)
    with pytest.raises(ValueError, match=r"x.shape=\(2, 4, 24\)"):
        nn.functional.temporal_self_attention(x[:, :, 0], 3, weight, None, proj, None)


def test_patch_embed_shares_state_dicts_with_conv2d():
    conv = torch.nn.Conv2d(3, 24, (4, 6), stride=(4, 6))
    ours = nn.PatchEmbed(24, (4, 6), mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
    assert list(ours.state_dict()) == list(conv.state_dict())
    ours.load_state_dict(conv.state_dict())
    frames = torch.randint(0, 256, (2, 3, 8, 12, 3), dtype=torch.uint8)
    images = (frames.flatten(0, 1) / 255 - torch.tensor([0.5, 0.4, 0.3])) / torch.tensor([0.2, 0.3, 0.4])
    want = conv(images.movedim(-1, 1)).flatten(2).transpose(1, 2).unflatten(0, (2, 3))
    torch.testing.assert_close(ours(frames), want)
    assert "patch_size=(4, 6), bias=True, mean=(0.5, 0.4, 0.3)" in repr(ours)


def test_patch_embed_takes_a_convs_place():
    conv = torch.nn.Conv2d(3, 24, 4, stride=4, bias=False).eval()
    ours = nn.PatchEmbed.from_conv(conv)
    assert ours.weight is conv.weight and ours.bias is None and not ours.training
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ours(torch.zeros(1, 2, 8, 8, 3, dtype=torch.uint8)).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "conv, text",
    [
        (torch.nn.Linear(3, 4), "it is a Linear"),
        (torch.nn.Conv2d(3, 24, 4, stride=2), "its stride"),
        (torch.nn.Conv2d(3, 24, 4, stride=4, padding=1), "padding"),
        (torch.nn.Conv2d(3, 24, 4, stride=4, dilation=2), "dilation"),
        (torch.nn.Conv2d(6, 24, 4, stride=4), "6 channels of 6"),
        (torch.nn.Conv2d(3, 24, 4, stride=4, groups=3), "1 channels of 3"),
        (torch.nn.utils.parametrizations.weight_norm(torch.nn.Conv2d(3, 24, 4, stride=4)), "Parametrized"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_patch_embed_refuses_other_layers(conv, text):
    with pytest.raises(ValueError, match=text):
        nn.PatchEmbed.from_conv(conv)


def test_patch_embed_leaves_hooks_their_layer():
    conv = torch.nn.Conv2d(3, 24, 4, stride=4)
    hook = conv.register_forward_hook(lambda *_: None)
    assert "hooks" in nn.PatchEmbed.why_not(conv)
    hook.remove()
    assert nn.PatchEmbed.why_not(conv) is None


@pytest.mark.parametrize(
    "module", ["functional", "temporal_attention", "temporal_cross_attention", "token_shift", "temporal_conv", "patch_embed"]
)
def test_docstring_examples(module):
    result = doctest.testmod(importlib.import_module(f"i2v_kernels.nn.{module}"))
    assert result.attempted > 0 and result.failed == 0


def test_info_reports_every_op(capsys):
    from i2v_kernels import info

    text = info.report()
    for name in ("temporal_attention", "token_shift", "temporal_conv", "torch", "instruction sets"):
        assert name in text


# Children that are more than their class -----------------------------------------------------------------------------------


def _wrap(layer):
    own = layer.forward
    layer.forward = lambda x: 1.5 * own(x)


def _scale_by_hook(layer):
    layer.register_forward_hook(lambda module, args, out: 1.5 * out)


def _derive(layer):
    kind = type(layer)
    layer.__class__ = type("Quantised", (kind,), {"forward": lambda self, x: 1.5 * kind.forward(self, x)})


# a module, a call of it that runs its children one by one, and their names
def _adapter(module, x):
    out = module.D_fc2(torch.nn.functional.gelu(module.D_fc1(x)))
    return x + out


def _st(module, x):
    rows = module.fc1(x[:, :, 1:])
    planes = rows.permute(0, 3, 1, 2).reshape(*rows.shape[:1], rows.shape[3], rows.shape[1], 2, 3)
    update = module.fc2(module.conv(planes).flatten(3).permute(0, 2, 3, 1))
    return torch.cat([x[:, :, :1], x[:, :, 1:] + update], 2)


def _lora(module, x):
    return module.base_layer(x) + module.lora_B["default"](module.lora_A["default"](x)) * module.scaling


def _attention(module, x):
    return module.proj(temporal_attention(module.qkv(x).unflatten(3, (3, 2, 4))).flatten(3))


def _t1d(module, x):
    return torch.cat([module.conv(x[:, :, 0].transpose(1, 2)).transpose(1, 2)[:, :, None], x[:, :, 1:]], 2)


WITH_CHILDREN = {
    "BottleneckAdapter": (lambda: nn.BottleneckAdapter(8, 4), _adapter, ["D_fc1", "D_fc2"]),
    "STAdapter": (lambda: nn.STAdapter(8, 4, (3, 3, 3)), _st, ["fc1", "conv", "fc2"]),
    "LoRALinear": (
        lambda: nn.LoRALinear(torch.nn.Linear(8, 8), 2), _lora, ["base_layer", "lora_A.default", "lora_B.default"],
    ),
    "TemporalAttention": (lambda: nn.TemporalAttention(8, 2), _attention, ["qkv", "proj"]),
    "TokenT1D": (lambda: nn.TokenT1D(8), _t1d, ["conv"]),
}  # fmt: skip


def _made(name):
    torch.manual_seed(0)
    make, by_parts, children = WITH_CHILDREN[name]
    module = make()
    for p in module.parameters():
        torch.nn.init.normal_(p, std=0.3)
    options = {"grid": (2, 3)} if name == "STAdapter" else {}
    return module, (lambda x: module(x, **options)), (lambda x: by_parts(module, x)), children


@pytest.mark.parametrize("change", [None, _wrap, _scale_by_hook, _derive])
@pytest.mark.parametrize("name", WITH_CHILDREN)
def test_children_that_are_more_than_their_class_are_called(name, change):
    """LoRA, offloading, hooks and quantisers act when a layer is called: reading its weight would drop them without a word."""
    x = torch.randn(2, 4, 7, 8)
    for place in range(len(WITH_CHILDREN[name][2])):
        module, call, by_parts, children = _made(name)
        before = call(x)
        if change is not None:
            change(module.get_submodule(children[place]))
        torch.testing.assert_close(call(x), by_parts(x))
        assert change is None or not torch.allclose(call(x), before)
        with torch.autocast("cpu", torch.bfloat16):
            assert call(x).dtype == _made(name)[1](x).dtype  # of the op


@pytest.mark.parametrize("name", ["BottleneckAdapter", "STAdapter", "TemporalAttention", "TokenT1D"])
def test_peft_on_children(name):
    peft = pytest.importorskip("peft")
    module, call, by_parts, children = _made(name)
    x = torch.randn(2, 4, 7, 8)
    before = call(x)
    config = peft.LoraConfig(target_modules=children, init_lora_weights=False, r=8)  # a multiple of the depthwise groups
    peft.inject_adapter_in_model(config, module)
    torch.testing.assert_close(call(x), by_parts(x))
    assert not torch.allclose(call(x), before)


def test_st_adapter_of_called_children_wants_its_grid():
    module = nn.STAdapter(8, 4, (3, 3, 3))
    _scale_by_hook(module.fc1)
    with pytest.raises(ValueError, match="grid=None"):
        module(torch.randn(2, 4, 7, 8))
    narrow = nn.STAdapter(8, 4)
    _scale_by_hook(narrow.fc1)
    assert narrow(torch.randn(2, 4, 7, 8)).shape == (2, 4, 7, 8)


def test_lora_is_not_merged_into_a_weight_that_is_computed():
    """It would be gone with the next call."""
    for change in (
        torch.nn.utils.parametrizations.weight_norm,
        lambda base: torch.nn.utils.prune.l1_unstructured(base, "weight", 1),
    ):
        layer = nn.LoRALinear(torch.nn.Linear(8, 8), 2)
        change(layer.base_layer)
        with pytest.raises(ValueError, match="no update can be added to its weight"):
            layer.merge()
        assert not layer.merged


def test_patch_embed_leaves_a_conv_with_a_forward_of_its_own():
    conv = torch.nn.Conv2d(3, 24, 4, stride=4)
    _wrap(conv)
    assert "a forward of its own" in nn.PatchEmbed.why_not(conv)


def test_asking_whether_children_are_plain_is_cheap():
    """Next to what calling one of them costs."""
    from i2v_kernels.nn.plain import is_plain

    layers, x = (torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)), torch.zeros(1, 1)

    def seconds(call):
        return min(timeit.repeat(call, number=200, repeat=9))

    with torch.no_grad():
        assert seconds(lambda: is_plain(*layers, kind=torch.nn.Linear)) < seconds(lambda: layers[1](layers[0](x)))
