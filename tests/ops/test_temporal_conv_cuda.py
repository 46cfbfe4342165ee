"""What the threads of temporal_conv's CUDA kernels compute, over the whole grid, against the definition.

Run on the CPU by the kernels' emulation, and by the kernels themselves where there is a GPU.
"""

from __future__ import annotations

import pytest
import torch
from emulation import device_fixture
from test_correct import compare

from i2v_kernels import _extension
from i2v_kernels.ops.temporal_conv import cuda
from i2v_kernels.testing import OPINFOS, Sample

pytestmark = pytest.mark.skipif(_extension.why_no_cpu() is not None, reason=str(_extension.why_no_cpu()))
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
INFO = next(info for info in OPINFOS if info.name == "temporal_conv")

device = device_fixture("temporal_conv", lambda *args: cuda.limits(*args[:2]))


def randn(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def call(name, b, t, n, c, kernel, bias=True, **options):
    return Sample(name, (randn(b, t, n, c), randn(c, 1, *kernel, seed=1), *([randn(c, seed=2)] if bias else [])), options)


SAMPLES = [
    *INFO.samples(),
    call("several chunks of frames", 2, 19, 3, 32, (3, 1, 1)),
    call("dilated chunks", 1, 23, 3, 32, (5, 1, 1), dilation=2),
    call("7 frames over a grid", 1, 11, 13, 16, (7, 3, 3), grid=(3, 4), prefix=1, dilation=3, activation="gelu"),
    call("gelu, residual", 2, 9, 5, 32, (3, 1, 1), prefix=2, activation="gelu", residual=True),
    call("quick_gelu, no bias", 1, 5, 7, 16, (3, 3, 3), False, grid=(2, 3), prefix=1, activation="quick_gelu"),
    call("relu, odd channels", 1, 6, 4, 13, (3, 1, 1), activation="relu", residual=True),
    call("silu, grid alone", 2, 4, 6, 8, (1, 3, 3), grid=(2, 3), activation="silu"),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sample", [pytest.param(sample, id=sample.name) for sample in SAMPLES])
def test_matches_the_definition(sample, dtype, device):
    compare(INFO, sample.to(device=device), dtype, "cuda")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("first", "gap"), [(0, 0), (8, 0), (1, 0), (0, 8), (0, 3)])
def test_any_address_and_stride(first, gap, dtype, device):
    """Rows that begin at multiples of 16 bytes are read by 16 bytes, others by elements."""
    wide = randn(2, 5, 4, first + 16 + gap)
    sample = Sample("", (wide[..., first : first + 16], randn(16, 1, 3, 1, 1), randn(16)), {"residual": True})
    compare(INFO, sample.to(device=device), dtype, "cuda")


@pytest.mark.parametrize("threads", [1, 100, 1 << 20])
def test_weight_gradient_by_any_number_of_shares(threads, device, monkeypatch):
    monkeypatch.setattr(cuda, "THREADS", threads)
    sample = call("", 2, 6, 13, 24, (3, 3, 1), grid=(3, 4), prefix=1)
    compare(INFO, sample.to(device=device), torch.float16, "cuda")


def test_a_frame_that_is_not_finite_reaches_its_neighbours_alone(device):
    x, weight = randn(1, 9, 3, 8).float().to(device), randn(8, 1, 3, 1, 1).float().to(device)
    clean = INFO.op(x, weight, backend="cuda")
    x[0, 4, 1, 3] = float("nan")
    spoiled = INFO.op(x, weight, backend="cuda")
    assert spoiled.isnan().nonzero().tolist() == [[0, t, 1, 3] for t in (3, 4, 5)]
    assert torch.equal(spoiled.nan_to_num(), torch.where(spoiled.isnan(), 0, clean))


def test_says_what_it_does_not_take(device):
    for sample, text in (
        (call("", 1, 3, 2, 8, (3, 1, 1)), "float64"),
        (call("", 1, 3, 2, 8, (9, 1, 1)).to(torch.float32), "kt=9: the kernels reach over at most 7 frames"),
    ):
        placed = sample.to(sample.args[0].dtype, device)
        with pytest.raises(NotImplementedError, match=text):
            INFO.op(*placed.args, backend="cuda")


@pytest.mark.parametrize(
    ("change", "text"),
    (
        ({"kernel": [3, 3]}, "three sizes"),
        ({"kernel": [2, 1, 1]}, "kernel size 2 is even"),
        ({"kernel": [9, 1, 1]}, "at most 7 frames"),
        ({"kernel": [5, 1, 1]}, "weight must be contiguous with 40 elements"),
        ({"height": 2}, "is not N"),
        ({"dilation": 0}, "dilation 0 is below 1"),
        ({"activation": "tanh"}, "activation 'tanh' is unknown"),
        ({"gradient": True}, "no gradient is given"),
        ({"out": torch.empty(1, 3, 2, 9)}, "size 9 of dimension 3 is not 8"),
    ),
)
def test_the_compiled_op_refuses(change, text, device):
    x = torch.randn(1, 3, 2, 8)
    arguments = {"x": x, "weight": torch.randn(3, 8), "bias": None, "extra": None, "out": torch.empty_like(x)}
    arguments |= {"kernel": [3, 1, 1], "height": 1, "width": 2, "prefix": 0, "copy_prefix": False, "dilation": 1}
    arguments |= {"activation": "", "gradient": False, **change}
    placed = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    with pytest.raises(RuntimeError, match=text):
        torch.ops.i2v_kernels_C.temporal_conv(**placed)
