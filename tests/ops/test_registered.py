"""The registered ops called as they are: what is wrong raises, and neither ends the process nor reads outside a tensor."""

from __future__ import annotations

import pytest
import torch

from i2v_kernels import _extension

OPS = torch.ops.i2v_kernels
pytestmark = pytest.mark.skipif(_extension.why_no_cpu() is not None, reason=str(_extension.why_no_cpu()))


def attention(shape=(2, 4, 3, 2, 8), keys=None, bias=None, mask=None, offsets=None, left=-1, right=-1, grad=None):
    q = torch.randn(shape)
    k = torch.randn(shape if keys is None else keys)
    rest = (bias, mask, offsets, 1.0, left, right)
    if grad is not None:
        return OPS.temporal_attention_backward(grad, q, k, k, *rest, bias is not None, "cpu")
    return OPS.temporal_attention(q, k, k, *rest, True, "cpu")


def conv(x=None, weight=None, bias=None, grid=(1, 6), prefix=0, mode="zero", dilation=1, act="", wanted=None, grad=None):
    x = torch.randn(2, 4, 6, 8) if x is None else x
    weight = torch.randn(8, 1, 3, 1, 1) if weight is None else weight
    rest = (x, weight, bias, *grid, prefix, mode, dilation, act, False)
    if grad is not None:
        return OPS.temporal_conv_backward(grad, *rest, wanted or [True, True, False], "cpu")
    return OPS.temporal_conv(*rest, "cpu")


def shift(x=None, channels=(4,), offsets=(1,), start=0, stop=6, step=1, padding="zeros", name="token_shift"):
    x = torch.randn(2, 4, 6, 8) if x is None else x
    rest = () if name == "token_shift_" else (False,)
    return getattr(OPS, name)(x, list(channels), list(offsets), padding, start, stop, step, *rest, "cpu")


X = torch.randn(2, 4, 6, 8)
WRONG = {
    "no frame": lambda: attention((2, 0, 3, 2, 8)),
    "no frame, backward": lambda: attention((2, 0, 3, 2, 8), grad=torch.randn(2, 0, 3, 2, 8)),
    "no key": lambda: attention(keys=(2, 0, 3, 2, 8)),
    "keys of other heads": lambda: attention(keys=(2, 4, 3, 1, 8)),
    "bias of another shape": lambda: attention(bias=torch.randn(2, 4, 3)),
    "bias of another dtype": lambda: attention(bias=torch.randn(2, 4, 4).half()),
    "mask of another length": lambda: attention(mask=torch.ones(2, 3, dtype=torch.bool)),
    "mask of numbers": lambda: attention(mask=torch.ones(2, 4)),
    "an offset too few": lambda: attention(offsets=[1]),
    "huge offsets": lambda: attention(offsets=[2**63 - 1, -(2**63)]),
    "gradient of another shape": lambda: attention(grad=torch.randn(2, 3, 3, 2, 8)),
    "gradient of another dtype": lambda: attention(grad=torch.randn(2, 4, 3, 2, 8).double()),
    "gradient with strided channels": lambda: attention(grad=torch.randn(2, 4, 3, 8, 2).transpose(3, 4)),
    "conv of three dimensions": lambda: conv(X[0]),
    "conv with strided channels": lambda: conv(torch.randn(2, 4, 8, 6).transpose(2, 3)),
    "conv of integers": lambda: conv(X.int(), torch.ones(8, 1, 3, 1, 1, dtype=torch.int32)),
    "even kernel": lambda: conv(weight=torch.randn(8, 1, 2, 1, 1)),
    "weight of another C": lambda: conv(weight=torch.randn(7, 1, 3, 1, 1)),
    "another grid": lambda: conv(grid=(2, 4)),
    "negative grid": lambda: conv(grid=(-2, -3)),
    "a grid that overflows": lambda: conv(X[:, :, :0], grid=(2**62, 4)),
    "negative prefix": lambda: conv(prefix=-1, grid=(1, 7)),
    "no dilation": lambda: conv(dilation=0),
    "unknown activation": lambda: conv(act="tanh"),
    "unknown prefix mode": lambda: conv(mode="zeros"),
    "conv gradient of another shape": lambda: conv(grad=X[:1]),
    "gradient of no bias": lambda: conv(grad=X, wanted=[True, True, True]),
    "two wanted": lambda: conv(grad=X, wanted=[True, True]),
    "too many channels": lambda: shift(channels=(9,)),
    "negative channels": lambda: shift(channels=(-1,)),
    "channels that overflow": lambda: shift(channels=(2**62, 2**62, 2**62), offsets=(1, 1, 1)),
    "an offset too many": lambda: shift(offsets=(1, 1)),
    "no step": lambda: shift(step=0),
    "tokens before the first": lambda: shift(start=-(2**63)),
    "tokens behind the last": lambda: shift(stop=7),
    "tokens of another, in place": lambda: shift(stop=7, name="token_shift_"),
    "overlap in place": lambda: shift(X[:1].expand(2, 4, 6, 8), name="token_shift_"),
    "unknown padding": lambda: shift(padding="zero"),
}


@pytest.mark.parametrize("why", WRONG)
def test_what_is_wrong_raises(why):
    with pytest.raises((RuntimeError, TypeError, ValueError, NotImplementedError)):
        WRONG[why]()


def test_what_is_right_does_not():
    grad = torch.randn(2, 4, 3, 2, 8)
    assert all(x.isfinite().all() for x in attention(bias=torch.randn(2, 4, 4), offsets=[4, -4], left=2**62, grad=grad))
    assert conv(X, bias=torch.ones(8), dilation=2**62).isfinite().all()
    assert shift(offsets=(2**63 - 1,)).isfinite().all()
    assert shift(offsets=(-(2**63),), padding="wrap").isfinite().all()
