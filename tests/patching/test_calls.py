"""What was true when a model was patched may not be at a later call: it then runs as if it had not been patched."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.prune
from architectures import MODELS, aim_adapters, trained
from published import AIMAdapter, AIMBlock, QuickGELU, STAdapter, TemporalShift, TimeSformerBlock, XCLIPBlock
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import i2v_kernels as i2v

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
CHEAP = [
    "timesformer divided",
    "tsm",
    "aim blocks",
    "x-clip blocks",
    "st-adapter blocks",
    "timesformer blocks",
    "evl",
]


class Named(nn.Module):
    """A perceptron as models have it."""

    def __init__(self, act: nn.Module | None = None) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(8, 16), act or nn.GELU(), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


def output(model: nn.Module, *inputs: Any) -> Tensor:
    result = model(*(x.clone() if isinstance(x, Tensor) else x for x in inputs))  # some write into their input
    return result if isinstance(result, Tensor) else result[0]


def agree(fast: nn.Module, plain: nn.Module, *inputs: Any) -> None:
    """In outputs and gradients."""
    found = []
    for model in (fast, plain):
        given = [x.detach().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs]
        out = output(model, *given)
        learning = [p for p in model.parameters() if p.requires_grad]
        found.append([out, *torch.autograd.grad(out.square().sum(), [given[0], *learning], allow_unused=True)])
    for a, b in zip(*found, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * max(1, b.abs().max().item()))


def twins(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """Patched, and not."""
    plain = copy.deepcopy(model)
    assert i2v.patch(model).replaced
    return model, plain


# What LoRA tools, offloading, pruning and others do to a layer -------------------------------------------------------------


def wrap_forward(layer: nn.Module) -> None:
    own = layer.forward
    layer.forward = lambda x: 1.5 * own(x)  # type: ignore[method-assign]


def forward_hook(layer: nn.Module) -> None:
    layer.register_forward_hook(lambda module, args, out: 1.5 * out)


def pre_hook(layer: nn.Module) -> None:
    layer.register_forward_pre_hook(lambda module, args: (1.5 * args[0],))


def backward_hook(layer: nn.Module) -> None:
    layer.register_full_backward_hook(lambda module, grads, outs: tuple(None if g is None else 1.5 * g for g in grads))


def backward_pre_hook(layer: nn.Module) -> None:
    layer.register_full_backward_pre_hook(lambda module, outs: tuple(1.5 * g for g in outs))


def weight_norm(layer: nn.Module) -> None:
    nn.utils.parametrizations.weight_norm(layer)
    layer.parametrizations.weight.original0.data *= 1.5


def weight_norm_by_hook(layer: nn.Module) -> None:
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(layer)
    layer.weight_g.data *= 1.5


def prune(layer: nn.Module) -> None:
    nn.utils.prune.l1_unstructured(layer, "weight", 0.5)


def derive(layer: nn.Module) -> None:
    """As bitsandbytes' and quantisers' layers, whose class says something else."""
    kind = type(layer)
    layer.__class__ = type("Quantised", (kind,), {"forward": lambda self, x: 1.5 * kind.forward(self, x)})


CHANGES = [
    wrap_forward,
    forward_hook,
    pre_hook,
    backward_hook,
    backward_pre_hook,
    weight_norm,
    weight_norm_by_hook,
    prune,
    derive,
]


@pytest.mark.parametrize(
    ("name", "before", "change"),
    [("perceptron", before, change) for change in CHANGES for before in (False, True)]
    + [
        (name, False, change)
        for name in ("aim blocks", "st-adapter blocks", "evl", "timesformer divided")
        for change in CHANGES[:2]
    ],
)
def test_layers_that_are_more_than_their_class(name: str, before: bool, change: Callable[[nn.Module], None]) -> None:
    """Whether the layer changed before or after it was patched."""
    torch.manual_seed(0)
    model, x = (trained(nn.Sequential(Named())), torch.randn(3, 8)) if name == "perceptron" else MODELS[name][0]()
    plain = copy.deepcopy(model)
    unchanged = output(model, x)
    if not before:
        assert i2v.patch(model).replaced
    for each in (model, plain):
        for layer in [m for m in each.modules() if type(m) in LAYERS]:
            change(layer)
    if before:
        i2v.patch(model)
    agree(model, plain, x)
    if "backward" not in change.__name__:
        assert not torch.allclose(output(model, x), unchanged)


@pytest.mark.parametrize("name", CHEAP)
def test_a_layer_at_a_time(name: str) -> None:
    """Of each model's: a replacement that passes over it takes the original."""
    model, x = MODELS[name][0]()
    model, plain = twins(model)
    kinds = (*LAYERS, nn.GELU, QuickGELU, AIMAdapter, nn.Dropout)
    places = {re.sub(r"\b\d+\.", "", path): path for path, part in model.named_modules() if type(part) in kinds}  # of one block
    for path in places.values():
        part, own = model.get_submodule(path), plain.get_submodule(path)
        if path:
            handles = [m.register_forward_hook(lambda module, args, out: 1.5 * out) for m in (part, own)]
            torch.testing.assert_close(output(model, x), output(plain, x), rtol=1e-3, atol=1e-3)
            for handle in handles:
                handle.remove()


