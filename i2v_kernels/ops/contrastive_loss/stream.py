"""The losses chunk by chunk: forward keeps sums, backward computes each chunk's logits again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .processes import Pairs


@dataclass(frozen=True)
class Logits:
    """``logits(scale, bias, *texts, *videos) -> [a, V]``, under the autocast that was on when this was made."""

    similarity: Callable[..., Tensor]
    texts: int
    dtype: torch.dtype
    device: torch.device
    autocast: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        kind = self.device.type
        on, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
        object.__setattr__(self, "autocast", {"device_type": kind, "dtype": dtype, "enabled": on})

    def __call__(self, scale: Tensor, bias: Tensor, *parts: Tensor | None) -> Tensor:
        found, shape = self.similarity(*parts), tuple(self._rows(x) for x in (parts[: self.texts], parts[self.texts :]))
        if not isinstance(found, Tensor) or found.shape != shape:
            got = f"a tensor {tuple(found.shape)}" if isinstance(found, Tensor) else repr(found)
            raise ValueError(f"contrastive_loss: similarity gave {got}, but [a, v] = {shape} is needed")
        return found.to(self.dtype) * scale + bias

    @staticmethod
    def _rows(parts: Sequence[Tensor | None]) -> int:
        return next(len(x) for x in parts if x is not None)

    @contextmanager
    def again(self, random: Sequence[Tensor] | None = None) -> Iterator[None]:
        """With that autocast, which keeps no weight for later that was cast where autograd did not look; and, if they are
        given, from these states of the generators on.
        """
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.autocast(**self.autocast, cache_enabled=False), torch.random.fork_rng(devices, enabled=random is not None):
            if random is not None:
                torch.set_rng_state(random[0])
                for device, state in zip(devices, random[1:]):
                    torch.cuda.set_rng_state(state, device)
            yield

    def random(self) -> list[Tensor]:
        """The generators' states."""
        cuda = [torch.cuda.get_rng_state(self.device)] if self.device.type == "cuda" else []
        return [torch.get_rng_state(), *cuda]

    def leaves(self, scale: Any, bias: Any, *parts: Tensor | None) -> list[Tensor]:
        """What the similarity closes over, found from that of one pair."""
        one = [x if x is None else x[:1].detach() for x in (scale[None], bias[None], *parts)]
        with torch.enable_grad(), self.again(self.random()):
            return leaves_of(self(*one))  # type: ignore[arg-type]


def leaves_of(x: Tensor) -> list[Tensor]:
    """The tensors at the ends of x's graph, in the order in which they are met."""
    if x.grad_fn is None:
        return [x] if x.requires_grad else []
    met, waiting, found = {x.grad_fn}, [x.grad_fn], []
    while waiting:
        node = waiting.pop()
        if hasattr(node, "variable"):
            found.append(node.variable)
        for other, _ in node.next_functions:
            if other is not None and other not in met:
                met.add(other)
                waiting.append(other)
    return found


class Softmax:
    """``sum_i (row_i - d_i) + (column_i - d_i)`` over ``2 B``: log-sum-exp of rows and columns, d the logits of pairs."""

    def __init__(self, pairs: Pairs) -> None:
        self.pairs = pairs
        self.rows: list[Tensor] = []
        self.diagonal: list[Tensor] = []
        self.columns: Any = None

    def add(self, logits: Tensor, start: int) -> None:
        """Logits ``[a, V]`` of this process's texts from ``start`` on."""
        self.rows.append(logits.logsumexp(1))
        self.diagonal.append(self.of_pairs(logits, start).clone())
        columns = logits.logsumexp(0)
        self.columns = columns if self.columns is None else torch.logaddexp(self.columns, columns)

    def of_pairs(self, logits: Tensor, start: int) -> Tensor:
        """Those of a chunk's pairs, ``[a]``, a view."""
        return logits.diagonal(self.pairs.first + start)[: len(logits)]

    def value(self) -> Tensor:
        self.columns = self.pairs.logsumexp(self.columns)
        own = self.columns[self.pairs.first :][: self.pairs.count]
        terms = (torch.cat(self.rows) - torch.cat(self.diagonal)) + (own - torch.cat(self.diagonal))
        return self.pairs.sum(terms.sum()) / (2 * self.pairs.whole)

    def gradient(self, logits: Tensor, start: int, row: int) -> Tensor:
        """Of the loss by a chunk's logits; ``row``: which chunk it is."""
        found = (logits - self.rows[row][:, None]).exp_()
        found += (logits - self.columns).exp_()
        self.of_pairs(found, start).sub_(2)
        return found.div_(2 * self.pairs.whole)


class Sigmoid(Softmax):
    """``-sum_ij log sigmoid(z_ij logits_ij)`` over ``B``."""

    def add(self, logits: Tensor, start: int) -> None:
        negative = -logits
        self.of_pairs(negative, start).neg_()
        self.rows.append(-F.logsigmoid(negative).sum())

    def value(self) -> Tensor:
        return self.pairs.sum(torch.stack(self.rows).sum()) / self.pairs.whole

    def gradient(self, logits: Tensor, start: int, row: int) -> Tensor:
        found = logits.sigmoid()
        self.of_pairs(found, start).copy_(-(-self.of_pairs(logits, start)).sigmoid())
        return found.div_(self.pairs.whole)


