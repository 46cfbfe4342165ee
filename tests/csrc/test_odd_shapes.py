"""Sizes around every unrolling and vector width of the CPU kernels. ``test_sanitizers.py`` runs them once more."""

from __future__ import annotations

import itertools
from functools import partial

import pytest
import torch

import i2v_kernels as i2v
from i2v_kernels import _extension

EXTENSION, WHY_NOT = _extension.load()
ISAS = EXTENSION.build_info()["instruction_sets"] if EXTENSION else []
LIMITS = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 1.5e-2, torch.float16: 2e-3}
pytestmark = pytest.mark.skipif(EXTENSION is None, reason=str(WHY_NOT))


def kernels():
    """Each instruction set in turn, with each dtype; avx512 and avx512_bf16 are one code but for bfloat16."""
    for isa, dtype in itertools.product(ISAS, LIMITS):
        if isa != "avx512" or "avx512_bf16" not in ISAS or dtype == torch.bfloat16:
            EXTENSION.use_instruction_set(isa)
            yield isa, dtype


@pytest.fixture(autouse=True)
def _instruction_set():
    yield
    EXTENSION.use_instruction_set(ISAS[-1])


def results(op, tensors, kwargs, dtype, backend):
    leaves = [t.detach().to(dtype).requires_grad_() for t in tensors]
    kwargs = {k: v.to(dtype) if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in kwargs.items()}
    out = op(*leaves, **kwargs, backend=backend)
    grad = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(dtype)
    return [out, *torch.autograd.grad(out, leaves, grad)]


def check(op, tensors, kwargs):
    wanted = results(op, tensors, kwargs, torch.float64, "reference")
    for isa, dtype in kernels():
        for got, want in zip(results(op, tensors, kwargs, dtype, "cpu"), wanted):
            assert (got.double() - want).norm() <= LIMITS[dtype] * want.norm() + 1e-9, (isa, dtype, kwargs)


def test_temporal_attention():
    torch.manual_seed(0)
    for frames, dim, heads in (
        (1, 8, 1),
        (2, 1, 1),
        (3, 7, 2),
        (5, 40, 3),
        (9, 33, 2),
        (12, 16, 5),
        (16, 65, 1),
        (17, 8, 3),
    ):
        q, k, v = torch.randn(3, 2, frames, 3, heads, dim).unbind(0)
        mask = torch.rand(2, frames) > 0.3
        mask[0] = False
        bias = torch.randn(heads, frames, frames)
        for kwargs in (
            {},
            {"causal": True},
            {"mask": mask},
            {"bias": bias, "mask": mask, "causal": True, "scale": 0.3},
        ):
            check(i2v.temporal_attention, (q, k, v), kwargs)


def test_temporal_attention_at_its_limits():
    q, k, v = torch.randn(3, 1, 128, 1, 1, 256).unbind(0)
    check(i2v.temporal_attention, (q, k, v), {"causal": True})


def test_video_cross_attention():
    torch.manual_seed(0)
    for queries, frames, tokens, heads, dim in (
        (1, 1, 1, 1, 8),
        (1, 3, 5, 12, 64),
        (2, 2, 17, 3, 7),
        (3, 1, 40, 2, 33),
        (5, 4, 16, 5, 16),
        (1, 8, 197, 2, 65),
    ):
        q, (k, v) = torch.randn(2, queries, heads, dim), torch.randn(2, 2, frames, tokens, heads, dim).unbind(0)
        mask = torch.rand(2, frames) > 0.3
        mask[0] = False
        for kwargs in ({}, {"mask": mask, "scale": 0.3}):
            check(i2v.video_cross_attention, (q, k, v), kwargs)


def test_masked_mean():
    torch.manual_seed(0)
    for channels in (0, 1, 3, 7, 16, 33, 64, 95, 130):
        x, mask = torch.randn(2, 3, 5, channels)[:, ::2].flatten(0, 1), torch.rand(4, 5) > 0.4
        mask[2] = False
        for normalize in (False, True):
            for kwargs in ({}, {"mask": mask}):
                # of one channel the mean is one of signs, perhaps of as many of either
                check(i2v.masked_mean, (x,), {**kwargs, "normalize": normalize and channels != 1})


def test_late_interaction():
    """Tokens that end within a vector, or take several; masks that leave none; products that 16 bits hold, many equal."""
    torch.manual_seed(0)
    for rows, columns, channels in ((1, 1, 1), (3, 17, 5), (5, 33, 16), (33, 7, 70), (2, 300, 9), (260, 3, 20), (4, 16, 130)):
        text, video = torch.randint(-1, 2, (3, rows, channels)), torch.randint(-1, 2, (columns, 5, channels)).transpose(0, 1)
        masks = {"text_mask": torch.rand(3, rows) > 0.4, "video_mask": torch.rand(5, columns) > 0.4}
        masks["video_mask"][2] = False
        for kwargs in ({}, masks, {**masks, "masked": "zero"}, {**masks, "mode": "maxsim"}):
            check(i2v.late_interaction, (text.double(), video.double()), kwargs)


def test_token_shift():
    torch.manual_seed(0)
    groupings = ([(4, 1), (4, -1)], [(3, -2), (1, 20), (28, -20)], [(1, 2**62), (1, -(2**62))])
    for padding, tokens, groups in itertools.product(("zeros", "edge", "wrap"), (None, (1, 4), (0, 5, 2)), groupings):
        for frames, residual in itertools.product((1, 2, 8), (False, True)):
            x, kwargs = torch.randn(2, frames, 5, 33), {"groups": groups, "padding": padding, "tokens": tokens}
            check(i2v.token_shift, (x,), {**kwargs, "residual": residual})
            for _, dtype in kernels():
                want = i2v.token_shift(x.to(dtype), **kwargs)
                assert torch.equal(i2v.token_shift_(x.to(dtype), **kwargs, backend="cpu"), want)


