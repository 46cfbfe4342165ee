"""Each method against its published formula, written out here token by token in float64."""

from __future__ import annotations

import functools
import math

import open_clip
import pytest
import torch
import torch.nn.functional as F

from i2v_models import build
from i2v_models.methods import create

from .conftest import tiny_clip
from .test_backbone import METHODS, shake

CLIPS, FRAMES, CHANNELS, HEADS, GRID = 2, 4, 64, 4, 4
TOKENS = 1 + GRID * GRID


def attention(block, x):
    """nn.MultiheadAttention from its weights; x [batch, tokens, C]."""
    q, k, v = (x @ block.attn.in_proj_weight.T + block.attn.in_proj_bias).chunk(3, dim=-1)
    out = []
    for head in range(HEADS):
        part = slice(head * CHANNELS // HEADS, (head + 1) * CHANNELS // HEADS)
        scores = q[..., part] @ k[..., part].transpose(-1, -2) / math.sqrt(CHANNELS // HEADS)
        out.append(scores.softmax(-1) @ v[..., part])
    return torch.cat(out, -1) @ block.attn.out_proj.weight.T + block.attn.out_proj.bias


def mlp(block, x):
    return F.gelu(x @ block.mlp.c_fc.weight.T + block.mlp.c_fc.bias) @ block.mlp.c_proj.weight.T + block.mlp.c_proj.bias


def norm(ln, x):
    return F.layer_norm(x, (CHANNELS,), ln.weight, ln.bias, 1e-5)


def published_st_adapter(adapter, x):
    """x [B, T, L, C]: three weights per hidden channel over the frames before, after; zeros beyond the ends."""
    out = x.clone()
    hidden = x[:, :, 1:] @ adapter.fc1.weight.T + adapter.fc1.bias
    for t in range(FRAMES):
        conv = adapter.conv.bias.expand_as(hidden[:, t]).clone()
        for tap, source in enumerate((t - 1, t, t + 1)):
            if 0 <= source < FRAMES:
                conv += adapter.conv.weight[:, 0, tap, 0, 0] * hidden[:, source]
        out[:, t, 1:] += conv @ adapter.fc2.weight.T + adapter.fc2.bias
    return out


def st_adapter_block(method, own, block, x):
    if "adapter_pre_attn" in own:
        x = published_st_adapter(own.adapter_pre_attn, x)
    x = x + torch.stack([attention(block, norm(block.ln_1, clip)) for clip in x])
    x = published_st_adapter(own.adapter_pre_mlp, x)
    return x + mlp(block, norm(block.ln_2, x))


def aim_block(method, own, block, x):
    def adapter(weights, x):
        hidden = x @ weights.D_fc1.weight.T + weights.D_fc1.bias
        return F.gelu(hidden) @ weights.D_fc2.weight.T + weights.D_fc2.bias

    over_time = torch.empty_like(x)
    for token in range(TOKENS):  # the class token takes part
        n = norm(block.ln_1, x[:, :, token])
        if "T_Adapter_in" in own:
            n = n + adapter(own.T_Adapter_in, n)
        over_time[:, :, token] = adapter(own.T_Adapter, attention(block, n))
    x = x + over_time
    space = torch.stack([attention(block, norm(block.ln_1, clip)) for clip in x])
    x = x + space + adapter(own.S_Adapter, space)
    n = norm(block.ln_2, x)
    return x + mlp(block, n) + own.MLP_Adapter.scale * adapter(own.MLP_Adapter, n)


def tokshift_block(method, own, block, x):
    def shift(x):
        out = x.clone()
        quarter = CHANNELS // 4
        for t in range(FRAMES):
            later = x[:, t + 1, 0] if t + 1 < FRAMES else torch.zeros_like(x[:, 0, 0])
            earlier = x[:, t - 1, 0] if t > 0 else torch.zeros_like(x[:, 0, 0])
            out[:, t, 0, :quarter] = later[:, :quarter]
            out[:, t, 0, quarter : 2 * quarter] = earlier[:, quarter : 2 * quarter]
        return out

    x = shift(x)
    x = x + torch.stack([attention(block, norm(block.ln_1, clip)) for clip in x])
    x = shift(x)
    return x + mlp(block, norm(block.ln_2, x))


PUBLISHED = {"st_adapter": st_adapter_block, "aim": aim_block, "tokshift": tokshift_block}
VARIANTS = [
    ("st_adapter", {"width": 24}),
    ("st_adapter", {"width": 24, "adapters": 2}),
    ("aim", {}),
    ("aim", {"adapters": 2, "scale": 1.0}),
    ("tokshift", {}),
]


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize(("name", "options"), VARIANTS)
def test_block_is_the_published_formula(name, options, kernels):
    visual = tiny_clip().double().eval().visual
    method = create(name, visual, frames=FRAMES, kernels=kernels, **options).double()
    shake(method)
    shake(visual)
    x = torch.randn(CLIPS, FRAMES, TOKENS, CHANNELS, dtype=torch.float64)
    own = method.transformer.resblocks[1] if name != "tokshift" else None
    block = visual.transformer.resblocks[1]
    expected = PUBLISHED[name](method, own, block, x)
    out = method.block(1, block, x.flatten(0, 1), FRAMES).view_as(x)
    torch.testing.assert_close(out, expected, atol=1e-10, rtol=1e-10)
    assert not torch.allclose(out, block(x.flatten(0, 1)).view_as(x), atol=1e-3)


@pytest.mark.parametrize(("name", "options"), VARIANTS)
def test_kernels_and_plain_agree_forward_and_backward(name, options, frames):
    outs, grads = [], []
    options = {"head": "linear", "captions": ["a", "b"], "train_backbone": True, **options}
    for kernels in (True, False):
        model = build(tiny_clip(), name, frames=4, kernels=kernels, **options).eval()
        shake(model)
        outs.append(model(frames))
        F.cross_entropy(outs[-1], torch.tensor([0, 1])).backward()
        grads.append(dict(model.named_parameters()))
    torch.testing.assert_close(outs[0], outs[1], atol=1e-4, rtol=1e-4)
    for key, parameter in grads[0].items():
        if parameter.requires_grad and parameter.grad is not None:
            error = (parameter.grad - grads[1][key].grad).norm() / parameter.grad.norm().clamp(min=1e-6)
            assert error < 1e-3, (key, error)


@pytest.mark.parametrize(("name", "options"), [v for v in VARIANTS if v[0] != "tokshift"])
def test_layers_of_adapters_are_called_by_kernels_and_plain_alike(name, options):
    """Hooks and LoRA act when a layer is called: reading its weight would drop them without a word."""
    visual = tiny_clip().eval().visual
    methods = [create(name, visual, frames=FRAMES, kernels=kernels, **options) for kernels in (True, False)]
    shake(visual)
    x = torch.randn(CLIPS * FRAMES, TOKENS, CHANNELS)

    def outputs():
        return [method.block(1, visual.transformer.resblocks[1], x.clone(), FRAMES) for method in methods]

    for method in methods:
        shake(method)
    before = outputs()[0]
    own = methods[0].transformer.resblocks[1]
    layers = [path for path, part in own.named_modules() if isinstance(part, (torch.nn.Linear, torch.nn.Conv3d))]
    for path in layers:
        parts = [method.transformer.resblocks[1].get_submodule(path) for method in methods]
        handles = [part.register_forward_hook(lambda part, args, out: 1.5 * out) for part in parts]
        kernels, plain = outputs()
        torch.testing.assert_close(kernels, plain, atol=1e-4, rtol=1e-4)
        assert not torch.allclose(plain, before, atol=1e-3)
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize(("name", "options"), [v for v in VARIANTS if v[0] != "tokshift"])
@pytest.mark.parametrize("kernels", [True, False])
def test_step_zero_is_the_image_model(name, options, kernels, clip_model, frames):
    model = build(clip_model, name, frames=4, head=None, kernels=kernels, **options)
    image_model = build(tiny_clip(), "frame_mean", head=None)
    with torch.no_grad():
        torch.testing.assert_close(model.tokens(frames), image_model.tokens(frames), atol=1e-5, rtol=1e-5)


def test_aim_adds_its_embedding_before_ln_pre(clip_model, frames):
    model = build(clip_model, "aim", frames=4, head=None)
    visual, table = clip_model.visual, torch.randn(4, CHANNELS)
    inputs = []
    visual.ln_pre.register_forward_hook(lambda ln_pre, args, out: inputs.append(args[0]))
    with torch.no_grad():
        model.tokens(frames)
        model.method.temporal_embedding.copy_(table[None])
        model.tokens(frames)
    without, added = (x.view(2, 4, TOKENS, CHANNELS) for x in inputs)
    torch.testing.assert_close(added, without + table[None, :, None])


def test_frame_mean_is_clip4clip_and_blind_to_order(clip_model, frames):
    model = build(clip_model, "frame_mean", head=None)
    with torch.no_grad():
        each = clip_model.visual(model.images(frames)).view(2, 4, -1)
        expected = sum(each[:, t] / each[:, t].norm(dim=-1, keepdim=True) for t in range(4)) / 4
        torch.testing.assert_close(model.encode(frames), expected)
        torch.testing.assert_close(model.encode(frames.flip(1)), expected)


@pytest.mark.parametrize("name", ["tokshift", "st_adapter", "aim"])
def test_temporal_methods_see_the_order_of_frames(name, frames):
    model = build(tiny_clip(), name, frames=4, head=None, train_backbone=True)
    shake(model)
    with torch.no_grad():
        assert not torch.allclose(model.encode(frames), model.encode(frames.flip(1)), atol=1e-4)


@pytest.mark.parametrize("order", ["st_adapter", "aim"])
def test_frames_are_averaged_before_or_after_ln_post_as_published(order, clip_model, frames):
    model = build(clip_model, order, frames=4, head="linear", captions=["a", "b"]).eval()
    with torch.no_grad():
        ln_post = clip_model.visual.ln_post
        ln_post.weight.copy_(torch.linspace(0.5, 2, 64))
        if order == "aim":
            model.method.ln_post.load_state_dict(ln_post.state_dict())
        cls = model.tokens(frames)[:, :, 0]
        features = ln_post(cls.mean(1)) if order == "st_adapter" else ln_post(cls).mean(1)
        torch.testing.assert_close(model(frames), features @ model.head.fc.weight.T + model.head.fc.bias)
        other = ln_post(cls).mean(1) if order == "st_adapter" else ln_post(cls.mean(1))
        assert not torch.allclose(features, other, atol=1e-4)


COUNTS = [
    ("ViT-B-16", "st_adapter", {}, 7.110),
    ("ViT-B-16", "st_adapter", {"adapters": 2}, 14.220),
    ("ViT-L-14", "st_adapter", {}, 18.945),
    ("ViT-B-16", "aim", {}, 10.659),
    ("ViT-B-16", "aim", {"adapters": 2}, 14.210),
    ("ViT-L-14", "aim", {}, 37.851),
    ("ViT-B-16", "tokshift", {}, 0.0),
    ("ViT-B-16", "frame_mean", {}, 0.0),
]


@functools.cache
def meta_clip(vit):
    with torch.device("meta"):
        return open_clip.model.CLIP(**open_clip.get_model_config(vit))


@pytest.mark.parametrize(("vit", "name", "options", "millions"), COUNTS)
def test_parameter_counts_are_the_published_ones(vit, name, options, millions):
    with torch.device("meta"):
        method = create(name, meta_clip(vit).visual, frames=8, **options)
    assert round(sum(p.numel() for p in method.parameters()) / 1e6, 3) == millions
    assert all(p.requires_grad for p in method.parameters())


def test_trainable_state_has_the_published_names():
    def names(name, **options):
        return set(build(tiny_clip(), name, frames=4, head="linear", captions=["a"], **options).trainable_state_dict())

    head, blocks = {"fc.weight", "fc.bias"}, [f"transformer.resblocks.{i}" for i in range(3)]
    kinds = ("weight", "bias")
    st = {f"{b}.adapter_pre_mlp.{m}.{k}" for b in blocks for m in ("fc1", "conv", "fc2") for k in kinds}
    assert names("st_adapter") == head | st
    assert names("st_adapter", adapters=2) == head | st | {n.replace("pre_mlp", "pre_attn") for n in st}
    adapters = ("T_Adapter", "S_Adapter", "MLP_Adapter")
    aim = {f"{b}.{a}.{m}.{k}" for b in blocks for a in adapters for m in ("D_fc1", "D_fc2") for k in kinds}
    aim |= {"temporal_embedding", "ln_post.weight", "ln_post.bias"}
    assert names("aim") == head | aim
    assert names("aim", adapters=2) == head | aim | {n.replace("T_Adapter", "T_Adapter_in") for n in aim if "T_Ad" in n}
    assert names("tokshift") == names("frame_mean") == head


def test_initial_values_are_the_published_ones():
    torch.manual_seed(0)
    visual = tiny_clip(width=256, head_width=64).visual
    st = create("st_adapter", visual, frames=4).transformer.resblocks[0].adapter_pre_mlp
    assert not any(p.any() for p in (st.conv.weight, st.conv.bias, st.fc1.bias, st.fc2.bias))
    assert st.fc1.weight.any() and st.fc2.weight.any()
    aim = create("aim", visual, frames=4)
    for adapter in aim.transformer.resblocks[0].values():
        assert not any(p.any() for p in (adapter.D_fc2.weight, adapter.D_fc2.bias, adapter.D_fc1.bias))
        assert adapter.D_fc1.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert not aim.temporal_embedding.any()
    assert torch.equal(aim.ln_post.weight, visual.ln_post.weight) and aim.ln_post.weight is not visual.ln_post.weight
    stds = {"st_adapter": 0.02, "aim": 0.01, "tokshift": 0.0}
    for name, std in stds.items():
        model = build(tiny_clip(), name, frames=4, head="linear", captions=["c"] * 200)
        assert model.head.fc.weight.std().item() == pytest.approx(std, rel=0.05)
        assert not model.head.fc.bias.any()


@pytest.mark.parametrize("name", METHODS)
def test_bfloat16_autocast_stays_close(name, frames):
    model = build(tiny_clip(), name, frames=4, head=None)
    with torch.no_grad():
        expected = F.normalize(model.encode(frames), dim=-1)
        with torch.autocast("cpu", torch.bfloat16):
            out = F.normalize(model.encode(frames).float(), dim=-1)
    assert (out * expected).sum(-1).min() > 0.999
