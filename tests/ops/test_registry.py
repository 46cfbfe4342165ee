"""The registry's calls of models: nothing is drawn until a call is placed, and then in the dtype and place asked for."""

from __future__ import annotations

import pytest
import torch

from i2v_kernels.testing import OPINFOS


@pytest.mark.parametrize("info", OPINFOS, ids=str)
def test_a_model_call_costs_nothing_until_it_is_placed(info):
    assert all(not call.inputs() for call in info.models(10**7))  # terabytes, if they were drawn


@pytest.mark.parametrize("info", OPINFOS, ids=str)
def test_a_placed_model_call_is_drawn_in_its_dtype(info):
    first, again = (info.models(1)[0].to(torch.bfloat16, requires_grad=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.inputs(), again.inputs()))
    assert all(t.dtype == torch.bfloat16 and t.requires_grad for t in first.tensors())
    drawn = info.models(1)[0].args[0]
    spread = 74 if drawn.pixels else drawn.scale  # of the numbers from 0 to 255, else of a normal distribution
    assert first.args[0].float().std().item() == pytest.approx(spread, rel=0.02)
