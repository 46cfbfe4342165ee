"""compute-sanitizer over the calls of calls.py, in a few processes, each with its share."""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from . import place

FINDING = re.compile(r"========= (Invalid|Error|Warning|Uninitialized|Misaligned|Program hit)")
SUMMARY = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)")
OPTIONS = {
    # PyTorch asks the driver for things that it may refuse: those are no errors of a kernel
    "memcheck": ["--tool=memcheck", "--leak-check=no", "--report-api-errors=no"],
    "racecheck": ["--tool=racecheck", "--racecheck-report=all"],
}


def findings(log: str) -> tuple[int | None, list[str]]:
    """How many errors the tool counted (None: it came to no end), and the lines that begin a finding."""
    counts = [int(count) for count in SUMMARY.findall(log)]
    lines, call = [], ""
    for line in log.splitlines():
        if FINDING.match(line):
            lines.append(f"{call}: {line.removeprefix('========= ')}")
        elif not line.startswith("========="):
            call = line
    return (sum(counts) if counts else None), lines


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.sanitize", description=__doc__)
    parser.add_argument("check", choices=list(OPTIONS))
    parser.add_argument("--tool", required=True, help="compute-sanitizer, as a command")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--processes", type=int, default=4)
    options = parser.parse_args(argv)
    folder = options.work / options.check
    folder.mkdir(exist_ok=True)
    deadline = time.monotonic() + options.seconds - 2
    # without the caching allocator every tensor has bounds of its own
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    children = []
    for i in range(options.processes):
        command = [*options.tool.split(), *OPTIONS[options.check], "--error-exitcode=1", "--target-processes=application-only"]
        command += [sys.executable, "-m", "bench.gpu.calls", "sanitize", "--record", str(folder / f"{i}.json")]
        command += ["--part", str(i), "--parts", str(options.processes), "--seconds", f"{max(options.seconds * 0.6, 5):.0f}"]
        with (folder / f"{i}.log").open("wb") as log:
            children.append(subprocess.Popen(command, cwd=place.ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT))
    ran: Counter[str] = Counter()
    failed, cut, unfinished = [], 0, []
    for i, child in enumerate(children):
        try:
            code: int | None = child.wait(max(deadline - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            code = None  # the stage's process group is killed as a whole
        errors, found = findings((folder / f"{i}.log").read_text(errors="replace"))
        record = folder / f"{i}.json"
        said = json.loads(record.read_text()) if record.exists() else {"ran": {}, "failed": [], "cut": 0}
        ran.update(said["ran"])
        failed += [*said["failed"], *found]
        cut += said["cut"]
        if errors and not found:
            failed.append(f"{errors} errors, see {record.with_suffix('.log').name}")
        if code is None:
            unfinished.append(f"process {i} was not done in time")
        elif errors is None or (code != 0 and not (errors or said["failed"])):
            failed.append(f"process {i} ended with status {code}" + (", without a summary" if errors is None else ""))
    missing = [f"{info} {backend}" for info, backend in place.pairs(("cuda", "triton")) if not ran[f"{info} {backend}"]]
    if not unfinished and not cut:
        failed += [f"{name}: no call ran" for name in missing]
    print("\n".join([*(f"{name}: {count} calls" for name, count in sorted(ran.items())), *failed, *unfinished]))
    note = f"{sum(ran.values())} calls under {options.check}, {len(failed)} findings"
    note += f", {cut} calls not run" if cut else ""
    note += "".join(f"; {line}" for line in (*unfinished, *failed[:2]))
    status = place.evidence(
        options.work / f"{options.check}.json", sum(ran.values()), len(failed), note, cut=bool(cut or unfinished)
    )
    if any(child.poll() is None for child in children):
        sys.stdout.flush()
        os._exit(status)
    return status


if __name__ == "__main__":
    sys.exit(main())
