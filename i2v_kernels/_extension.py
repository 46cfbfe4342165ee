"""The compiled module ``_C``: loaded if it was built, and the reason why not if it was not."""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any

import torch  # its shared libraries must be loaded before ours


@cache
def load() -> tuple[Any, str | None]:
    """``(module, None)``, or ``(None, reason)`` where the extension is missing or does not load."""
    try:
        return importlib.import_module("i2v_kernels._C"), None
    except ModuleNotFoundError:
        return None, (
            "the C++ extension is not built (a C++20 compiler is needed; I2V_KERNELS_NO_EXTENSION=1 installs without)"
        )
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
def why_no_cuda() -> str | None:
    """None if the CUDA C++ kernels are there, else the reason."""
    module, reason = load()
    if reason is not None:
        return reason
    if not module.build_info()["cuda_architectures"]:
        return "the extension was built without CUDA (nvcc was not found, or I2V_KERNELS_BUILD_CUDA=0)"
    return None
