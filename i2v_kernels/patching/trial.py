"""The trial: copies of a module run its own forward and the replacement, and what comes out is compared."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_map_only

from .rules import Inputs, Replacement
from .watch import PLAIN, attributes


class Trials:
    """One trial for all modules that are alike: same class, same rule, same shapes, settings, buffers and configuration."""

    def __init__(self) -> None:
        self.reasons: dict[Any, str | None] = {}

    def reason_against(self, module: nn.Module, replacement: Replacement) -> str | None:
        parts = (
            (name, type(part), type(part).forward, part.extra_repr(), tuple((n, described(v)) for n, v in attributes(part)))
            for name, part in module.named_modules()
        )
        tensors = ((name, p.shape, p.dtype, p.device, type(p)) for name, p in module.named_parameters())
        key = (replacement.by, replacement.forward, tuple(parts), tuple(tensors))
        if key not in self.reasons:
            self.reasons[key] = differs(module, replacement)
        return self.reasons[key]


def described(value: Any, depth: int = 0) -> Any:
    """What is equal for values that make the same difference to a module; its identity where nothing is known of it."""
    if isinstance(value, Tensor):
        if type(value) not in (Tensor, nn.Parameter) or value.is_meta:
            return id(value)
        numbers = value.detach().cpu().contiguous().view(-1).view(torch.uint8) if value.numel() else value.new_zeros(0).cpu()
        return tuple(value.shape), value.dtype, value.device, numbers.numpy().tobytes()
    if isinstance(value, (*PLAIN, torch.dtype, torch.device)):
        return repr(value)
    if isinstance(value, MethodType):
        return id(value.__func__)
    if depth > 4 or isinstance(value, (nn.Module, type, FunctionType, BuiltinFunctionType)):
        return id(value)
    if isinstance(value, dict):
        return type(value), tuple((repr(k), described(v, depth + 1)) for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return type(value), tuple(described(v, depth + 1) for v in value)
    return (type(value), described(vars(value), depth + 1)) if hasattr(value, "__dict__") else id(value)


def differs(module: nn.Module, replacement: Replacement) -> str | None:
    """None if the replacement gives what the class's forward gives, in evaluation and in training, gradients included; else
    how not. Copies without hooks are tried, on the CPU and in float32 or wider: what is compared is the computation, which
    the rounding of 16 bits or of TF32 would hide."""
    tensors = [*module.parameters(), *module.buffers()]
    if any(t.is_meta for t in tensors):
        return "its weights are on the meta device: load them first"
    if any(hasattr(t, "placements") for t in tensors):  # DTensor
        return None if replacement.known else "its weights are sharded, so that no trial can be made: patch it before"
    for name, t in (*module.named_parameters(), *module.named_buffers()):
        if type(t) not in (nn.Parameter, Tensor):
            return f"its {name} is a {type(t).__name__}, a kind of tensor that computes in its own way"
    try:
        with torch.inference_mode(False), _disable_current_modes(), torch.device("cpu"), _OnCPU():
            reasons = (_compare(module, replacement, method) for method in replacement.methods)
            return next((reason for reason in reasons if reason is not None), None)
    except Exception as error:
        return f"a trial with inputs as expected failed: {type(error).__name__}: {error}"


class _OnCPU(TorchFunctionMode):
    """Memory that a module asks of a GPU by name, whatever its input is on, comes from the CPU, where its copy is tried."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cuda":
            kwargs = {**kwargs, "device": "cpu"}
        return func(*args, **kwargs)


