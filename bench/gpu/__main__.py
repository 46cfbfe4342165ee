"""``python -m bench.gpu --out DIR --budget SECONDS``: what only a GPU can show, in minutes. README.md beside this file.

Exit status: 0 if every stage that ran is ok, 1 if one is not or none ran, 2 if there is no GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if "--stub" in sys.argv:  # place.py reads the environment when it is imported
    os.environ["I2V_GPU_STUB"] = "1"

from . import place
from .probe import output_of
from .runner import Runner
from .stages import EVERY, MORE, NOT_IN_STUB, STAGES, Context, Stage

PROBE = 90  # seconds: the first import on a cold disk
TABLE, FAILURES = 5500, 8  # characters of the bench's table and failed tests that are printed last


def python_path(folder: Path) -> str:
    """``i2v_models`` is installed under that name and lies in the tree under another."""
    link = folder / "i2v_models"
    folder.mkdir(parents=True, exist_ok=True)
    if not link.exists():
        link.symlink_to(place.ROOT / "models", target_is_directory=True)
    return os.pathsep.join(p for p in (str(place.ROOT), str(folder), os.environ.get("PYTHONPATH", "")) if p)


def probe(environment: dict[str, str]) -> dict[str, Any] | None:
    """What the machine is, asked in a process of its own: none here holds a CUDA context."""
    command = [sys.executable, "-m", "bench.gpu.probe"]
    try:
        done = subprocess.run(command, cwd=place.ROOT, env=environment, capture_output=True, text=True, timeout=PROBE)
    except subprocess.TimeoutExpired:
        print(f"bench.gpu: the device did not answer in {PROBE} s, so nothing was run and nothing was written.")
        return None
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    why = (done.stderr.strip().splitlines() or ["it has no torch"])[-1]
    print(f"bench.gpu: {why}, so nothing was run and nothing was written.")
    return None


def earlier(path: Path | None, commit: str | None) -> dict[str, dict[str, Any]]:
    """Stage -> its outcome in the run that is resumed, if that was of the same commit."""
    if path is None:
        return {}
    before = json.loads(path.read_text())
    if not commit or before.get("commit") != commit:
        print(f"{path} is of commit {before.get('commit')}, this is {commit}: everything is run again")
        return {}
    return {stage["stage"]: stage for stage in before["stages"]}


def run(runner: Runner, stage: Stage, context: Context, before: dict[str, dict[str, Any]]) -> None:
    asked = stage.name in context.only
    if context.only and not asked:
        return
    done = before.get(stage.name, {})
    if done.get("result") in ("ok", "earlier") and not asked:
        runner.skip(stage.name, done["note"], "earlier")
        return
    why_not = "not in the stub" if place.STUB and stage.name in NOT_IN_STUB else stage.why_not(context)
    if why_not is not None:
        runner.skip(stage.name, why_not)
    elif runner.left() < stage.least and not asked:
        runner.skip(stage.name, f"{max(runner.left(), 0):.0f} s were left")
    else:
        runner.run(stage.name, stage.seconds * place.PATIENCE, stage.command(context), **stage.environment(context))


def failed_tests(work: Path, before: dict[str, dict[str, Any]]) -> list[str]:
    """Of this run, or of the one that is resumed where this one has not run them."""
    found: list[str] = []
    for stage in ("tests", "rows"):
        said = work / f"{stage}.json"
        if said.exists():
            found += json.loads(said.read_text()).get("failed_tests", [])
        elif before.get(stage, {}).get("result") == "failed":
            found += before[stage].get("left", [])
    return found


def show(runner: Runner) -> None:
    """Last, since who sees the end of the output sees this."""
    tables = [path for name in ("bench", "float32") if (path := runner.work / f"{name}.txt").exists()]
    for table in tables[:1]:
        print(f"\n{table.read_text()[:TABLE]}")
    for name in ("tests", "rows"):
        log = runner.work / f"{name}.log"
        lines = log.read_text(errors="replace").splitlines() if log.exists() else []
        print("\n".join([line[:180] for line in lines if line.startswith("FAILED")][:FAILURES]))
    print(f"\n{'stage':<12}{'result':<11}{'seconds':>7}  note")
    for outcome in runner.outcomes:
        print(f"{outcome.stage:<12}{outcome.result:<11}{outcome.seconds:7.1f}  {outcome.note}")
    size = (runner.out / "results.tar.gz").stat().st_size / 2**20
    print(f"written to {runner.out}: summary.json and results.tar.gz, {size:.1f} MiB")


def interrupted(signum: int, _: Any) -> None:
    raise KeyboardInterrupt(signal.Signals(signum).name)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="gets summary.json and results.tar.gz")
    parser.add_argument("--budget", type=float, default=420, help="seconds, altogether")
    parser.add_argument("--resume", type=Path, help="a summary.json: leave out what was ok there at the same commit")
    parser.add_argument("--commit", help="of this tree, where there is no .git")
    parser.add_argument("--only", choices=EVERY, action="append", default=[], help="only this stage; may be given again")
    parser.add_argument("--stub", action="store_true", help="without a card: interpreter, emulation and tiny shapes")
    options = parser.parse_args(argv)
    begun = time.monotonic()
    environment = {**os.environ, **(place.STUB_ENVIRONMENT if place.STUB else {}), "PYTHONUNBUFFERED": "1"}
    environment["PYTHONPATH"] = python_path(place.ROOT / "build" / "gpu")
    about = probe(environment)
    if about is None:
        return 2
    about["commit"] = options.commit or output_of(["git", "rev-parse", "HEAD"])
    about["budget"] = options.budget
    print(", ".join(f"{key} {value}" for key, value in about.items()), flush=True)
    before = earlier(options.resume, about["commit"])
    work = Path(tempfile.mkdtemp(prefix="i2v-gpu-"))
    left = {name: stage.get("left", []) for name, stage in before.items()}
    context = Context(work, about, [], options.only, left)
    runner = Runner(work, options.out.resolve(), options.budget, environment, about, begun)
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, interrupted)
    status = 1
    try:
        for stage in (*STAGES, *MORE):
            if stage.name == "again":
                context.again = failed_tests(work, before)
            run(runner, stage, context, before)
        good = any(outcome.result in ("ok", "earlier") for outcome in runner.outcomes)
        status = int(not good or any(outcome.bad for outcome in runner.outcomes))
    except KeyboardInterrupt as why:
        runner.end()
        runner.skip("interrupted", str(why) or "SIGINT", "failed")
    show(runner)
    shutil.rmtree(work, ignore_errors=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
