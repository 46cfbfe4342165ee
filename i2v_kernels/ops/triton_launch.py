"""Launches that are planned once: what a call derives from shapes, strides, dtypes and alignment is kept for the next one.

Kept are numbers, the compiled kernel, and where in its arguments the pointers go; never a tensor. A launch that is repeated
calls the compiled kernel as Triton itself does, with pointers in place of tensors.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton import knobs
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from .backends import INTERPRETED
from .triton_common import Launch, dot_precision

LARGEST = 4096  # calls that are kept; with one more all are forgotten

_CALL = (
    "kernel.run(grid_0,grid_1,grid_2,stream,kernel.function,kernel.packed_metadata,launch_metadata,"
    "knobs.runtime.launch_enter_hook,knobs.runtime.launch_exit_hook,*bound_args.values())"
)


def _calls_as_we_do() -> bool:
    """Whether this Triton calls its compiled kernels as ``_call`` does."""
    try:
        return _CALL in re.sub(r"\s", "", inspect.getsource(JITFunction.run))
    except (OSError, TypeError):
        return False


FAST = not INTERPRETED and _calls_as_we_do()


@dataclass(frozen=True)
class Place:
    """A tensor of a launch: where it lies in one of the call's tensors, and how."""

    index: int
    offset: int  # bytes
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    def of(self, tensors: Sequence[Tensor | None]) -> Tensor:
        base = tensors[self.index]
        assert base is not None
        start = base.storage_offset() * base.element_size() + self.offset
        view = torch.empty(0, dtype=self.dtype, device=base.device)
        return view.set_(base.untyped_storage(), start // self.dtype.itemsize, self.shape, self.stride)


class Step(NamedTuple):
    """A compiled kernel and its arguments: ``slots`` says which of ``values`` are which of the call's pointers, how far on."""

    kernel: Any
    programs: int
    values: list[Any]
    slots: list[tuple[int, int, int]]


@dataclass
class Planned:
    """What one kind of call launches. ``memory``: shapes and dtypes of what the plan made; the first ``returned`` go to the
    caller. ``steps`` once the kernels are compiled.
    """

    launches: list[Launch]  # with Places for tensors
    memory: list[tuple[tuple[int, ...], torch.dtype]]
    returned: list[int | None]
    steps: list[Step] | None = None


PLANNED: dict[tuple[Any, ...], Planned] = {}


def run(plan: Callable[..., Any], tensors: Sequence[Tensor | None], options: tuple[Any, ...]) -> Sequence[Tensor | None]:
    """Run the launches of ``plan(*tensors, *options)`` on the current stream of the first tensor's device.

    The plan, a function of a module, returns a Launch or a list of them, or a tuple of that and memory that the caller wants,
    which is returned here. It depends on what the tensors look like alone: it sees them without their values, as in
    ``torch.device("meta")``. Memory that it makes by ``torch.empty`` is made anew at each call. ``options`` can be hashed.
    """
    first: Tensor = tensors[0]  # type: ignore[assignment]
    device, pointers = first.get_device(), []
    key: list[Any] = [plan, options, device, first.dtype is torch.float32 and dot_precision(torch.float32)]
    for x in tensors:
        if x is None:
            pointers.append(0)
            key.append(None)
        else:
            pointer = x.data_ptr()
            pointers.append(pointer)
            key += (x.shape, x.stride(), x.dtype, pointer % 16)
    known = tuple(key)
    planned = PLANNED.get(known)
    if planned is None:
        planned = _first(known, plan, tensors, options)
    memory: list[Tensor] = []
    if planned.memory:
        memory = [torch.empty(shape, dtype=dtype, device=first.device) for shape, dtype in planned.memory]
    if planned.steps is None or _special():
        _compile(planned, (*tensors, *memory), device)
    else:
        if memory:
            pointers += [x.data_ptr() for x in memory]
        active = driver.active
        current = active.get_current_device()
        if device != current and device >= 0:
            with torch.cuda.device(device):
                _call(planned.steps, pointers, active.get_current_stream(device))
        else:
            _call(planned.steps, pointers, active.get_current_stream(current))
    return [None if i is None else memory[i] for i in planned.returned] if planned.returned else ()


def _call(steps: list[Step], pointers: list[int], stream: int) -> None:
    enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    hooked = getattr(enter, "calls", enter) or getattr(leave, "calls", leave)
    for kernel, programs, template, slots in steps:
        values = template.copy()
        for i, index, offset in slots:
            values[i] = pointers[index] + offset
        if hooked:
            about = kernel.launch_metadata((programs, 1, 1), stream, *values)
            kernel.run(programs, 1, 1, stream, kernel.function, kernel.packed_metadata, about, enter, leave, *values)
        else:
            kernel.run(programs, 1, 1, stream, kernel.function, kernel.packed_metadata, None, None, None, *values)


def _special() -> Any:
    """Whether Triton would compile otherwise than usual now."""
    runtime = knobs.runtime
    return runtime.debug or knobs.compilation.instrumentation_mode or getattr(runtime, "add_stages_inspection_hook", None)


def _first(
    key: tuple[Any, ...], plan: Callable[..., Any], tensors: Sequence[Tensor | None], options: tuple[Any, ...]
) -> Planned:
    """Asks the plan of a call that has no like among those before; it sees shapes, strides and dtypes alone."""
    likes = [None if x is None else torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta") for x in tensors]
    with _NothingComputed() as watch:
        result = plan(*likes, *options)
    found, *returned = result if isinstance(result, tuple) else (result,)
    launches = [found] if isinstance(found, Launch) else found
    where = {_storage(x): i for i, x in enumerate(likes) if x is not None}
    memory: list[tuple[tuple[int, ...], torch.dtype]] = []
    for x in (*returned, *(x for launch in launches for x in launch.args.values() if isinstance(x, Tensor))):
        if x is not None and _storage(x) not in where:
            if _storage(x) in map(_storage, watch.computed):
                raise ValueError(f"{plan} computes a tensor, which would be kept for other calls: compute it before")
            where[_storage(x)] = len(tensors) + len(memory)
            whole = x.is_contiguous() and x.untyped_storage().nbytes() == x.numel() * x.itemsize
            memory.append((tuple(x.shape) if whole else (x.untyped_storage().nbytes() // x.itemsize,), x.dtype))
    planned = Planned(
        [replace(launch, args=_places(launch, where)) for launch in launches if launch.programs > 0],
        memory,
        [None if x is None else where[_storage(x)] - len(tensors) for x in returned],
    )
    if len(PLANNED) >= LARGEST:
        PLANNED.clear()
    PLANNED[key] = planned
    return planned


class _NothingComputed(TorchDispatchMode):
    """Watches a plan: memory that it makes must be as ``torch.empty`` leaves it."""

    def __init__(self) -> None:
        super().__init__()
        self.computed: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if "empty" not in func._schema.name and not func.is_view:
            self.computed += [x for x in (result if isinstance(result, (tuple, list)) else (result,)) if isinstance(x, Tensor)]
        return result


def _storage(x: Tensor) -> int:
    return x.untyped_storage()._cdata


def _places(launch: Launch, where: dict[int, int]) -> dict[str, Any]:
    return {
        name: Place(where[_storage(x)], int(x.storage_offset()) * x.itemsize, tuple(x.shape), x.stride(), x.dtype)
        if isinstance(x, Tensor)
        else x
        for name, x in launch.args.items()
    }


def _compile(planned: Planned, tensors: Sequence[Tensor | None], device: int) -> None:
    """Run the launches by way of Triton, and keep what it compiled."""
    kernels = []
    with torch.cuda.device(device) if device >= 0 else nullcontext():
        for launch in planned.launches:
            args = {name: x.of(tensors) if isinstance(x, Place) else x for name, x in launch.args.items()}
            kernels.append(replace(launch, args=args).run())
    if FAST and None not in kernels and not _special():
        planned.steps = [_step(kernel, launch) for kernel, launch in zip(kernels, planned.launches)]


def _step(kernel: Any, launch: Launch) -> Step:
    given = {**launch.args, **launch.constexprs}
    values = [given[name] for name in launch.kernel.arg_names]
    slots = [(i, x.index, x.offset) for i, x in enumerate(values) if isinstance(x, Place)]
    return Step(kernel, launch.programs, [None if isinstance(x, Place) else x for x in values], slots)
