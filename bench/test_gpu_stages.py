"""The stages of ``python -m bench.gpu``, without a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest
import torch

from . import gpu


@pytest.fixture
def runner(tmp_path):
    return gpu.Runner(tmp_path, dict(os.environ))


def python(code):
    return [sys.executable, "-c", code]


def test_a_failure_is_recorded_and_does_not_stop_the_next(runner):
    runner.run("first", 60, python("import sys; print('3 failed'); print('bye'); sys.exit(1)"), "failed")
    runner.run("second", 60, python("print('4 passed')"), "passed")
    assert [(o.result, o.note) for o in runner.outcomes] == [("failed", "3 failed"), ("ok", "4 passed")]
    assert "3 failed\nbye" in (runner.folder / "first.log").read_text()


def test_a_stage_that_hangs_is_ended_with_its_children(runner):
    start = time.monotonic()
    child = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    assert runner.run("hangs", 5, python(child), "nothing").result == "timed out"
    assert time.monotonic() - start < 30


def test_nothing_starts_after_the_deadline(runner):
    runner.deadline = time.monotonic()
    assert runner.run("late", 60, python("print(1)"), "1").result == "skipped"


def test_finds_the_files_with_gpu_tests_and_what_they_lack(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
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
    found = [(path.name, missing) for path, missing in gpu.gpu_tests()]
    assert found == [
        ("test_a.py", ["no_such_library", "other_missing"]),
        ("test_c.py", ["no_such_library"]),
        ("test_d.py", ["lacking", "no_such_library"]),
    ]


def test_every_gpu_test_file_of_this_tree_can_be_collected():
    found = dict(gpu.gpu_tests())
    kernels = {f"test_{name}.py" for name in ("token_shift_emulated", "temporal_attention_cuda", "temporal_conv_cuda")}
    assert kernels | {"test_gpu.py"} <= {path.name for path in found}
    assert all(not missing for path, missing in found.items() if path.parent.name in ("ops", "csrc"))


def test_names_hopper_as_nvcc_does():
    assert [gpu.architecture(c) for c in ("8.0", "9.0", "12.0")] == ["8.0", "9.0a", "12.0"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path):
    command = [sys.executable, "-m", "bench.gpu", "--out", str(tmp_path / "results")]
    done = subprocess.run(command, cwd=gpu.ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "sees no NVIDIA GPU, so nothing was run and nothing was written" in done.stdout
    assert not (tmp_path / "results").exists()