def test_temporal_conv():
    torch.manual_seed(0)
    kernels = ((1, 1, 1), (3, 1, 1), (5, 1, 1), (7, 1, 1), (3, 3, 3), (3, 5, 1))
    for kernel, frames, channels in itertools.product(kernels, (1, 4), (1, 7, 65, 130)):
        mode = ("zero", "copy")[frames == 4]
        tensors = (torch.randn(2, frames, 13, channels), torch.randn(channels, 1, *kernel), torch.randn(channels))
        check(i2v.temporal_conv, tensors, {"grid": (3, 4), "prefix": 1, "prefix_mode": mode})


@pytest.mark.parametrize("activation", [None, "gelu", "quick_gelu", "silu"])  # relu has a step where rounding decides
def test_temporal_conv_activation_residual_dilation(activation):
    torch.manual_seed(0)
    for kt, channels, dilation in itertools.product((3, 5, 7), (7, 65, 130), (1, 2)):
        tensors = (torch.randn(2, 6, 5, channels), torch.randn(channels, 1, kt, 1, 1), torch.randn(channels))
        options = {"prefix": 1, "activation": activation, "residual": kt != 5, "dilation": dilation}
        check(i2v.temporal_conv, tensors, options)


@pytest.mark.parametrize("kernel", [(1, 3, 3), (3, 3, 3), (1, 5, 5), (5, 5, 5)], ids=str)
def test_temporal_conv_by_columns(kernel):
    """Rows around every block of columns, channels around every vector and cache line, and grids smaller than the kernel."""
    torch.manual_seed(0)
    sizes = itertools.cycle(itertools.product((1, 2, 3, 7), (16, 17, 33, 79), (1, 2, 5)))
    options = itertools.cycle(
        (
            {},
            {"prefix": 2, "prefix_mode": "copy"},
            {"prefix": 1, "dilation": 2, "residual": True},
            {"prefix": 1, "activation": "gelu"},
            {"activation": "silu", "residual": True, "dilation": 3},
        )
    )
    for width in (*range(3, 17), 19):
        for _ in range(3):
            (height, channels, frames), kwargs = next(sizes), next(options)
            x = torch.randn(2, frames, kwargs.get("prefix", 0) + height * width, channels)
            tensors = (x, torch.randn(channels, 1, *kernel), torch.randn(channels))
            check(i2v.temporal_conv, tensors, {"grid": (height, width), **kwargs})


def test_temporal_conv_by_columns_of_strided_tensors():
    torch.manual_seed(0)
    x, weight = torch.randn(4, 2, 30, 40), torch.randn(3, 3, 3, 1, 70)
    for isa, dtype in kernels():
        x_of = x.to(dtype).transpose(0, 1)[:, :, 1:29, 2:37]
        weight_of = weight.to(dtype).permute(4, 3, 2, 0, 1)[::2]
        got = i2v.temporal_conv(x_of, weight_of, grid=(4, 7), backend="cpu").double()
        want = i2v.temporal_conv(x_of.double(), weight_of.double(), grid=(4, 7), backend="reference")
        assert (got - want).norm() <= LIMITS[dtype] * want.norm(), (isa, dtype)


@pytest.mark.parametrize("kernel", [(1, 3, 3), (3, 3, 3), (5, 5, 5), (3, 1, 1)], ids=str)
def test_temporal_conv_of_what_is_not_finite(kernel):
    """Infinity and NaN reach the outputs that they belong to, and no padding or other frame."""
    torch.manual_seed(0)
    x, weight = torch.randn(2, 6, 63, 35), torch.randn(35, 1, *kernel)
    x[0, 2, 0, 3] = x[1, 5, 62, 34] = torch.inf
    x[0, 4, 31, 0] = torch.nan
    for isa, dtype in kernels():
        got = i2v.temporal_conv(x.to(dtype), weight.to(dtype), grid=(7, 9), backend="cpu").double()
        want = i2v.temporal_conv(x.to(dtype).double(), weight.to(dtype).double(), grid=(7, 9), backend="reference")
        assert torch.equal(got.isnan(), want.isnan()) and torch.equal(got.isinf(), want.isinf()), (isa, dtype)
        finite = want.isfinite()
        assert (got - want)[finite].norm() <= LIMITS[dtype] * want[finite].norm(), (isa, dtype)


def test_temporal_conv_at_its_limits():
    tensors = (torch.randn(1, 4, 12, 17), torch.randn(17, 1, 7, 7, 7), torch.randn(17))
    check(i2v.temporal_conv, tensors, {"grid": (3, 4)})


def test_patch_embed():
    """Runs of 3 to 105 bytes, of frames whose last byte is the memory's last."""
    torch.manual_seed(0)
    for height, width in ((1, 1), (2, 3), (3, 5), (1, 11), (2, 16), (1, 35)):
        frames = torch.randint(0, 256, (2, 1, 2 * height, 3 * width, 3), dtype=torch.uint8)
        for video in (frames, frames[:, :, :, : 2 * width], frames.transpose(0, 1)):
            op = partial(embedded, video)
            check(op, (torch.randn(5, 3, height, width), torch.randn(5)), {})


def embedded(frames, weight, bias, backend):
    return i2v.patch_embed(frames, weight, bias, mean=(0.48, 0.46, 0.41), std=(0.27, 0.26, 0.28), backend=backend)
