"""text_conditioned_pool and text_conditioned_similarity: X-Pool's own formulas, blocks, vectors of zeros, memory."""

from __future__ import annotations

import pytest
import torch

import i2v_kernels as i2v
from bench import peers
from bench.memory import peak
from i2v_kernels.ops import products
from i2v_kernels.ops.text_conditioned_similarity import blocks
from i2v_kernels.testing.text_conditioned_pool import call, mask_of


def drawn(*sizes):
    text, k, v = (x.requires_grad_() for x in call(*sizes))
    return text, k, v, torch.randn(len(text), v.shape[2], dtype=torch.float64).requires_grad_()


@pytest.mark.parametrize("target", [False, True])
@pytest.mark.parametrize("way", ["published", "sdpa"])
def test_is_what_is_published(way, target):
    tensors = drawn(7, 5, 6, 24)[: 4 if target else 3]
    name = "text_conditioned_similarity" if target else "text_conditioned_pool"
    got = i2v.text_conditioned_pool(*tensors[:3], target=tensors[3] if target else None)
    # which rounds to float32
    pooled = getattr(peers, f"pool_{way}")(*tensors[:3])
    want = torch.cosine_similarity(tensors[3][:, None], pooled.transpose(0, 1), dim=-1) if target else pooled
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(peers.PEERS[name][way](*tensors).double(), want, atol=1e-7, rtol=1e-6)
    grad = torch.randn_like(want)
    for one, other in zip(torch.autograd.grad(got, tensors, grad), torch.autograd.grad(want, tensors, grad)):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("op", [i2v.text_conditioned_pool, i2v.text_conditioned_similarity])
def test_results_are_the_same_in_blocks(op, monkeypatch):
    tensors = drawn(11, 5, 6, 24)[: 4 if op is i2v.text_conditioned_similarity else 3]
    mask, found = mask_of(5, 6), []
    for block, texts in ((2 << 20, 4096), (1, 4), (2 * 11 * 6 * 4, 11)):
        monkeypatch.setitem(products.BLOCK, "cpu", block)
        monkeypatch.setattr(blocks, "TEXTS", texts)
        out = op(*tensors, mask=mask)
        found.append([out, *torch.autograd.grad(out, tensors, torch.linspace(-1, 1, out.numel()).view(out.shape).to(out))])
    for others in found[1:]:
        for one, other in zip(found[0], others):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("backend", ["reference", "library"])
def test_zeros_are_like_nothing_and_get_no_gradient(backend):
    text, k, v, target = drawn(4, 5, 3, 8)
    v, target, mask = v.detach().clone(), target.detach().clone(), torch.ones(5, 3, dtype=torch.bool)
    v[2], target[1], mask[4] = 0, 0, False
    inputs = text, k, v.requires_grad_(), target.requires_grad_()
    out = i2v.text_conditioned_similarity(*inputs, mask=mask, backend=backend)
    zero = torch.zeros(4, 5, dtype=torch.bool)
    zero[1] = zero[:, 2] = zero[:, 4] = True
    assert torch.equal(out == 0, zero)
    _, dk, dv, dtarget = torch.autograd.grad(out.sum(), inputs)
    assert not dk[[2, 4]].any() and not dv[[2, 4]].any() and not dtarget[1].any()
    assert dv[[0, 1, 3]].any() and dtarget[[0, 2, 3]].any()


def test_a_target_chooses_the_other_op_and_is_named():
    text, k, v, target = (x.detach() for x in drawn(4, 5, 3, 8))
    want = i2v.text_conditioned_similarity(text, k, v, target, scale=0.5)
    assert torch.equal(i2v.text_conditioned_pool(text, k, v, target=target, scale=0.5), want)
    with pytest.raises(ValueError, match=r"^text_conditioned_pool: target.shape=\(3, 8\)"):
        i2v.text_conditioned_pool(text, k, v, target=target[:3])


def test_pooled_videos_are_not_in_memory():
    """256 texts and videos: 128 MiB for each tensor of them."""
    text, k, v = (x.float() for x in call(256, 256, 12, 512))
    with torch.no_grad():
        mine = peak(lambda: i2v.text_conditioned_similarity(text, k, v, text), "cpu")
        whole = peak(lambda: peers.compared(peers.pool_published, text, k, v, text), "cpu")
    assert whole > 256 and mine < 0.05 * whole


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_similarity_under_autocast(dtype):
    """Its sums in float32 are products of PyTorch, which autocast must not cast: the result is that of inputs in 16 bits."""
    given = [torch.randn(shape) for shape in ((5, 16), (4, 6, 16), (4, 6, 16), (5, 16))]
    found = []
    for under in (True, False):
        leaves = [(x if under else x.to(dtype)).clone().requires_grad_() for x in given]
        with torch.autocast("cpu", dtype, enabled=under):
            out = i2v.text_conditioned_similarity(*leaves)
            grads = torch.autograd.grad(out, leaves, torch.ones_like(out))
        found.append([out, *(x.float() for x in grads)])
    for got, want in zip(*found, strict=True):
        assert torch.equal(got, want)
