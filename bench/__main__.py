"""``python -m bench``: every op beside its peers, forward and forward+backward, as ratios from one process.

The table says for each op, dtype and mode: this package's median time with its spread; the floor of a forward call, which is
the longer of a copy of as many bytes and of as many operations in a large library product, both measured, as a share of
that time; how many times faster it is than the best eager and the best compiled peer, and the most
memory that it has at a time besides its arguments, beside the leanest eager peer's. A peer that gives other numbers than
the definition stops the run.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import i2v_kernels as i2v
from i2v_kernels import _extension
from i2v_kernels.testing import OPINFOS, OpInfo, Sample

from .measure import copy_ceiling, interleaved, product_ceiling, start
from .memory import kept_for_backward, peak
from .peers import GPU_PEERS, PEERS

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MODES = ("forward", "forward+backward")


def candidates(info: OpInfo, compiled: bool) -> dict[str, Callable[..., Tensor]]:
    """Name -> function over the sample's arguments: ours, the peers, and the peers compiled."""
    found: dict[str, Callable[..., Tensor]] = {"i2v_kernels": info.op, **PEERS[info.name]}
    if compiled:
        found |= {f"compiled {name}": torch.compile(peer) for name, peer in PEERS[info.name].items()}
    return found


def on_gpu(info: OpInfo, sample: Sample) -> dict[str, Callable[..., Tensor]]:
    """What GPUs have besides: our backends that are not chosen automatically, and the peers that this call suits."""
    explained = i2v.explain(info.op, *sample.args, **sample.kwargs)
    named = [name for name in ("triton", "cuda") if not explained.reasons.get(name, "cannot").startswith("cannot")]
    found = {f"i2v_kernels {name}": partial(info.op, backend=name) for name in named if name != explained.backend}
    for name, peer in GPU_PEERS.get(info.name, {}).items():
        refusal = why_not(peer, sample)
        if refusal:
            print(f"{info} {sample.name}: {name} cannot run: {refusal}", flush=True)
        else:
            found[name] = peer
    return found


def why_not(function: Callable[..., Tensor], sample: Sample) -> str | None:
    try:
        function(*sample.args, **sample.kwargs)
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return None


def check(info: OpInfo, sample: Sample, functions: dict[str, Callable[..., Tensor]]) -> None:
    """A speed-up over something that computes something else is no speed-up."""
    want = info.op(*sample.args, **sample.kwargs, backend="reference").double()
    tolerance = max(8 * torch.finfo(sample.dtype).eps, 4e-6)  # float32 adds thousands of numbers that nearly cancel
    for name, function in functions.items():
        got = function(*sample.args, **sample.kwargs).double()
        difference = ((got - want).norm() / want.norm()).item()
        if not difference <= tolerance:
            raise SystemExit(f"{info}: {name} differs from the definition by {difference:.1e} on {sample.name}")


def forward(function: Callable[..., Tensor], sample: Sample) -> None:
    with torch.no_grad():
        function(*sample.args, **sample.kwargs)


def forward_backward(function: Callable[..., Tensor], sample: Sample, grad: Tensor) -> None:
    torch.autograd.grad(function(*sample.args, **sample.kwargs), sample.tensors(), grad)


def measure(
    info: OpInfo, sample: Sample, device: str, seconds: float, compiled: bool, cold: bool, modes: Sequence[str]
) -> list[dict]:
    """One row per mode."""
    sample = sample.to(sample.dtype, device, requires_grad=True)
    functions = candidates(info, compiled) | (on_gpu(info, sample) if device == "cuda" else {})
    with torch.no_grad():
        check(info, sample, functions)
        grad = torch.randn_like(info.op(*sample.args, **sample.kwargs))
    copy, product = copy_ceiling(info.traffic(sample), device), product_ceiling(sample.dtype, device)
    floor = 1e3 * max(info.traffic(sample) / copy, info.flops(sample) / product)
    rows = []
    for mode in modes:
        run = forward if mode == "forward" else partial(forward_backward, grad=grad)
        timings = interleaved({n: partial(run, f, sample) for n, f in functions.items()}, device, seconds, cold)
        peaks = {n: peak(partial(run, f, sample), device) for n, f in functions.items()}
        kept = {n: kept_for_backward(f, sample) for n, f in functions.items()} if mode != "forward" else {}
        ours = timings.pop("i2v_kernels")
        rows.append(
            {
                "op": info.name,
                "sample": sample.name,
                "shape": list(sample.args[0].shape),
                "dtype": str(sample.dtype).removeprefix("torch."),
                "mode": mode,
                "backend": i2v.explain(info.op, *sample.args, **sample.kwargs).backend,
                "ms": vars(ours),
                "copy_gb_per_s": copy / 1e9,
                "product_gflop_per_s": product / 1e9,
                "floor_ms": floor if mode == "forward" else None,
                "peak_mib": peaks,
                "kept_mib": kept,
                "peers_ms": {name: vars(timing) for name, timing in timings.items()},
                "ratios": {name: timing.median / ours.median for name, timing in timings.items()},
            }
        )
        print(line(rows[-1]), flush=True)
    return rows