def test_hooks_of_all_modules() -> None:
    model, plain = twins(nn.Sequential(Named()))
    x, seen = torch.randn(3, 8), []
    with_all = torch.nn.modules.module.register_module_forward_hook(lambda module, args, out: seen.append(type(module)))
    try:
        plain(x)
        expected, seen[:] = list(seen), []
        model(x)
    finally:
        with_all.remove()
    assert seen == expected and nn.Linear in seen


def test_a_class_whose_forward_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """nn.Linear's, as quantisers do, and that of the module itself."""
    model, plain = twins(nn.Sequential(Named()))
    x, own = torch.randn(3, 8), nn.Linear.forward
    with monkeypatch.context() as m:
        m.setattr(nn.Linear, "forward", lambda self, x: 2 * own(self, x))
        assert torch.equal(model(x), plain(x))
    with monkeypatch.context() as m:
        m.setattr(Named, "forward", lambda self, x: x)
        assert torch.equal(model(x), x)


# Settings ------------------------------------------------------------------------------------------------------------------


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


# Calls ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CHEAP)
def test_calls_of_another_kind(name: str) -> None:
    """Float64 under autocast, nothing in the batch, the meta device, inference mode, a mode that counts: as without patch."""
    model, x = MODELS[name][0]()
    model, plain = twins(model)
    results: list[list[Any]] = []
    for module in (model, plain):
        found: list[Any] = []
        wide = copy.deepcopy(module).double()
        with torch.autocast("cpu", torch.bfloat16):
            found.append(attempt(lambda wide=wide: output(wide, x.double())))
        found.append(attempt(lambda module=module: output(module, x[:0])))
        far = copy.deepcopy(module).to("meta")
        found.append(attempt(lambda far=far: tuple(output(far, x.to("meta")).shape)))
        with torch.inference_mode():
            found.append(attempt(lambda module=module: output(module, x.clone())))
        with Counting() as counting:
            found.extend((attempt(lambda module=module: output(module, x)), dict(counting.calls)))
        results.append(found)
    for a, b in zip(*results, strict=True):
        if isinstance(a, Tensor):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
        else:
            assert a == b


def attempt(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except Exception as error:
        return type(error)


class Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[str(func)] = self.calls.get(str(func), 0) + 1
        return func(*args, **(kwargs or {}))


@contextmanager
def intercepting() -> Iterator[None]:
    class Mode(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            return 2 * out if func is F.linear else out

    with Mode():
        yield


def test_a_mode_that_changes_functions() -> None:
    model, plain = twins(nn.Sequential(Named()))
    x = torch.randn(3, 8)
    with intercepting():
        assert torch.equal(model(x), plain(x)) and not torch.allclose(model(x), 2 * x)


@pytest.mark.parametrize("name", ["aim adapters", "tsm", "st-adapter blocks"])
def test_transforms_and_forward_mode_go_through(name: str) -> None:
    """A tangent that is silently zero would be worse than none."""
    model, x = MODELS[name][0]()
    model, plain = twins(model.eval())
    for transform in (
        lambda m: torch.func.jvp(m, (x,), (torch.ones_like(x),))[1],
        lambda m: torch.func.grad(lambda x: m(x).square().sum())(x),
        lambda m: torch.func.vmap(m)(x[None]),
    ):
        torch.testing.assert_close(transform(model), transform(plain), rtol=1e-4, atol=1e-4)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        a, b = (torch.autograd.forward_ad.unpack_dual(m(dual)).tangent for m in (model, plain))
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_compiled_it_runs_the_ops_and_sees_what_changes() -> None:
    model, x = aim_adapters()
    model, plain = twins(model)
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: object) -> object:
        graphs.append(str(graph.code))
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    torch.testing.assert_close(compiled(x), plain(x))
    assert graphs[0].count("i2v_kernels.bottleneck_adapter") == 2
    for module in (model, plain):
        module[0].skip_connect, module[1].act.approximate = False, "tanh"
    torch.testing.assert_close(compiled(x), plain(x))
    for module in (model, plain):
        module[0].D_fc1.register_forward_hook(lambda module, args, out: 2 * out)
    torch.testing.assert_close(compiled(x), plain(x))


def test_replicas_run_the_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of ``nn.DataParallel``, whose weights are plain attributes."""
    module, plain = twins(nn.Conv3d(4, 4, (3, 1, 1), padding="same", groups=4))
    x = torch.randn(2, 4, 5, 2, 2, requires_grad=True)
    replica, ran, op = module._replicate_for_data_parallel(), [], i2v.temporal_conv
    replica.weight, replica.bias = module.weight * 1, module.bias * 1
    monkeypatch.setattr(i2v.patching.conv, "temporal_conv", lambda *args, **options: ran.append(1) or op(*args, **options))
    torch.testing.assert_close(replica(x), plain(x))
    assert ran


def test_default_devices_are_no_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = twins(Named())
    ran = []
    monkeypatch.setattr(i2v.patching.mlp, "fused", lambda x, *rest: ran.append(1) or x)
    with torch.device("cpu"), torch.no_grad():
        model(torch.randn(3, 8))
    assert ran
