"""``patch``, ``unpatch`` and ``patched``: the forwards of instances, replaced and put back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from functools import partial
from types import MethodType
from typing import Any, TypeAlias

import torch
from torch import nn

from .catalogue import RULES
from .report import PatchReport, Row
from .rules import Replacement, Rule, differs

Chosen: TypeAlias = "str | type[nn.Module] | Sequence[str | type[nn.Module]] | None"


def patch(
    model: nn.Module,
    include: Chosen = None,
    exclude: Chosen = None,
    dry_run: bool = False,
) -> PatchReport:
    """Makes a model that you have faster: modules that this package can compute better get another ``forward``.

    Only instances change, and only their ``forward``: classes, other models, parameters, state dict keys, hooks,
    ``requires_grad`` and ``training`` are as before, and calls that the replacement does not cover, such as
    ``output_attentions=True`` or dropout in training, run the class's own forward. Modules within ``DistributedDataParallel``,
    FSDP, PEFT models and ``torch.compile``'s are found like others. Before a kind of modules is replaced, copies of one of
    them run both ways on random inputs; if outputs or gradients differ it stays as it is. A second call does nothing.

    Args:
        model: any module; it is changed in place.
        include: what may be replaced: patterns such as ``"encoder.layer.*"`` for the module's path or the name of its class,
            or classes. None: everything.
        exclude: what must not be, likewise; it has the last word.
        dry_run: change nothing, report what would be.

    Returns:
        PatchReport: a row for each module that a rule knew: replaced by what, or why not. ``print`` it.

    Raises:
        TypeError: model is no ``nn.Module``; include or exclude has something else than strings and classes.
        ValueError: a pattern of include or exclude matches no module: most likely a spelling mistake.

    >>> import torch, i2v_kernels
    >>> model = torch.nn.Sequential(torch.nn.Conv3d(64, 64, (3, 1, 1), padding=(1, 0, 0), groups=64))
    >>> report = i2v_kernels.patch(model)
    >>> len(report.replaced)
    1
    >>> _ = i2v_kernels.unpatch(model)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"patch: model is a {type(model).__name__}, but an nn.Module is needed")
    modules = dict(model.named_modules())
    wanted = _selected(modules, include, "include") if include is not None else set(modules)
    unwanted = _selected(modules, exclude, "exclude") if exclude is not None else set()
    report, tried = PatchReport(dry_run=dry_run), _Trials()
    for name, module in modules.items():
        found = _first(RULES, module)
        if found is None:
            continue
        if not isinstance(found, str):
            if name in unwanted or name not in wanted:
                found = "excluded" if name in unwanted else "not included"
            elif is_patched(module):
                report.rows.append(Row(name, type(module).__name__, True, f"{found.by} (already)"))
                continue
            else:
                found = _reason_against(module) or tried.reason_against(module, found) or found
        if isinstance(found, str):
            report.rows.append(Row(name, type(module).__name__, False, found))
            continue
        if not dry_run:
            _replace(module, found.forward)
        report.rows.append(Row(name, type(module).__name__, True, found.by))
    return report


def unpatch(model: nn.Module) -> nn.Module:
    """Undoes ``patch``: every module has its class's forward again. Returns the model.

    Raises:
        TypeError: model is no ``nn.Module``.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"unpatch: model is a {type(model).__name__}, but an nn.Module is needed")
    for module in model.modules():
        if is_patched(module):
            _put_back(module)
    return model


@contextmanager
def patched(model: nn.Module, **options: Any) -> Iterator[PatchReport]:
    """``with patched(model) as report:`` patches within the block; modules that were patched before stay so.

    Args:
        model, options: as for ``patch``.
    """
    before = {module for module in model.modules() if is_patched(module)}
    report = patch(model, **options)
    try:
        yield report
    finally:
        for module in model.modules():
            if module not in before and is_patched(module):
                _put_back(module)


def is_patched(module: nn.Module) -> bool:
    """Whether ``patch`` replaced this module's forward."""
    return hasattr(getattr(module.__dict__.get("forward"), "__func__", None), "i2v_kernels_replacement")


def _replace(module: nn.Module, replacement: Callable[..., Any]) -> None:
    # A method named forward: copies of the module bind it to the copy, and pickles, which look it up by this name in the
    # class, load as the class's own.
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return replacement(self, partial(type(self).forward, self), *args, **kwargs)

    forward.i2v_kernels_replacement = replacement  # type: ignore[attr-defined]
    module.__dict__["forward"] = MethodType(forward, module)
    module.__dict__["_replicate_for_data_parallel"] = MethodType(_replicate_for_data_parallel, module)


def _replicate_for_data_parallel(self: nn.Module) -> nn.Module:
    """``nn.DataParallel`` copies a module's attributes as they are: a replica's forward would run the original's weights."""
    replica = type(self)._replicate_for_data_parallel(self)
    for method in (self.__dict__["forward"], self.__dict__["_replicate_for_data_parallel"]):
        replica.__dict__[method.__func__.__name__] = MethodType(method.__func__, replica)
    return replica


def _put_back(module: nn.Module) -> None:
    del module.__dict__["forward"], module.__dict__["_replicate_for_data_parallel"]


def _first(rules: Sequence[Rule], module: nn.Module) -> Replacement | str | None:
    return next((found for rule in rules if (found := rule(module)) is not None), None)


def _reason_against(module: nn.Module) -> str | None:
    own = module.__dict__.get("forward")  # in a pickle that was patched it is the class's
    if own is not None and getattr(own, "__func__", None) is not type(module).forward:
        return "its forward has been replaced by other code"
    if isinstance(module, torch.jit.ScriptModule):
        return "it is a TorchScript module"
    if torch.nn.utils.parametrize.is_parametrized(module):
        return "its weights are parametrised"
    return None


class _Trials:
    """One trial for all modules that are alike: same class, same rule, same shapes and settings."""

    def __init__(self) -> None:
        self.reasons: dict[Any, str | None] = {}

    def reason_against(self, module: nn.Module, replacement: Replacement) -> str | None:
        parts = ((name, type(part), part.extra_repr(), _settings(part)) for name, part in module.named_modules())
        tensors = ((name, p.shape, p.dtype, p.device) for name, p in module.named_parameters())
        key = (replacement.by, tuple(parts), tuple(tensors))
        if key not in self.reasons:
            self.reasons[key] = differs(module, replacement)
        return self.reasons[key]


def _settings(module: nn.Module) -> tuple[Any, ...]:
    """The plain values among its attributes."""
    plain = (bool, int, float, str, tuple, type(None))
    return tuple((name, repr(value)) for name, value in vars(module).items() if isinstance(value, plain))


def _selected(modules: dict[str, nn.Module], chosen: Any, argument: str) -> set[str]:
    chosen = [chosen] if isinstance(chosen, (str, type)) else list(chosen)
    names: set[str] = set()
    for item in chosen:
        if isinstance(item, str):
            found = {n for n, m in modules.items() if fnmatchcase(n, item) or fnmatchcase(type(m).__name__, item)}
        elif isinstance(item, type):
            found = {n for n, m in modules.items() if isinstance(m, item)}
        else:
            raise TypeError(f"patch: {argument} has {item!r}, but patterns and module classes are needed")
        if not found:
            raise ValueError(f"patch: {argument}={item!r} matches no module of the model, neither a path nor a class")
        names |= found
    return names
