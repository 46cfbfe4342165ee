"""Where a stage runs: on the card or, in the stub, on the CPU, with Triton's interpreter and the CUDA kernels' emulation in its
place. Nothing here imports torch until a function is called: what starts the stages needs none.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
STUB = os.environ.get("I2V_GPU_STUB") == "1"  # tests/ops/card.py reads the same
DEVICE = "cpu" if STUB else "cuda"
OURS = ("library", "triton", "cuda")  # what must be there; the others are yardsticks
PATIENCE = 4 if STUB else 1  # times what a card's machine is given: the stub shares its cores with other tests
STUB_ENVIRONMENT = {"I2V_GPU_STUB": "1", "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
PLUGIN = "I2V_GPU_STUB_PLUGIN"  # "module:function", called in every process of the stub that runs kernels: tests break them so


def prepare() -> None:
    """First thing in every process that runs kernels."""
    if not STUB:
        return
    emulate()
    module, _, function = os.environ.get(PLUGIN, "").partition(":")
    if module:
        getattr(importlib.import_module(module), function)()


def emulate() -> None:
    """``backend="cuda"`` on CPU tensors is the emulation, which the extension holds for tests."""
    from i2v_kernels import _extension
    from i2v_kernels.ops import base
    from i2v_kernels.ops.temporal_attention import cuda as attention
    from i2v_kernels.ops.temporal_conv import cuda as conv
    from i2v_kernels.ops.token_shift import op as shift

    limits: dict[str, Callable[..., str | None]] = {
        "temporal_attention": lambda *args: attention.limits(*args[:3]),
        "temporal_conv": lambda *args: conv.limits(*args[:2]),
        "token_shift": lambda *args: shift._triton_limits(*args[:2]),
    }

    def can_run(limit: Callable[..., str | None]) -> Callable[..., str | None]:
        return lambda *args: _extension.why_no_cpu() or limit(*args)

    for name, limit in limits.items():
        backends = base.OPS[name]._by_name
        backends["cuda"] = dataclasses.replace(backends["cuda"], can_run=can_run(limit))


def pairs(names: tuple[str, ...] = OURS) -> list[tuple[Any, str]]:
    """Every (OpInfo, backend) that a card runs; in the stub of the ops in I2V_GPU_STUB_OPS, if that is set."""
    from i2v_kernels.ops import base
    from i2v_kernels.testing import OPINFOS

    only = os.environ.get("I2V_GPU_STUB_OPS", "") if STUB else ""
    infos = [info for info in OPINFOS if not only or info.name in only.split(",")]
    return [(info, b.name) for info in infos for b in base.OPS[info.name].backends if b.name in names]


def cannot(info: Any, sample: Any, backend: str) -> str | None:
    """Why the backend does not run this call, in its own words."""
    import i2v_kernels as i2v

    reason = i2v.explain(info.op, *sample.args, **sample.kwargs).reasons[backend]
    return reason.removeprefix("cannot: ") if reason.startswith("cannot") else None


def grown(info: Any, clips: int) -> Any:
    """The op's first sample with that many clips: the stub's stand-in for a model's call."""
    first = info.samples()[0]
    args = list(first.args)
    for i, axis in info.axes(info.rows[0]).items():
        size = args[i].shape[axis]
        args[i] = args[i].repeat_interleave(-(-clips // size), axis).narrow(axis, 0, clips).contiguous()
    return dataclasses.replace(first, args=tuple(args))


def models(info: Any, clips: int) -> list[Any]:
    """Calls of real models, in the order in which they tell most."""
    return [grown(info, clips)] if STUB else info.models(clips)


def synchronize() -> None:
    import torch

    if not STUB:
        torch.cuda.synchronize()


def found(module: str) -> bool:
    """Whether a module is installed; a parent that is not is no error."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


# A CUDA context does not recover from these: whatever runs next in its process fails too
STICKY = re.compile(
    r"CUDA error|AcceleratorError|illegal memory access|launch failure|device-side assert|misaligned address"
    r"|illegal instruction|CUDA_ERROR_(?!OUT_OF_MEMORY)|uncorrectable"
)


def telling(error: BaseException) -> str:
    """Of an error's text the line that says most: the device's, or the first, or, of Triton's compiler, the last."""
    lines = str(error).strip().splitlines() or [""]
    of_device = next((line for line in lines if STICKY.search(line)), None)
    line = of_device or (lines[-1] if lines[0].startswith("at ") else lines[0])
    return f"{type(error).__name__}: {line.strip()}"[:240]


def write_json(path: Path, value: object) -> None:
    """Beside the target first: no half-written file is left."""
    beside = path.with_suffix(".part")
    beside.write_text(json.dumps(value, indent=1))
    beside.replace(path)


def evidence(path: Path, passed: int, failed: int, note: str, **more: Any) -> int:
    """What a stage says of itself, and its exit status. ``cut=True``: time ended it; ``left``: what is to be run again."""
    write_json(path, {"passed": passed, "failed": failed, "note": note, **more})
    return int(failed > 0 or passed == 0)
