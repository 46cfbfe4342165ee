"""Packages that only some parts need: where one is missing, one sentence says what needs it and how to install it."""

from __future__ import annotations

import importlib
from typing import Any

INSTALL = {  # package -> what pip is given
    "av": '"i2v-kernels[video]"',
    "torchcodec": '"i2v-kernels[torchcodec]"',
    "nvidia.dali": '"i2v-kernels[dali]"',
    "open_clip": '"i2v-kernels[models]"',
    "safetensors": '"i2v-kernels[models]"',
    "tqdm": '"i2v-kernels[models]"',
    "sklearn": '"i2v-kernels[demo]"',
    "matplotlib": '"i2v-kernels[demo]"',
    "flash_attn": '--no-build-isolation "i2v-kernels[flash]"',
    "transformers": '"transformers>=4.48"',
}


def missing(package: str, what: str) -> str:
    """The sentence: ``what`` needs ``package``."""
    return f"{what} needs {package}: pip install {INSTALL[package]}"


def require(module: str, what: str) -> Any:
    """The module of that name, of a package in ``INSTALL``; an ``ImportError`` if it is not there.

    >>> require("torchcodec.decoders", "decoding with torchcodec")  # doctest: +SKIP
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = next(name for name in INSTALL if f"{module}.".startswith(f"{name}."))
        absent = isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}.")
        raise ImportError(missing(package, what) + ("" if absent else f" ({error})"), name=package) from error
