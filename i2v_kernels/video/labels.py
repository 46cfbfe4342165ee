"""Labels as people write them, in lists and in files: one rule says which are numbers, which are names and which are none."""

from __future__ import annotations

import operator
import re
import unicodedata
import warnings
from collections.abc import Sequence
from decimal import Decimal
from numbers import Real
from typing import Any, NamedTuple

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.IGNORECASE)
_DECIMAL_COMMA = re.compile(r"[+-]?\d+(,\d+)+")
_ABSENT = {"", "nan", "<na>"}  # what pandas makes of a label that is not there
_LIMIT = 2**63


class Row(NamedTuple):
    """One video as it was given; ``where`` names the line of the file or the place in the list."""

    where: str
    path: str
    label: Any = None
    caption: str = ""


def read_label(label: Any, where: str) -> int | str:
    """A label is a name, or a whole number from 0, however written (7, 7.0, "007", "7e0"); none at all is -1.

    Raises:
        ValueError: a number that is not whole, or negative and not -1. TypeError: neither number nor text. Both name ``where``.
    """
    if hasattr(label, "item") and hasattr(label, "ndim"):  # numpy, PyTorch
        label = label.item() if label.ndim == 0 else tuple(label)
    if label is None or str(label).strip().lower() in _ABSENT:
        return -1
    if isinstance(label, str):
        text = label.strip()
        if _NUMBER.fullmatch(text):
            return _whole(Decimal(text), label, where)
        if _DECIMAL_COMMA.fullmatch(text):
            raise ValueError(f"{where}: label {label!r} is neither a name nor a whole number")
        return text
    try:
        return _whole(operator.index(label), label, where)
    except TypeError:
        pass
    if isinstance(label, (Real, Decimal)):
        return _whole(label, label, where)
    raise TypeError(f"{where}: a label is a whole number, a name or None, got {label!r} ({type(label).__name__})")


def _whole(number: Any, label: Any, where: str) -> int:
    if not -1 <= number < _LIMIT or number != int(number):
        raise ValueError(f"{where}: label {label!r} is not a whole number from 0 (or -1 for none)")
    return int(number)


def number_labels(rows: Sequence[Row]) -> tuple[list[int], tuple[str, ...]]:
    """The label of each row and the names of the classes: names are numbered in Python's order of text, numbers stay."""
    labels = [read_label(row.label, row.where) for row in rows]
    first: dict[type, int] = {}
    for i, label in enumerate(labels):
        if label != -1:
            first.setdefault(type(label), i)
    if len(first) == 2:
        told = " and ".join(f"{rows[i].label!r} ({rows[i].where})" for i in sorted(first.values()))
        raise ValueError(f"labels must be all numbers or all names, got {told}")
    names = tuple(sorted({label for label in labels if isinstance(label, str)}))
    _tell_alike(names)
    place = {name: i for i, name in enumerate(names)}
    numbers = [place[label] if isinstance(label, str) else label for label in labels]
    _tell_contradictions(rows, numbers)
    return numbers, names


def sorted_names(names: Sequence[str]) -> tuple[str, ...]:
    """Names of class folders in the order that numbers them: by value if all are whole numbers, else Python's order of text."""
    _tell_alike(names)
    try:
        values = {name: read_label(name, "") for name in names}
    except ValueError:
        return tuple(sorted(names))
    if all(isinstance(value, int) and value >= 0 for value in values.values()):
        return tuple(sorted(names, key=lambda name: (values[name], name)))
    return tuple(sorted(names))


def _tell_alike(names: Sequence[str]) -> None:
    seen: dict[str, str] = {}
    for name in sorted(names):
        other = seen.setdefault(" ".join(unicodedata.normalize("NFKC", name).casefold().split()), name)
        if other != name:
            warnings.warn(f"classes {other!r} and {name!r} differ in case or spelling alone, and are two", stacklevel=5)
            return


def _tell_contradictions(rows: Sequence[Row], numbers: Sequence[int]) -> None:
    first: dict[str, int] = {}
    labelled = [(i, row.path) for i, row in enumerate(rows) if numbers[i] >= 0]
    found = [(first[path], i) for i, path in labelled if numbers[first.setdefault(path, i)] != numbers[i]]
    if found:
        told = " and ".join(f"{rows[i].label!r} ({rows[i].where})" for i in found[0])
        path, count = rows[found[0][1]].path, len({rows[i].path for _, i in found})
        warnings.warn(f"{count} videos have several labels, and are shown with each: {path!r} has {told}", stacklevel=5)
