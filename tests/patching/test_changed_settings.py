"""Settings of a module that are changed once a model is patched: it runs as if it had not been patched."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from architectures import trained
from published import (
    AIMAdapter,
    AIMBlock,
    CLIPViPLayer,
    OpenVCLIPBlock,
    QuickGELU,
    STAdapter,
    TemporalShift,
    TimeSformerBlock,
    XCLIPBlock,
)
from torch import Tensor, nn
from twins import Named, agree, output, twins

import i2v_kernels as i2v


def set_to(path: str, value: Any) -> Callable[[nn.Module], None]:
    *parts, name = path.split(".")

    def change(module: nn.Module) -> None:
        for part in parts:
            module = getattr(module, part)
        setattr(module, name, value() if isinstance(value, type) else value)

    return change


class OtherQuickGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(2 * x)


OtherQuickGELU.__name__ = "QuickGELU"


class Config:
    def __init__(self) -> None:
        self.scale, self.names = 1.0, {}


class Scaled(AIMAdapter):
    """With all kinds of settings, which are neutral at first."""

    factor = 1.0

    def __init__(self) -> None:
        super().__init__(8)
        self.scale, self.config, self.factors, self.function = 1.0, Config(), [1.0], torch.clone
        self.register_buffer("gate", torch.ones(()))
        self.table = torch.ones(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x) if hasattr(self, "norm") else x
        scale = self.scale * self.config.scale * self.factors[0] * self.factor * self.gate * self.table
        return x + self.function(scale * self.D_fc2(self.act(self.D_fc1(x))) * getattr(self, "late", 1.0))


def load_gate(module: Any) -> None:
    module.load_state_dict({**module.state_dict(), "gate": torch.tensor(0.1)})


def assign_gate(module: Any) -> None:
    module.load_state_dict({**module.state_dict(), "gate": torch.tensor(0.1)}, assign=True)


def write_gate(module: Any) -> None:
    module.gate.data.fill_(0.1)


def write_table(module: Any) -> None:
    module.table[2] = 5.0


def write_factors(module: Any) -> None:
    module.factors[0] = 3.0


SETTINGS = {
    "gelu": (Named, set_to("act.approximate", "tanh"), (3, 8)),
    "another act": (Named, set_to("act", nn.Tanh), (3, 8)),
    "another act of that name": (lambda: Named(QuickGELU()), set_to("act", OtherQuickGELU), (3, 8)),
    "aim gelu": (lambda: AIMAdapter(8), set_to("act.approximate", "tanh"), (3, 8)),
    "aim skip": (lambda: AIMAdapter(8), set_to("skip_connect", False), (3, 8)),
    "number": (Scaled, set_to("scale", 2.0), (3, 8)),
    "class's number": (Scaled, set_to("factor", 2.0), (3, 8)),
    "new number": (Scaled, set_to("late", 2.0), (3, 8)),
    "new child": (Scaled, set_to("norm", nn.Tanh), (3, 8)),
    "function": (Scaled, set_to("function", torch.tanh), (3, 8)),
    "configuration": (Scaled, set_to("config.scale", 0.1), (3, 8)),
    "list": (Scaled, write_factors, (3, 8)),
    "buffer loaded": (Scaled, load_gate, (3, 8)),
    "buffer assigned": (Scaled, assign_gate, (3, 8)),
    "buffer written": (Scaled, write_gate, (3, 8)),
    "tensor": (Scaled, write_table, (3, 8)),
    "conv padding": (
        lambda: nn.Conv3d(4, 4, (3, 1, 1), padding=(1, 0, 0), groups=4), set_to("padding", (0, 0, 0)), (2, 4, 5, 2, 2),
    ),
    "conv stride": (
        lambda: nn.Conv3d(4, 4, (3, 1, 1), padding=(1, 0, 0), groups=4), set_to("stride", (2, 1, 1)), (2, 4, 5, 2, 2),
    ),
    "conv padding mode": (
        lambda: nn.Conv3d(4, 4, (3, 1, 1), padding="same", groups=4), set_to("padding_mode", "circular"), (2, 4, 5, 2, 2),
    ),
    "conv's own method": (
        lambda: nn.Conv3d(4, 4, (3, 1, 1), padding="same", groups=4),
        set_to("_conv_forward", lambda x, *parts: 2 * x), (2, 4, 5, 2, 2),
    ),
    "patches stride": (lambda: nn.Conv2d(3, 4, 4, 4), set_to("stride", (2, 2)), (2, 3, 8, 8)),
    "patches padding": (lambda: nn.Conv2d(3, 4, 4, 4), set_to("padding", (4, 4)), (2, 3, 8, 8)),
    "st conv": (lambda: STAdapter(8, 4), set_to("conv.padding_mode", "circular"), None),
    "shift": (lambda: TemporalShift(nn.Conv2d(8, 8, 1), 4), set_to("n_segment", 2), (8, 8, 2, 2)),
    "shift in place": (lambda: TemporalShift(nn.Conv2d(8, 8, 1), 4), set_to("fold_div", 4), (8, 8, 2, 2)),
    "aim frames": (lambda: AIMBlock(16, 2, 4), set_to("num_frames", 2), (5, 8, 16)),
    "aim scale": (lambda: AIMBlock(16, 2, 4), set_to("scale", 2.0), (5, 8, 16)),
    "aim mask": (lambda: AIMBlock(16, 2, 5), set_to("attn_mask", torch.ones(5, 5).triu(1).bool()), (5, 5, 16)),
    "aim heads": (lambda: AIMBlock(16, 2, 4), set_to("attn.num_heads", 2), (5, 8, 16)),
    "aim method": (lambda: AIMBlock(16, 2, 4), set_to("attention", lambda x: 2 * x), (5, 8, 16)),
    "x-clip frames": (lambda: XCLIPBlock(16, 2, 4), set_to("T", 2), (5, 8, 16)),
    "x-clip stochastic depth": (lambda: XCLIPBlock(16, 2, 4), set_to("drop_path", QuickGELU), (5, 8, 16)),
    "open-vclip frames": (lambda: OpenVCLIPBlock(16, 2, 4), set_to("attn.T", 2), (5, 8, 16)),
    "open-vclip window": (
        lambda: OpenVCLIPBlock(16, 2, 4), set_to("attn.temporal_shift", "expand_temporal_view_step2"), (5, 8, 16),
    ),
    "open-vclip mask": (lambda: OpenVCLIPBlock(16, 2, 4), set_to("attn_mask", -9 * torch.ones(5, 15).triu(3)), (5, 8, 16)),
    "clip-vip size": (lambda: CLIPViPLayer(16, 2), set_to("size", (6, 4, 2)), (2, 14, 16)),
    "clip-vip no size": (lambda: CLIPViPLayer(16, 2), set_to("size", None), (2, 14, 16)),
    "clip-vip scale": (lambda: CLIPViPLayer(16, 2), set_to("self_attn.scale", 3.0), (2, 14, 16)),
    "timesformer type": (lambda: TimeSformerBlock(16, 2), set_to("temporal_attn.scale", 3.0), (2, 25, 16)),
}  # fmt: skip


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_changed_afterwards(name: str) -> None:
    make, change, shape = SETTINGS[name]
    torch.manual_seed(0)
    model, plain = twins(trained(make()).eval())
    inputs = (torch.randn(8, 10, 8), 4) if shape is None else (torch.randn(shape),)
    before = output(plain, *inputs)
    torch.testing.assert_close(output(model, *inputs), before)
    for module in (model, plain):
        change(module)
    expected = output(plain, *inputs)
    agree(model, plain, *inputs)
    if name != "aim heads":
        assert expected.shape != before.shape or not torch.equal(expected, before)


@pytest.mark.parametrize(
    "change", [load_gate, write_table, write_factors, set_to("config.scale", 0.1), set_to("function", torch.tanh)]
)
def test_what_differs_is_tried_by_itself(change: Callable[[nn.Module], None]) -> None:
    model = trained(nn.Sequential(Scaled(), Scaled(), Scaled()))
    model[1].gate.fill_(1.0)
    for part in model:
        part.gate.fill_(1.0)
    change(model[1])
    plain, x = copy.deepcopy(model), torch.randn(3, 8)
    assert [row.replaced for row in i2v.patch(model)] == [True, False, True]
    torch.testing.assert_close(model(x), plain(x))
