from __future__ import annotations

import copy

import open_clip
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from i2v_models import build

from .conftest import tiny_clip

METHODS = ["frame_mean", "tokshift", "st_adapter", "aim"]
VITS = {
    "default": {},
    "no_ln_pre": {"no_ln_pre": True},
    "average": {"pool_type": "avg", "pos_embed_type": "sin_cos_2d"},
    "average_then_norm": {"pool_type": "avg", "final_ln_after_pool": True},
    "layer_scale": {"ls_init_value": 0.3},
    "custom_block": {"qk_norm": True, "scale_attn": True, "scale_fc": True, "ls_init_value": 0.3},
    "patch_dropout": {"patch_dropout": 0.5},
    "oblong": {"image_size": (32, 48)},
}


def shake(model: nn.Module) -> None:
    """Random values in every trainable parameter, so that nothing is zero by initialisation."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("vit", VITS)
def test_frames_are_encoded_as_open_clip_encodes_images(vit):
    clip_model = tiny_clip(**VITS[vit])
    height, width = clip_model.visual.image_size
    frames = torch.randint(0, 256, (2, 3, height, width, 3), dtype=torch.uint8)
    with torch.no_grad():
        model = build(clip_model, "frame_mean", head=None, spatial="module", kernels=False).train()
        images = clip_model.encode_image(model.images(frames), normalize=True).view(2, 3, -1).mean(1)
        assert torch.equal(model.encode(frames), images)
        torch.testing.assert_close(build(clip_model, "frame_mean", head=None).encode(frames), images)


@pytest.mark.parametrize("autocast", [False, True])
def test_patches_are_those_of_normalised_frames(autocast, clip_model, frames, monkeypatch):
    """Forward and the gradient of conv1, within what eager's own rounding leaves of them."""
    import i2v_kernels as i2v

    calls, embed = [], i2v.patch_embed
    monkeypatch.setattr(i2v, "patch_embed", lambda *args, **kwargs: calls.append(args) or embed(*args, **kwargs))
    results = []
    for kernels in (True, False):
        model = build(clip_model, "frame_mean", head=None, kernels=kernels, train_backbone=True)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            patches = model.patches(frames)
        weight = clip_model.visual.conv1.weight
        results.append((patches, torch.autograd.grad(patches.float().square().sum(), weight)[0]))
        assert len(calls) == 1  # by the first model alone
    for got, want in zip(*results):
        assert got.dtype == want.dtype and got.shape == want.shape
        assert (got - want).norm() <= (8e-3 if autocast else 1e-6) * want.norm()


@pytest.mark.parametrize("why", ["a hook", "channels apart", "a border that is no patch", "another layer"])
def test_patches_that_the_op_does_not_compute(why, frames):
    clip_model = tiny_clip(image_size=36 if why == "a border that is no patch" else 32)
    size, conv = clip_model.visual.image_size, clip_model.visual.conv1
    frames = torch.nn.functional.pad(frames, (0, 0, 0, size[1] - 32, 0, size[0] - 32))
    model = build(clip_model, "frame_mean", head=None)
    with torch.no_grad():
        want = conv(model.images(frames)).flatten(2).transpose(1, 2)
        called = []
        if why == "a hook":
            conv.register_forward_hook(lambda *_: called.append(1))
        elif why == "channels apart":
            frames = frames.movedim(-1, 2).contiguous().movedim(2, -1)
        elif why == "another layer":
            clip_model.visual.conv1 = nn.Sequential(conv)
            clip_model.visual.conv1.weight = conv.weight
        assert torch.equal(model.patches(frames), want)
        assert len(called) == (why == "a hook")


