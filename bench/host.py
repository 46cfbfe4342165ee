"""``python -m bench.host``: microseconds of Python before a call's kernels are on their way, op by op, without a GPU.

Counted: the public function, its checks, autograd, the choice of a backend, memory, PyTorch's operators where an op uses
them, and ours and Triton's Python up to its launcher. Not counted: Triton's launcher (C behind a few lines of Python, about
1 us), the driver, PyTorch's question to it which GPU is current, compilation. Tensors are small and on the CPU, so PyTorch's
operators cost what they cost here: their number and their own time, repeated alone, stand beside the whole, as does "engine",
a forward and backward of an ``autograd.Function`` that does nothing. "ours" is what is left; it holds what PyTorch's operators
take longer amid all else than alone. "bare" is ``kernel[grid](...)`` for the same launches, "arguments" of the longest. The
best of many repeats: other processes only add.

For this Triton gets a driver that launches nothing and a compiler that makes nothing, the extension is hidden, so that the
ops are registered in Python as they are for GPUs, and the backend ``triton`` is told that it is interpreted, so that it takes
tensors on CPUs. All of that holds for the process: nothing else should run in it.

On two cores of an idle x86 server, torch 2.14.1, triton 3.8.0, before launches were planned once (the whole, on a busy machine)
and now (the whole, and in it ours), in microseconds. At most 20 and 80 were wanted of ours:

| call | forward | forward+backward | PyTorch's operators in that, engine |
| --- | --- | --- | --- |
| temporal_attention | 61 -> 21, ours 12 | 258 -> 95, ours 48 | 6: 20, 28 |
| token_shift | 37 -> 13, ours 9 | 160 -> 58, ours 29 | 2: 7, 22 |
| temporal_conv | 58 -> 25, ours 9 | 354 -> 135, ours 61 | 15: 47, 27 |
| bottleneck_adapter | 60 -> 22, ours 15 | 456 -> 212, ours 106 | 19: 74, 32 |
| st_adapter | 162 -> 88, ours 27 | 1100 -> 385, ours 188 | 51: 162, 35 |
| lora_linear | 55 -> 33, ours 6 | 297 -> 190, ours 78 | 28: 81, 31 |
| patch_embed | 138 -> 25, ours 6 | 483 -> 210, ours 105 | 22: 81, 24 |

The three above 80 are made of PyTorch's products, which take longer amid all else than alone.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

LIMITS = {"forward": 20.0, "forward+backward": 80.0}  # what we want of every op
COMPOSED = ("st_adapter", "lora_linear")  # of PyTorch's products, which are quickest here in float32
BATCHES = (64, 63, 48, 33, 32, 17, 16, 15, 8, 3, 2)  # and 1: where a size is 1, strides may say less


class Stub:
    """Stands in for Triton's driver and its compiler: ``compiled`` has a line for each kernel asked for."""

    def __init__(self) -> None:
        from triton.backends.compiler import GPUTarget

        self.compiled: list[str] = []
        self.launched: list[tuple[Any, ...]] = []
        self.keep = False  # the arguments of launches
        self.count = 0
        self.target = GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return self.target

    def launch(self, *args: Any) -> None:
        self.count += 1
        if self.keep:
            self.launched.append(args)

    def install(self) -> None:
        from triton.compiler import CompiledKernel
        from triton.runtime.driver import driver
        from triton.runtime.jit import JITFunction

        stub = self

        class Made(CompiledKernel):
            def __init__(self, name: str) -> None:
                self.module, self.function, self.packed_metadata, self._run = True, 0, (), stub.launch
                self.name, self.src = name, None

            def __del__(self) -> None:
                pass

        def compiled(kernel: Any, key: str, signature: Any, device: int, *rest: Any) -> Any:
            stub.compiled.append(f"{kernel.__name__} {key}")
            kernel.device_caches[device][0][key] = made = Made(kernel.__name__)
            return made

        driver.set_active(self)  # type: ignore[arg-type]
        JITFunction._do_compile = compiled  # type: ignore[method-assign]


def prepare() -> Stub:
    """The stub, and the package as it is where tensors are on a GPU."""
    if "i2v_kernels" in sys.modules:
        raise RuntimeError("bench.host needs a process in which i2v_kernels is not imported yet")
    sys.modules["i2v_kernels._C"] = None  # type: ignore[assignment]
    from i2v_kernels.ops import backends
    from i2v_kernels.ops.base import OPS

    if backends.INTERPRETED:
        raise RuntimeError("bench.host measures compiled kernels: unset TRITON_INTERPRET")
    stub = Stub()
    stub.install()
    from i2v_kernels.ops import triton_launch  # noqa: F401  # while it is not interpreted

    backends.INTERPRETED = True
    for op in OPS.values():
        op.preference = {"cpu": op.preference.get("cuda", ())}
    return stub


def best(call: Callable[[], object], seconds: float) -> float:
    """Microseconds of one call, in the best of many repeats, each short beside the slices that a busy machine deals out."""
    for _ in range(3):
        call()
    start, number, shortest = time.perf_counter(), 4, float("inf")
    while time.perf_counter() - start < seconds:
        begin = time.perf_counter()
        for _ in range(number):
            call()
        shortest = min(shortest, time.perf_counter() - begin)
    return shortest / number * 1e6


