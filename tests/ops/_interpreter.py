"""The Triton kernels in Triton's interpreter; test_triton_interpreter.py runs this file under TRITON_INTERPRET=1."""

from __future__ import annotations

import importlib

import numpy as np
import pytest
import torch
from test_correct import compare, run, telling
from test_temporal_attention import log_sum_exp
from test_token_shift_in_place import CALLS as IN_PLACE
from test_token_shift_in_place import same_bits_as_out_of_place, takes_what_is_empty, writes_nothing_else
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

import i2v_kernels as i2v
from i2v_kernels.ops import triton_launch
from i2v_kernels.ops.base import OPS
from i2v_kernels.ops.patch_embed import fold
from i2v_kernels.ops.temporal_conv import triton_backward
from i2v_kernels.testing import OPINFOS, Sample
from i2v_kernels.testing.bottleneck_adapter import _parameters as bottleneck
from i2v_kernels.testing.frame_bias import _call as bias_call
from i2v_kernels.testing.opinfo import pixels
from i2v_kernels.testing.patch_embed import CLIP
from i2v_kernels.testing.patch_embed import _parameters as patch_weights


def dot(self, a, b, d, input_precision, max_num_imprecise_acc):
    """The nearest number to the product, the same for ``b.T @ a.T``: numpy sums float32 in another order for either, which
    depends on the processor, and a score that backward computes again would be another number.
    """
    found = np.matmul(a.data.astype(np.float64), b.data.astype(np.float64)) + d.data
    return TensorHandle(found.astype(d.data.dtype), d.dtype.scalar)


InterpreterBuilder.create_dot = dot
INFOS = {info.name: info for info in OPINFOS if any(b.name == "triton" for b in OPS[info.name].backends)}


