"""What attends within a frame: PyTorch on strided views, flash-attn on the same, or the image model's own module."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from i2v_kernels.extras import missing
from i2v_models import build, spatial
from i2v_models.spatial import spatial_attention, why_not_flash

from .conftest import tiny_clip


@pytest.fixture
def block(clip_model):
    return clip_model.visual.transformer.resblocks[0].requires_grad_(False).eval()


@pytest.fixture
def flash_attn(monkeypatch):
    """A stand-in for the package, so that what it is given can be seen without a GPU."""
    calls, version = [], {"number": 2}

    def flash_attn_func(q, k, v):
        calls.append((q, k, v))
        out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2).contiguous()
        return (out, None) if version["number"] == 4 else out

    for name in ("flash_attn", "flash_attn.cute"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(flash_attn_func=flash_attn_func))
    monkeypatch.setattr(spatial, "why_not_flash", lambda qkv: None)
    monkeypatch.setattr(spatial, "flash_version", lambda device: version["number"])
    spatial._flash.cache_clear()
    yield SimpleNamespace(calls=calls, version=version)
    spatial._flash.cache_clear()


def same_storage(*tensors):
    return len({x.untyped_storage().data_ptr() for x in tensors}) == 1


def test_sdpa_is_the_module_on_views_of_one_projection(block, monkeypatch):
    x, given = torch.randn(6, 17, 64, requires_grad=True), []
    real = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *qkv: given.append(qkv) or real(*qkv))
    out = spatial_attention(block, x)
    assert len(given) == 1 and same_storage(*given[0])
    monkeypatch.undo()
    want = spatial_attention(block, x, "module")
    torch.testing.assert_close(out, want)
    got, expected = (torch.autograd.grad(y.sum(), x)[0] for y in (out, want))
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("version", [2, 4])
def test_flash_attn_is_given_the_same_views(block, flash_attn, version):
    flash_attn.version["number"] = version
    x = torch.randn(6, 17, 64)
    torch.testing.assert_close(spatial_attention(block, x, "flash"), spatial_attention(block, x, "module"))
    (q, k, v), *rest = flash_attn.calls
    assert not rest and q.shape == (6, 17, 4, 16) and same_storage(q, k, v)


def test_flash_attn_says_why_it_cannot_run(block):
    with pytest.raises(NotImplementedError, match="the tensors are on cpu, flash-attn needs a GPU"):
        spatial_attention(block, torch.randn(2, 17, 64), "flash")

    def on_gpu(dtype, dim=64):
        return SimpleNamespace(device=torch.device("cuda"), dtype=dtype, shape=(2, 17, 3, 4, dim))

    assert "torch.float32" in why_not_flash(on_gpu(torch.float32))
    assert "heads of 20 channels" in why_not_flash(on_gpu(torch.bfloat16, 20))


def test_flash_attn_that_is_not_installed(monkeypatch):
    monkeypatch.setattr(spatial.importlib.util, "find_spec", lambda name: None)
    qkv = SimpleNamespace(device=torch.device("cuda"), dtype=torch.bfloat16, shape=(2, 17, 3, 4, 64))
    assert why_not_flash(qkv) == missing("flash_attn", "spatial='flash'")


def test_modules_that_are_more_than_clips_attention_are_called(block):
    """A hook, as of a LoRA or a profiler, must see its call; attention of another kind has its own formula."""
    x, seen = torch.randn(2, 17, 64), []
    handle = block.attn.register_forward_hook(lambda *args: seen.append(1))
    spatial_attention(block, x)
    assert seen
    handle.remove()
    custom = tiny_clip(qk_norm=True).visual.transformer.resblocks[0].eval()
    assert torch.equal(spatial_attention(custom, x), spatial_attention(custom, x, "module"))


@pytest.mark.parametrize("method", ["frame_mean", "tokshift", "st_adapter", "aim"])
def test_every_method_takes_it(method, clip_model, frames, flash_attn):
    with torch.no_grad():
        outs = []
        for how in ("module", "sdpa", "flash"):
            torch.manual_seed(0)
            outs.append(build(clip_model, method, frames=4, head=None, spatial=how).eval()(frames))
    assert len(flash_attn.calls) == len(clip_model.visual.transformer.resblocks)
    for out in outs[1:]:
        torch.testing.assert_close(out, outs[0])


def test_unknown_names(clip_model):
    with pytest.raises(ValueError, match="spatial='fast' is unknown; there are sdpa, flash, module"):
        build(clip_model, "frame_mean", head=None, spatial="fast")
