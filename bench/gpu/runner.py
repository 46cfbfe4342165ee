"""Runs stages one after another, each in a process group of its own and within its own time, and keeps what they bring."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import tarfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .place import ROOT, write_json

LOG_HEAD, LOG_TAIL = 32 << 10, 224 << 10  # bytes kept of a longer log
FILE_MOST, ARCHIVE_MOST = 1 << 20, 12 << 20  # of any file; of all together, before they are compressed
GRACE, PACKING, LEAST = 3, 4, 5  # seconds: to end in, to pack in, and under which nothing is begun
LEFT_MOST = 400  # names of what a stage has left to do; beyond that it is all run again


@dataclass
class Outcome:
    """``result``: ok, failed, timed out, cut (it ended itself for want of time), skipped or earlier (ok in the run resumed);
    ``note``: the line that says most; ``left``: what of it must run again.
    """

    stage: str
    result: str
    seconds: float = 0.0
    note: str = ""
    left: list[str] = field(default_factory=list)

    @property
    def bad(self) -> bool:
        return self.result in ("failed", "timed out", "cut")


class Runner:
    """``work`` holds what the stages write; ``out`` gets ``summary.json`` and ``results.tar.gz`` after every stage."""

    def __init__(
        self, work: Path, out: Path, budget: float, environment: dict[str, str], about: dict[str, Any], begun: float
    ) -> None:
        self.work, self.out, self.environment, self.about, self.begun = work, out, environment, about, begun
        self.deadline = self.begun + budget - PACKING
        self.outcomes: list[Outcome] = []
        self.child: subprocess.Popen[bytes] | None = None

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def skip(self, stage: str, why: str, result: str = "skipped") -> None:
        self.record(Outcome(stage, result, note=why))

    def run(self, stage: str, limit: float, command: Sequence[str], **environment: str) -> Outcome:
        """What the stage says of itself is in ``work/<stage>.json``: without one pass in it, it has failed."""
        limit = min(limit, self.left())
        if limit < LEAST:
            self.skip(stage, "the budget was spent")
            return self.outcomes[-1]
        print(f"{stage} ...", flush=True)
        log, start = self.work / f"{stage}.log", time.monotonic()
        said = self.work / f"{stage}.json"
        said.unlink(missing_ok=True)
        command = [part.replace("{seconds}", f"{limit:.0f}") for part in command]
        with log.open("wb") as output:
            output.write(f"$ {' '.join(command)}\n".encode())
            output.flush()
            self.child = subprocess.Popen(
                command,
                cwd=ROOT,
                env={**self.environment, **environment},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                code: int | None = self.child.wait(limit)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                self.end()
        outcome = judged(stage, code, said, log)
        outcome.seconds = round(time.monotonic() - start, 1)
        self.record(outcome)
        return outcome

    def end(self) -> None:
        """The running stage and whatever it started: asked first, then killed."""
        if self.child is None:
            return
        with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(self.child.pid, signal.SIGTERM)
            self.child.wait(GRACE)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.child.pid, signal.SIGKILL)
        self.child.wait()
        self.child = None

    def record(self, outcome: Outcome) -> None:
        if len(outcome.left) > LEFT_MOST:
            outcome.left = []
        self.outcomes.append(outcome)
        print(f"{outcome.stage:<12}{outcome.result:<11}{outcome.seconds:6.1f} s  {outcome.note}", flush=True)
        self.keep()

    def keep(self) -> None:
        """Written anew after every stage: a run that is killed leaves all that came before."""
        self.out.mkdir(parents=True, exist_ok=True)
        pack(self.work, self.out / "results.tar.gz")
        seconds = round(time.monotonic() - self.begun, 1)
        write_json(self.out / "summary.json", {**self.about, "seconds": seconds, "stages": list(map(asdict, self.outcomes))})


def judged(stage: str, code: int | None, said: Path, log: Path) -> Outcome:
    """``code``: the exit status, None if time ran out."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines()]
    last = next((line for line in reversed(lines) if line), "")
    try:
        evidence = json.loads(said.read_text())
    except (OSError, ValueError):
        evidence = {}
    if "passed" not in evidence and "rows" in evidence:  # a bench that knows nothing of stages
        evidence = {"passed": len(evidence["rows"]), "note": f"{len(evidence['rows'])} rows"}
    note, left = evidence.get("note", last)[:300], evidence.get("left", [])
    if code is None:
        return Outcome(stage, "timed out", note=note, left=left)
    if code == 0 and not evidence.get("passed"):
        return Outcome(stage, "failed", note=f"nothing passed: {note}", left=left)
    if code != 0:
        return Outcome(stage, "failed", note=note if evidence.get("failed") else f"exit status {code}: {last}"[:300], left=left)
    return Outcome(stage, "cut" if evidence.get("cut") else "ok", note=note, left=left)


def pack(folder: Path, target: Path) -> None:
    """All files of a folder in one archive of a bounded size, small ones first; what is cut or left out is said in it."""
    beside, total, left_out = target.with_suffix(".part"), 0, []
    files = sorted((p for p in folder.rglob("*") if p.is_file() and p.suffix != ".part"), key=lambda p: (p.stat().st_size, p))
    with tarfile.open(beside, "w:gz", compresslevel=6) as archive:

        def add(name: str, content: bytes) -> None:
            entry = tarfile.TarInfo(f"results/{name}")
            entry.size, entry.mtime = len(content), int(time.time())
            archive.addfile(entry, io.BytesIO(content))

        for path in files:
            content = trimmed(path)
            total += len(content)
            if total > ARCHIVE_MOST:
                left_out.append(f"{path.relative_to(folder)} ({path.stat().st_size} bytes)")
                total -= len(content)
            else:
                add(str(path.relative_to(folder)), content)
        if left_out:
            add("LEFT_OUT", "\n".join(left_out).encode())
    beside.replace(target)


def trimmed(path: Path) -> bytes:
    """Of logs the first and the last part; of results the first megabyte."""
    size = path.stat().st_size
    with path.open("rb") as file:
        if path.suffix != ".log":
            return file.read(FILE_MOST)
        if size <= LOG_HEAD + LOG_TAIL:
            return file.read()
        head = file.read(LOG_HEAD)
        file.seek(size - LOG_TAIL)
        return head + f"\n\n... {size - LOG_HEAD - LOG_TAIL} bytes left out ...\n\n".encode() + file.read()
