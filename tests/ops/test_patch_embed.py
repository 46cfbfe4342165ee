"""``patch_embed`` beyond what the registry asks of every op: against the layer it replaces, and what it keeps."""

from __future__ import annotations

import pytest
import torch
from test_correct import compare, needs_extension

import i2v_kernels as i2v
from i2v_kernels.ops.patch_embed import blocks
from i2v_kernels.ops.patch_embed.fold import centre, rests
from i2v_kernels.testing import Sample
from i2v_kernels.testing.patch_embed import CLIP, INFO

BACKENDS = ["reference", pytest.param("cpu", marks=needs_extension)]
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