KINDS: dict[str, type[Softmax]] = {"softmax": Softmax, "sigmoid": Sigmoid}


def streamed(
    logits: Logits, kind: type[Softmax], pairs: Pairs, chunk: int, scale: Tensor, bias: Tensor,
    texts: Sequence[Tensor | None], videos: Sequence[Tensor | None],
) -> Tensor:  # fmt: skip
    """The loss of this process's texts and all videos; ``chunk`` texts at a time."""
    given: tuple[Any, ...] = (scale, bias, *texts, *videos)
    record = torch.is_grad_enabled()
    leaves = logits.leaves(*given) if record else []
    return _Streamed.apply(logits, kind(pairs), chunk, record, len(given), *given, *leaves)


class _Streamed(torch.autograd.Function):
    """Takes scale, bias, texts, videos, ``count`` in all, and what the similarity closes over."""

    @staticmethod
    def forward(
        ctx: Any, logits: Logits, terms: Softmax, chunk: int, record: bool, count: int, *tensors: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(*tensors)
        ctx.logits, ctx.terms, ctx.chunk, ctx.count, ctx.kept = logits, terms, chunk, count, None
        ctx.random = []
        for start in range(0, terms.pairs.count, chunk):
            ctx.random.append(logits.random())
            if record and chunk >= terms.pairs.count:  # nothing is saved by computing it again
                ctx.kept = _recorded(ctx, tensors, 0)
                found = ctx.kept[1]
            else:
                with logits.again():
                    found = logits(*_chunk(logits, tensors[:count], start, chunk))
            terms.add(found.detach(), start)
        return terms.value()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise NotImplementedError(
                "contrastive_loss: create_graph=True, but there are no gradients of gradients in chunks, nor on several "
                "processes; pass chunk=B for them on one"
            )
        logits, terms, tensors, wanted = ctx.logits, ctx.terms, ctx.saved_tensors, ctx.needs_input_grad[5:]
        # rows of texts get their gradient once, others are summed
        texts = range(2, 2 + logits.texts)
        sums: list[Any] = [
            x.new_zeros(x.shape, dtype=x.dtype if i in texts else logits.dtype) if want else None
            for i, (x, want) in enumerate(zip(tensors, wanted))
        ]
        for row in range(len(ctx.random)):
            start = row * ctx.chunk
            given, found = ctx.kept or _recorded(ctx, tensors, row)
            inputs = {i: x for i, x in enumerate((*given, *tensors[ctx.count :])) if wanted[i]}
            if any(all(leaf is not x for x in inputs.values()) for leaf in leaves_of(found)):
                raise RuntimeError(
                    "contrastive_loss: similarity used a tensor with a gradient that it did not use for a single pair"
                )
            if not found.requires_grad:
                continue
            of_logits = terms.gradient(found.detach(), start, row).mul_(grad * terms.pairs.world)
            # retained, since what the similarity closes over may have been computed before it was called
            with _without_hooks(tensors[ctx.count :]):
                parts = torch.autograd.grad(found, list(inputs.values()), of_logits, retain_graph=True, allow_unused=True)
            for i, part in zip(inputs, parts):
                if part is not None:
                    into = sums[i][start : start + ctx.chunk] if i in texts else sums[i]
                    into += part
        return (*[None] * 5, *(s if s is None else s.to(x.dtype) for s, x in zip(sums, tensors)))


def _recorded(ctx: Any, tensors: Sequence[Tensor | None], row: int) -> tuple[list[Tensor | None], Tensor]:
    """A chunk's arguments, cut off from what they were computed by, and its logits, which autograd records."""
    given = [
        x if x is None else x.detach().requires_grad_(want)
        for x, want in zip(_chunk(ctx.logits, tensors[: ctx.count], row * ctx.chunk, ctx.chunk), ctx.needs_input_grad[5:])
    ]
    with torch.enable_grad(), ctx.logits.again(ctx.random[row]):
        return given, ctx.logits(*given)


@contextmanager
def _without_hooks(leaves: Sequence[Tensor]) -> Iterator[None]:
    """Hooks on parameters see the whole gradient, once it is returned, and not that of each chunk."""
    hooked = [(x, x._backward_hooks) for x in leaves if x._backward_hooks]
    for x, _ in hooked:
        x._backward_hooks = None
    try:
        yield
    finally:
        for x, hooks in hooked:
            x._backward_hooks = hooks


def _chunk(logits: Logits, given: Sequence[Tensor | None], start: int, count: int) -> list[Any]:
    """Scale, bias, rows of the texts, and all videos."""
    texts = range(2, 2 + logits.texts)
    return [x[start : start + count] if x is not None and i in texts else x for i, x in enumerate(given)]