def _compare(module: nn.Module, replacement: Replacement, method: str) -> str | None:
    results, attributes_left, left_to_original = [], [], []
    for call in (_original, replacement.forward):
        try:
            twin = copy.deepcopy(module).cpu()
        except Exception as error:
            return f"it cannot be copied for a trial: {error}"
        if any(p.dtype in (torch.float16, torch.bfloat16) for p in twin.parameters()):
            twin = twin.float()
        for part in twin.modules():
            part.__dict__.pop("forward", None)
            part.__dict__.pop(method, None)
            for hooks in (part._forward_hooks, part._forward_pre_hooks, part._backward_hooks, part._backward_pre_hooks):
                hooks.clear()
        _disturb(twin)
        replacement.stand_in(twin)

        def original(*args: Any, twin: nn.Module = twin, **kwargs: Any) -> Any:
            left_to_original.append(twin.training)
            return getattr(type(twin), method)(twin, *args, **kwargs)

        left_to_original.clear()
        results.append(_run(partial(call, twin, original), twin, replacement.probe(twin)))
        kept = [(f"{path}.{name}", value) for path, part in twin.named_modules() for name, value in attributes(part)]
        attributes_left.append([(name, v if isinstance(v, PLAIN) else type(v)) for name, v in kept])
        results[-1]["buffers and attributes"] = [value.detach() for _, value in kept if isinstance(value, Tensor)]
    if set(left_to_original) == {False, True}:
        return "calls as it is now would all be left to its own forward"
    if attributes_left[0] != attributes_left[1]:
        return "a trial left other attributes behind"
    for what, expected in results[0].items():
        got = results[1][what]
        if [(x.shape, x.dtype) for x in expected] != [(x.shape, x.dtype) for x in got]:
            return f"a trial gave {what} of another shape or dtype"
        # Against the largest of all: the gradient of a key's bias, for one, is zero but for rounding.
        finite = [x.double() for x in expected if x.numel()]
        size = max((x[x.isfinite()].abs().max().item() for x in finite if x.isfinite().any()), default=0.0)
        for x, y in zip(expected, got):
            if what == "buffers and attributes" and torch.equal(x, y):  # masks hold infinities
                continue
            distance = (x.double() - y.double()).abs().max().item() if x.numel() else 0.0
            eps = torch.finfo(x.dtype).eps if x.is_floating_point() else 0.0
            if not distance <= size * 32 * eps:  # not "distance >": NaN must not pass
                return f"a trial gave other {what}: they differ by {distance:.1e} where the largest is {size:.1e}"
    return None


@torch.no_grad()
def _disturb(module: nn.Module) -> None:
    """Weights as after training: adapters start at zero, where forks that differ give the same."""
    generator = torch.Generator().manual_seed(0)
    for p in module.parameters():
        if p.is_floating_point():
            scale = 0.1 if p.dim() < 2 else (len(p) / p.numel()) ** 0.5
            p.data = p + scale * torch.randn(p.shape, generator=generator, device="cpu").to(p)


def _original(module: nn.Module, original: Any, *inputs: Any) -> Any:
    return original(*inputs)


@torch.autocast("cpu", enabled=False)
def _run(call: Callable[..., Any], module: nn.Module, inputs: Inputs) -> dict[str, list[Tensor]]:
    """What comes out in evaluation, and in training with the same random numbers, and what is learnt then."""
    module.eval()
    with torch.no_grad():  # copies are given: some modules write into their input
        found = {"outputs": _tensors(call(*_copies(inputs)))}
    module.train()
    learning = [t for t in (*_tensors(inputs), *module.parameters()) if t.is_floating_point()]
    learning = [t.requires_grad_() for t in learning]
    with torch.random.fork_rng(devices=()), torch.enable_grad():
        torch.default_generator.manual_seed(0)  # those of GPUs are not forked
        outputs = _tensors(call(*_copies(inputs)))
        found["outputs in training"] = [out.detach() for out in outputs]
        outputs = [out for out in outputs if out.requires_grad]
        weights = [torch.cos(torch.arange(out.numel(), device="cpu")).view(out.shape).to(out.dtype) for out in outputs]
        grads = torch.autograd.grad(outputs, learning, weights, allow_unused=True) if outputs else ()
    found["gradients"] = [t.new_zeros(0) if g is None else g for g, t in zip(grads, learning)]
    return found


def _copies(inputs: Inputs) -> Inputs:
    """Of every tensor one, also of one that stands in several places."""
    made: dict[Tensor, Tensor] = {t: t.clone() for t in _tensors(inputs)}
    return tree_map_only(Tensor, made.__getitem__, inputs)


def _tensors(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    values = result.values() if isinstance(result, dict) else result if isinstance(result, (tuple, list)) else ()
    return [tensor for value in values for tensor in _tensors(value)]
