"""One bfloat16 call of every (op, backend), forward and backward, each in a process of its own: what runs at all.

The processes are forked from one that has imported everything and touched no device.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from . import place

TOLERANCE = 0.05  # of the norm, against float64: what is that far off is broken; the tests judge the rest
EACH = 40 * place.PATIENCE  # seconds
IN_PLACE = "token_shift_"


def compare(got: Sequence[Any], want: Sequence[Any]) -> float:
    """The largest relative error; tensors that are not finite count as infinitely wrong."""
    errors = [0.0]
    for g, w in zip(got, want):
        finite = g.isfinite().all().item() and w.isfinite().all().item()
        errors.append(((g.double() - w).norm() / w.norm().clamp_min(1e-30)).item() if finite else float("inf"))
    return max(errors)


def call(op: str, backend: str) -> dict[str, Any]:
    """Runs it, and says what became of it."""
    import torch

    import i2v_kernels as i2v

    place.prepare()
    info = next(info for info, _ in place.pairs() if info.name == op.removesuffix("_"))
    call = place.models(info, 1)[0]
    sample = call.to(torch.bfloat16, place.DEVICE, requires_grad=op != IN_PLACE)
    exact = sample.to(torch.float64, requires_grad=True)
    want = info.op(*exact.args, **exact.kwargs, backend="reference")
    if op == IN_PLACE:
        got = [i2v.token_shift_(sample.args[0].clone(), *sample.args[1:], **sample.kwargs, backend=backend)]
        wanted = [want.detach()]
    else:
        why_not = place.cannot(info, sample, backend)
        if why_not is not None:
            return {"result": "unavailable", "note": why_not}
        out = info.op(*sample.args, **sample.kwargs, backend=backend)
        grad = torch.randn_like(out)
        got = [out, *torch.autograd.grad(out, sample.tensors(), grad)]
        wanted = [want, *torch.autograd.grad(want, exact.tensors(), grad.double())]
    error = compare([g.detach() for g in got], [w.detach() for w in wanted])
    place.synchronize()
    note = f"error {error:.1e} of {len(got)} tensors, {sample.name}"
    return {"result": "ok" if error <= TOLERANCE else "failed", "note": note, "error": error}


def about(_: str, __: str) -> dict[str, Any]:
    """The text of ``python -m i2v_kernels.info``."""
    from i2v_kernels import info

    print(info.report())
    return {"result": "ok", "note": "see its log"}


def row(name: str, file: Path, function: Callable[[str, str], dict[str, Any]]) -> int:
    """In the row's own process: its result goes into the file, or why there is none."""
    begun = time.monotonic()
    op, _, backend = name.partition(" ")
    try:
        found = function(op, backend)
    except BaseException as error:
        traceback.print_exc()
        found = {"result": "failed", "note": place.telling(error)}
    place.write_json(file, {"op": op, "backend": backend, "seconds": round(time.monotonic() - begun, 2), **found})
    return 0


def start(name: str, folder: Path) -> tuple[int, Path]:
    """``(process, the file that it writes)``."""
    file = folder / f"{name.replace(' ', '.')}.json"
    file.unlink(missing_ok=True)
    child = os.fork()
    if child:
        return child, file
    try:
        log = os.open(file.with_suffix(".log"), os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o644)
        os.dup2(log, 1)
        os.dup2(log, 2)
        import torch

        if not place.STUB and torch.cuda._is_in_bad_fork():  # something that was imported has touched the device
            os.execv(sys.executable, [sys.executable, "-m", "bench.gpu.smoke", "--row", name, "--work", str(folder)])
        row(name, file, about if name == "info" else call)
        sys.stdout.flush()
    finally:
        os._exit(0)


def finish(name: str, child: int, file: Path, deadline: float) -> dict[str, Any]:
    op, _, backend = name.partition(" ")
    status = None
    while status is None and time.monotonic() < deadline:
        done, code = os.waitpid(child, os.WNOHANG)
        status = code if done else None
        if not done:
            time.sleep(0.02)
    if status is None:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError):
        why = f"took more than {EACH} s" if status is None else f"its process ended by {os.waitstatus_to_exitcode(status)}"
        return {"op": op, "backend": backend, "result": "failed", "note": why, "seconds": EACH if status is None else 0}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.smoke", description=__doc__.split("\n\n")[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=EACH)
    parser.add_argument("--row", help="this row alone, in this process")
    options = parser.parse_args(argv)
    if options.row:
        file = options.work / f"{options.row.replace(' ', '.')}.json"
        return row(options.row, file, about if options.row == "info" else call)
    with contextlib.suppress(ImportError):  # before the fork: once for all rows
        import triton  # noqa: F401

    names = [f"{info.name} {backend}" for info, backend in place.pairs((*place.OURS, "sdpa"))]
    if any(name.startswith("token_shift ") for name in names):
        names.append(f"{IN_PLACE} triton")
    folder = options.work / "smoke"
    folder.mkdir(exist_ok=True)
    deadline = time.monotonic() + min(EACH, options.seconds - 1)
    together, rows = max(2, os.cpu_count() or 1), []
    waiting, running = ["info", *names], []
    while waiting or running:
        while waiting and len(running) < together:
            name = waiting.pop(0)
            running.append((name, *start(name, folder)))
        rows.append(finish(*running.pop(0), deadline))
    rows, shown = [r for r in rows if r["op"] != "info"], []
    for r in rows:
        needed = r["backend"] in place.OURS
        r["bad"] = r["result"] == "failed" or (needed and r["result"] == "unavailable")
        shown.append(f"{r['op']:<22}{r['backend']:<9}{r['result']:<13}{r['seconds']:5.1f} s  {r['note']}")
    print("\n".join(shown))
    passed, bad = [r for r in rows if r["result"] == "ok"], [r for r in rows if r["bad"]]
    note = f"{len(passed)} of {len(rows)} calls ran" + "".join(f"; {r['op']} {r['backend']}: {r['note']}" for r in bad)
    return place.evidence(options.work / "smoke.json", len(passed), len(bad), note, rows=rows)


if __name__ == "__main__":
    sys.exit(main())
