"""What a GPU call costs the host: _launches.py, in a process where Triton's driver and compiler are stubs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from i2v_kernels.ops.triton_common import dot_precision

HERE = Path(__file__).parent


def test_launches():
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", "-W", "ignore"]
    env = {key: value for key, value in os.environ.items() if key not in ("TRITON_INTERPRET", "I2V_KERNELS_BACKEND")}
    env["CUDA_VISIBLE_DEVICES"] = ""
    done = subprocess.run([*command, HERE / "_launches.py"], env=env, cwd=HERE.parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout, done.stdout[-2000:]


@pytest.mark.parametrize("setting", [torch.backends.cuda.matmul, torch.backends], ids=["of products", "of all"])
@pytest.mark.skipif(torch.version.hip is not None, reason="TF32 is NVIDIA's")
def test_tf32_by_the_new_setting(setting):
    """After which PyTorch refuses to tell what the old one, allow_tf32, is."""
    before = setting.fp32_precision
    setting.fp32_precision = "tf32"
    try:
        with pytest.raises(RuntimeError):
            _ = torch.backends.cuda.matmul.allow_tf32
        assert dot_precision(torch.float32) == "tf32" and dot_precision(torch.bfloat16) == "ieee"
    finally:
        setting.fp32_precision = before
    assert dot_precision(torch.float32) == "ieee"


def test_tf32_by_the_old_setting():
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.allow_tf32 = True
    try:
        assert dot_precision(torch.float32) == ("ieee" if torch.version.hip else "tf32")
        matmul.allow_tf32 = False
        assert dot_precision(torch.float32) == "ieee"
    finally:
        matmul.fp32_precision = before
