"""``patch_embed`` beyond what the registry asks of every op: against the layer it replaces, and what it keeps."""

from __future__ import annotations

import pytest
import torch
from test_correct import compare, needs_extension

import i2v_kernels as i2v
from i2v_kernels import _extension
from i2v_kernels.ops.patch_embed import blocks, digits
from i2v_kernels.ops.patch_embed.fold import centre, rests
from i2v_kernels.testing import Sample
from i2v_kernels.testing.patch_embed import CLIP, INFO

BACKENDS = ["reference", pytest.param("cpu", marks=needs_extension)]
needs_vnni = pytest.mark.skipif(not (_extension.load()[0] and digits.bytes_are_fast()), reason="no exact product of bytes")
WEIGHT, BIAS = INFO.samples()[0].args[1:]


def frames(*shape):
    return torch.randint(0, 256, (*shape, 3), dtype=torch.uint8)


@pytest.mark.parametrize("backend", BACKENDS)
def test_is_the_convolution_of_normalised_frames(backend):
    """Pixel by pixel, with no convolution."""
    video, mean, std = frames(1, 2, 8, 12), torch.tensor(CLIP["mean"]).double(), torch.tensor(CLIP["std"]).double()
    out = i2v.patch_embed(video, WEIGHT, BIAS, **CLIP, backend=backend)
    for t, i, j in ((0, 0, 0), (0, 1, 2), (1, 0, 1)):
        patch = (video[0, t, 4 * i : 4 * i + 4, 4 * j : 4 * j + 4].double() / 255 - mean) / std  # [4, 4, 3]
        want = BIAS + (WEIGHT.permute(0, 2, 3, 1) * patch).sum((1, 2, 3))
        torch.testing.assert_close(out[0, t, 3 * i + j], want)


def test_pixels_are_measured_from_a_pixel():
    """What is left of the mean is at most half a pixel, so that nothing large cancels; exact in 8 significant bits."""
    assert centre([0.0, 0.5, 1.0]) == [0, 128, 255] and centre([-3.0, 2.0, 0.45]) == [0, 255, 115]
    assert all(abs(rest) <= 0.5 / 256 for rest in rests(list(CLIP["mean"])))
    exact = (torch.arange(256.0)[:, None] - torch.arange(256.0)) / 256
    assert all(torch.equal(exact.to(dtype).float(), exact) for dtype in (torch.bfloat16, torch.float16))


@pytest.mark.parametrize("backend", BACKENDS)
def test_keeps_its_arguments_alone(backend):
    video, weight, kept = frames(2, 3, 8, 12), WEIGHT.float().requires_grad_(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()), lambda t: t):
        i2v.patch_embed(video, weight, None, **CLIP, backend=backend)
    assert set(kept) == {video.data_ptr(), weight.data_ptr()}


@needs_extension
@pytest.mark.parametrize("wanted", [(True, False), (False, True)])
def test_gradients_that_are_wanted(wanted):
    video = frames(2, 3, 8, 12)
    results = []
    for backend in ("cpu", "reference"):
        leaves = [t.clone().requires_grad_(want) for t, want in zip((WEIGHT, BIAS), wanted)]
        i2v.patch_embed(video, *leaves, **CLIP, backend=backend).square().sum().backward()
        assert [leaf.grad is not None for leaf in leaves] == list(wanted)
        results += [leaf.grad for leaf in leaves if leaf.grad is not None]
    torch.testing.assert_close(*results)


@needs_extension
@pytest.mark.parametrize("block", [1, 5, 1 << 20])
@pytest.mark.parametrize("layout", ["behind a class token", "sequence first", "clips after frames"])
def test_gradients_that_lie_apart(layout, block, monkeypatch):
    """As models send them; in blocks of a part of a frame, of one frame, of all."""
    monkeypatch.setattr(blocks, "rows_of_a_block", lambda *_: block)
    video, weight, bias = frames(2, 3, 8, 12), WEIGHT.clone().requires_grad_(), BIAS.clone().requires_grad_()
    wide = {
        "behind a class token": torch.randn(2, 3, 7, 10, dtype=torch.float64)[:, :, 1:],
        "sequence first": torch.randn(6, 2, 3, 10, dtype=torch.float64).permute(1, 2, 0, 3),
        "clips after frames": torch.randn(3, 2, 6, 10, dtype=torch.float64).transpose(0, 1),
    }[layout]
    got, want = (
        torch.autograd.grad(i2v.patch_embed(video, weight, bias, **CLIP, backend=backend), (weight, bias), wide)
        for backend in ("cpu", "reference")
    )
    for g, w in zip(got, want):
        torch.testing.assert_close(g, w)


