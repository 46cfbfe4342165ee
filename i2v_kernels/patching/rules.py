"""What a rule is, and what rules share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..nn.plain import why_not_plain

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
        uncalled: paths of the children that it never calls. If one of them is no longer what it was, or not plain, the call is
            the original's. Those that it calls or not, it asks ``nn.plain.is_plain`` about.
        reads: attributes of the module that it reads at each call; if others have changed, the call is the original's.
        methods: what it replaces, all by ``forward``: the module's own, or others that a model calls it by.
        stand_in: puts other modules in the place of children of a copy that are called both ways and that a trial cannot run.
    """

    forward: Callable[..., Any]
    by: str
    probe: Callable[[Any], Inputs]
    known: bool = False
    uncalled: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()
    methods: tuple[str, ...] = ("forward",)
    stand_in: Callable[[Any], None] = lambda module: None


# Replacement: take it; of several the first that passes its trial. str: it is one of mine, but this speaks against it. None:
# not one of mine.
Found = Replacement | tuple[Replacement, ...] | str | None
Rule = Callable[[Any], Found]


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


def not_plain(module: nn.Module, *paths: str, kind: type[nn.Module] | None = None) -> str | None:
    """A reason if one of these children may not be passed over, now; see ``nn.plain``."""
    for path in paths:
        if (what := why_not_plain(module.get_submodule(path), kind)) is not None:
            return f"its {path} {what}"
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
