"""One of the processes that tests.py runs the tests in: pytest collects, then the names of tests come one a line on standard
input, and what became of each goes as a line of JSON into the pipe named by the first argument.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import pytest

from . import place

TEXT = 3000  # characters kept of a failure
ALONE = ("test_more_than_65535_rows", "test_more_elements_than_32_bits_count")  # they need the card's memory
COMPILED = ("test_opcheck_and_compile",)
DTYPES = ("bfloat16", "float16", "float32", "float64")


def parameters(item: Any) -> dict[str, Any]:
    return item.callspec.params if hasattr(item, "callspec") else {}


def selected(items: list[Any], which: str) -> list[Any]:
    """``which``: tests, rows, opcheck or all; the most telling first: bfloat16 before others, and every op soon."""
    kept, seen, functions = [], {}, {}
    ops = [info.name for info, backend in place.pairs() if backend == "triton"]
    for item in items:
        group = "rows" if item.originalname in ALONE else "opcheck" if item.originalname in COMPILED else "tests"
        if which not in ("all", group):
            continue
        if not wanted_in_stub(item) if place.STUB else item.get_closest_marker("gpu") is None:
            continue
        given = parameters(item)
        kind = (item.path, item.originalname, str(given.get("info")), given.get("backend"))
        seen[kind] = seen.get(kind, -1) + 1
        if place.STUB and seen[kind] > (0 if item.path.name == "test_gpu.py" else 1):
            continue
        function = functions.setdefault(item.originalname, len(functions))
        if place.STUB and given.get("backend") == "triton" and function and (function + ops.index(given["info"].name)) % 3:
            continue  # the interpreter is slow: every op in the first test, a third of them in each of the others
        dtype = str(given.get("dtype", "bfloat16")).removeprefix("torch.")
        kept.append((DTYPES.index(dtype), seen[kind], len(kept), item))
    return [item for *_, item in sorted(kept, key=lambda each: each[:3])]


def wanted_in_stub(item: Any) -> bool:
    """A few, in float16, whose arithmetic Triton's interpreter does as a GPU does."""
    given, ops = parameters(item), os.environ.get("I2V_GPU_STUB_OPS", "")
    if str(given.get("dtype", "torch.float16")) != "torch.float16":
        return False
    if item.path.name != "test_gpu.py":  # these name the device: "cpu" is the emulation
        return given.get("device") == "cpu" and (not ops or any(op in item.path.name for op in ops.split(",")))
    if item.originalname in COMPILED and given["backend"] != "library":
        return False
    return any(given["info"].name == info.name for info, _ in place.pairs())


class Plugin:
    def __init__(self, pipe: Any, commands: Any, which: str) -> None:
        self.pipe, self.commands, self.which = pipe, commands, which
        self.reports: list[Any] = []

    def send(self, **said: Any) -> None:
        self.pipe.write(json.dumps(said) + "\n")
        self.pipe.flush()

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        items[:] = selected(items, self.which)

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self.send(broken=report.nodeid, text=report.longreprtext[-TEXT:])

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.reports.append(report)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: Any) -> bool:
        items = {item.nodeid: item for item in session.items}
        self.send(collected=[[name, *backend(item)] for name, item in items.items()])
        for line in self.commands:
            item = items[line.rstrip("\n")]
            self.reports.clear()
            shares = getattr(sys.modules.get("test_correct"), "SHARES", [])
            shares.clear()
            session.config.hook.pytest_runtest_protocol(item=item, nextitem=None)
            failures = [r.longreprtext for r in self.reports if r.failed]
            try:
                place.synchronize()  # an error that comes late belongs to this test
            except Exception as error:
                failures.append(f"when the test was over: {type(error).__name__}: {error}")
            text = "\n".join(failures)
            sticky = bool(place.STICKY.search(text))
            skips = [r.longrepr for r in self.reports if r.skipped]
            reason = str(skips[0][2]).removeprefix("Skipped: ") if skips and isinstance(skips[0], tuple) else ""
            self.send(
                id=item.nodeid,
                outcome="failed" if failures else "skipped" if skips else "passed",
                seconds=round(sum(r.duration for r in self.reports), 2),
                text=text[-TEXT:],
                reason=reason,
                shares=shares[:],
                sticky=sticky,
            )
            if sticky:
                os._exit(3)
        return True


def backend(item: Any) -> list[str]:
    """The op and the backend that a test of test_gpu.py tries."""
    given = parameters(item)
    named = item.path.name == "test_gpu.py" and "info" in given and "backend" in given
    return [given["info"].name, given["backend"]] if named else ["", ""]


def main() -> int:
    pipe, which, *files = sys.argv[1:]
    commands = os.fdopen(os.dup(0))
    with os.fdopen(int(pipe), "w") as out:
        place.prepare()
        options = ["-q", "--capture=no", "-p", "no:cacheprovider", "-p", "no:xdist", "-W", "ignore"]
        return int(pytest.main([*options, *files], plugins=[Plugin(out, commands, which)]))


if __name__ == "__main__":
    sys.stdout.flush()
    os._exit(main())  # a broken CUDA context may hang at exit