def best(row: dict, compiled: bool) -> str:
    peers = {n: r for n, r in row["ratios"].items() if not n.startswith("i2v_kernels")}
    ratios = {n: r for n, r in peers.items() if n.startswith("compiled ") == compiled}
    if not ratios:
        return "-"
    name = min(ratios, key=ratios.__getitem__)
    return f"{ratios[name]:5.2f}x {name.removeprefix('compiled ')}"


def memory(row: dict) -> str:
    """Ours, and the least of any eager peer."""
    peers = [mib for name, mib in row["peak_mib"].items() if not name.startswith(("i2v_kernels", "compiled "))]
    return f"{row['peak_mib']['i2v_kernels']:.0f}" + (f", eager {min(peers):.0f}" if peers else "")


HEADER = (
    f"{'op':<22}{'call':<43}{'dtype':<10}{'mode':<18}{'ms (20-80 %)':<22}{'floor':<9}{'best eager':<22}{'best compiled':<22}"
    "peak MiB"
)


def line(row: dict) -> str:
    ms, floor = row["ms"], row["floor_ms"]
    spread = f"{ms['median']:.2f} ({ms['low']:.2f}-{ms['high']:.2f})"
    return (
        f"{row['op']:<22}{row['sample']:<43}{row['dtype']:<10}{row['mode']:<18}{spread:<22}"
        f"{'' if floor is None else format(floor / ms['median'], '.0%'):<9}"
        f"{best(row, False):<22}{best(row, True):<22}{memory(row)}"
    )


def processor() -> str:
    """Its name, with family and model, which tell apart what goes by one name, and the instructions that kernels use."""
    info = Path("/proc/cpuinfo")
    lines = (line.partition(":") for line in info.read_text().splitlines()) if info.exists() else ()
    known = {key.strip(): value.strip() for key, _, value in lines}
    name = known.get("model name") or platform.processor() or platform.machine()
    family = f" family {known['cpu family']} model {known['model']}" if {"cpu family", "model"} <= known.keys() else ""
    module, _ = _extension.load()
    return f"{name}{family}" + (f", {module.build_info()['instruction_set']}" if module else "")


def machine(device: str) -> dict:
    """What the figures were taken on."""
    name = torch.cuda.get_device_name() if device == "cuda" else processor()
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "torch": torch.__version__,
        "python": platform.python_version(),
        "i2v_kernels": i2v.__version__,
    }


def save(path: Path, about: dict, rows: list[dict]) -> None:
    write(path, about, rows)
    print(f"\nwritten to {path}")


def write(path: Path, about: dict, rows: list[dict]) -> None:
    """Beside the target first: no half-written file is left."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".part")
    beside.write_text(json.dumps({"machine": about, "rows": rows}, indent=1))
    beside.replace(path)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--op", choices=[info.name for info in OPINFOS], action="append", help="only this op")
    parser.add_argument("--dtype", choices=list(DTYPES), action="append", help="only this dtype")
    parser.add_argument("--mode", choices=MODES, action="append", help="only this mode")
    parser.add_argument("--all", action="store_true", help="every model's call, not only the first of each op")
    parser.add_argument("--call", metavar="TEXT", help="every model's call whose name holds this text")
    parser.add_argument("--clips", type=int, help="clips a call; 4 on a CPU, 64 on a GPU")
    parser.add_argument("--seconds", type=float, default=5.0, help="measuring time per op, dtype and mode")
    parser.add_argument("--no-compile", action="store_true", help="leave the compiled peers out")
    parser.add_argument("--cold", action="store_true", help="each call right after another candidate's, none to warm up")
    parser.add_argument("--json", type=Path, help="write every figure here")
    options = parser.parse_args(argv)
    warnings.filterwarnings("ignore")
    logging.getLogger("torch").setLevel(logging.ERROR)
    about = machine(options.device)
    print(f"{about['device']}, {about['threads']} threads, torch {about['torch']}, load {about['load']:.1f}\n\n{HEADER}")
    rows = []
    for info in OPINFOS:
        if options.op and info.name not in options.op:
            continue
        calls = info.models(options.clips or (64 if options.device == "cuda" else 4))
        if options.call:
            calls = [call for call in calls if options.call in call.name]
        for call in calls if options.all or options.call else calls[:1]:
            for dtype in options.dtype or ("float32", "bfloat16"):
                torch.compiler.reset()
                sample = call.to(DTYPES[dtype])
                rows += measure(
                    info, sample, options.device, options.seconds, not options.no_compile, options.cold, options.mode or MODES
                )
                if options.json:  # after each call: what was measured is not lost
                    write(options.json, about, rows)
    if options.call and not rows:
        parser.error(f"--call {options.call!r}: no call has such a name")
    if options.json:
        save(options.json, about, rows)
    return 0


if __name__ == "__main__":
    start(main)
