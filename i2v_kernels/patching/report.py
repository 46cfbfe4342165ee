"""What ``patch`` did, module by module."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Row:
    """One module that a rule knew.

    Attributes:
        name: its path in the model, "" for the model itself.
        kind: the name of its class.
        replaced: its forward runs this package's code; in a dry run: would run it.
        detail: by what it was replaced, or why it was not.
    """

    name: str
    kind: str
    replaced: bool
    detail: str


@dataclass
class PatchReport:
    """The rows of all modules that a rule knew, in the order of ``model.named_modules()``. Printed, it is a table."""

    rows: list[Row] = field(default_factory=list)
    dry_run: bool = False

    @property
    def replaced(self) -> list[Row]:
        return [row for row in self.rows if row.replaced]

    @property
    def refused(self) -> list[Row]:
        return [row for row in self.rows if not row.replaced]

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __str__(self) -> str:
        done = "would be replaced" if self.dry_run else "replaced"
        title = f"i2v_kernels.patch: {len(self.replaced)} {done}, {len(self.refused)} left as they are"
        if not self.rows:
            return f"{title}: nothing in this model is known to it"
        lines = [(name, kind, "->" if ok else "--", detail) for (name, kind, ok, detail) in _grouped(self.rows)]
        widths = [max(len(line[i]) for line in lines) for i in range(2)]
        table = (f"  {a:<{widths[0]}}  {b:<{widths[1]}}  {c} {d}" for a, b, c, d in lines)
        return "\n".join((title, *table))

    __repr__ = __str__


def _grouped(rows: list[Row]) -> list[tuple[str, str, bool, str]]:
    """Rows that differ in numbers of their names alone, as one: ``layer.{0-11}.attention``."""
    groups: dict[tuple[str, str, bool, str], list[list[int]]] = {}  # to the numbers in their names
    for row in rows:
        shape = re.sub(r"(?<![^.])\d+(?![^.])", "#", row.name)
        numbers = [int(part) for part in row.name.split(".") if part.isdecimal()]
        groups.setdefault((shape, row.kind, row.replaced, row.detail), []).append(numbers)
    lines = []
    for (shape, kind, replaced, detail), all_numbers in groups.items():
        for column in zip(*all_numbers):
            shape = shape.replace("#", _spans(sorted(set(column))), 1)
        counted = f"{kind} x {len(all_numbers)}" if len(all_numbers) > 1 else kind
        lines.append((shape or "(the model)", counted, replaced, detail))
    return lines


def _spans(numbers: list[int]) -> str:
    if len(numbers) == 1:
        return str(numbers[0])
    spans: list[tuple[int, int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1] = (spans[-1][0], number)
        else:
            spans.append((number, number))
    return "{" + ",".join(f"{first}" if first == last else f"{first}-{last}" for first, last in spans) + "}"
