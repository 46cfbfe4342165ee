"""``python -m bench.gpu``: everything that only a GPU can show, in one go: build, tests, compute-sanitizer, benches.

Each stage has a time limit, and none stops the next. Logs, figures and ``summary.json`` go to ``bench/results/<device>/``.
Nothing is downloaded: the Python that runs this holds torch, triton, pytest and, to compile, setuptools and pybind11.
Exit status: 0 if no stage failed, 1 if one did, 2 if there is no GPU.
"""

from __future__ import annotations

import argparse
import ast
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 19 * 60  # seconds altogether
STAGES = ("build", "kernels", "tests", "memcheck", "racecheck", "bench", "video", "patch")


@dataclass
class Outcome:
    """What became of a stage: ok, failed, timed out or skipped; ``note`` is the line that says most."""

    stage: str
    result: str
    seconds: float = 0.0
    note: str = ""


class Runner:
    """Runs the stages, each in a process group of its own, with its output in a log."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.folder, self.environment = folder, environment
        self.deadline = time.monotonic() + LIMIT
        self.outcomes: list[Outcome] = []

    def skip(self, stage: str, why: str) -> None:
        self._record(Outcome(stage, "skipped", note=why))

    def run(self, stage: str, limit: float, command: Sequence[str], note: str, **environment: str) -> Outcome:
        """``note``: a pattern; the last line of the log that it is found in becomes the outcome's note."""
        limit = min(limit, self.deadline - time.monotonic())
        if limit < 5:
            self.skip(stage, f"the {LIMIT // 60} minutes were over")
            return self.outcomes[-1]
        print(f"{stage} ...", flush=True)
        log, start = self.folder / f"{stage}.log", time.monotonic()
        with log.open("w") as output:
            output.write(f"$ {' '.join(command)}\n")
            output.flush()
            child = subprocess.Popen(
                command,
                cwd=ROOT,
                env={**self.environment, **environment},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                result = "ok" if child.wait(limit) == 0 else "failed"
            except subprocess.TimeoutExpired:
                result = "timed out"
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
        lines = [line.strip() for line in log.read_text(errors="replace").splitlines()]
        said = [line for line in lines if re.search(note, line)]
        outcome = Outcome(stage, result, time.monotonic() - start, (said or lines or [""])[-1][:160])
        self._record(outcome)
        return outcome

    def _record(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)
        print(f"{outcome.stage:<12}{outcome.result:<11}{outcome.seconds:6.0f} s  {outcome.note}", flush=True)


def gpu_tests() -> Iterator[tuple[Path, list[str]]]:
    """Test files with tests marked ``gpu``, and the modules that they or their conftest.py import but this Python lacks.

    The others are not collected at all: a machine with a GPU need not hold video decoders and model libraries.
    """
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        beside = {file.stem: file for file in path.parent.glob("*.py")}
        helpers = [beside[name] for name in imported(path) if name in beside and not name.startswith("test_")]
        if not any("mark.gpu" in file.read_text() for file in (path, *helpers)):
            continue
        parents = path.relative_to(ROOT).parents
        files = [path, *helpers, *(conftest for p in parents if (conftest := ROOT / p / "conftest.py").exists())]
        wanted = {name for file in files for name in imported(file)}
        yield path, sorted(n for n in wanted if n not in beside and importlib.util.find_spec(n) is None)


def imported(path: Path) -> Iterator[str]:
    """The top-level names of the modules that a file imports when it is imported."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level <= 1 and node.module:  # or the file beside it
            yield node.module.split(".")[0]


def found(module: str) -> bool:
    """Whether a module is installed; a parent that is not is no error."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def find(program: str) -> str | None:
    """A program of the CUDA toolkit."""
    places = [os.environ.get("CUDA_HOME", ""), "/usr/local/cuda"]
    return shutil.which(program) or shutil.which(program, path=":".join(f"{p}/bin" for p in places if p))


def run_kernels() -> None:
    """Every GPU kernel once, forward and backward, on the registry's small samples: what compute-sanitizer looks at."""
    import torch

    from i2v_kernels.ops import base
    from i2v_kernels.testing import OPINFOS

    calls = 0
    for info in OPINFOS:
        for backend in base.OPS[info.name].backends:
            if backend.name not in ("library", "triton", "cuda"):
                continue
            for sample in info.samples():
                for dtype in (torch.bfloat16, torch.float32):
                    call = sample.to(dtype, "cuda", requires_grad=True)
                    try:
                        out = info.op(*call.args, **call.kwargs, backend=backend.name)
                    except NotImplementedError as reason:
                        print(f"not run: {info}, {sample.name}, {dtype}: {reason}")
                        continue
                    torch.autograd.grad(out, call.tensors(), torch.ones_like(out))
                    calls += 1
            torch.cuda.synchronize()
    print(f"{calls} calls, forward and backward")
    if not calls:
        raise SystemExit("no kernel ran")


def output_of(command: Sequence[str]) -> str | None:
    """The first line that a program prints, or None where there is no such program or it fails."""
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return done.stdout.splitlines()[0].strip() if done.returncode == 0 and done.stdout else None


def machine() -> dict[str, object]:
    """What the results were taken on."""
    import torch

    query = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,clocks.max.mem,power.limit", "--format=csv,noheader"]
    properties = torch.cuda.get_device_properties(0)
    return {
        "device": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "multiprocessors": properties.multi_processor_count,
        "driver, max sm clock, max memory clock, power limit": output_of(query),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": importlib.metadata.version("triton") if importlib.util.find_spec("triton") else None,
        "python": platform.python_version(),
        "commit": output_of(["git", "rev-parse", "HEAD"]),
        "date": time.strftime("%Y-%m-%d"),
    }


def architecture(capability: str) -> str:
    """As TORCH_CUDA_ARCH_LIST names it. Hopper's own instructions need the "a"."""
    return "9.0a" if capability == "9.0" else capability


def python_path(folder: Path) -> str:
    """``i2v_models`` is installed under that name and lies in the tree under another."""
    link = folder / "i2v_models"
    folder.mkdir(parents=True, exist_ok=True)
    if not link.exists():
        link.symlink_to(ROOT / "models", target_is_directory=True)
    return os.pathsep.join(p for p in (str(ROOT), str(folder), os.environ.get("PYTHONPATH", "")) if p)


def stages(runner: Runner, only: Sequence[str], capability: str) -> None:
    """Runs those of STAGES that are asked for, in order."""
    python = sys.executable
    if "build" in only:
        if find("nvcc") is None:
            runner.skip("build", "no nvcc here: the CUDA C++ kernels stay unverified, Triton's are judged below")
        else:
            build = [python, "setup.py", "build_ext", "--inplace"]
            switches = {"I2V_KERNELS_BUILD_CUDA": "1", "TORCH_CUDA_ARCH_LIST": architecture(capability)}
            runner.run("build", 300, build, r"[Ee]rror|failed", **switches)
    calls = [python, "-m", "bench.gpu", "--run-kernels"]
    if "kernels" in only:  # also fills Triton's cache, so that nothing is compiled under the sanitizer
        runner.run("kernels", 240, calls, r"calls,|Error")
    if "tests" in only:
        files = []
        for path, missing in gpu_tests():
            if missing:
                runner.skip(f"tests/{path.stem}", f"needs {', '.join(missing)}")
            else:
                files.append(str(path.relative_to(ROOT)))
        runner.run("tests", 540, [python, "-m", "pytest", "-q", "-m", "gpu", *files], r"\b(passed|failed|error|No module)")
    sanitizer = find("compute-sanitizer")
    for check, options in (("memcheck", ["--leak-check=no"]), ("racecheck", ["--racecheck-report=all"])):
        if check not in only:
            continue
        if sanitizer is None:
            runner.skip(check, "compute-sanitizer was not found")
            continue
        command = [sanitizer, f"--tool={check}", "--error-exitcode=1", "--target-processes=application-only", *options]
        # without the caching allocator every tensor has bounds of its own
        runner.run(check, 180, [*command, *calls], "SUMMARY|Error", PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    if "bench" in only:
        command = [python, "-m", "bench", "--device", "cuda", "--json", str(runner.folder / "ops.json")]
        runner.run("bench", 360, command, r"written to|Error|differs")
    for stage, bench, limit, needed in (
        ("video", "bench.loader", 300, ("av", "nvidia.dali", "open_clip", "skvideo")),
        ("patch", "bench.patch", 240, ("open_clip", "torchvision", "transformers")),
    ):
        missing = [name for name in needed if not found(name)]
        if stage in only and missing:
            runner.skip(stage, f"needs {', '.join(missing)}")
        elif stage in only:
            command = [python, "-m", bench, "--device", "cuda", "--json", str(runner.folder / f"{stage}.json")]
            runner.run(stage, limit, command, r"written to|Error|without")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.split("\n\n")[0])
    parser.add_argument("--only", choices=STAGES, action="append", help="only this stage; may be given again")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results", help="the folder of all devices' results")
    parser.add_argument("--run-kernels", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    try:
        import torch
    except ImportError:
        print("bench.gpu: this Python has no torch, so nothing was run and nothing was written.", file=sys.stderr)
        return 2
    if not torch.cuda.is_available() or torch.version.cuda is None:
        print(f"bench.gpu: torch {torch.__version__} sees no NVIDIA GPU, so nothing was run and nothing was written.")
        return 2
    if options.run_kernels:
        run_kernels()
        return 0
    about = machine()
    folder = options.out.resolve() / re.sub(r"[^a-z0-9]+", "-", str(about["device"]).lower()).strip("-")
    folder.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "PYTHONPATH": python_path(ROOT / "build" / "gpu")}
    runner = Runner(folder, environment)
    print(", ".join(f"{key} {value}" for key, value in about.items()), flush=True)
    stages(runner, options.only or STAGES, str(about["capability"]))
    beside = folder / "summary.part"
    beside.write_text(json.dumps({"machine": about, "stages": list(map(asdict, runner.outcomes))}, indent=1))
    beside.replace(folder / "summary.json")
    print(f"\n{'stage':<28}{'result':<11}{'seconds':>7}  note")
    for outcome in runner.outcomes:
        print(f"{outcome.stage:<28}{outcome.result:<11}{outcome.seconds:7.0f}  {outcome.note}")
    print(f"written to {folder}")
    return int(any(outcome.result in ("failed", "timed out") for outcome in runner.outcomes))


if __name__ == "__main__":
    sys.exit(main())
