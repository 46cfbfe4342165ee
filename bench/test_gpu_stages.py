"""``python -m bench.gpu`` without a GPU: its parts, and the whole of it in the stub, with kernels that work and broken ones."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch

from i2v_kernels import _extension

from . import measure, short
from .gpu import __main__ as command
from .gpu import place, probe, runner, sanitize, stages, tests

needs_stub = pytest.mark.skipif(_extension.why_no_cpu() is not None, reason=str(_extension.why_no_cpu()))
PASSES = "import json, sys; json.dump({'passed': 4, 'failed': 0, 'note': '4 passed'}, open(sys.argv[1], 'w'))"


@pytest.fixture
def work(tmp_path):
    folder = tmp_path / "work"
    folder.mkdir()
    return folder


@pytest.fixture
def run(tmp_path, work):
    return runner.Runner(work, tmp_path / "out", 600, dict(os.environ), {"commit": "abc"}, time.monotonic())


def python(code, *arguments):
    return [sys.executable, "-c", code, *map(str, arguments)]


def summary(folder):
    return json.loads((folder / "summary.json").read_text())


def results(folder):
    return {stage["stage"]: stage["result"] for stage in summary(folder)["stages"]}


def test_a_failure_is_recorded_and_does_not_stop_the_next(run, work, tmp_path):
    run.run("first", 60, python("import sys; print('3 failed'); print('bye'); sys.exit(1)"))
    assert results(tmp_path / "out") == {"first": "failed"}  # kept at once, not at the end
    run.run("second", 60, python(PASSES, work / "second.json"))
    assert [(o.result, o.note) for o in run.outcomes] == [("failed", "exit status 1: bye"), ("ok", "4 passed")]
    with tarfile.open(tmp_path / "out" / "results.tar.gz") as archive:
        assert set(archive.getnames()) == {f"results/{name}" for name in ("first.log", "second.log", "second.json")}
        assert b"3 failed\nbye" in archive.extractfile("results/first.log").read()


@pytest.mark.parametrize("code", ["print('all skipped')", PASSES.replace("4,", "0,")], ids=["says nothing", "passed nothing"])
def test_a_stage_in_which_nothing_passed_has_failed(run, work, code):
    assert run.run("empty", 60, python(code, work / "empty.json")).result == "failed"


def test_a_stage_that_ends_itself_for_want_of_time_is_not_ok(run, work):
    code = PASSES.replace("'note'", "'cut': True, 'left': ['a', 'b'], 'note'")
    outcome = run.run("cut", 60, python(code, work / "cut.json"))
    assert outcome.result == "cut" and outcome.left == ["a", "b"] and outcome.bad


def test_a_stage_that_hangs_is_ended_with_its_children(run, tmp_path):
    start, file = time.monotonic(), tmp_path / "pid"
    child = f"import os, signal, time; open({str(file)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    code = "import signal, subprocess, sys; signal.signal(15, signal.SIG_IGN); "
    code += f"subprocess.run([sys.executable, '-c', {child!r}])"
    assert run.run("hangs", 5, python(code)).result == "timed out"
    assert time.monotonic() - start < 30
    status = Path("/proc", file.read_text(), "status")
    while status.exists() and "State:\tZ" not in status.read_text():  # ended, though nobody may have asked how
        assert time.monotonic() - start < 50
        time.sleep(0.1)


def test_nothing_starts_after_the_deadline(run):
    run.deadline = time.monotonic()
    assert run.run("late", 60, python("print(1)")).result == "skipped"


def test_the_archive_is_bounded(work, tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "ARCHIVE_MOST", 2 << 20)
    (work / "long.log").write_bytes(b"first" + bytes(3 << 20) + b"last")
    for name in ("a.jsonl", "b.jsonl"):
        (work / name).write_bytes(bytes(5 << 20))
    runner.pack(work, tmp_path / "out.tar.gz")
    with tarfile.open(tmp_path / "out.tar.gz") as archive:
        sizes = {member.name: member.size for member in archive}
        log = archive.extractfile("results/long.log").read()
        assert archive.extractfile("results/LEFT_OUT").read() == b"b.jsonl (5242880 bytes)"
    assert log.startswith(b"first") and log.endswith(b"last") and b"bytes left out" in log
    assert sizes["results/a.jsonl"] == 1 << 20 and sizes["results/long.log"] < 300_000 and "results/b.jsonl" not in sizes


def test_resumes_what_was_ok_at_the_same_commit(run, work, tmp_path):
    file = tmp_path / "before.json"
    before = [{"stage": "smoke", "result": "ok", "note": "fine"}, {"stage": "tests", "result": "failed", "left": ["x"]}]
    file.write_text(json.dumps({"commit": "abc", "stages": before}))
    assert command.earlier(file, "def") == {} == command.earlier(file, None) == command.earlier(None, "abc")
    found = command.earlier(file, "abc")
    context = stages.Context(work, {}, [])
    for stage in (stages.Stage(n, 60, lambda c, n=n: python(PASSES, work / f"{n}.json")) for n in ("smoke", "tests")):
        command.run(run, stage, context, found)
    assert [(o.stage, o.result, o.note) for o in run.outcomes] == [("smoke", "earlier", "fine"), ("tests", "ok", "4 passed")]
    assert command.failed_tests(work / "none", found) == ["x"]


def test_finds_the_files_with_gpu_tests_and_what_they_lack(tmp_path, monkeypatch):
    monkeypatch.setattr(place, "ROOT", tmp_path)
    folder = tmp_path / "tests" / "models"
    folder.mkdir(parents=True)
    (folder / "conftest.py").write_text("import no_such_library.part\n")
    (folder / "helpers.py").write_text("")
    (folder / "test_a.py").write_text("import torch, helpers\nfrom other_missing import x\n# pytest.mark.gpu\n")
    (folder / "test_b.py").write_text("import torch\n")
    (folder / "devices.py").write_text("# pytest.mark.gpu\n")
    (folder / "test_c.py").write_text("from devices import device\n")
    (folder / "clips.py").write_text("import lacking\n")
    (folder / "test_d.py").write_text("from .clips import clip\n# pytest.mark.gpu\n")
    found = [(path.name, missing) for path, missing in tests.gpu_tests()]
    assert found == [
        ("test_a.py", ["no_such_library", "other_missing"]),
        ("test_c.py", ["no_such_library"]),
        ("test_d.py", ["lacking", "no_such_library"]),
    ]


def test_every_gpu_test_file_of_this_tree_can_be_collected():
    found = dict(tests.gpu_tests())
    kernels = {f"test_{name}.py" for name in ("token_shift_emulated", "temporal_attention_cuda", "temporal_conv_cuda")}
    assert kernels | {"test_gpu.py"} <= {path.name for path in found}
    assert all(not missing for path, missing in found.items() if path.parent.name in ("ops", "csrc"))


def test_a_backend_whose_tests_were_all_skipped_has_failed(work):
    run = tests.Run("tests", [], work, "tests")
    run.know([["f.py::a", "shift", "triton"], ["f.py::b", "shift", "cuda"], ["f.py::c", "shift", "cuda"], ["g.py::d", "", ""]])
    run.todo.clear()
    for name, outcome in {"f.py::a": "passed", "f.py::b": "skipped", "f.py::c": "skipped", "g.py::d": "skipped"}.items():
        run.results[name] = {"id": name, "outcome": outcome, "reason": "no extension", "text": "", "shares": []}
    assert run.without_a_pass() == [f"{n} (2 no extension)" if "cuda" in n else f"{n} (1 no extension)" for n in (
        "shift cuda: nothing passed", "g.py: nothing passed",
    )]  # fmt: skip
    assert tests.report(run, 1.0) == 1 and json.loads((work / "tests.json").read_text())["failed"] == 2


def test_reads_what_compute_sanitizer_says():
    log = "call one\n========= Invalid __global__ read of size 4 bytes\n=========     at f\ncall two\n"
    assert sanitize.findings(log) == (None, ["call one: Invalid __global__ read of size 4 bytes"])
    assert sanitize.findings("========= ERROR SUMMARY: 0 errors\n") == (0, [])
    racecheck = "========= RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)"
    assert sanitize.findings(racecheck)[0] == 2


def test_a_benchs_call_is_larger_than_the_cache_by_far():
    for info, number in short.calls():
        clips = short.sized(info, number, torch.bfloat16, 50 << 20)[1]
        sample = place.models(info, clips)[number].to(torch.bfloat16, "meta")
        more = info.traffic(place.models(info, 2 * clips)[number].to(torch.bfloat16, "meta"))
        enough = info.traffic(sample) >= 4 * (50 << 20) or more == info.traffic(sample)  # it stops
        assert enough and info.traffic(sample) <= 2 * short.MOST, (info, sample.name, clips)


def test_predictions_are_found_by_call_pass_and_backend(tmp_path):
    file = tmp_path / "predictions.json"
    row = {"op": "a", "sample": "s", "dtype": "bfloat16", "pass": "forward", "backend": "triton"}
    row |= {"share": 0.9, "microseconds": 7}
    file.write_text(json.dumps([row, {**row, "dtype": "float32", "share": 0.1}]))
    assert short.predictions(file, "bfloat16") == {("a", "s", "forward", "triton"): (0.9, 7)}
    assert short.predictions(tmp_path / "none", "bfloat16") == {}
    known = short.predictions(short.PREDICTIONS, "bfloat16")
    calls = {(info.name, place.models(info, 1)[number].name) for info, number in short.calls()}
    assert {(op, sample) for op, sample, *_ in known} <= calls  # none is left behind by a renamed call
    assert {("temporal_attention", "ViT-B/16 T=8", which, "triton") for which in short.PASSES} <= set(known)


def test_a_launch_is_timed_only_once_it_has_waited_in_the_queue(monkeypatch):
    """A device that runs as long as it was told to sleep, and a host that takes 30 ms to queue a launch."""
    clock, asleep = [0.0], [0.0]  # seconds: the host's, and until when the device sleeps

    class Event:
        def __init__(self, enable_timing):
            pass

        def record(self):
            self.at = max(clock[0], asleep[0])

        def query(self):
            return clock[0] >= self.at

        def synchronize(self):
            clock[0] = max(clock[0], self.at)

        def elapsed_time(self, other):
            return (other.at - self.at) * 1e3

    def launch(i):
        clock[0] += 0.03
        asleep[0] = max(clock[0], asleep[0]) + 0.002

    def sleep(cycles):
        asleep[0] = clock[0] + cycles / 2e9

    for name, fake in {"Event": Event, "synchronize": lambda: None, "_sleep": sleep}.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(measure.time, "perf_counter", lambda: clock[0])
    queue = measure.Queued(launch, "cuda")
    queue.launches = 4
    device, host = queue.once()
    assert queue.waited and device == pytest.approx(2000) and host == pytest.approx(30_000)
    queue.LONGEST = queue.cycles = 1000
    device, _ = queue.once()
    assert not queue.waited and device > 29_000  # what it would have said of the kernel


def test_the_line_that_says_most():
    lines = ["RuntimeError: CUDA error: an illegal memory access was encountered", "(originally from here)"]
    assert place.telling(RuntimeError("\n".join(["At:", *lines]))).endswith("an illegal memory access was encountered")
    assert place.telling(ValueError("at 3:4:\n  x = y\nincompatible shapes")) == "ValueError: incompatible shapes"
    assert place.telling(KeyError()) == "KeyError: "


def test_names_hopper_as_nvcc_does():
    assert [stages.architecture(c) for c in ("8.0", "9.0", "12.0")] == ["8.0", "9.0a", "12.0"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path):
    arguments = [sys.executable, "-m", "bench.gpu", "--out", str(tmp_path / "results")]
    done = subprocess.run(arguments, cwd=place.ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "sees no NVIDIA GPU, so nothing was run and nothing was written" in done.stdout
    assert not (tmp_path / "results").exists()


def stub(out, *arguments, **environment):
    line = [sys.executable, "-m", "bench.gpu", "--stub", "--commit", "abc", "--out", str(out), "--budget", "840", *arguments]
    return subprocess.Popen(
        line, cwd=place.ROOT, env={**os.environ, **environment}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def content(out):
    with tarfile.open(out / "results.tar.gz") as archive:
        return {m.name.removeprefix("results/"): archive.extractfile(m).read().decode() for m in archive}


@needs_stub
def test_the_whole_of_it_in_the_stub(tmp_path):
    child = stub(tmp_path)
    said = child.communicate()[0]
    assert child.returncode == 0, said
    ran = {name for name, result in results(tmp_path).items() if result == "ok"}
    assert ran == {"smoke", "tests", "rows", "bench", "memcheck", "opcheck", "float32", "patch", "ncu"}, said
    assert {stage["stage"] for stage in summary(tmp_path)["stages"]} == set(stages.EVERY)
    kept = content(tmp_path)
    backends = {(r["op"], r["backend"]) for r in json.loads(kept["smoke.json"])["rows"]}
    assert backends >= {(info.name, backend) for info, backend in place.pairs()}
    shares = {(op, backend) for op, backend, *_ in json.loads(kept["tests.json"])["shares"]}
    assert shares == {(info.name, backend) for info, backend in place.pairs()}
    rows = [json.loads(line) for line in kept["bench.jsonl"].splitlines()]
    assert {(r["op"], r["pass"], r["candidate"]) for r in rows if "us" in r} >= {
        (info.name, which, backend) for info, backend in place.pairs() for which in short.PASSES
    }
    assert "host us" in kept["bench.txt"] and "memcheck/0.log" in kept and "i2v_kernels" in kept["smoke/info.log"]


@needs_stub
def test_broken_kernels_turn_their_stages_red(tmp_path):
    """Each stage finds the fault that is there for it and no other."""
    only = [f"--only={name}" for name in ("smoke", "tests", "rows", "bench", "memcheck", "again")]
    ops = "temporal_attention,temporal_conv,token_shift,lora_linear"
    child = stub(tmp_path, *only, I2V_GPU_STUB_OPS=ops, I2V_GPU_STUB_PLUGIN="bench.stub_faults:all_at_once")
    said = child.communicate()[0]
    assert child.returncode == 1, said
    wanted = dict.fromkeys(("smoke", "tests", "bench", "memcheck", "again"), "failed")
    assert results(tmp_path) == {**wanted, "rows": "ok"}, said
    kept = content(tmp_path)
    rows = json.loads(kept["smoke.json"])["rows"]
    assert [(r["op"], r["backend"]) for r in rows if r["bad"]] == [("token_shift_", "triton")]
    failed = json.loads(kept["tests.json"])["failed_tests"]
    culprits = ("temporal_attention-triton", "test_temporal_attention_cuda.py")
    assert all(any(culprit in name for culprit in culprits) for name in failed)
    assert all(any(culprit in name for name in failed) for culprit in culprits)
    assert "processes replaced" in json.loads(kept["tests.json"])["note"]
    assert set(json.loads(kept["again.json"])["failed_tests"]) == set(failed)
    figures = [json.loads(line) for line in kept["bench.jsonl"].splitlines()]
    without = {(r["op"], r["candidate"]) for r in figures if "reason" in r and not r["candidate"].startswith("peer")}
    assert without == {("lora_linear", "library")}
    found = [line for line in kept["memcheck.log"].splitlines() if "Invalid" in line]
    assert found and all(line.startswith("temporal_conv cuda: ") for line in found)


@needs_stub
def test_a_backend_that_is_missing_is_a_failure(tmp_path):
    environment = {"I2V_GPU_STUB_OPS": "patch_embed", "I2V_GPU_STUB_PLUGIN": "bench.stub_faults:triton_is_missing"}
    child = stub(tmp_path, "--only=smoke", **environment)
    assert "patch_embed triton: triton is not installed" in child.communicate()[0]
    assert child.returncode == 1 and results(tmp_path) == {"smoke": "failed"}


@needs_stub
def test_ended_early_it_leaves_what_it_has(tmp_path):
    child = stub(tmp_path, "--only=smoke", "--only=tests", I2V_GPU_STUB_OPS="lora_linear")
    for line in child.stdout:
        if line.startswith("tests ..."):
            child.send_signal(signal.SIGTERM)
            break
    child.communicate()
    assert child.returncode == 1
    assert results(tmp_path) == {"smoke": "ok", "interrupted": "failed"} and "smoke.json" in content(tmp_path)


def test_the_probe_says_what_the_machine_is():
    assert {"torch", "python", "why_no_extension"} <= set(probe.versions())
