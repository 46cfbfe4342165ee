"""What is particular to video_cross_attention: log-sum-exps, the route for many queries, gradients that nobody wants."""

from __future__ import annotations

import pytest
import torch
from test_correct import ISAS, compare, isa, needs_extension, run  # noqa: F401  (a fixture)
from test_temporal_attention import log_sum_exp

import i2v_kernels as i2v
from i2v_kernels.ops.base import OPS
from i2v_kernels.ops.video_cross_attention import sdpa
from i2v_kernels.testing import OPINFOS, Sample
from i2v_kernels.testing.opinfo import sequence_first

INFO = next(info for info in OPINFOS if info.name == "video_cross_attention")
SAMPLES = [pytest.param(sample, id=sample.name) for sample in INFO.samples()]
NOT_TAME = ("nan in q", "nan in a frame that is not valid", "inf in k", "large scores")


def qkv(b, q, t, n, h, d, dtype=torch.float32):
    return torch.randn(b, q, h, d, dtype=dtype), *torch.randn(2, b, t, n, h, d, dtype=dtype).unbind(0)


@needs_extension
@pytest.mark.parametrize("isa", ISAS, indirect=True)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sample", SAMPLES)
def test_log_sum_exp(sample, dtype, isa):  # noqa: F811
    log_sum_exp(sample, dtype, "cpu", INFO)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sample", [p for p in SAMPLES if p.id not in NOT_TAME])
def test_sdpa(sample, dtype):
    compare(INFO, sample, dtype, "sdpa")
    if dtype != torch.bfloat16:  # where PyTorch's own is not as near
        log_sum_exp(sample, dtype, "sdpa", INFO)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("lay", [lambda x: x, sequence_first], ids=["clips are views", "frames are views"])
def test_many_queries_take_the_route_through_sdpa(lay, masked):
    """Of clips whose frames do not follow each other in memory it runs frame after frame."""
    q, k, v = qkv(2, sdpa.MANY // 8, 3, 7, 2, 16, torch.float64)
    k, v = lay(k), lay(v)
    mask = torch.tensor([[True, False, True], [False] * 3]) if masked else None
    assert len(sdpa._parts(k, v)) == (1 if lay(k) is k else 3)
    assert i2v.explain(i2v.video_cross_attention, q, k, v).backend == "sdpa"
    assert i2v.explain(i2v.video_cross_attention, q[:, :1], k, v).backend == OPS[INFO.name].first_choice("cpu")
    compare(INFO, Sample("", (q, k, v), {"mask": mask}), torch.float32, "sdpa")


@pytest.mark.parametrize("backend", ["reference", "sdpa", pytest.param("cpu", marks=needs_extension)])
def test_parts_of_the_keys_join_by_their_log_sum_exps(backend):
    q, k, v = qkv(2, 3, 5, 4, 2, 16)
    q.requires_grad_()
    parts = (slice(2), slice(2, 5))
    out, lse = zip(*(i2v.video_cross_attention(q, k[:, p], v[:, p], return_lse=True, backend=backend) for p in parts))
    assert not any(x.requires_grad for x in lse)
    share = torch.stack(lse).softmax(0)[..., None]
    torch.testing.assert_close(share[0] * out[0] + share[1] * out[1], i2v.video_cross_attention(q, k, v, backend=backend))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", ["sdpa", pytest.param("cpu", marks=needs_extension)])
def test_one_key(backend, dtype):
    """Its weight is one, whatever q and k are: their gradients cancel, on the CPU to the last bit."""
    sample = Sample("", qkv(2, 3, 1, 1, 2, 20, torch.float64)).to(dtype, requires_grad=True)
    out, *gradients = run(INFO, sample, backend)
    want, *exact = run(INFO, sample, "reference")
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(gradients[2], exact[2])
    for got, zero in zip(gradients[:2], exact[:2]):
        assert not zero.any() and got.stride() == zero.stride()
        bound = 0 if backend == "cpu" else 8 * torch.finfo(dtype).eps * exact[2].abs().max()
        assert got.abs().max() <= bound


@pytest.mark.parametrize("backend", ["reference", "sdpa", pytest.param("cpu", marks=needs_extension)])
@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2)])
def test_gradients_that_nobody_wants(wanted, backend):
    """Of frozen features none is made."""
    tensors = qkv(2, 2, 3, 5, 2, 16)
    grad = torch.randn_like(tensors[0])

    def gradients(which):
        leaves = [x.detach().requires_grad_(i in which) for i, x in enumerate(tensors)]
        out = i2v.video_cross_attention(*leaves, backend=backend)
        return torch.autograd.grad(out, [leaves[i] for i in which], grad)

    for got, want in zip(gradients(wanted), [gradients((0, 1, 2))[i] for i in wanted], strict=True):
        assert torch.equal(got, want)


@needs_extension
@pytest.mark.parametrize("clips", [1, 3, 100])
def test_pieces_of_a_long_clip(clips):
    """One clip is cut in many pieces, of many clips none is; pieces end within a block of rows and within a frame."""
    compare(INFO, Sample("", qkv(clips, 1, 9, 71, 2, 64, torch.float64)), torch.float32, "cpu")


@needs_extension
def test_keys_are_not_copied():
    """Sequence-first keys are read where they lie: a call needs far less memory than they take."""
    from bench.memory import peak

    q, k, v = qkv(1, 1, 8, 197, 12, 64)
    k, v = (x.permute(2, 0, 1, 3, 4).contiguous().permute(1, 2, 0, 3, 4) for x in (k, v))
    assert peak(lambda: i2v.video_cross_attention(q, k, v), "cpu") < k.numel() * 4 / 2**20 / 20
