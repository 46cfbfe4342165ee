"""What the fuzz draws calls of ops from: sizes with 0 and 1 among them. Each op's ``OpInfo.drawn`` makes a call of these."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..ops.activations import ACTIVATIONS
from .opinfo import Choose, randn

FEW = (2, 1, 3, 0)
FRAMES = (3, 1, 2, 4, 7, 8, 9, 16, 17)
CHANNELS = (8, 1, 3, 16, 20, 33, 64, 0)
ACTIVATION = (None, *ACTIVATIONS)
YES_NO = (False, True)


def grid(choose: Choose) -> tuple[int, int, int, dict[str, Any]]:
    """Tokens, the kernel's height and width, and the options that tell of them."""
    height, width, prefix = choose((2, 1, 3, 5, 0)), choose((3, 1, 2, 6)), choose((0, 1, 2))
    kernel = choose(((1, 1), (3, 3), (1, 3), (5, 1), (5, 5)))
    options: dict[str, Any] = {"prefix": prefix}
    if kernel != (1, 1) or choose(YES_NO):
        options["grid"] = (height, width)
    return prefix + height * width, *kernel, options


def rows(choose: Choose, channels: int) -> Tensor:
    """``[..., channels]``."""
    return randn(*[choose(FEW) for _ in range(choose((3, 0, 1, 2)))], channels)
