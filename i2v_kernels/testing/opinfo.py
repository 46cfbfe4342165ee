"""One ``OpInfo`` per op: samples, bad inputs, bytes and flops."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor

Choose = Callable[[Sequence[Any]], Any]
_drawing_later = False


@dataclass(frozen=True)
class Drawn:
    """A tensor of a model's call before ``Sample.to`` draws it, in the dtype and place that are asked for and in no other.
    It can be multiplied by a number.
    """

    shape: tuple[int, ...]
    seed: int
    pixels: bool = False  # uint8 from 0 to 255, else normal
    scale: float = 1.0

    def __mul__(self, factor: float) -> Drawn:
        return replace(self, scale=self.scale * factor)

    def numel(self) -> int:
        return prod(self.shape)

    def draw(self, dtype: torch.dtype, device: str | None) -> Tensor:
        if device == "meta":  # its shape is wanted
            return torch.empty(self.shape, dtype=torch.uint8 if self.pixels else dtype, device=device)
        generator = torch.Generator(device or "cpu").manual_seed(self.seed)
        if self.pixels:
            return torch.randint(0, 256, self.shape, dtype=torch.uint8, device=device, generator=generator)
        drawn = torch.randn(self.shape, dtype=dtype, device=device, generator=generator)
        return drawn if self.scale == 1 else drawn.mul_(self.scale)


@dataclass(frozen=True, eq=False)
class Sample:
    """Arguments of one call. Floating-point tensors are float64 on the CPU until ``to`` places them; those of a model's call
    are ``Drawn`` until then.

    ``telling``: like the first one of an op it stands for the others where a test takes long: with dynamic shapes, and in
    bfloat16 in Triton's interpreter.
    """

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    telling: bool = False

    def to(self, dtype: torch.dtype = torch.float64, device: str | None = None, requires_grad: bool = False) -> Sample:
        """The same call in another dtype and, if it is named, another place; strides kept, fresh leaves."""

        def place(value: Tensor | Drawn) -> Tensor:
            if isinstance(value, Drawn):
                return value.draw(dtype, device).requires_grad_(requires_grad and not value.pixels)
            floats = value.is_floating_point()
            if not floats and torch.device(device or value.device) == value.device:
                return value
            kind = dtype if floats else value.dtype
            return _moved(value, kind, device).requires_grad_(requires_grad and floats)

        return self.map(place)

    def map(self, change: Callable[[Any], Any]) -> Sample:
        """The same call with each tensor changed."""

        def each(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(map(each, value))
            return change(value) if isinstance(value, (Tensor, Drawn)) else value

        return replace(self, args=tuple(map(each, self.args)), kwargs={k: each(v) for k, v in self.kwargs.items()})

    def inputs(self) -> list[Tensor]:
        """All tensors, in order."""
        values: list[Any] = []
        for value in (*self.args, *self.kwargs.values()):
            values.extend(value if isinstance(value, tuple) else [value])
        return [v for v in values if isinstance(v, Tensor)]

    def tensors(self) -> list[Tensor]:
        """The floating-point tensors, in order: what gradients are taken of."""
        return [v for v in self.inputs() if v.is_floating_point()]

    @property
    def dtype(self) -> torch.dtype:
        """Of the floating-point tensors."""
        return self.tensors()[0].dtype


def _moved(x: Tensor, dtype: torch.dtype, device: str | None) -> Tensor:
    """A copy with x's strides, whose elements share memory where those of x do."""
    if x.numel() == 0:
        return torch.empty_strided(x.shape, x.stride(), dtype=dtype, device=device or x.device)
    extent = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride()))
    memory = x.detach().as_strided((extent,), (1,)).to(device or x.device, dtype, copy=True)
    return memory.as_strided(x.shape, x.stride())


