"""Argument checks shared by the ops: each raises one error that names the op, the argument, its value and what fits."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from . import dispatcher
from .base import FLOATS

LARGEST = 2**31 - 1  # of what is counted: frames, patches, channels


def tensor(
    op: str, name: str, value: object, shape: tuple[int | None, ...], layout: str, like: Tensor | None = None,
    any_stride: bool = False,
) -> None:  # fmt: skip
    """A floating-point tensor of this shape (None: any size), last stride 1, on the device and of the dtype of ``like``."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a torch.Tensor {layout}, got {type(value).__name__}")
    if value.layout is not torch.strided:
        raise TypeError(f"{op}: {name}.layout={value.layout}, but only dense tensors are supported")
    dtype, got = value.dtype, value.shape
    if dtype not in FLOATS:
        raise TypeError(f"{op}: {name}.dtype={dtype}, but only float64, float32, bfloat16 and float16 are supported")
    fits = len(got) == len(shape)
    if fits and got != shape:
        for a, b in zip(shape, got):  # not any(): a generator takes longer than all the rest
            if a is not None and a != b:
                fits = False
    if not fits:
        wanted = "" if all(size is None for size in shape) else f" with sizes {tuple('*' if s is None else s for s in shape)}"
        raise ValueError(f"{op}: {name}.shape={tuple(got)}, but {layout}{wanted} is needed")
    if not any_stride and got[-1] > 1 and value.stride(-1) != 1 and not dispatcher.is_transformed(value):
        raise ValueError(
            f"{op}: {name}.stride()={tuple(value.stride())}, but the last dimension must have stride 1; "
            f"pass {name}.contiguous() or arrange the layout so"
        )
    if like is not None:
        same_place(op, name, value, like)
        if dtype != like.dtype:
            raise TypeError(f"{op}: {name}.dtype={dtype}, but the first argument has {like.dtype}")


def same_place(op: str, name: str, value: Tensor, like: Tensor) -> None:
    """On the same device."""
    if value.device != like.device:
        raise ValueError(f"{op}: {name} is on {value.device}, but the first argument is on {like.device}")


def no_overlap(op: str, name: str, value: Tensor) -> None:
    """No two elements in the same memory: each dimension steps over all that lies within it."""
    if value.is_contiguous():
        return
    dims = [(stride, size) for stride, size in zip(value.stride(), value.shape) if size > 1]
    for i, (stride, _) in enumerate(dims):
        within = sum((n - 1) * s for j, (s, n) in enumerate(dims) if s < stride or (s == stride and j < i))
        if stride <= within:
            raise ValueError(
                f"{op}: {name}.stride()={tuple(value.stride())} with shape {tuple(value.shape)}: elements share memory, but "
                f"are overwritten; pass {name}.clone()"
            )


def mask(op: str, value: object, layout: str, shape: tuple[int, ...], like: Tensor, name: str = "mask") -> Tensor:
    """A contiguous bool tensor of this shape, on the device of ``like``."""
    if not isinstance(value, Tensor) or value.dtype != torch.bool:
        got = getattr(value, "dtype", value)
        raise TypeError(f"{op}: {name} must be a bool tensor {layout}, True where valid, got {got!r}")
    if value.shape != shape:
        raise ValueError(f"{op}: {name}.shape={tuple(value.shape)}, but {layout} = {shape} is needed")
    same_place(op, name, value, like)
    return value.contiguous()


def integer(op: str, name: str, value: object, low: int | None = None, high: int | None = None) -> int:
    """An int in [low, high]."""
    if type(value) is not int and (isinstance(value, bool) or not isinstance(value, (int, torch.SymInt))):
        raise TypeError(f"{op}: {name}={value!r} must be an int")
    if (low is not None and value < low) or (high is not None and value > high):
        raise ValueError(f"{op}: {name}={value} must " + (f"be at least {low}" if high is None else f"lie in [{low}, {high}]"))
    return value  # type: ignore[return-value]


def flag(op: str, name: str, value: object) -> bool:
    """A bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{op}: {name}={value!r} must be a bool")
    return value


def number(op: str, name: str, value: object, hint: str = "", finite: bool = False) -> float:
    """A number as a float."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{op}: {name}={value!r} must be a number{hint}")
    try:
        found = float(value)
    except OverflowError:
        raise ValueError(f"{op}: {name} is an int of {value.bit_length()} bits, but must be within a float's range") from None  # type: ignore[union-attr]
    if finite and not math.isfinite(found):
        raise ValueError(f"{op}: {name}={value!r} must be finite")
    return found


def one_of(op: str, name: str, value: object, choices: Iterable[str]) -> None:
    """One of these strings."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{op}: {name}={value!r} is not one of {', '.join(map(repr, choices))}")


def sizes(op: str, name: str, value: object, names: str, low: int = 0) -> tuple[int, ...]:
    """As many ints of at least ``low`` as there are names, such as "H, W"."""
    count = names.count(",") + 1
    if not isinstance(value, (tuple, list)) or len(value) != count:
        raise TypeError(f"{op}: {name}={value!r} must be {count} ints ({names})")
    return tuple(integer(op, f"{name}[{i}]", size, low, LARGEST) for i, size in enumerate(value))


def kernel(op: str, value: object) -> tuple[int, ...]:
    """The size of a convolution's kernel, ``(kt, kh, kw)``, odd."""
    found = sizes(op, "kernel_size", value, "kt, kh, kw", low=1)
    if not all(size % 2 for size in found):
        raise ValueError(f"{op}: kernel_size={value!r}, but kt, kh and kw must be odd")
    return found


def items(op: str, name: str, value: object, what: str) -> list[Any]:
    """What a list holds."""
    if isinstance(value, (str, bytes)) or not isinstance(value, Iterable):
        raise TypeError(f"{op}: {name}={value!r} must be {what}")
    return list(value)


def autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Under ``torch.autocast``: the tensors in its dtype, as PyTorch does for matrix products and convolutions."""
    first = tensors[0]
    if isinstance(first, Tensor):
        device = "cuda" if first.is_cuda else "cpu" if first.is_cpu else ""
        if device and torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            return tuple(t.to(dtype) if isinstance(t, Tensor) and t.dtype in FLOATS[1:] else t for t in tensors)
    return tensors