def randn(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def spoiled(sample, which, value):
    """With one number of q, k or v that is not finite."""
    sample.args[which][0, 2, 1, 1, 3] = value
    return sample


def attention(name, b, t, n, h, d, **options):
    qkv = randn(b, t, n, 3, h, d).unbind(3)
    masks = {"mask": torch.arange(t)[None] % 3 != torch.arange(b)[:, None]} if options.pop("mask", False) else {}
    bias = {"bias": randn(h, t, t, seed=1)} if options.pop("bias", False) else {}
    return Sample(name, qkv, {**masks, **bias, **options})


MORE = {
    "temporal_attention": [
        attention("several query blocks", 1, 40, 1, 1, 24, bias=True, mask=True, causal=True),
        attention("several shares of the bias", 2, 3, 9, 2, 8, bias=True),
        attention("wide heads", 1, 3, 2, 1, 136),
        attention("long, offsets, window", 1, 40, 1, 2, 8, mask=True, offsets=[3, -2], window=(9, 4)),
        spoiled(attention("nan in q, one key sees it", 1, 7, 3, 3, 8, causal=True, offsets=[0, 1, 9]), 0, float("nan")),
        spoiled(attention("nan in q, T19, offsets", 1, 19, 2, 2, 8, window=(3, 1), offsets=[0, -2]), 0, float("nan")),
        spoiled(attention("inf in v, offsets", 2, 5, 2, 2, 8, causal=True, offsets=[-9, -1]), 2, float("inf")),
        attention("D that no 8 divides", 1, 6, 3, 2, 20, bias=True),
        Sample("many to few", (randn(1, 40, 2, 1, 8), *randn(2, 1, 7, 2, 1, 8).unbind(0)), {"bias": randn(1, 40, 7)}),
        Sample("few to many", (randn(2, 5, 2, 1, 8), *randn(2, 2, 36, 2, 1, 8).unbind(0)), {"causal": True}),
    ],
    "bottleneck_adapter": [
        # 160 rows, three blocks of channels, a bottleneck of 128 and 42 columns
        Sample("several tiles", (randn(2, 4, 20, 72), *bottleneck(72, 170)), {"norm": (randn(72), randn(72, seed=1), 1e-5)}),
        Sample("as many columns as a tile", (randn(2, 4, 20, 64), *bottleneck(64, 192)), {"activation": "relu", "scale": 0.5}),
        Sample("256 columns", (randn(1, 3, 30, 40), *bottleneck(40, 256)), {"activation": "silu", "residual": False}),
    ],
    "video_cross_attention": [
        # one query and several, tiles and pieces that end within a frame, blocks of queries
        Sample("pieces of a frame", (randn(1, 2, 1, 16), *randn(2, 1, 2, 300, 1, 16, seed=1).unbind(0))),
        Sample("one query, tiles of a frame", (randn(1, 1, 1, 64), *randn(2, 1, 2, 150, 1, 64, seed=1).unbind(0))),
        Sample("blocks of queries", (randn(1, 70, 2, 16), *randn(2, 1, 2, 40, 2, 16, seed=1).unbind(0)), {"scale": -0.2}),
        Sample("wide heads", (randn(1, 3, 1, 136), *randn(2, 1, 2, 20, 1, 136, seed=1).unbind(0))),
    ],
    "frame_bias": [
        Sample("all keys in a tile of 256", *bias_call(1, 2, (14, 14), 1, 16, 8)),
        Sample("more keys than a tile", *bias_call(1, 2, (17, 16), 1, 16, 8)),
    ],
    "patch_embed": [Sample("a wide tile", (pixels(1, 2, 32, 48), *patch_weights(200, 16, 16)), CLIP)],
    "token_shift": [Sample("several tiles", (randn(1, 3, 5, 520), [(264, 1), (3, -1)]), {"padding": "edge"})],
    "temporal_conv": [
        Sample("looped taps", (randn(1, 5, 6, 3), randn(3, 1, 5, 3, 3), randn(3)), {"grid": (2, 3)}),
        Sample("long clip", (randn(1, 11, 2, 5), randn(5, 1, 3, 1, 1), randn(5))),
        Sample("long clip over a grid", (randn(1, 10, 7, 9), randn(9, 1, 3, 3, 1)), {"grid": (3, 2), "prefix": 1}),
        Sample("seven frames wide", (randn(1, 2, 3, 8), randn(8, 1, 7, 1, 1), randn(8)), {"prefix": 2}),
        Sample("gelu, residual", (randn(2, 5, 3, 8), randn(8, 1, 3, 1, 1), randn(8)), {"activation": "gelu", "residual": True}),
        Sample("nine frames wide", (randn(1, 5, 3, 8), randn(8, 1, 9, 1, 1), randn(8)), {"prefix": 1, "residual": True}),
        Sample("eleven frames wide", (randn(1, 4, 2, 3), randn(3, 1, 11, 1, 1)), {"dilation": 2}),
        Sample("dilated chunks", (randn(1, 19, 2, 3), randn(3, 1, 5, 1, 1), randn(3)), {"dilation": 2, "residual": True}),
        Sample("wide over a grid", (randn(1, 2, 13, 3), randn(3, 1, 1, 5, 5), randn(3)), {"grid": (3, 4), "prefix": 1}),
        Sample(
            "whole columns, a tile of prefix", (randn(1, 2, 13, 192), randn(192, 1, 3, 1, 1)), {"prefix": 9, "residual": True}
        ),
    ],
}
CALLS = [
    pytest.param(info, sample, id=f"{info}-{sample.name}")
    for info in INFOS.values()
    for sample in (*info.samples(), *MORE.get(info.name, ()))
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("info, sample", CALLS)
def test_sample(info, sample, dtype):
    compare(info, sample, dtype, "triton")


@pytest.mark.parametrize("name", INFOS)
def test_again_with_other_values(name):
    """The second call's launches are known from the first: what tensors held then must not matter."""

    for sample in INFOS[name].samples()[:2]:
        compare(INFOS[name], sample, torch.float16, "triton")
        kinds = len(triton_launch.PLANNED)
        again = sample.to()  # where the first lies
        for x in again.tensors():
            x.mul_(-2)
        compare(INFOS[name], again, torch.float16, "triton")
        assert len(triton_launch.PLANNED) == kinds > 0


@pytest.mark.parametrize("info, sample", [c for c in telling(INFOS.values()) if not c.values[1].kwargs.get("residual")])
def test_bfloat16(info, sample):
    """The interpreter's own bfloat16 arithmetic is wrong; the kernels widen what they load. It rounds sums toward zero."""
    compare(info, sample, torch.bfloat16, "triton")


@pytest.mark.parametrize(
    "info, sample", [c for c in CALLS if c.values[0].name in ("temporal_attention", "video_cross_attention")]
)
def test_log_sum_exp(info, sample):
    log_sum_exp(sample, torch.float32, "triton", info)


@pytest.mark.parametrize("dtype, residual", [(torch.float64, False), (torch.float64, True), (torch.bfloat16, False)])
@pytest.mark.parametrize("padding", ["zeros", "edge", "wrap"])
def test_token_shift_in_any_dtype(padding, dtype, residual):
    """But sums in bfloat16, which the interpreter rounds toward zero."""
    sample = Sample("", (randn(1, 4, 2, 24), [(3, 1), (5, -2)]), {"padding": padding, "residual": residual})
    compare(INFOS["token_shift"], sample, dtype, "triton")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("padding", ["zeros", "edge", "wrap"])
@pytest.mark.parametrize("call", IN_PLACE)
def test_token_shift_in_place(call, padding, dtype):
    same_bits_as_out_of_place(call, padding, dtype, "triton")


def test_token_shift_in_place_at_its_limits():
    """Tiles of one load's width, several of them; nothing written beside them; nothing to do; too long a clip."""
    x = randn(1, 1000, 1, 24).float()
    want = i2v.token_shift(x, [(9, 3), (11, -1)], backend="reference")
    assert torch.equal(i2v.token_shift_(x, [(9, 3), (11, -1)], backend="triton"), want)
    writes_nothing_else("triton")
    takes_what_is_empty("triton")
    with pytest.raises(NotImplementedError, match="T=1025: the kernel in place takes at most 1024"):
        i2v.token_shift_(torch.zeros(1, 1025, 1, 4), [(1, 1)], backend="triton")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", ["q", "k", "v", "gradient"])
def test_sequences_of_a_tile_are_apart(place, value):
    """What is not finite in one token's frames changes no bit of another token's result, forward or backward."""
    op = INFOS["temporal_attention"].op

    def results(spoiled):
        tensors = dict(zip(("q", "k", "v", "gradient"), randn(4, 1, 4, 6, 2, 8).float()))
        if spoiled:
            tensors[place][0, 2, 3, 1, 5] = value
        leaves = [tensors[name].requires_grad_() for name in "qkv"]
        out = op(*leaves, backend="triton")
        return [out, *torch.autograd.grad(out, leaves, tensors["gradient"])]

    for clean, spoiled in zip(results(False), results(True)):
        clean[0, :, 3, 1] = spoiled[0, :, 3, 1] = 0
        assert torch.equal(clean, spoiled)


@pytest.mark.parametrize("kernel, options", [((3, 1, 1), {"residual": True}), ((3, 3, 3), {"grid": (1, 19)})])
@pytest.mark.parametrize("programs", [1, 3])
def test_convolution_by_any_number_of_programs(kernel, options, programs, monkeypatch):
    """Each takes several tiles of tokens; their sums are added in one go, or a last part of it."""
    monkeypatch.setattr(triton_backward, "WAVE", programs)
    monkeypatch.setattr(triton_backward, "ADDED", 2)
    monkeypatch.setattr(triton_launch, "PLANNED", {})  # calls of this shape may have been planned with other numbers
    sample = Sample("", (randn(2, 2, 20, 20), randn(20, 1, *kernel), randn(20)), {"prefix": 1, **options})
    compare(INFOS["temporal_conv"], sample, torch.float32, "triton")


@pytest.mark.parametrize(
    "name", ["temporal_attention", "video_cross_attention", "temporal_conv", "bottleneck_adapter", "patch_embed"]
)
def test_double_precision_is_refused(name):
    with pytest.raises(NotImplementedError, match="float64"):
        run(INFOS[name], INFOS[name].samples()[0].to(requires_grad=True), "triton")


class Calls(TorchDispatchMode):
    """The names of PyTorch's operations that a block of code calls."""

    def __enter__(self):
        self.names = []
        return super().__enter__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


def kernels_of(name):
    return importlib.import_module(f"i2v_kernels.ops.{name}.triton_kernels")


def test_patch_embed_in_two_launches(monkeypatch):
    """The weights are folded in every call, so that no change can go unseen, in one launch: PyTorch computes nothing."""
    kernels, launched = kernels_of("patch_embed"), []
    video, (weight, bias) = pixels(1, 2, 8, 12), (t.half() for t in patch_weights(10, 4, 4))
    with monkeypatch.context() as patch, Calls() as calls:
        patch.setattr(kernels, "run", lambda plan, tensors, options: launched.extend(plan(*tensors, *options)))
        kernels.forward(video, weight, bias, list(CLIP["mean"]), list(CLIP["std"]))
    assert [launch.kernel.__name__ for launch in launched] == ["fold_kernel", "patch_embed_kernel"]
    assert {name for name in calls.names if not name.startswith(("empty", "new_empty", "fill"))} == set()
    first = i2v.patch_embed(video, weight, bias, **CLIP, backend="triton")
    weight.data.mul_(2)  # autograd counts no such change
    second = i2v.patch_embed(video, weight, bias, **CLIP, backend="triton")
    torch.testing.assert_close(second - bias, 2 * (first - bias), rtol=2e-3, atol=4e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("side, layout", [(4, torch.contiguous_format), (14, torch.channels_last), (20, torch.channels_last)])
def test_patch_embed_folds_as_pytorch_does(side, layout, bias, dtype):
    kernels, (weight, vector) = kernels_of("patch_embed"), patch_weights(6, side, side)
    weight, mean, std = weight.to(dtype).contiguous(memory_format=layout), list(CLIP["mean"]), list(CLIP["std"])
    vector = vector.to(dtype) if bias else None
    (matrix, got), (want, shift) = kernels.fold(weight, vector, mean, std), fold.fold(weight, vector, mean, std)
    assert torch.equal(matrix, want)
    torch.testing.assert_close(got, shift, rtol=1e-5, atol=1e-6)
    product, sums = torch.randn(6, want.shape[1]), torch.randn(6)
    got, want = (module.unfold(product, sums, weight, mean, std) for module in (kernels, fold))
    assert got.stride() == want.stride()
    torch.testing.assert_close(got, want, rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_tiles_of_token_shift_leave_few_lanes_idle():
    tile = kernels_of("token_shift").tile
    widths = {384: (32, 128), 760: (16, 256), 768: (16, 256), 1024: (8, 512), 1280: (16, 256)}
    assert {channels: tile(197, channels, 2) for channels in widths} == widths
    assert tile(5, 24, 4) == (8, 32) and tile(1, 1, 2) == (1, 1)
