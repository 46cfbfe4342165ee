"""Which backend a call would use, and why the others would not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .ops import base, dispatcher


@dataclass(frozen=True)
class Explanation:
    """``backend`` would run the call; ``reasons`` says of every backend whether it could, and of the others why not."""

    op: str
    backend: str
    reasons: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{self.op}: {self.backend}"]
        lines += [f"  {'->' if name == self.backend else '  '} {name:<10} {why}" for name, why in self.reasons.items()]
        return "\n".join(lines)


def explain(op: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Explanation:
    """What ``op(*args, **kwargs)`` would run, without running it: ``print(explain(temporal_attention, q, k, v))``.

    Args:
        op: a function of this package, e.g. ``i2v_kernels.temporal_attention``.
        args, kwargs: its arguments; ``backend=`` too.

    Raises:
        TypeError: op is not one of this package's ops. Whatever the op itself raises for bad arguments.
    """
    found = base.OPS.get(getattr(op, "__name__", ""))
    if found is None:
        raise TypeError(f"explain: op={op!r} is not an op of i2v_kernels: {', '.join(sorted(base.OPS))}")
    recorded: list[tuple[Any, ...]] = []
    with found.recording(recorded):
        op(*args, **kwargs)
    *call, requested = recorded[0]
    by_formula = dispatcher.needs_formula(call)
    chosen = (found.with_formula(requested) if by_formula else found.choose(tuple(call), requested, quiet=True)).name
    reasons = {}
    for name in base.BACKENDS:
        why_not = found.why_not(name, tuple(call))
        if why_not is not None:
            reasons[name] = f"cannot: {why_not}"
        elif name == chosen:
            reasons[name] = _why(found, kwargs.get("backend"), by_formula)
        elif by_formula:
            reasons[name] = "PyTorch's own operators are followed by forward-mode and by the transforms of torch.func"
        elif name in found.by_name_only:
            reasons[name] = found.by_name_only[name]
        else:
            reasons[name] = "could run; another comes first on this device"
    return Explanation(found.name, chosen, reasons)


def _why(op: base.Op, backend: str | None, by_formula: bool) -> str:
    """Why that backend was chosen."""
    if backend:
        return "asked for by name"
    if op.forced:
        return f"asked for by I2V_KERNELS_BACKEND={op.forced}"
    why = "its formula can be differentiated in every way" if by_formula else "first choice that can run"
    return f"{why} (I2V_KERNELS_BACKEND={base.FORCED}: {op.name} has no such backend)" if base.FORCED else why
