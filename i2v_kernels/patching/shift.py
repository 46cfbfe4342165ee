"""The shift of TSM networks, MIT's ``TemporalShift`` and mmaction2's, known by what they hold and proved by a trial."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..ops.token_shift import token_shift
from .rules import Found, Inputs, Replacement, random_like

SEGMENTS, DIVISORS = ("n_segment", "num_segments"), ("fold_div", "shift_div")


def temporal_shift(module: Any) -> Found:
    """``net(shift(x))``, x ``[B * T, C, H, W]``: C/div channels from the next frame, C/div from the previous, zeros outside."""
    if [name for name, _ in module.named_children()] != ["net"] or _numbers(module) is None:
        return None
    if getattr(module, "inplace", False):
        return "it shifts in place"
    return Replacement(_forward, "token_shift", _inputs, reads=(*SEGMENTS, *DIVISORS))


def _numbers(module: Any) -> tuple[int, int] | None:
    """T and the divisor of channels."""

    def first(names: tuple[str, ...]) -> int:
        return next((value for name in names if isinstance(value := getattr(module, name, None), int)), 0)

    frames, divisor = first(SEGMENTS), first(DIVISORS)
    return (frames, divisor) if frames > 0 and divisor > 0 else None


def _inputs(module: Any) -> Inputs:
    first = next(m for m in module.net.modules() if isinstance(m, nn.Conv2d))
    frames, _ = _numbers(module) or (1, 1)
    return (random_like(module, 2 * frames, first.in_channels, 8, 8),)


def _forward(module: Any, original: Any, *args: Any, **kwargs: Any) -> Any:
    frames, divisor = _numbers(module) or (1, 1)
    if kwargs or len(args) != 1 or args[0].dim() != 4 or args[0].shape[0] % frames:
        return original(*args, **kwargs)
    x: Tensor = args[0]
    fold = x.shape[1] // divisor
    tokens = x.permute(0, 2, 3, 1)
    if tokens.stride(-1) == 1 and tokens.is_contiguous():  # channels last
        shifted = token_shift(tokens.reshape(-1, frames, x.shape[2] * x.shape[3], x.shape[1]), [(fold, -1), (fold, 1)])
        return module.net(shifted.view(tokens.shape).permute(0, 3, 1, 2))
    # Planes: a channel is a run of H * W numbers, and a frame one token of C such runs.
    run = fold * x.shape[2] * x.shape[3]
    return module.net(token_shift(x.reshape(-1, frames, 1, x[0].numel()), [(run, -1), (run, 1)]).view(x.shape))