@needs_extension
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bright_frames_and_weights_of_one_sign(dtype):
    """Where product and bias would be large beside their sum, were pixels not measured from the mean."""
    video = torch.randint(110, 121, (2, 3, 32, 32, 3), dtype=torch.uint8)
    weight = WEIGHT.abs().repeat(1, 1, 4, 4)
    compare(INFO, Sample("", (video, weight), CLIP), dtype, "cpu")


@needs_extension
@pytest.mark.parametrize("sample", INFO.samples(), ids=str)
def test_float32_without_the_product_of_bytes(sample, monkeypatch):
    monkeypatch.setattr(digits, "bytes_are_fast", lambda: False)
    compare(INFO, sample, torch.float32, "cpu")


def by_digits(video, weight, bias=None, norm=CLIP):
    """The float32 result from whole numbers, or None where they do not suit."""
    out = blocks.empty_output(video, weight)
    norm = {name: list(map(float, values)) for name, values in norm.items()}
    return out if digits._fill(out.view(-1, len(weight)), video, weight, bias, **norm) else None


@needs_vnni
@pytest.mark.parametrize("side", [2, 7, 16, 32])
@pytest.mark.parametrize("pixels", ["any", "black", "white", "black and white"])
@pytest.mark.parametrize("kind", ["normal", "all alike", "of one sign", "a channel of zeros", "1e-15", "1e15"])
def test_whole_numbers_are_at_least_as_good(side, pixels, kind):
    """As float32 sums; up to the largest sums there can be."""
    torch.manual_seed(0)
    video = {
        "any": frames(1, 2, 64, 64), "black": frames(1, 2, 64, 64) * 0, "white": frames(1, 2, 64, 64) * 0 + 255,
        "black and white": frames(1, 2, 64, 64) // 128 * 255,
    }[pixels][:, :, : 64 // side * side, : 64 // side * side]  # fmt: skip
    weight = torch.randn(20, 3, side, side)
    weight = {
        "normal": weight, "all alike": weight * 0 - 0.3, "of one sign": weight.abs() + 1,
        "1e-15": weight * 1e-15, "1e15": weight * 1e15,
        "a channel of zeros": weight * (torch.arange(20) != 3)[:, None, None, None],
    }[kind]  # fmt: skip
    exact = i2v.patch_embed(video, weight.double(), **CLIP, backend="reference")
    got, floats = by_digits(video, weight), i2v.patch_embed(video, weight, **CLIP, backend="reference")
    error = (got - exact).norm() / exact.norm()
    assert error <= max(1.5 * (floats - exact).norm() / exact.norm(), 2**-23)  # of float32, the last place


@needs_vnni
@pytest.mark.parametrize("value", [1000.0, float("nan"), float("inf"), float("-inf")])
def test_weights_that_do_not_suit_whole_numbers(value):
    """A weight that outweighs its channel would leave too few digits to the others; the float32 product takes them all."""
    video, weight = frames(1, 2, 32, 48), torch.randn(20, 3, 16, 16)
    assert by_digits(video, weight) is not None
    weight[3, 1, 7, 9] = value
    assert by_digits(video, weight) is None
    got, want = (i2v.patch_embed(video, weight, **CLIP, backend=backend) for backend in ("cpu", "reference"))
    assert torch.equal(got.isfinite(), want.isfinite())
    torch.testing.assert_close(*(out.nan_to_num(0, 0, 0) for out in (got, want)), rtol=1e-5, atol=1e-3)
    assert by_digits(video, torch.randn(20, 3, 16, 16) * 1e-30) is None


@needs_vnni
def test_float32_takes_the_product_of_bytes(monkeypatch):
    calls = []
    monkeypatch.setattr(
        torch, "_int_mm", lambda *args, product=torch._int_mm, **rest: calls.append(1) or product(*args, **rest)
    )
    video, weight = frames(1, 2, 32, 48), torch.randn(20, 3, 16, 16)
    i2v.patch_embed(video, weight, **CLIP, backend="cpu")
    assert len(calls) == 1
    i2v.patch_embed(video, weight.bfloat16(), **CLIP, backend="cpu")
    i2v.patch_embed(video, weight.double(), **CLIP, backend="cpu")
    assert len(calls) == 1


@needs_extension
@pytest.mark.parametrize(
    "changes, text",
    [
        ({"weight": torch.zeros(2, 12).double()}, "weight"),
        ({"weight": torch.zeros(2, 24)[:, ::2]}, "weight"),
        ({"weight": torch.zeros(24)}, "weight must be"),
        ({"centre": [1]}, "3 numbers"),
        ({"digits": torch.zeros(5, 12, dtype=torch.int8)}, "digits"),
        ({"digits": torch.zeros(6, 12, dtype=torch.uint8)}, "digits"),
        ({"correction": torch.zeros(3, 1, dtype=torch.int32)}, "correction"),
        ({"scale": torch.zeros(1)}, "scale"),
    ],
)
def test_a_direct_split_stays_within_its_tensors(changes, text):
    good = {"weight": torch.ones(2, 12), "centre": [1, 2, 3], "digits": torch.zeros(6, 12, dtype=torch.int8)}
    good |= {"correction": torch.zeros(3, 2, dtype=torch.int32), "scale": torch.zeros(2)}
    assert torch.ops.i2v_kernels_C.split_weight(**good)
    with pytest.raises(RuntimeError, match=text):
        torch.ops.i2v_kernels_C.split_weight(**{**good, **changes})


@needs_extension
@pytest.mark.parametrize(
    "changes, text",
    [
        ({"out": torch.zeros(4, 3)}, "out|sums"),
        ({"out": torch.zeros(8)}, "out must be"),
        ({"sums": torch.zeros(4, 6)}, "sums"),
        ({"sums": torch.zeros(3, 6, dtype=torch.int32)}, "sums"),
        ({"correction": torch.zeros(2, 2, dtype=torch.int32)}, "correction"),
        ({"scale": torch.zeros(3)}, "scale"),
        ({"bias": torch.zeros(2).double()}, "bias"),
    ],
)
def test_a_direct_join_stays_within_its_tensors(changes, text):
    good = {"sums": torch.ones(4, 6, dtype=torch.int32), "correction": torch.zeros(3, 2, dtype=torch.int32)}
    good |= {"scale": torch.full((2,), 2.0), "bias": torch.ones(2), "out": torch.zeros(4, 2)}
    torch.ops.i2v_kernels_C.join_digits(**good)
    assert (good["out"] == 2 * (65536 + 256 + 1) + 1).all()
    with pytest.raises(RuntimeError, match=text):
        torch.ops.i2v_kernels_C.join_digits(**{**good, **changes})


@needs_extension
@pytest.mark.parametrize(
    "changes, text",
    [
        ({"frames": torch.zeros(1, 2, 8, 12, 3)}, "uint8"),
        ({"frames": frames(1, 2, 8, 12).transpose(3, 4)}, "H, W, 3"),
        ({"centre": [1, 2]}, "3 numbers"),
        ({"patch_height": 3}, "do not divide"),
        ({"patch_width": 0}, "do not divide"),
        ({"rows": torch.zeros(12, 47)}, "rows must be"),
        ({"rows": torch.zeros(13, 48)}, "of 12"),
        ({"first": 1}, "of 12"),
        ({"first": -1}, "of 12"),
    ],
)
def test_a_direct_call_stays_within_its_tensors(changes, text):
    good = {"frames": frames(1, 2, 8, 12), "centre": [1, 2, 3], "patch_height": 4, "patch_width": 4, "first": 0}
    with pytest.raises(RuntimeError, match=text):
        torch.ops.i2v_kernels_C.patch_rows(**{**good, "rows": torch.zeros(12, 48), **changes})
