"""The tests that need a card, over several processes: a test that hangs or breaks its CUDA context takes no other with it.

A worker (worker.py) takes one test after another. It is replaced when it ends itself after an error that CUDA does not recover
from, when it dies, and when a test takes too long.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib.util
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from . import place

EACH = 60 * place.PATIENCE  # seconds that a test may take, or a worker to start
STARTS = 3  # workers that may end before their first test and are replaced
SHOWN = 25  # failures that are printed
NOT_IN_STUB = ("test_token_shift_in_place.py", "test_dali.py")  # what they try on a card has no stand-in


def gpu_tests() -> Iterator[tuple[Path, list[str]]]:
    """Test files with tests marked ``gpu``, and the modules that they or their conftest.py import but this Python lacks.

    The others are not collected at all: a machine with a GPU need not hold video decoders and model libraries.
    """
    for path in sorted((place.ROOT / "tests").rglob("test_*.py")):
        beside = {file.stem: file for file in path.parent.glob("*.py")}
        helpers = [beside[name] for name in imported(path) if name in beside and not name.startswith("test_")]
        if not any("mark.gpu" in file.read_text() for file in (path, *helpers)):
            continue
        parents = path.relative_to(place.ROOT).parents
        files = [path, *helpers, *(conftest for p in parents if (conftest := place.ROOT / p / "conftest.py").exists())]
        wanted = {name for file in files for name in imported(file)}
        yield path, sorted(n for n in wanted if n not in beside and importlib.util.find_spec(n) is None)


def imported(path: Path) -> Iterator[str]:
    """The top-level names of the modules that a file imports when it is imported."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level <= 1 and node.module:  # or the file beside it
            yield node.module.split(".")[0]


class Worker:
    """A process, the test that it is at, and since when."""

    def __init__(self, which: str, files: Sequence[str], log: Path) -> None:
        self.read, write = os.pipe()
        self.rest = b""
        self.test: str | None = None
        self.since = time.monotonic()
        self.ready = False
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "bench.gpu.worker", str(write), which, *files],
                cwd=place.ROOT,
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                pass_fds=(write,),
            )
        os.close(write)

    def give(self, test: str) -> None:
        self.test, self.since = test, time.monotonic()
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # then its pipe says that it has ended
            self.process.stdin.write(f"{test}\n".encode())
            self.process.stdin.flush()

    def said(self) -> list[dict[str, Any]] | None:
        """What came down the pipe, or None when the worker has ended."""
        got = os.read(self.read, 1 << 16)
        if not got:
            return None
        *lines, self.rest = (self.rest + got).split(b"\n")
        return [json.loads(line) for line in lines]

    def end(self) -> int:
        if self.process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.close()
        self.process.kill()
        os.close(self.read)
        return self.process.wait()


