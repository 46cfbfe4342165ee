"""The modules of a model, those too that it keeps in plain lists, dictionaries and attributes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from .watch import OF_ALL


def modules_of(model: nn.Module) -> dict[str, nn.Module]:
    """Path to module, each module once, in the order of ``named_modules``; behind a module's children what it hides.

    A frozen backbone is often put into a list so that its weights are not among the model's: ``self.backbone = [vit]`` is
    found as ``backbone.0``.
    """
    found: dict[str, nn.Module] = {}
    seen: set[nn.Module] = set()

    def visit(path: str, module: nn.Module) -> None:
        if module in seen:
            return
        seen.add(module)
        found[path] = module
        prefix = f"{path}." if path else ""
        for name, child in module._modules.items():
            if child is not None:
                visit(prefix + name, child)
        for name, value in vars(module).items():
            if name not in OF_ALL:
                for hidden, child in _within(value, name):
                    visit(prefix + hidden, child)

    visit("", model)
    return found


def _within(value: Any, path: str, depth: int = 0) -> Iterator[tuple[str, nn.Module]]:
    if issubclass(type(value), nn.Module):  # isinstance takes weak references for what they refer to
        yield path, value
    elif type(value) in (list, tuple, dict) and depth < 3:
        for key, item in value.items() if type(value) is dict else enumerate(value):
            yield from _within(item, f"{path}.{key}", depth + 1)
