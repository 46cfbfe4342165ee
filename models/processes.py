"""What the processes of one run tell each other beside gradients: small things, on the CPU, without waiting for a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

T = TypeVar("T")
_groups: dict[tuple[Any, str], Any] = {}


def count() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def is_first() -> bool:
    """Whether this process writes files and shows progress."""
    return rank() == 0


def _group() -> Any:
    """A group that talks over the CPU: the default one if it does, else one of its own; made once on all processes."""
    if dist.get_backend() == "gloo":
        return None
    return _kept("all", lambda: dist.new_group(backend="gloo"))


def _kept(name: str, make: Callable[[], Any]) -> Any:
    """The group of that name among the processes that are connected now, made once."""
    world = dist.group.WORLD
    if (world, name) not in _groups:
        for stale in [key for key in _groups if key[0] is not world]:
            del _groups[stale]
        _groups[world, name] = make()
    return _groups[world, name]


def alone() -> Any:
    """A group of this process alone, for what would else ask all of them; None where there is no other."""
    if count() == 1:
        return None
    return _kept("alone", lambda: dist.new_group([rank()], backend="gloo", use_local_synchronization=True))


def gathered(value: T) -> list[T]:
    """``value`` of every process, in the order of their ranks, on every process."""
    if count() == 1:
        return [value]
    values: list[Any] = [None] * count()
    dist.all_gather_object(values, value, group=_group())
    return values


def rows(*numbers: int) -> list[list[int]]:
    """As ``gathered``, for whole numbers, in one message without pickling: what every step can afford."""
    mine = torch.tensor(numbers, dtype=torch.int64)
    if count() == 1:
        return [mine.tolist()]
    found = [torch.empty_like(mine) for _ in range(count())]
    dist.all_gather(found, mine, group=_group())
    return [row.tolist() for row in found]


@contextmanager
def together() -> Iterator[None]:
    """What fails on one process fails on all, so that none waits for one that has ended. No collectives in the body."""
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        if count() == 1:
            raise
        error = caught
    failed(error)


def failed(error: Exception | None) -> None:
    """Raise this process's ``error``, or that of the first process which has one; called on all."""
    texts = gathered(None if error is None else f"{type(error).__name__}: {error}")
    if error is not None:
        raise error
    for number, text in enumerate(texts):
        if text is not None:
            raise ValueError(f"process {number} cannot go on: {text}")


def from_first(action: Callable[[], T]) -> T:
    """The result of ``action``, run on the first process alone, on all of them; so too what it raises."""
    if count() == 1:
        return action()
    told: list[Any] = [None, None]
    if is_first():
        try:
            told[0] = action()
        except Exception as error:
            told[1] = error
    dist.broadcast_object_list(told, 0, group=_group())
    if told[1] is not None:
        raise told[1]
    return told[0]


def sum_over(parameters: list[nn.Parameter], total: Tensor, factor: float, *, lacking: bool) -> Tensor:
    """Every gradient, and ``total``, times ``factor`` and summed over all processes, in one message; the sum of ``total``.

    ``lacking``: some process has had no clip, and has no gradient of what the others have one of.
    """
    if lacking:
        for parameter, *used in zip(parameters, *rows(*(p.grad is not None for p in parameters))):
            if any(used) and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if count() == 1:
        if factor != 1:
            torch._foreach_mul_(grads, factor)
        return total * factor
    flat = torch.cat([total.view(1), *(grad.flatten() for grad in grads)]) * factor
    dist.all_reduce(flat)
    total, *sums = flat.split([1, *(grad.numel() for grad in grads)])
    for grad, value in zip(grads, sums):
        grad.copy_(value.view_as(grad))
    return total.view(())


def joined(x: Tensor, counts: list[int]) -> Tensor:
    """The rows of ``x [counts[rank], ...]`` of all processes, one process after the other: ``[sum(counts), ...]``.

    For a loss that every process computes from all rows: what reaches its own rows is then the gradient of the whole, and no
    message is needed on the way back. It is multiplied by the number of processes, so that the mean of the processes'
    gradients is that of the loss, as it is for what is not of one process.
    """
    return x if count() == 1 else _Joined.apply(x, counts)


class _Joined(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, counts: list[int]) -> Tensor:
        ctx.counts = counts
        filled = F.pad(x, [*([0, 0] * (x.ndim - 1)), 0, max(counts) - len(x)])  # all of one size, as the message needs it
        parts = [torch.empty_like(filled) for _ in counts]
        dist.all_gather(parts, filled)
        return torch.cat([part[:rows] for part, rows in zip(parts, counts)])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.split(ctx.counts)[rank()] * len(ctx.counts), None