class Run:
    """All tests of a stage; ``results``: name -> what the worker sent."""

    def __init__(self, which: str, files: Sequence[str], work: Path, stage: str, only: Sequence[str] = ()) -> None:
        self.which, self.files, self.work, self.stage, self.only = which, files, work, stage, set(only)
        self.collected: dict[str, tuple[str, str]] = {}
        self.todo: deque[str] = deque()
        self.results: dict[str, dict[str, Any]] = {}
        self.broken: dict[str, str] = {}
        self.false_starts = self.replaced = self.number = 0
        self.workers: list[Worker] = []
        self.selector = selectors.DefaultSelector()

    def start(self) -> None:
        self.number += 1
        log = self.work / self.stage / f"worker-{self.number:02}.log"
        log.parent.mkdir(exist_ok=True)
        worker = Worker(self.which, self.files, log)
        self.workers.append(worker)
        self.selector.register(worker.read, selectors.EVENT_READ, worker)

    def go(self, count: int, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        for _ in range(count):
            self.start()
        while self.workers and time.monotonic() < deadline:
            for key, _ in self.selector.select(timeout=0.5):
                self.hear(key.data)
            for worker in self.workers[:]:
                if time.monotonic() - worker.since > EACH:
                    self.lost(worker, f"took more than {EACH} s")
        for worker in self.workers[:]:
            self.drop(worker)

    def hear(self, worker: Worker) -> None:
        said = worker.said()
        if said is None:
            self.lost(worker, "")
            return
        for message in said:
            if "broken" in message:
                self.broken[message["broken"]] = message["text"]
            elif "collected" in message:
                self.know(message["collected"])
                worker.ready = True
                self.next(worker)
            else:
                self.results[message["id"]] = message
                self.keep(message)
                worker.test = None
                if message["sticky"]:
                    self.replaced += 1
                    self.drop(worker)
                    self.replace()
                    return
                self.next(worker)

    def know(self, tests: list[list[str]]) -> None:
        if not self.collected:
            self.collected = {name: (op, backend) for name, op, backend in tests if not self.only or name in self.only}
            self.todo.extend(self.collected)

    def next(self, worker: Worker) -> None:
        if self.todo:
            worker.give(self.todo.popleft())
        else:
            self.drop(worker)

    def replace(self) -> None:
        if len(self.todo) > sum(not worker.ready for worker in self.workers):
            self.start()

    def lost(self, worker: Worker, why: str) -> None:
        code = self.drop(worker)
        if worker.test is None:
            self.false_starts += not worker.ready
            if not worker.ready and self.false_starts < STARTS and (self.todo or not self.collected):
                self.start()
            return
        self.replaced += 1
        why = why or (f"its process was ended by signal {-code}" if code < 0 else f"its process ended with status {code}")
        seconds = round(time.monotonic() - worker.since, 2)
        message = {"id": worker.test, "outcome": "failed", "seconds": seconds, "text": why, "shares": []}
        self.results[worker.test] = message
        self.keep(message)
        self.replace()

    def drop(self, worker: Worker) -> int:
        self.workers.remove(worker)
        self.selector.unregister(worker.read)
        return worker.end()

    def keep(self, message: dict[str, Any]) -> None:
        with (self.work / f"{self.stage}.jsonl").open("a") as file:
            file.write(json.dumps({key: value for key, value in message.items() if value not in ("", [], False)}) + "\n")

    def named(self, outcome: str) -> list[str]:
        return [name for name, result in self.results.items() if result["outcome"] == outcome]

    def without_a_pass(self) -> list[str]:
        """Backends and files of which no test passed: that all of them were skipped is no success."""
        finished = not self.todo and not self.only
        groups: dict[str, list[str]] = {}
        for name, (op, backend) in self.collected.items():
            for group in (name.partition("::")[0], *([f"{op} {backend}"] if op else [])):
                groups.setdefault(group, []).append(name)
        found = []
        for group, names in groups.items():
            results = [self.results[name] for name in names if name in self.results]
            if finished and not any(result["outcome"] == "passed" for result in results):
                reasons = Counter(result.get("reason", "") or result["outcome"] for result in results)
                found.append(f"{group}: nothing passed ({', '.join(f'{n} {r}' for r, n in reasons.most_common(2))})")
        return found


def worst(results: dict[str, dict[str, Any]]) -> list[list[Any]]:
    """The comparison of each (op, backend, dtype) that came nearest to its limit: [op, backend, dtype, sample, what, share]."""
    most: dict[tuple[str, ...], list[Any]] = {}
    for result in results.values():
        for share in result["shares"]:
            key = tuple(share[:3])
            if key not in most or not share[5] <= most[key][5]:
                most[key] = share
    return sorted(most.values(), key=lambda share: -share[5])


def report(run: Run, seconds: float) -> int:
    left = [name for name in run.collected if name not in run.results]
    failed, empty = run.named("failed"), run.without_a_pass()
    shares = worst(run.results)
    for op, backend, dtype, sample, what, share in shares:
        print(f"{op:<20}{backend:<9}{dtype:<10}{share:7.1%} of its tolerance: {what} of {sample!r}")
    for name, text in run.broken.items():
        print(f"\ncannot be collected: {name}\n{text}")
    for name in failed[:SHOWN]:
        lines = run.results[name]["text"].strip().splitlines() or [""]
        said = next((line for line in reversed(lines) if line.startswith("E ")), lines[-1])
        print(f"FAILED {name.rpartition('/')[2]}: {said[:200]}")
    for line in empty:
        print(f"FAILED {line}")
    passed, skipped = run.named("passed"), run.named("skipped")
    reasons = Counter(run.results[name].get("reason", "") for name in skipped)
    for reason, count in reasons.most_common(8):
        print(f"{count} skipped: {reason}")
    note = f"{len(passed)} passed, {len(failed)} failed, {len(skipped)} skipped"
    note += f", {len(left)} not run" if left else ""
    note += f", {run.replaced} processes replaced" if run.replaced else ""
    note += f", worst {shares[0][5]:.0%} of a tolerance ({' '.join(shares[0][:3])})" if shares else ""
    note += f"; {empty[0]}" if empty else ""
    note += f"; {len(run.broken)} files cannot be collected" if run.broken else ""
    note += "; no worker started, see its log" if not run.collected else ""
    print(f"{note}, {seconds:.0f} s")
    return place.evidence(
        run.work / f"{run.stage}.json",
        len(passed),
        len(failed) + len(empty) + len(run.broken),
        note,
        left=[] if empty or run.broken else failed + left,  # then all again
        failed_tests=failed,
        cut=bool(left),
        shares=shares,
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.tests", description=__doc__.split("\n\n")[0])
    parser.add_argument("which", choices=("tests", "rows", "opcheck", "all"))
    parser.add_argument("--stage", help="under whose name results are kept")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--workers", type=int, default=12)
    parser.add_argument("--only", type=Path, help="a JSON list of tests' names: these alone")
    options = parser.parse_args(argv)
    files, begun = [], time.monotonic()
    for path, missing in gpu_tests():
        if place.STUB and path.name in NOT_IN_STUB:
            continue
        if missing:
            print(f"left out: {path.name} needs {', '.join(missing)}")
        elif options.which in ("tests", "all") or path.name == "test_gpu.py":
            files.append(str(path.relative_to(place.ROOT)))
    only = json.loads(options.only.read_text()) if options.only else ()
    run = Run(options.which, files, options.work, options.stage or options.which, only)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    try:
        run.go(options.workers, options.seconds - 2)
    finally:
        status = report(run, time.monotonic() - begun)
    return status


if __name__ == "__main__":
    sys.exit(main())
