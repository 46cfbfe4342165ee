"""What transformers and the hub's ``kernels`` offer themselves: an attention implementation, and stateless layers."""

from __future__ import annotations

import copy
import doctest
from typing import Any

import pytest
import torch
from architectures import timesformer, xclip
from published import AIMAdapter, STAdapter, TemporalShift
from torch import Tensor, nn

import i2v_kernels as i2v
from i2v_kernels.patching import layers, seams

transformers = pytest.importorskip("transformers")


def counted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes with which the op is called."""
    shapes: list[tuple[int, ...]] = []

    def op(q: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        shapes.append(tuple(q.shape))
        return i2v.temporal_attention(q, *args, **kwargs)

    monkeypatch.setattr(seams, "temporal_attention", op)
    monkeypatch.setattr(seams, "MANY", 0)
    return shapes


@pytest.mark.parametrize("name", ["vivit", "xclip", "text"])
def test_attention_implementation(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Short rows by the op, the rest and masks by sdpa: the outputs of "eager" in either case."""
    torch.manual_seed(0)
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    if name == "vivit":
        config = transformers.VivitConfig(image_size=32, num_frames=4, tubelet_size=[2, 8, 8], **small)
        kind, inputs = transformers.VivitModel, {"pixel_values": torch.randn(2, 4, 3, 32, 32)}
    elif name == "xclip":
        config = transformers.XCLIPVisionConfig(image_size=80, patch_size=8, num_frames=4, **small)
        kind, inputs = transformers.XCLIPVisionModel, {"pixel_values": torch.randn(8, 3, 80, 80)}
    else:
        config = transformers.CLIPTextConfig(vocab_size=50, max_position_embeddings=16, **small)
        mask = torch.ones(2, 9, dtype=torch.int64)
        mask[1, 6:] = 0
        kind, inputs = transformers.CLIPTextModel, {"input_ids": torch.randint(0, 49, (2, 9)), "attention_mask": mask}
    eager = kind._from_config(copy.deepcopy(config), attn_implementation="eager").eval()
    ours = kind._from_config(copy.deepcopy(config), attn_implementation=i2v.register_attention()).eval()
    ours.load_state_dict(eager.state_dict())
    shapes = counted(monkeypatch)
    results = []
    for model in (eager, ours):
        out = model(**inputs).last_hidden_state
        out.square().mean().backward()
        results.append([out, *(p.grad for p in model.parameters() if p.grad is not None)])
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)
    # vivit: 1 + 2 * 16 tokens; xclip: messages of 4 frames, while 102 tokens a frame are too many; text: a mask
    assert set(shapes) == {"vivit": {(2, 33, 1, 2, 16)}, "xclip": {(2, 4, 1, 2, 16)}, "text": set()}[name]


def test_attention_function_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores' scale, causality and grouped heads as sdpa's function takes them."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    shapes = counted(monkeypatch)
    module = nn.Module()
    q, k, v = torch.randn(3, 6, 4, 8, 16)
    for options in ({}, {"is_causal": False}, {"scaling": 0.3, "is_causal": True}):
        got, weights = seams.attention_forward(module, q, k, v, None, **options)
        want, _ = sdpa_attention_forward(module, q, k, v, None, **options)
        assert weights is None
        torch.testing.assert_close(got, want)
    assert len(shapes) == 3
    module.num_key_value_groups = 2
    got, _ = seams.attention_forward(module, q, k[:, :2], v[:, :2], None)
    torch.testing.assert_close(got, sdpa_attention_forward(module, q, k[:, :2], v[:, :2], None)[0])
    assert len(shapes) == 3  # fewer heads of keys: not the op's
    monkeypatch.setattr(seams, "MANY", q.numel() + 1)
    seams.attention_forward(nn.Module(), q, k, v, None)
    assert len(shapes) == 3  # and not so few numbers


def modules() -> dict[str, tuple[nn.Module, tuple[Any, ...]]]:
    """One for each layer, with inputs."""
    torch.manual_seed(0)
    conv = nn.Conv3d(8, 8, (3, 1, 1), padding=(1, 0, 0), groups=8)
    model, _ = timesformer()
    clip, _ = xclip()
    aim, st = AIMAdapter(16), STAdapter(16, 8)
    for p in (*aim.parameters(), *st.parameters()):
        nn.init.normal_(p, std=0.3)
    return {
        "AIMAdapter": (aim, (torch.randn(2, 5, 16),)),
        "DepthwiseConv3d": (conv, (torch.randn(2, 8, 4, 3, 3),)),
        "QuickGELUMLP": (clip.encoder.layers[0].mlp, (torch.randn(2, 5, 48),)),
        "STAdapter": (st, (torch.randn(8, 10, 16), 4)),
        "TemporalShift": (TemporalShift(nn.Conv2d(16, 8, 1), 4), (torch.randn(8, 16, 3, 3),)),
        "TimesformerLayer": (model.encoder.layer[0], (torch.randn(2, 65, 48),)),
    }


@pytest.mark.parametrize("name", layers.__all__)
def test_layers_for_the_hubs_kernels(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = pytest.importorskip("kernels")
    module, inputs = modules()[name]

    def call() -> Tensor:
        out = module(*(x.clone() if isinstance(x, Tensor) else x for x in inputs))
        return out[0] if isinstance(out, tuple) else out

    expected = call()
    for mark in ("kernel_layer_name", "kernel_condition"):  # which is how a class takes part; others keep theirs as it is
        monkeypatch.setattr(type(module), mark, None, raising=False)
    kernels.replace_kernel_forward_from_hub(type(module), name)
    mode = kernels.Mode.TRAINING | kernels.Mode.TORCH_COMPILE
    with kernels.use_kernel_mapping(i2v.kernel_mapping(), inherit_mapping=False):
        kernels.kernelize(module, mode=mode, device="cpu", use_fallback=False)
    assert "forward" in vars(module)
    torch.testing.assert_close(call(), expected, rtol=1e-4, atol=1e-5)
    call().square().mean().backward()
    assert all(p.grad is not None for p in module.parameters())
    torch._dynamo.reset()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    out = compiled(*inputs)
    torch.testing.assert_close(out[0] if isinstance(out, tuple) else out, expected, rtol=1e-4, atol=1e-5)


def test_examples() -> None:
    pytest.importorskip("kernels")
    assert doctest.testmod(seams).failed == 0
