"""How often a program goes through the loops of a kernel whose launch does not say so itself (``Launch.loops``).

By kernel: from the launch's arguments and constants ``v``, and the lengths of the loops that were found in the code. What does
not fit what was found is no count: better no prediction than a wrong one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from . import sass
from .sass import Instruction

Values = dict[str, Any]


def counts(launch: Any, code: Sequence[Instruction]) -> tuple[int, ...] | None:
    """One number for each loop, or None."""
    found = [i + 1 - code[i].target for i in sass.loops(code)]
    if not found:  # unrolled
        return ()
    said = launch.loops
    if not said:
        rule = RULES.get(launch.kernel.fn.__name__)
        said = rule({**launch.args, **launch.constexprs}, [length / len(code) for length in found]) if rule else ()
    if said and not any(said):
        return (0,) * len(found)
    return tuple(said) if len(said) == len(found) else None


def over(a: int, b: int) -> int:
    return -(-a // b)


def _attention(v: Values, found: list[float]) -> tuple[int, ...]:
    return (0,) if v["TP"] <= v["BQ"] else (v["TP"] // v["BK"],)  # those of whole sequences are for NaN


def _attention_backward(v: Values, found: list[float]) -> tuple[int, ...]:
    """Loops for NaN, within one over the tiles of a program if there is that one."""
    if found[-1] < 0.5:
        return (0,)
    units = v["B"] * over(v["N"], v["BQ"] // v["TP"]) if v.get("bias_sums") is not None else 1
    return (*(0,) * (len(found) - 1), over(units, v["P"]) if units > 1 else 1)


def _conv(v: Values, found: list[float]) -> tuple[int, ...]:
    """Over taps; the others copy frames of a few rows."""
    taps = v["KT"] // v["GT"] * v["KH"] * v["KW"]
    if taps == 1:
        return (0,)
    return (taps, *(0,) * (len(found) - 1)) if found[0] > 0.1 else ()


def _conv_backward(v: Values, found: list[float]) -> tuple[int, ...]:
    """Over frames, over the dilation, over tiles; those before copy frames of a few rows."""
    last = [over(v["T"], v["BT"] * v["dilation"]), *([v["dilation"]] if v["dilation"] > 1 else [])]
    last.append(round(v["B"] * over(v["N"], v["BN"]) / v["P"]))
    return (*(0,) * (len(found) - len(last)), *last)


RULES: dict[str, Callable[[Values, list[float]], tuple[int, ...]]] = {
    "temporal_attention_kernel": _attention,
    "temporal_attention_backward_kernel": _attention_backward,
    "temporal_attention_backward_rows_kernel": lambda v, found: (over(v["TK"], v["BK"]),) * 2,
    "temporal_attention_backward_columns_kernel": lambda v, found: (over(v["TQ"], v["BQ"]),),
    "temporal_attention_backward_bias_kernel": lambda v, found: (over(v["B"] * v["N"], v["P"]),),
    "token_shift_edge_adjoint_kernel": lambda v, found: tuple(map(abs, v["OFFSETS"])) if len(found) > 1 else (0,),
    "temporal_conv_kernel": _conv,
    "temporal_conv_backward_kernel": _conv_backward,
    "temporal_conv_add_kernel": lambda v, found: (over(v["P"], v["BP"]),),
    "bottleneck_adapter_kernel": lambda v, found: (over(v["C"], v["BC"]),) * (2 if v["norm"] is None else 4),
    "patch_embed_kernel": lambda v, found: (over(v["KP"], v["BK"]),),
    "fold_kernel": lambda v, found: (over(v["KP"], v["BK"]),),
    "unfold_kernel": lambda v, found: (over(v["PH"] * v["PW"] * 3, v["BK"]),),
}
