"""``python -m bench.short``: what a GPU shows of every op in a minute and a half, the most telling calls first.

Forward and backward apart, in one dtype: our backends beside each other and beside the peers, each against the floor that a
copy and a large product of the same run give, and beside what was predicted (``bench/predictions.json``). Inputs are random,
several times the cache, and take turns; launches wait in the device's queue, so the host's share is measured by itself. Every
figure is one line of the file as soon as it is there; who differs or fails is a line with the reason.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import random
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from i2v_kernels.testing import OpInfo, Sample

from .gpu import place
from .measure import Queued, copy_ceiling, product_ceiling, summary
from .peers import GPU_PEERS, PEERS

ORDER = (
    "temporal_attention", "temporal_conv", "token_shift", "st_adapter", "bottleneck_adapter", "patch_embed", "lora_linear",
    "frame_attention", "video_cross_attention", "frame_bias", "late_interaction", "text_conditioned_similarity",
    "text_conditioned_pool", "masked_mean",
)  # fmt: skip
PASSES = ("forward", "backward")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
CLIPS = 64
PREDICTED_CLIPS = 64  # of the calls in PREDICTIONS
CACHES, MOST = 4, 3 << 29  # a call moves at least so many times the L2 cache, and at most so many bytes
ROTATED = 2  # sets of inputs that take turns: together twice that
PREDICTIONS = Path(__file__).with_name("predictions.json")
LEAST_ROUNDS = 1 if place.STUB else 5
LAUNCHES_US = 1 if place.STUB else 3000  # of work are queued at a time


def calls() -> Iterator[tuple[OpInfo, int]]:
    """(op, number of its model call), by worth: every op's first call before any op's second; unknown ops last."""
    infos = {info.name: info for info, _ in place.pairs()}
    names = [*(name for name in ORDER if name in infos), *(name for name in infos if name not in ORDER)]
    numbered = [(i, infos[name]) for name in names for i in range(len(place.models(infos[name], 1)))]
    return iter([(info, i) for i, info in sorted(numbered, key=lambda each: each[0])])


def cache_bytes() -> int:
    return 1536 if place.STUB else torch.cuda.get_device_properties(0).L2_cache_size


def sized(info: OpInfo, number: int, dtype: torch.dtype, cache: int) -> tuple[Callable[[], Sample], int]:
    """(what draws the call's inputs, clips): CLIPS of them, or so many that the caches hold little of them and memory all; of
    calls that stop growing before that, the largest.
    """

    def traffic(clips: int) -> int:
        return info.traffic(place.models(info, clips)[number].to(dtype, "meta"))  # shapes alone

    clips = 1 if place.STUB else CLIPS
    while traffic(clips) > MOST and clips > 1:
        clips //= 2
    while traffic(clips) < CACHES * cache and traffic(2 * clips) > traffic(clips):
        clips *= 2

    def draw() -> Sample:
        return place.models(info, clips)[number].to(dtype, place.DEVICE, requires_grad=True)

    return draw, clips


def candidates(info: OpInfo, compiled: bool) -> dict[str, Callable[..., Tensor]]:
    """Name -> function over the sample's arguments. Ours are named by their backends."""
    peers = {**PEERS[info.name], **GPU_PEERS.get(info.name, {})}
    found: dict[str, Callable[..., Tensor]] = {b: partial(info.op, backend=b) for i, b in place.pairs() if i is info}
    found |= {f"peer: {name}": peer for name, peer in peers.items()}
    if compiled:
        by = "aot_eager" if place.STUB else "inductor"
        some = list(PEERS[info.name])[: 1 if place.STUB else None]
        found |= {f"peer: compiled {name}": torch.compile(PEERS[info.name][name], backend=by) for name in some}
    return found


def launcher(function: Callable[..., Tensor], samples: list[Sample], which: str) -> Callable[[int], object]:
    """Launch number i of a pass, on the inputs whose turn it is."""
    if which == "forward":

        def forward(i: int) -> None:
            with torch.no_grad():
                sample = samples[i % len(samples)]
                function(*sample.args, **sample.kwargs)

        return forward
    outs = [function(*sample.args, **sample.kwargs) for sample in samples]
    grads = [torch.randn_like(out) for out in outs]

    def backward(i: int) -> None:
        turn = i % len(samples)
        torch.autograd.grad(outs[turn], samples[turn].tensors(), grads[turn], retain_graph=True)

    return backward


def least(info: OpInfo, sample: Sample, which: str, out: Tensor) -> tuple[int, int]:
    """(bytes that must move, operations). Backward reads the output's gradient and what forward read, and writes a gradient for
    every input; of a shift it reads no input. It computes twice what forward does.
    """
    if which == "forward":
        return info.traffic(sample), info.flops(sample)
    inputs = [] if info.exact else sample.inputs()
    tensors = (out, *inputs, *sample.tensors())
    return sum(t.numel() * t.element_size() for t in tensors), 2 * info.flops(sample)


def why_unfit(function: Callable[..., Tensor], sample: Sample, want: Tensor) -> str | None:
    """A speed-up over something that computes something else is no speed-up."""
    try:
        with torch.no_grad():
            got = function(*sample.args, **sample.kwargs).double()
        wrong = ((got - want.double()).norm() / want.double().norm()).item()
    except Exception as error:
        return place.telling(error)
    fits = wrong <= 8 * torch.finfo(sample.dtype).eps
    return None if fits else f"differs from the definition by {wrong:.1e}"


def clean() -> None:
    gc.collect()
    if not place.STUB:
        torch.cuda.empty_cache()


class Bench:
    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.dtype = options, DTYPES[options.dtype]
        self.deadline = time.monotonic() + options.seconds - 3
        self.rows: list[dict[str, Any]] = []
        self.predicted = predictions(options.predictions, options.dtype)
        self.product = product_ceiling(self.dtype, place.DEVICE, 0.5) if not place.STUB else 1e9
        self.copies: dict[int, float] = {}
        self.unmeant: set[str] = set()

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def copy(self, traffic: int) -> float:
        """Measured for each power of two once."""
        size = 1 << max(traffic - 1, 1).bit_length()
        if size not in self.copies:
            self.copies[size] = copy_ceiling(size, place.DEVICE, 0.01 if place.STUB else 0.3)
        return self.copies[size]

    def keep(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        with self.options.rows.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(line(row), flush=True)

    def measure(self, info: OpInfo, number: int) -> None:
        draw, clips = sized(info, number, self.dtype, cache_bytes())
        samples = [draw() for _ in range(ROTATED)]
        with torch.no_grad():
            want = info.op(*samples[0].args, **samples[0].kwargs, backend="reference")
        functions = candidates(info, self.options.compiled)
        about = {"op": info.name, "sample": samples[0].name, "clips": clips, "dtype": self.options.dtype}
        failed: dict[str, str] = {}
        for name in place.OURS:
            why_not = place.cannot(info, samples[0], name) if name in functions else None
            if why_not and why_not.startswith(str(self.dtype)):  # never meant to run in it
                del functions[name]
                self.unmeant.add(f"{info} {name}")
                print(f"{info} {name}: {why_not}")
        for name, function in functions.items():
            why = why_unfit(function, samples[0], want)
            if why:
                failed[name] = why
        for which in PASSES:
            moved, flops = least(info, samples[0], which, want)
            copy = self.copy(moved)
            floor_us = 1e6 * max(moved / copy, flops / self.product)
            common = {**about, "pass": which, "floor_us": floor_us, "bytes": moved, "copy_gb_per_s": copy / 1e9}
            queues: dict[str, Queued] = {}
            for name, function in functions.items():
                if name not in failed:
                    try:
                        queues[name] = self.ready(launcher(function, samples, which))
                    except Exception as error:
                        failed[name] = place.telling(error)
                        clean()
            for name, (device, host) in self.rounds(queues).items():
                timing, hosts = summary(device), summary(host)
                share, us = self.predicted.get((info.name, about["sample"], which, name), (None, None))
                spread = {"low_us": timing.low, "high_us": timing.high, "rounds": len(device)}
                row = {**common, "candidate": name, "us": timing.median, **spread, "share": floor_us / timing.median}
                us = us and us * clips / PREDICTED_CLIPS
                row |= {"host_us": hosts.median, "predicted_share": share, "predicted_us": us}
                self.keep(row | ({} if queues[name].waited else {"host_bound": True}))
            for name in functions:
                if name in failed:
                    self.keep({**common, "candidate": name, "reason": failed[name]})
            del queues
            clean()

    def ready(self, call: Callable[[int], object]) -> Queued:
        """Warm, and with as many launches a turn as make a few milliseconds."""
        queue = Queued(call, place.DEVICE)
        for i in range(ROTATED):
            call(i)
        us = queue.once()[0]
        queue.launches = int(min(max(LAUNCHES_US / max(us, 1), 1), 10))
        return queue

    def rounds(self, queues: dict[str, Queued]) -> dict[str, tuple[list[float], list[float]]]:
        """(device's, host's microseconds) of every candidate, by turns."""
        times: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in queues}
        names, shuffle = list(queues), random.Random(0).shuffle
        begun, done = time.monotonic(), 0
        while names and (done < LEAST_ROUNDS or time.monotonic() - begun < self.options.each):
            shuffle(names)
            for name in names:
                device, host = times[name]
                if done >= 3 and sum(device) * queues[name].launches * 1e-6 > self.options.each:
                    continue  # many times slower than the others
                for kept, us in zip((device, host), queues[name].once()):
                    kept.append(us)
            done += 1
        return times


def predictions(path: Path, dtype: str) -> dict[tuple[str, str, str, str], tuple[float | None, float | None]]:
    """(op, sample, pass, backend) -> (share of the floor, microseconds), as estimated from the machine code."""
    if not path.exists():
        return {}
    said = json.loads(path.read_text())
    rows = said["rows"] if isinstance(said, dict) else said
    return {
        (row["op"], row["sample"], row["pass"], row["backend"]): (row.get("share"), row.get("microseconds"))
        for row in rows
        if row["dtype"] in (dtype, str(DTYPES[dtype]))
    }


# share: floor / us; predicted: the same, estimated from machine code
HEADER = f"{'op':<22}{'call':<39}{'pass':<9}{'candidate':<25}{'us':>9}{'share':>7}{'predicted':>10}{'host us':>9}"


def line(row: dict[str, Any]) -> str:
    head = f"{row['op']:<22}{row['sample'][:31] + ', B=' + str(row['clips']):<39}{row['pass']:<9}{row['candidate'][:24]:<25}"
    if "reason" in row:
        return f"{head}{row['reason']}"
    predicted = "-" if row["predicted_share"] is None else f"{row['predicted_share']:.2f}"
    bound = " waits for the host" if row.get("host_bound") else ""
    return f"{head}{row['us']:9.1f}{row['share']:7.2f}{predicted:>10}{row['host_us']:9.1f}{bound}"


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Ours, each with its best peer, in a few lines: what is read first."""
    shown = []
    for row in rows:
        ours, same = row["candidate"] in place.OURS, ("op", "sample", "clips", "pass")
        peers = [r for r in rows if "us" in r and r["candidate"].startswith("peer") and all(r[k] == row[k] for k in same)]
        if ours:
            best = min(peers, key=lambda r: r["us"], default=None)
            beside = f"  {best['us'] / row['us']:.2f}x {best['candidate'][6:]}" if best and "us" in row else ""
            shown.append(line(row) + beside)
    return shown


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.short", description=__doc__.split("\n\n")[0])
    parser.add_argument("--rows", type=Path, required=True, help="a JSON line for every figure is appended here")
    parser.add_argument("--evidence", type=Path, required=True, help="what became of it all")
    parser.add_argument("--seconds", type=float, default=90.0)
    parser.add_argument("--each", type=float, default=0.5, help="measuring time per call and pass")
    parser.add_argument("--dtype", choices=list(DTYPES), default="bfloat16")
    parser.add_argument("--compiled", action="store_true", help="the peers compiled, too")
    parser.add_argument("--predictions", type=Path, default=PREDICTIONS)
    options = parser.parse_args(argv)
    warnings.filterwarnings("ignore")
    logging.getLogger("torch").setLevel(logging.ERROR)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False  # else a float32 peer differs
    place.prepare()
    torch.manual_seed(0)
    print(HEADER)
    bench, cut, broken, shown = Bench(options), [], [], []
    for info, number in calls():
        if bench.left() < 2 * options.each:
            cut.append(f"{info} {number}")
            continue
        try:
            if options.compiled:
                torch.compiler.reset()
            bench.measure(info, number)
        except Exception as error:
            broken.append(f"{info} call {number}: {place.telling(error)}")
            print(broken[-1], flush=True)
        clean()
        shown = table(bench.rows)
        options.rows.with_suffix(".txt").write_text("\n".join([HEADER, *shown]) + "\n")  # if the next call takes too long
    ours = [row for row in bench.rows if row["candidate"] in place.OURS]
    failed = [f"{r['op']} {r['candidate']}, {r['sample']}, {r['pass']}: {r['reason']}" for r in ours if "reason" in r] + broken
    missing = {f"{info} {b}" for info, b in place.pairs()} - {f"{r['op']} {r['candidate']}" for r in ours} - bench.unmeant
    failed += [] if cut else [f"{name}: not measured" for name in sorted(missing)]
    passed = sum("us" in row for row in ours)
    note = f"{passed} figures of ours, {len(bench.rows) - len(ours)} rows of peers, {len(failed)} without a figure"
    note += f", {len(cut)} calls not run: {cut[0]} ..." if cut else ""
    note += "".join(f"; {text}" for text in failed[:2])
    print("\n".join(["", HEADER, *shown, *failed, note]))
    return place.evidence(options.evidence, passed, len(failed), note, cut=bool(cut), product_tflop_per_s=bench.product / 1e12)


if __name__ == "__main__":
    sys.exit(main())
