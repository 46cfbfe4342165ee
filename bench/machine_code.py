"""``python -m bench.machine_code``: what the compilers made of every Triton kernel, read without a GPU.

For each kind of launch (bench/aot.py) and each target: instructions in the code and as a warp executes them (loops counted by
``Launch.loops``, else bench/rounds.py), barriers, registers, bytes spilled, shared memory, programs that a multiprocessor
holds, loads and stores of global memory of 16 bytes and narrower ones, matrix instructions; for sm_90 what bench/sm.py, which
is not calibrated, makes of these: *headroom*, the throughput without a limit of memory over 3.0 TB/s, and the *share* of the
copy ceiling.

``--compare OLD.json`` shows what changed since a table that ``--json`` wrote, or since tests/ops/aot_golden.json.
``--update`` writes that golden table anew (tests/ops/test_triton_aot.py holds the code against it) and shows what changed.
``--predict`` writes bench/predictions.json, see bench/predictions.py.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from i2v_kernels.testing import OPINFOS

from . import aot, cache, collect, rounds, sass, sm
from .aot import Compiled, Job

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests" / "ops" / "aot_golden.json"
PREDICTIONS = ROOT / "bench" / "predictions.json"
MODELLED = "sm_90"
MODEL = 2  # to be raised when bench/sm.py or what is made of it here changes: predictions are kept too
COMPARED = (
    "instructions", "executed", "barriers", "registers", "spilled", "shared", "resident", "vector loads", "narrow loads",
    "vector stores", "narrow stores", "matrix instructions", "loops", "headroom", "share",
)  # fmt: skip


def executed(launch: Any, code: Compiled) -> list[int] | None:
    """The way of a warp through the code, if it is known how often it goes through each loop."""
    counts = rounds.counts(launch, code.code)
    return None if counts is None else sass.walk(code.code, counts)


def needed(launch: Any) -> float:
    """Bytes of memory of a program at least: every tensor once."""
    tensors = {x.untyped_storage()._cdata: x for x in launch.args.values() if isinstance(x, torch.Tensor)}
    return sum(collect.distinct(x) for x in tensors.values()) / max(launch.programs, 1)


def model(launch: Any, code: Compiled) -> dict[str, float] | None:
    """``headroom`` and ``share`` while a multiprocessor is full, and ``microseconds`` of all programs; kept like the code."""
    path = executed(launch, code)
    if path is None or not code.facts["resident"]:
        return None
    warps, resident = max(launch.threads // 32, 1), code.facts["resident"]
    moved = min(needed(launch), sm.moved(code.code, path) * warps)
    key = f"model-{MODEL}-" + aot.digest(aot.key_of(launch, MODELLED), path, round(moved), launch.programs)
    found = cache.load("aot", key)
    if found is None:
        found = _model(sm.steps(code.code, path, moved / warps), warps, resident, launch.programs, moved)
        cache.store("aot", key, found)
    return found


def _model(path: Sequence[sm.Step], warps: int, resident: int, programs: int, moved: float) -> dict[str, float]:
    full = min(max(4 * resident, sm.EVENTS // (len(path) * warps)), 10 * resident)
    free, bound = (sm.run(path, warps, resident, full, memory) for memory in (None, sm.MEMORY))
    mine = -(-programs // sm.MULTIPROCESSORS)  # of the multiprocessor that has most
    if mine <= full:
        cycles = sm.run(path, warps, resident, mine).cycles
    else:
        cycles = bound.cycles + (mine - full) * bound.steady
    return {
        "headroom": moved / free.steady / sm.MEMORY,
        "share": min(moved / bound.steady / sm.MEMORY, 1.0),
        "microseconds": cycles / sm.CLOCK * 1e6,
    }


def row(job: Job, launch: Any, code: Compiled, with_model: bool) -> dict[str, Any]:
    """What is said of one kernel."""
    entry = aot.entries()[job.entry][1]
    facts = {**code.facts, "dots": entry.dots and job.dtype != "float32", "vectors": entry.vectors}
    if not with_model:
        return facts
    path = executed(launch, code)
    facts["executed"] = path and len(path)
    if path is None:
        facts["bodies"] = [i + 1 - code.code[i].target for i in sass.loops(code.code)]
    if job.target == MODELLED:
        found = model(launch, code)
        facts |= {name: found and round(found[name], 2) for name in ("headroom", "share")}
    return facts


def table(wanted: Sequence[Job], with_model: bool, processes: int = 2) -> dict[str, dict[str, Any]]:
    """Name of the kernel -> its row."""
    read = list(aot.read(wanted, with_model, processes))
    if with_model:
        modelled = [job for job, launch, code in read if job.target == MODELLED and executed(launch, code) is not None]
        with ProcessPoolExecutor(processes, get_context("spawn")) as pool:  # fills the cache
            list(pool.map(_fill, modelled, chunksize=4))
    return {aot.name(job): row(job, launch, code, with_model) for job, launch, code in read}


def _fill(job: Job) -> None:
    for _, launch, code in aot.read([job]):
        model(launch, code)


def saved(path: Path) -> dict[str, dict[str, Any]]:
    """The rows of a file that this tool wrote."""
    return {key: value for key, value in json.loads(path.read_text()).items() if isinstance(value, dict)}


def save(path: Path, **values: Any) -> None:
    """One line a kernel; beside the target first."""
    lines = (f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in values.items())
    beside = path.with_suffix(".part")
    beside.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    beside.replace(path)


def golden(rows: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Without what is estimated, or depends on a launch's own account of its loops."""
    left_out = ("executed", "headroom", "share")
    return {key: {name: value for name, value in facts.items() if name not in left_out} for key, facts in rows.items()}