@dataclass(frozen=True)
class OpInfo:
    """An op and all that tests and benches know of it.

    ``samples``: small calls: ordinary, then edges. ``models``: clips -> calls of real models, for benches; ``randn`` and
    ``pixels`` give ``Drawn`` there, so that a call costs nothing until it is placed.
    ``bad``: (what is wrong, args, kwargs, exception, a part of its text).
    ``drawn``: a call at random for the fuzz, which gives it ``choose``: one of a few values; see drawn.py.
    ``traffic``: bytes that the forward call must move at least (every input once, every output once).
    ``flops``: floating-point operations of the forward call (a multiply-add counts 2).
    ``dims``: which dimension is what in the first sample's first arguments and in the output, as in ``einsum``: "BTNC -> BNC".
    ``rows``: those that may have any number of entries, each computed by itself; the first counts clips, or what else a batch
    is made of. Tests repeat entries of each.
    ``more``: (first argument, count) -> it with so many entries of the last of ``rows``, where no argument has that dimension.
    """

    name: str
    op: Callable[..., Tensor]
    samples: Callable[[], list[Sample]]
    models: Callable[[int], list[Sample]]
    bad: Callable[[], list[tuple[str, tuple[Any, ...], dict[str, Any], type[Exception], str]]]
    drawn: Callable[[Choose], Sample]
    traffic: Callable[[Sample], int]
    flops: Callable[[Sample], int]
    dims: str = "BTNC -> BTNC"
    rows: str = "BN"
    more: Callable[[Tensor, int], Tensor] | None = None
    exact: bool = False  # copies: every backend gives the reference's bits
    autocasts: bool = True  # as matrix products and convolutions do; else its dtype is that of its inputs
    wide: bool = False  # its output is float32 at least, whatever its inputs are
    products: bool = False  # nearly all of it is PyTorch's matrix products, whose bits depend on the number of threads
    pads: bool = False  # may skip what lies outside the clip, where the definition multiplies zeros by what is not finite
    picks: bool = False  # where two are nearly equal, rounding may pick the other: eager's gradients are off by more then
    spreads: bool = False  # what is not finite in the first argument or the gradient gets into products of other tokens

    def __post_init__(self) -> None:
        object.__setattr__(self, "models", partial(_undrawn, self.models))

    def __str__(self) -> str:
        return self.name

    def axis(self, dim: str) -> int:
        """The place of that dimension in the output."""
        return self.dims.split(" -> ")[1].index(dim)

    def axes(self, dim: str) -> dict[int, int]:
        """Positions of the arguments that have that dimension -> its place in them."""
        shapes = self.dims.split(" -> ")[0].split(", ")
        return {i: shape.index(dim) for i, shape in enumerate(shapes) if dim in shape}

    def repeated(self, sample: Sample, dim: str, count: int) -> Sample:
        """The first sample with ``count`` times the first entry of that dimension, as views where that is possible."""
        args, places = list(sample.args), self.axes(dim)
        for i, axis in places.items():
            x = args[i]
            args[i] = x.narrow(axis, 0, 1).expand(*x.shape[:axis], count, *x.shape[axis + 1 :])
        if not places:
            assert self.more is not None, f"{self}: dims={self.dims!r} does not show {dim}, so that `more` is needed"
            args[0] = self.more(args[0], count)
        return replace(sample, args=tuple(args))


def _undrawn(models: Callable[[int], list[Sample]], clips: int) -> list[Sample]:
    global _drawing_later
    _drawing_later = True
    try:
        return models(clips)
    finally:
        _drawing_later = False


def randn(*shape: int, seed: int = 0) -> Tensor:
    return _drawn(Drawn(shape, seed + sum(shape)))


def pixels(*shape: int) -> Tensor:
    """Frames ``[..., 3]`` as decoders give them."""
    return _drawn(Drawn((*shape, 3), sum(shape), pixels=True))


def _drawn(what: Drawn) -> Tensor:
    return what if _drawing_later else what.draw(torch.float64, None)  # type: ignore[return-value]


def sequence_first(x: Tensor) -> Tensor:
    """The same values as slices of a larger buffer that holds tokens first: ``[N, B, T, ...]``, as in OpenAI's CLIP."""
    order = (2, 0, 1, *range(3, x.dim()))
    permuted = x.permute(order)
    wide = torch.zeros(*permuted.shape[:-1], permuted.shape[-1] + 3, dtype=x.dtype)
    wide[..., 1:-2] = permuted
    return wide[..., 1:-2].permute(1, 2, 0, *range(3, x.dim()))


def inputs_and(output: int, sample: Sample) -> int:
    """Bytes: every tensor argument once, and an output of so many elements."""
    return sum(t.numel() * t.element_size() for t in sample.inputs()) + output * sample.tensors()[0].element_size()


def inputs_and_output(sample: Sample) -> int:
    """Every tensor argument once, and an output of the first one's size."""
    return sum(t.numel() * t.element_size() for t in (*sample.tensors(), sample.args[0]))
