"""Shared by all tests: memory that a kernel forgets to write shows as NaN, and tests that need a GPU skip without one."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest
import torch

from bench import cache

SOURCES = sorted(Path(__file__).resolve().parent.parent.glob("i2v_kernels/ops/**/*.py"))


def pytest_configure():
    """Inductor keeps what it compiled by the graph, which does not say what shapes and strides an op gives: here it is kept for
    one state of the ops' sources.
    """
    state = hashlib.sha256(b"".join(path.read_bytes() for path in SOURCES)).hexdigest()[:24]
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(cache.folder("inductor") / state)
    cache.prune("inductor")


@pytest.fixture(autouse=True)
def _poison():
    """Memory from ``torch.empty*`` holds NaN, in C++ too: PyTorch fills it under deterministic algorithms."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(2).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _seed():
    """A test draws the same numbers in every run."""
    torch.manual_seed(0)


def pytest_collection_modifyitems(items):
    if os.environ.get("I2V_GPU_STUB") != "1" and not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):  # not item.keywords, which hold the names of folders too
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))
