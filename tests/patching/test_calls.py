"""Calls of another kind than patch() tried: modes, transforms, autocast, replicas; they run as if nothing had been patched."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from architectures import MODELS, aim_adapters
from published import CLIPViPAttention, OpenVCLIPAttention, XCLIPBlock
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from twins import CHEAP, Named, output, twins

import i2v_kernels as i2v


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


OPEN_VCLIP: list[tuple[str, dict[str, Any]]] = [
    ("weights", {}),
    ("a mask", {"need_weights": False, "attn_mask": -9.0 * torch.ones(5, 15).triu(3)}),
    ("other keys", {"need_weights": False, "key": torch.randn(5, 8, 16, generator=torch.Generator().manual_seed(1))}),
    ("dropout", {"need_weights": False}),
    ("half a clip", {"need_weights": False, "rows": 6}),
]


@pytest.mark.parametrize(("what", "options"), OPEN_VCLIP, ids=[what for what, _ in OPEN_VCLIP])
def test_open_vclip_calls_that_are_not_covered(what: str, options: dict[str, Any]) -> None:
    model, plain = twins(OpenVCLIPAttention(16, 2, 4, drop=0.5).train(what == "dropout"))
    options = dict(options)
    x = torch.randn(5, options.pop("rows", 8), 16)
    key = options.pop("key", x)
    results = []
    for module in (model, plain):
        torch.manual_seed(0)
        results.append(attempt(lambda module=module: module(x, key, key, **options)))
    if what == "half a clip":
        assert results[0] is results[1] is RuntimeError
    else:
        for a, b in zip(*results, strict=True):
            assert (a is None and b is None) or torch.equal(a, b)


@pytest.mark.parametrize("what", ["text", "a mask", "dropout"])
def test_clip_vip_calls_that_are_not_covered(what: str) -> None:
    model, plain = twins(CLIPViPAttention(16, 2, drop=0.5).train(what == "dropout"))
    x, size = torch.randn(2, 14, 16), None if what == "text" else (2, 3, 4)
    mask = torch.zeros(2, 1, 14, 14) if what == "a mask" else None
    results = []
    for module in (model, plain):
        torch.manual_seed(0)
        results.append(module(x, inputs_size=size, attention_mask=mask)[0])
    assert torch.equal(*results)


@pytest.mark.parametrize(
    ("make", "arguments"),
    [
        (lambda: XCLIPBlock(16, 2, 4), (torch.randn(5, 8, 16),)),
        (lambda: OpenVCLIPAttention(16, 2, 4), (torch.randn(5, 8, 16),) * 3),
        (lambda: CLIPViPAttention(16, 2), (torch.randn(2, 14, 16), (2, 3, 4))),
    ],
    ids=["x-clip", "open-vclip", "clip-vip"],
)
@pytest.mark.parametrize("frames", [4, 1])
def test_calls_that_are_covered_run_frame_attention(
    make: Any, arguments: Any, frames: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, plain = make(), make()
    if hasattr(model, "T"):
        model.T = plain.T = frames
    plain.load_state_dict(model.state_dict())
    assert i2v.patch(model).replaced
    options = {"need_weights": False} if isinstance(model, OpenVCLIPAttention) else {}
    ran, op = [], i2v.frame_attention
    for module in (i2v.patching.frame_attention, i2v.nn.proxy_attention):
        monkeypatch.setattr(module, "frame_attention", lambda *args, **options: ran.append(1) or op(*args, **options))
    got = model(*arguments, **options)
    assert ran
    expected = plain(*arguments, **options)
    torch.testing.assert_close(got, expected)


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