def test_images_are_normalised_with_the_models_own_mean_and_std(clip_model, frames):
    clip_model.visual.image_mean, clip_model.visual.image_std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    images = build(clip_model, "frame_mean", head=None).images(frames)
    pixel = frames[1, 2, 5, 7].double() / 255
    expected = (pixel - torch.tensor([0.1, 0.2, 0.3])) / torch.tensor([0.4, 0.5, 0.6])
    torch.testing.assert_close(images[1 * 4 + 2, :, 5, 7].double(), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_training_leaves_the_image_model_bit_identical(method, clip_model, frames):
    before = copy.deepcopy(clip_model)
    cls, names = type(clip_model), list(clip_model.state_dict())
    model = build(clip_model, method, frames=4, head="linear", captions=["a", "b"])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
    start = copy.deepcopy(model.trainable_state_dict())
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(model(frames), torch.tensor([0, 1])).backward()
        optimizer.step()
    assert any(not torch.equal(start[name], value) for name, value in model.trainable_state_dict().items())
    assert type(clip_model) is cls and list(clip_model.state_dict()) == names
    for name, value in before.state_dict().items():
        assert torch.equal(value, clip_model.state_dict()[name]), name
    with torch.no_grad():
        images = model.images(frames)
        assert torch.equal(before.eval().visual(images), clip_model.visual(images))


def test_nothing_is_recorded_before_the_first_trainable_module(clip_model, frames):
    model = build(clip_model, "st_adapter", frames=4, head=None)
    for blocks in model.method.transformer.resblocks[:2]:
        blocks.requires_grad_(False)
    recorded = []
    for block in clip_model.visual.transformer.resblocks:
        block.ln_1.register_forward_hook(lambda block, args, out: recorded.append(out.requires_grad))
    assert model.encode(frames).requires_grad
    assert recorded == [False, False, False]  # before each attention; the first trainable module comes later


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("method", ["tokshift", "st_adapter", "aim"])
def test_checkpointing_changes_no_gradient(method, kernels, frames):
    grads = []
    for checkpointing in (False, True):
        options = {"adapters": 2} if method != "tokshift" else {}
        options |= {"kernels": kernels, "checkpointing": checkpointing, "train_backbone": True}
        model = build(tiny_clip(), method, frames=4, head=None, **options)
        shake(model.method)
        model.encode(frames).square().sum().backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    assert "clip.visual.conv1.weight" in grads[0]
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("train_backbone", [False, True])
def test_trainable_state_survives_a_round_trip(method, train_backbone, frames):
    make = {"method": method, "frames": 4, "head": "linear", "captions": ["a", "b"], "train_backbone": train_backbone}
    model, other = build(tiny_clip(0), **make).eval(), build(tiny_clip(0), **make).eval()
    shake(model)
    assert not torch.equal(model(frames), other(frames))
    other.load_trainable_state_dict(model.trainable_state_dict())
    assert torch.equal(model(frames), other(frames))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("train_backbone", [False, True])
def test_what_trains_is_what_is_saved(method, train_backbone):
    model = build(tiny_clip(), method, frames=4, head="linear", captions=["a"], train_backbone=train_backbone)
    trains = {parameter.data_ptr() for parameter in model.parameters() if parameter.requires_grad}
    assert trains == {value.data_ptr() for value in model.trainable_state_dict().values()}


def test_a_state_that_does_not_fit_is_refused_by_name(clip_model):
    model = build(clip_model, "st_adapter", frames=4, head=None, width=16)
    state = model.trainable_state_dict()
    wide = build(tiny_clip(), "st_adapter", frames=4, head=None, width=24).trainable_state_dict()
    with pytest.raises(ValueError, match=r"fc1.weight is \[24, 64\], model has \[16, 64\]"):
        model.load_trainable_state_dict(wide)
    state["more"] = state.pop("transformer.resblocks.0.adapter_pre_mlp.fc1.bias")
    with pytest.raises(ValueError, match=r"more unknown.*fc1.bias missing"):
        model.load_trainable_state_dict(state)


def test_masked_frames_do_not_count(clip_model, frames):
    model = build(clip_model, "frame_mean", head=None)
    mask = torch.tensor([[True, True, False, False], [False] * 4])
    out = model.encode(frames, mask)
    assert torch.allclose(out[0], model.encode(frames[:1, :2])[0], atol=1e-6)
    assert torch.equal(out[1], torch.zeros(32))
    with pytest.raises(ValueError, match="mask is not possible with AIM"):
        build(clip_model, "aim", frames=4, head=None).encode(frames, mask)


def test_text_head_is_clip_similarity_to_captions(clip_model, frames):
    captions = ["a dog jumps", "a cat sleeps", "rain"]
    model = build(clip_model, "frame_mean", captions=captions)
    tokens = open_clip.SimpleTokenizer(context_length=16)(captions)
    with torch.no_grad():
        text = clip_model.encode_text(tokens, normalize=True)
        expected = clip_model.logit_scale.exp() * F.cosine_similarity(model.encode(frames)[:, None], text[None], dim=-1)
        torch.testing.assert_close(model(frames), expected)
    assert model.trainable_state_dict() == {}


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"frames": torch.zeros(1, 2, 32, 32, 3)}, TypeError, "must be uint8, got torch.float32"),
        ({"frames": torch.zeros(1, 2, 30, 32, 3, dtype=torch.uint8)}, ValueError, r"32, 32, 3\], got \[1, 2, 30"),
    ],
)
def test_wrong_frames_are_named(clip_model, change, error, text):
    with pytest.raises(error, match=text):
        build(clip_model, "frame_mean", head=None)(change["frames"])


def test_models_without_such_blocks_are_refused():
    vision = {"layers": [1, 1, 1, 1], "width": 8, "image_size": 32}
    resnet = open_clip.model.CLIP(embed_dim=16, vision_cfg=vision, text_cfg={"width": 32, "heads": 2})
    with pytest.raises(TypeError, match=r"visual.transformer.resblocks.*got ModifiedResNet"):
        build(resnet, "frame_mean", head=None)
    with pytest.raises(TypeError, match="got Linear"):
        build(nn.Linear(2, 2), "frame_mean", head=None)
    with pytest.raises(NotImplementedError, match="must pool by class token or average"):
        build(tiny_clip(attentional_pool=True), "frame_mean", head=None)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"method": "st_adaptor"}, "method='st_adaptor' is unknown; there are frame_mean, tokshift, st_adapter, aim"),
        ({"method": "aim", "depth": 3}, "aim has no option depth; it has adapters, scale, width"),
        ({"method": "aim", "adapters": 3}, "must be 1 or 2, got 3"),
        ({"head": "knn"}, "head='knn' is unknown"),
        ({"head": "text"}, "needs one caption per class"),
    ],
)
def test_unknown_arguments_are_named(clip_model, arguments, text):
    with pytest.raises(ValueError, match=text):
        build(clip_model, **{"head": None, **arguments})


def test_aim_refuses_another_number_of_frames(clip_model, frames):
    with pytest.raises(ValueError, match="built for 8 frames, got 4"):
        build(clip_model, "aim", frames=8, head=None)(frames)
