"""What a call of an op launches on a GPU, found on meta tensors without one: by running the op's own launchers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CLIPS = 64  # of a model's call


@dataclass
class Work:
    """What a pass launches: Triton's kernels, and PyTorch's by the bytes that they touch and the operations of products."""

    launches: list[Any] = field(default_factory=list)
    others: list[tuple[int, int]] = field(default_factory=list)
    bytes: int = 0  # of what the op was given and gives back


class Collect(TorchDispatchMode):
    """This package's ops run their launchers, which launch nothing; of all else bytes and operations are noted."""

    def __init__(self, work: Work) -> None:
        super().__init__()
        self.work, self.depth = work, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func.namespace == "i2v_kernels":
            with self:
                self.depth += 1
                out = self._ours(func.__name__.split(".")[0], args)
                self.depth -= 1
            if self.depth == 0:
                self.work.bytes += _touched((args, out))
            return out
        out = func(*args, **(kwargs or {}))
        name = func.__name__.split(".")[0]
        written = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        if func.is_view or "empty" in name or name in ("_unsafe_view", "detach", "set_") or not written:
            return out
        flops = 0
        if name in ("mm", "bmm", "addmm", "baddbmm"):
            flops = 2 * written[0].numel() * args[name.startswith(("add", "badd"))].shape[-1]
        self.work.others.append((_touched((args, kwargs, out)), flops))
        return out

    def _ours(self, name: str, args: Sequence[Any]) -> Any:
        from i2v_kernels.ops import base

        backward = name.endswith("_backward")
        op = base.OPS[name.removesuffix("_backward")]
        backend = op._by_name[backend_of(op)]
        return (backend.backward if backward else backend.forward)(*args[:-1])


def _touched(values: Any) -> int:
    """Bytes of the tensors among them, each once."""
    tensors = [x for x in tree_leaves(values) if isinstance(x, Tensor)]
    places = {(x.untyped_storage()._cdata, x.storage_offset(), x.shape, x.stride()): x for x in tensors}
    return sum(map(distinct, places.values()))


def backend_of(op: Any) -> str:
    """The one that GPUs are meant to run."""
    return "triton" if "triton" in op._by_name else op.first_choice("cuda")


def collected(call: Callable[[], Any]) -> tuple[Work, Any]:
    """What a call on meta tensors launches, and its result."""
    from i2v_kernels.ops import triton_common

    work = Work()
    real = triton_common.Launch.run
    triton_common.Launch.run = lambda launch: work.launches.append(launch)  # type: ignore[method-assign]
    try:
        with Collect(work):
            return work, call()
    finally:
        triton_common.Launch.run = real  # type: ignore[method-assign]


def on_meta(info: Any, number: int, dtype: torch.dtype) -> Any:
    """The op's model call of that number."""
    return info.models(CLIPS)[number].to(dtype, "meta", requires_grad=True)


def passes(info: Any, sample: Any) -> dict[str, Work]:
    """What forward and backward of a call on meta tensors launch."""
    forward, out = collected(lambda: info.op(*sample.args, **sample.kwargs))
    grad = torch.empty_like(out)
    backward, _ = collected(lambda: torch.autograd.grad(out, sample.tensors(), grad))
    return {"forward": forward, "backward": backward}


def distinct(x: Tensor) -> int:
    """Bytes without what ``expand`` repeats."""
    count = 1
    for size, stride in zip(x.shape, x.stride()):
        count *= size if stride != 0 else 1
    return count * x.element_size()