class Recorder(TorchDispatchMode):
    """The operators of PyTorch that run within our ops."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "i2v_kernels":
            from i2v_kernels.ops.base import OPS

            name = func._schema.name.split("::")[1]
            op = OPS[name.removesuffix("_backward")]
            with self:
                return (op._backward if name.endswith("_backward") else op._forward)(*args)
        self.calls.append((func, args, kwargs))
        return func(*args, **kwargs)

    def replay(self) -> None:
        with torch.no_grad():
            for func, args, kwargs in self.calls:
                func(*args, **kwargs)


def bare(launches: Iterable[Any]) -> Callable[[], None]:
    """These launches by ``kernel[grid](*arguments)``."""
    calls = []
    for launch in launches:
        given = {**launch.args, **launch.constexprs}
        values = [
            torch.empty_strided(x.shape, x.stride, dtype=x.dtype) if hasattr(x, "offset") else x
            for x in (given[name] for name in launch.kernel.arg_names)
        ]
        options = {"num_warps": launch.threads // 32, "num_stages": launch.stages, **launch.options}
        calls.append((launch.kernel, (launch.programs,), values, options))

    def call() -> None:
        for kernel, grid, values, options in calls:
            kernel[grid](*values, **options)

    return call


def rows(stub: Stub, names: Iterable[str], seconds: float) -> Iterable[dict[str, Any]]:
    from i2v_kernels.ops.base import OPS
    from i2v_kernels.ops.triton_launch import PLANNED
    from i2v_kernels.testing import OPINFOS

    for info in OPINFOS:
        if info.name not in names:
            continue
        dtype = torch.float32 if info.name in COMPOSED else torch.bfloat16
        sample = info.samples()[0].to(dtype, requires_grad=True)
        leaves = sample.tensors()

        def forward(info: Any = info, sample: Any = sample) -> Tensor:
            return info.op(*sample.args, **sample.kwargs)

        grad = torch.ones_like(forward().detach())

        def both(forward: Any = forward, leaves: Any = leaves, grad: Any = grad) -> None:
            torch.autograd.grad(forward(), leaves, grad)

        def checks(op: Any = OPS[info.name], forward: Any = forward) -> None:
            with op.recording([]):
                forward()

        for mode, call in (("forward", forward), ("forward+backward", both)):
            with torch.set_grad_enabled(mode != "forward"):
                call()
                before = stub.count
                call()
                launches = stub.count - before
                row = {"op": info.name, "mode": mode, "us": best(call, seconds), "launches": launches}
                recorder = Recorder()
                with recorder:
                    call()
                inside = [c for c in recorder.calls if mode == "forward" or c[0].namespace == "aten"]
                recorder.calls = inside
                row |= {"operators": len(inside), "operators_us": best(recorder.replay, seconds / 2)}
                row["checks_us"] = best(checks, seconds / 4)
                row["engine_us"] = engine(leaves, grad, seconds / 2) if mode != "forward" else 0.0
            row["ours_us"] = row["us"] - row["operators_us"] - row["engine_us"]
            PLANNED.clear()
            with torch.set_grad_enabled(mode != "forward"):
                call()
            planned = [launch for known in PLANNED.values() for launch in known.launches]
            row["bare_us"] = best(bare(planned), seconds / 2) if planned else 0.0
            row["arguments"] = max((len(x.args) for x in planned), default=0)
            yield row


def engine(leaves: list[Tensor], grad: Tensor, seconds: float) -> float:
    """Forward and backward of an ``autograd.Function`` of these tensors that does nothing: PyTorch's share."""

    class Nothing(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Tensor) -> Tensor:
            ctx.save_for_backward(*args)
            return grad.detach()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
            return ctx.saved_tensors

    return best(lambda: torch.autograd.grad(Nothing.apply(*leaves), leaves, grad), seconds)


def main(argv: list[str] | None = None) -> int:
    stub = prepare()
    from i2v_kernels.testing import OPINFOS

    names = [info.name for info in OPINFOS]
    parser = argparse.ArgumentParser("python -m bench.host", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--op", action="append", choices=names, help="this op alone; may be given again")
    parser.add_argument("--seconds", type=float, default=1.0, help="for each figure")
    parser.add_argument("--json", type=Path, help="write the rows here")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    torch.backends.mkldnn.set_flags(False)  # its products prepare more than these small ones compute
    heads = ("us", "ours", "launches", "bare", "arguments", "operators", "their us", "engine", "checks")
    print(f"torch {torch.__version__}\n{'op':22}{'mode':18}" + "".join(f"{head:>11}" for head in heads))
    found = []
    for row in rows(stub, options.op or names, options.seconds):
        found.append(row)
        print(
            f"{row['op']:22}{row['mode']:18}{row['us']:11.1f}{row['ours_us']:11.1f}{row['launches']:11}{row['bare_us']:11.1f}{row['arguments']:11}"
            f"{row['operators']:11}{row['operators_us']:11.1f}{row['engine_us']:11.1f}{row['checks_us']:11.1f}",
            flush=True,
        )
    if options.json:
        table = {"torch": torch.__version__, "limits": LIMITS, "rows": found}
        options.json.write_text(json.dumps(table, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
