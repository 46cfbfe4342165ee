"""merge_attention: parts of an attention joined by their log-sum-exp are the whole, for every op that returns one."""

from __future__ import annotations

import pytest
import torch

import i2v_kernels as i2v

DTYPES = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def temporal(q, k, v, keys):
    return i2v.temporal_attention(q, k[:, keys], v[:, keys], return_lse=True)


def frames(q, k, v, keys):
    return i2v.frame_attention(q, k[:, :, keys], v[:, :, keys], frames=(-1, 0, 1), return_lse=True)


def cross(q, k, v, keys):
    return i2v.video_cross_attention(q[:, 0], k[:, :, keys], v[:, :, keys], return_lse=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("attend", [temporal, frames, cross])
def test_parts_are_the_whole(attend, dtype):
    q, k, v = torch.randn(3, 2, 7, 7, 3, 16).to(dtype)
    parts = [attend(q, k, v, keys) for keys in (slice(0, 1), slice(1, 4), slice(4, 7))]
    (out, lse), (want, whole) = i2v.merge_attention(*zip(*parts)), attend(q, k, v, slice(0, 7))
    assert out.dtype == dtype and lse.dtype == whole.dtype
    torch.testing.assert_close(out, want, atol=DTYPES[dtype], rtol=DTYPES[dtype])
    torch.testing.assert_close(lse, whole, atol=1e-5, rtol=1e-5)


def test_queries_without_keys():
    q, k, v = torch.randn(3, 2, 4, 5, 3, 16)
    mask = torch.tensor([[True] * 4, [False] * 4])
    some = i2v.frame_attention(q, k, v, frames="all", mask=mask, return_lse=True)
    none = i2v.frame_attention(q, k, v, frames="all", mask=mask & False, return_lse=True)
    out, lse = i2v.merge_attention(*zip(some, none))
    torch.testing.assert_close(out, some[0])
    assert torch.equal(lse[0], some[1][0]) and (lse[1] == -torch.inf).all() and not out[1].any()


def test_gradients_are_those_of_the_whole():
    q, k, v = (x.requires_grad_() for x in torch.randn(3, 6, 9, 8, dtype=torch.float64))
    leaves = (q, k, v)

    def part(keys):
        scores = q @ k[:, keys].transpose(1, 2)
        return scores.softmax(-1) @ v[:, keys], scores.logsumexp(-1)

    merged, whole = i2v.merge_attention(*zip(part(slice(0, 2)), part(slice(2, 9)))), part(slice(0, 9))
    for got, want in zip(merged, whole):
        grad = torch.randn_like(want)
        pairs = zip(torch.autograd.grad(got, leaves, grad, True, allow_unused=True, materialize_grads=True),
                    torch.autograd.grad(want, leaves, grad, True, allow_unused=True, materialize_grads=True))  # fmt: skip
        for g, w in pairs:
            torch.testing.assert_close(g, w)


def test_compiles_whole():
    parts = [(torch.randn(2, 3, 8), torch.randn(2, 3)) for _ in range(2)]
    want = i2v.merge_attention(*zip(*parts))
    got = torch.compile(lambda a, b: i2v.merge_attention([a[0], b[0]], [a[1], b[1]]), fullgraph=True, backend="aot_eager")(
        *parts
    )
    torch.testing.assert_close(got, want)


OUT, LSE = torch.zeros(2, 3, 8), torch.zeros(2, 3)
BAD = {
    "one": (([OUT], [LSE]), ValueError, "1 outs and 1 lses"),
    "an lse too few": (([OUT, OUT], [LSE]), ValueError, "2 outs and 1 lses"),
    "no list": ((3, [LSE]), TypeError, "outs=3 must be a list of tensors"),
    "a number among tensors": (([OUT, 3.0], [LSE, LSE]), TypeError, "outs[1] must be a torch.Tensor"),
    "a number first": (([3.0, OUT], [LSE, LSE]), TypeError, "outs[0] must be a torch.Tensor"),
    "another shape": (([OUT, OUT[:1]], [LSE, LSE]), ValueError, "outs[1].shape=(1, 3, 8)"),
    "another dtype": (([OUT, OUT.half()], [LSE, LSE]), TypeError, "outs[1].dtype=torch.float16"),
    "an lse of 16 bits": (([OUT, OUT], [LSE, LSE.half()]), TypeError, "lses[1] must be a tensor [...] of torch.float32"),
    "an lse of another shape": (([OUT, OUT], [LSE, LSE.T]), ValueError, "lses[1].shape=(3, 2)"),
    "gradients that would be wrong": (([OUT.clone().requires_grad_(), OUT], [LSE, LSE]), ValueError, "torch.no_grad()"),
}


@pytest.mark.parametrize("why", BAD)
def test_bad_input(why):
    args, exception, text = BAD[why]
    with pytest.raises(exception) as raised:
        i2v.merge_attention(*args)
    assert text in str(raised.value) and str(raised.value).startswith("merge_attention: ")
