"""``patch``, ``unpatch`` and ``patched``: the forwards of instances, replaced and put back."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from functools import partial
from types import MethodType
from typing import Any, TypeAlias

import torch
from torch import nn

from ..nn.plain import PATCHED, is_replaced, why_not_tensors
from .catalogue import RULES
from .report import PatchReport, Row
from .rules import Found, Replacement, Rule
from .trial import Trials
from .walk import modules_of
from .watch import Watch, is_ordinary

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

    Examples:
        >>> import torch, i2v_kernels
        >>> conv = torch.nn.Conv3d(64, 64, (3, 1, 1), padding=(1, 0, 0), groups=64)
        >>> model = torch.nn.Sequential(conv)
        >>> report = i2v_kernels.patch(model)
        >>> len(report.replaced)
        1
        >>> _ = i2v_kernels.unpatch(model)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"patch: model is a {type(model).__name__}, but an nn.Module is needed")
    modules = modules_of(model)
    wanted = _selected(modules, include, "include") if include is not None else set(modules)
    unwanted = _selected(modules, exclude, "exclude") if exclude is not None else set()
    report, tried = PatchReport(dry_run=dry_run), Trials()
    chosen: list[tuple[nn.Module, dict[str, Callable[..., Any]]]] = []
    for name, module in modules.items():
        found = _first(RULES, module)
        if found is None:
            continue
        if not isinstance(found, str):
            if name in unwanted or name not in wanted:
                found = "excluded" if name in unwanted else "not included"
            elif is_patched(module):
                by = found[0].by if isinstance(found, tuple) else found.by
                report.rows.append(Row(name, type(module).__name__, True, f"{by} (already)"))
                continue
            else:
                found = _reason_against(module) or _tried(tried, module, found)
        if isinstance(found, Replacement):
            chosen.append((module, {method: _method_of(module, method, found) for method in found.methods}))
        report.rows.append(Row(name, type(module).__name__, *((False, found) if isinstance(found, str) else (True, found.by))))
    if not dry_run:  # after all has been asked, so that an error leaves the model as it was
        for module, methods in chosen:
            _replace(module, methods)
    return report


def unpatch(model: nn.Module) -> nn.Module:
    """Undoes ``patch``: every module has its class's forward again. Returns the model.

    Where other code has wrapped the forward since, its wrapper stays and calls the class's own; a ``UserWarning`` names these.

    Raises:
        TypeError: model is no ``nn.Module``.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"unpatch: model is a {type(model).__name__}, but an nn.Module is needed")
    _undo(modules_of(model))
    return model


@contextmanager
def patched(model: nn.Module, **options: Any) -> Iterator[PatchReport]:
    """``with patched(model) as report:`` patches within the block; modules that were patched before stay so.

    Args:
        model, options: as for ``patch``.
    """
    before = {module for module in modules_of(model).values() if _is_on(module)} if isinstance(model, nn.Module) else set()
    report = patch(model, **options)
    try:
        yield report
    finally:
        _undo({name: module for name, module in modules_of(model).items() if module not in before})


def is_patched(module: nn.Module) -> bool:
    """Whether ``patch`` replaced this module's forward, or other methods of it."""
    return _is_on(module) and bool(_replaced(module))


def _is_on(module: nn.Module) -> bool:
    """Whether it was patched and not put back since, though other code may have wrapped its forward."""
    return getattr(vars(module).get("_replicate_for_data_parallel"), "__func__", None) is _replicate_for_data_parallel


def _replaced(module: nn.Module) -> list[str]:
    """The methods of this instance that ``patch`` gave it."""
    return [name for name, value in vars(module).items() if hasattr(getattr(value, "__func__", None), PATCHED)]


def _method_of(module: nn.Module, name: str, found: Replacement) -> Callable[..., Any]:
    """The new method, which runs the class's own in calls for which the replacement has not been proved."""
    watch, replacement = Watch(module, found.uncalled, (*found.reads, *found.methods)), found.forward

    # A method of the old one's name: copies of the module bind it to the copy, and pickles, which look it up by this name in
    # the class, load as the class's own.
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        original = partial(getattr(type(self), name), self)
        if _is_on(self) and is_ordinary(args, kwargs) and watch.holds(self):
            return replacement(self, original, *args, **kwargs)
        return original(*args, **kwargs)

    forward.__name__ = name
    forward.__signature__ = inspect.signature(getattr(type(module), name))  # type: ignore[attr-defined]  # exporters and trainers ask
    setattr(forward, PATCHED, replacement)
    return forward


def _replace(module: nn.Module, methods: dict[str, Callable[..., Any]]) -> None:
    for name, method in methods.items():
        module.__dict__[name] = MethodType(method, module)
    module.__dict__["_replicate_for_data_parallel"] = MethodType(_replicate_for_data_parallel, module)


def _replicate_for_data_parallel(self: nn.Module) -> nn.Module:
    """``nn.DataParallel`` copies a module's attributes as they are: a replica's forward would run the original's weights."""
    replica = type(self)._replicate_for_data_parallel(self)
    for name in (*_replaced(self), "_replicate_for_data_parallel"):
        replica.__dict__[name] = MethodType(self.__dict__[name].__func__, replica)
    return replica


def _undo(modules: dict[str, nn.Module]) -> None:
    wrapped = []
    for name, module in modules.items():
        if _is_on(module):
            del module.__dict__["_replicate_for_data_parallel"]  # without which our forward is the class's own
            if not _replaced(module):
                wrapped.append(name)
        for method in _replaced(module):
            del module.__dict__[method]
    if wrapped:
        warnings.warn(
            f"unpatch: other code has wrapped the forward of {', '.join(wrapped)} since patch: its wrapper stays where it is, "
            "and calls the class's own forward again",
            stacklevel=3,
        )


def _tried(trials: Trials, module: nn.Module, found: Replacement | tuple[Replacement, ...]) -> Replacement | str:
    """The first that passes its trial, or why the last one does not."""
    reason = ""
    for replacement in found if isinstance(found, tuple) else (found,):
        reason = trials.reason_against(module, replacement) or ""
        if not reason:
            return replacement
    return reason


def _first(rules: Sequence[Rule], module: nn.Module) -> Found:
    return next((found for rule in rules if (found := rule(module)) is not None), None)


def _reason_against(module: nn.Module) -> str | None:
    own = module.__dict__.get("forward")  # in a pickle that was patched it is the class's
    if own is not None and getattr(own, "__func__", None) is not type(module).forward and not is_replaced(module):
        return "its forward has been replaced by other code"
    if isinstance(module, torch.jit.ScriptModule):
        return "it is a TorchScript module"
    if torch.nn.utils.parametrize.is_parametrized(module):
        return "its weights are parametrised"
    if any(hasattr(p, "placements") for p in module.parameters()):  # sharded ones are gathered before they are used
        return None
    return None if (what := why_not_tensors(module)) is None else f"it {what}"


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
