"""What a rule is, and what rules share."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

Inputs = tuple[Any, ...]


@dataclass(frozen=True)
class Replacement:
    """A forward for one module.

    Attributes:
        forward: called as ``forward(module, original, *args, **kwargs)``; ``original`` is the class's own, already bound,
            for calls that the replacement does not cover.
        by: what the report says.
        probe: makes inputs for a copy of the module; the replacement must give what the class's forward gives.
        known: the class is a library's own, not one that looks like it: where no copy can be made, none is needed.
    """

    forward: Callable[..., Any]
    by: str
    probe: Callable[[Any], Inputs]
    known: bool = False


# Replacement: take it. str: it is one of mine, but this speaks against it. None: not one of mine.
Rule = Callable[[Any], "Replacement | str | None"]


def class_of(module: nn.Module) -> type[nn.Module]:
    """The module's class; of one that ``fully_shard`` derived a class for, that which it had."""
    kinds = type(module).__mro__
    return kinds[2] if kinds[1].__name__ == "FSDPModule" else kinds[0]


def is_class(module: nn.Module, package: str, *names: str) -> bool:
    """Whether this is one of a package's own classes, without importing the package."""
    kind = class_of(module)
    return kind.__name__ in names and kind.__module__.startswith(package + ".")


def has_parts(module: nn.Module, **kinds: type[nn.Module] | None) -> bool:
    """Whether it has children of these names and, unless None, kinds."""
    children = dict(module.named_children())
    return all(name in children and isinstance(children[name], kind or nn.Module) for name, kind in kinds.items())


def hooked(*modules: nn.Module) -> bool:
    """Whether not calling these modules would leave out a hook."""
    return any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks for m in modules)


def not_linear(*layers: nn.Module) -> str | None:
    """A reason if one of them is no plain ``nn.Linear``."""
    for layer in layers:
        if type(layer) is not nn.Linear:
            package = type(layer).__module__.split(".")[0]
            return f"a layer of it is a {type(layer).__name__} of {package}, which computes something else than its weight says"
    return None


def drops(module: nn.Module, *probabilities: float) -> bool:
    """Whether dropout is at work: fused code has none."""
    return module.training and any(p > 0 for p in probabilities)


def keeps_its_dtype(x: Tensor) -> bool:
    """Whether a product of x is of x's dtype: autocast may change it, and x is added as it is."""
    kind = x.device.type
    return not torch.is_autocast_enabled(kind) or x.dtype == torch.get_autocast_dtype(kind)


def random_like(module: nn.Module, *shape: int) -> Tensor:
    """Seeded numbers in the dtype and on the device of the module's parameters; nothing of the global generators is used."""
    like = next((p for p in module.parameters() if p.is_floating_point()), torch.empty(0))
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), device="cpu").to(like)


@torch.inference_mode(False)
def differs(module: nn.Module, replacement: Replacement) -> str | None:
    """None if the replacement gives what the class's forward gives, in evaluation and in training, gradients included; else
    how not. Copies without hooks are tried, on the CPU and in float32 or wider: what is compared is the computation, which
    the rounding of 16 bits or of TF32 would hide."""
    tensors = [*module.parameters(), *module.buffers()]
    if any(t.is_meta for t in tensors):
        return "its weights are on the meta device: load them first"
    if any(hasattr(t, "placements") for t in tensors):  # DTensor
        return None if replacement.known else "its weights are sharded, so that no trial can be made: patch it before"
    results = []
    for call in (_original, replacement.forward):
        try:
            twin = copy.deepcopy(module).cpu()
        except Exception as error:
            return f"it cannot be copied for a trial: {error}"
        if any(p.dtype in (torch.float16, torch.bfloat16) for p in twin.parameters()):
            twin = twin.float()
        for part in twin.modules():
            part.__dict__.pop("forward", None)
            for hooks in (part._forward_hooks, part._forward_pre_hooks, part._backward_hooks, part._backward_pre_hooks):
                hooks.clear()
        _disturb(twin)
        try:
            results.append(_run(partial(call, twin, partial(type(module).forward, twin)), twin, replacement.probe(twin)))
        except Exception as error:
            return f"a trial with inputs as expected failed: {type(error).__name__}: {error}"
    for what, expected in results[0].items():
        got = results[1][what]
        if [(x.shape, x.dtype) for x in expected] != [(x.shape, x.dtype) for x in got]:
            return f"a trial gave {what} of another shape or dtype"
        # Against the largest of all: the gradient of a key's bias, for one, is zero but for rounding.
        size = max((x.double().abs().max().item() for x in expected if x.numel()), default=0.0)
        for x, y in zip(expected, got):
            distance = (x.double() - y.double()).abs().max().item() if x.numel() else 0.0
            if not distance <= size * 32 * torch.finfo(x.dtype).eps:  # not "distance >": NaN must not pass
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
