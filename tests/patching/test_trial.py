"""The trial before a replacement: forks are found out, and what is replaced does what it did."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from published import (
    AIMAdapter,
    AIMBlock,
    CLIPViPAttention,
    OpenVCLIPAttention,
    STAdapter,
    TimeSformerBlock,
    XCLIPBlock,
)
from torch import Tensor, nn

import i2v_kernels as i2v


class Twice(AIMAdapter):
    """Counts more; with weights that start at zero one sees no difference."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 2 * self.D_fc2(self.act(self.D_fc1(x)))


class Detached(AIMAdapter):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.D_fc2(self.act(self.D_fc1(x.detach())))


class Dropping(AIMAdapter):
    def forward(self, x: Tensor) -> Tensor:
        return x + nn.functional.dropout(self.D_fc2(self.act(self.D_fc1(x))), 0.5, self.training)


class Clipped(STAdapter):
    def forward(self, x: Tensor, T: int) -> Tensor:
        return super().forward(x, T).clamp(-1, 1)


class Reversed(XCLIPBlock):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flip(1))


class Masked(OpenVCLIPAttention):
    """Whose first frame leaves out what lies before the clip, as other windows do, and counts no zero keys."""

    def window(self, x: Tensor) -> Tensor:
        whole = super().window(x)
        return torch.where(whole == 0, whole.new_tensor(-1e3), whole)


class Repeated(CLIPViPAttention):
    def forward2(self, hidden_states: Tensor, inputs_size: Any) -> Tensor:
        return super().forward2(hidden_states, inputs_size).roll(1, 1)


class ByClip(TimeSformerBlock):
    def forward(self, x: Tensor, B: int, T: int, W: int) -> Tensor:
        return super().forward(x, B, T, W) + self.temporal_fc(x).mean(1, True)


@pytest.mark.parametrize(
    ("module", "what"),
    [
        (Twice(16), "outputs"),
        (Detached(16), "gradients"),
        (Dropping(16), "outputs in training"),
        (Clipped(16, 8), "outputs"),
        (Reversed(32, 2, 4), "outputs"),
        (Masked(32, 2, 4), "outputs"),
        (Repeated(32, 2), "outputs"),
        (ByClip(32, 2), "outputs"),
    ],
)
def test_forks_are_found_out(module: nn.Module, what: str) -> None:
    row = next(row for row in i2v.patch(module) if row.name == "")
    assert not row.replaced and f"a trial gave other {what}:" in row.detail, row


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_forks_are_found_out_in_16_bits(dtype: torch.dtype) -> None:
    """Whose rounding is as large as what a small change makes."""
    assert not i2v.patch(Twice(16).to(dtype)).replaced
    assert i2v.patch(AIMAdapter(16).to(dtype)).replaced


def test_patched_within_inference_mode_and_autocast() -> None:
    adapter, x = AIMAdapter(16), torch.randn(2, 16)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert i2v.patch(adapter).replaced and not i2v.patch(Twice(16)).replaced
    adapter(x).sum().backward()
    assert adapter.D_fc2.weight.grad is not None


def test_alike_but_for_a_setting() -> None:
    """One trial serves modules that are alike, and these are not."""

    class Scaled(AIMAdapter):
        scale = 1.0

        def forward(self, x: Tensor) -> Tensor:
            return x + self.scale * self.D_fc2(self.act(self.D_fc1(x)))

    model = nn.Sequential(Scaled(16), Scaled(16), Scaled(16))
    model[1].scale = 2.0
    assert [row.replaced for row in i2v.patch(model)] == [True, False, True]


@pytest.mark.parametrize("make", [AIMBlock, XCLIPBlock, TimeSformerBlock])
def test_stochastic_depth_draws_the_same(make: type[nn.Module]) -> None:
    options = {"drop_path": 0.5} if make is TimeSformerBlock else {"frames": 4, "drop": 0.5}
    block, x = make(32, 2, **options).train(), torch.randn(2, 25, 32)
    x = x if make is TimeSformerBlock else x.reshape(5, -1, 32)[:, :8]

    def step() -> Tensor:
        torch.manual_seed(5)
        return block(x)

    expected = step()
    assert i2v.patch(block).rows[0].replaced
    torch.testing.assert_close(step(), expected)
    assert not torch.equal(block.eval()(x), expected)


def test_st_adapter_leaves_its_input() -> None:
    adapter, x = STAdapter(16, 8), torch.randn(8, 10, 16)
    nn.init.normal_(adapter.conv.weight)
    kept = x.clone()
    expected = adapter(x.clone(), 4)
    assert "leaves its input" in i2v.patch(adapter).rows[0].detail
    torch.testing.assert_close(adapter(x, 4), expected)
    assert torch.equal(x, kept)


@pytest.mark.parametrize("wide", [False, True])
def test_adapters_under_autocast_keep_the_residual_stream(wide: bool) -> None:
    """In the dtype it has, also where that is not autocast's."""
    dtype = torch.float32 if wide else torch.bfloat16
    aim, st = torch.randn(2, 5, 16, dtype=dtype), torch.randn(8, 10, 16, dtype=dtype)
    for module, inputs in ((AIMAdapter(16), (aim,)), (STAdapter(16, 8), (st, 4))):
        for p in module.parameters():
            nn.init.normal_(p, std=0.3)
        with torch.autocast("cpu", torch.bfloat16):
            expected = module(inputs[0].clone(), *inputs[1:])
            i2v.patch(module)
            got = module(*inputs)
        assert got.dtype == expected.dtype == dtype
        torch.testing.assert_close(got, expected, rtol=5e-2, atol=5e-2)
