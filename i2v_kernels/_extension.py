"""The compiled module ``_C``: loaded if it was built, and the reason why not if it was not."""

from __future__ import annotations

import importlib
import os
import warnings
from functools import cache
from typing import Any

import torch  # its shared libraries must be loaded before ours


@cache
def load() -> tuple[Any, str | None]:
    """``(module, None)``, or ``(None, reason)`` where the extension is missing or does not load."""
    try:
        return importlib.import_module("i2v_kernels._C"), None
    except ModuleNotFoundError:
        return None, ("the C++ extension is not built (no C++20 compiler was found, or I2V_KERNELS_NO_EXTENSION=1 was set)")
    except ImportError as error:
        return None, f"the C++ extension does not load: {error}"


@cache
def compiled(name: str) -> Any:
    """The compiled kernels' entry point of that name: they fill outputs allocated by the caller."""
    return getattr(torch.ops.i2v_kernels_C, name).default


@cache
def why_no_cpu() -> str | None:
    """None if the C++ kernels for CPUs are there, else the reason."""
    return load()[1]


@cache
def warn_of_reference() -> None:
    """Says once in a process that ops run on plain PyTorch for want of the C++ kernels, if that is so."""
    reason = why_no_cpu()
    if reason is not None and os.environ.get("I2V_KERNELS_NO_WARNING") != "1":
        warnings.warn(
            f"i2v_kernels: ops on CPU tensors run on plain PyTorch (backend 'reference'), slower than compiled: {reason}. "
            "Install a C++20 compiler, then i2v-kernels again from its sources: "
            "pip install --force-reinstall --no-deps --no-build-isolation . "
            "(I2V_KERNELS_NO_WARNING=1 silences this)",
            RuntimeWarning,
            stacklevel=2,
        )


@cache
def why_no_cuda() -> str | None:
    """None if the CUDA C++ kernels are there, else the reason."""
    module, reason = load()
    if reason is not None:
        return reason
    if not module.build_info()["cuda_architectures"]:
        return "the extension was built without CUDA (nvcc was not found, or I2V_KERNELS_BUILD_CUDA=0)"
    return None
