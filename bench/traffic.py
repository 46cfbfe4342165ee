"""``python -m bench.traffic``: bytes moved by each formulation of an op, as a picture.

Counts what every operator that PyTorch dispatches reads and writes (views are free), in units of the op's input tensor. An op
of this package is one operator: it reads its inputs once and writes its output once.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from i2v_kernels.testing import OPINFOS, Sample

from .collect import distinct
from .peers import PEERS


class Traffic(TorchDispatchMode):
    """Adds up the bytes of the distinct memory that each dispatched operator reads and writes."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        read = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        written = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        storages = {x.untyped_storage().data_ptr() for x in read}
        if func.is_view or "empty" in func.__name__ or func.__name__.startswith("_unsafe_view"):
            return out
        if all(x.untyped_storage().data_ptr() in storages for x in written) and not func._schema.is_mutable:
            return out  # a reshape that turned out to be a view
        self.bytes += sum(distinct(x) for x in read) + (0 if func._schema.is_mutable else sum(distinct(x) for x in written))
        return out


def moved(function: Callable[..., Tensor], sample: Sample) -> int:
    with torch.no_grad(), Traffic() as traffic:
        function(*sample.args, **sample.kwargs)
    return traffic.bytes


def main() -> None:
    for info in OPINFOS:
        sample = info.models(2)[0].to(torch.float32)
        unit = sample.args[0].numel() * sample.args[0].element_size()
        shape = "x".join(map(str, sample.args[0].shape))
        print(f"{info}, {sample.name}, {shape} float32: one unit is {unit / 2**20:.1f} MiB")
        for name, function in {"i2v_kernels": info.op, **PEERS[info.name]}.items():
            units = moved(function, sample) / unit
            print(f"  {name:<14}{units:5.1f}  {'#' * round(2 * units)}")


if __name__ == "__main__":
    main()