def changes(old: dict[str, dict[str, Any]], new: dict[str, dict[str, Any]]) -> Iterator[str]:
    """A line for each kernel that is not as it was."""
    for key in [*new, *(key for key in old if key not in new)]:
        if key not in old or key not in new:
            yield f"{key}: {'new' if key in new else 'gone'}"
            continue
        pairs = [(name, old[key].get(name), new[key].get(name)) for name in COMPARED]
        said = [f"{name} {a} -> {b}" for name, a, b in pairs if a is not None and b is not None and a != b]
        if said:
            yield f"{key}: {', '.join(said)}"


HEADER = (
    f"{'kernel':<66}{'instructions':>13}{'executed':>9}{'barriers':>9}{'registers':>10}{'spilled':>8}{'shared':>8}"
    f"{'resident':>9}{'loads 16/less':>14}{'stores':>8}{'matrix':>7}{'headroom':>9}{'share':>6}"
)


def line(key: str, facts: dict[str, Any]) -> str:
    loads, stores = (f"{facts[f'vector {kind}']}/{facts[f'narrow {kind}']}" for kind in ("loads", "stores"))
    matrix = facts["matrix instructions"]
    text = (
        f"{key:<66}{facts['instructions']:>13}{facts.get('executed') or '':>9}{facts['barriers']:>9}{facts['registers']:>10}"
        f"{facts['spilled']:>8}{facts['shared']:>8}{facts['resident']:>9}{loads:>14}{stores:>8}{matrix:>7}"
    )
    if facts.get("executed", 0) is None:
        bodies = ", ".join(map(str, facts["bodies"]))
        return f"{text}  loops: {facts['loops']} found, of {bodies} instructions, not counted"
    if facts.get("headroom") is not None:
        text += f"{facts['headroom']:>9.2f}{facts['share']:>6.2f}"
    return text


def main(argv: Sequence[str] | None = None) -> int:
    import triton

    parser = argparse.ArgumentParser(prog="python -m bench.machine_code", description=__doc__.split("\n\n")[0])
    names = [info.name for info in OPINFOS]
    parser.add_argument("--op", choices=names, action="append", help="only this op; may be given again")
    parser.add_argument("--target", choices=list(aot.TARGETS), action="append", help="only this target")
    parser.add_argument("--no-model", action="store_true", help="read, but predict nothing")
    parser.add_argument("--json", type=Path, help="write every figure here")
    parser.add_argument("--compare", type=Path, help="show what changed since this file was written")
    parser.add_argument("--update", action="store_true", help=f"write {GOLDEN.relative_to(ROOT)}")
    parser.add_argument("--predict", action="store_true", help=f"write {PREDICTIONS.relative_to(ROOT)}")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="that compile side by side")
    options = parser.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET") == "1":
        print("bench.machine_code: TRITON_INTERPRET=1 is set, which compiles nothing", file=sys.stderr)
        return 2
    if options.predict:
        from . import predictions

        for said in predictions.write(PREDICTIONS, options.op or (), options.processes):
            share = "loops not counted" if said["share"] is None else f"{said['share']:.2f}, {said['microseconds']:.0f} us"
            print(f"{said['op']:<22}{said['sample']:<45}{said['pass']:<18}{said['backend']:<9}{share}")
        return 0
    if options.update and (options.op or options.target):
        parser.error("--update is of all kernels")
    rows = table(aot.jobs(options.op or (), options.target or ()), not (options.no_model or options.update), options.processes)
    unlisted = aot.unlisted()
    if options.json:
        save(options.json, triton=triton.__version__, unlisted=unlisted, **rows)
    before = GOLDEN if options.update and GOLDEN.exists() else options.compare
    if before:
        some = options.op or options.target
        old = {key: facts for key, facts in saved(before).items() if key in rows or not some}
        print("\n".join(changes(old, rows)) or "nothing changed")
    elif not options.json:
        print(HEADER)
        for key, facts in rows.items():
            print(line(key, facts))
    if options.update:
        save(GOLDEN, triton=triton.__version__, **golden(rows))
    for name in unlisted:
        print(f"launched by no model call and no table AOT: {name}")
    print(f"{len(rows)} compiled kernels, torch {torch.__version__}, triton {triton.__version__}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
