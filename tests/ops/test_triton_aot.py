"""Every Triton kernel compiled ahead for real GPUs, held against aot_golden.json: ``python -m bench.machine_code --update``.

What is compiled are the launches themselves, on meta tensors of real models' shapes. A compiled kernel must not spill, must
fit in shared memory, must read 16 bytes at a time and, in 16 bits, use matrix instructions; none of it may get worse.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
GOLDEN = Path(__file__).with_name("aot_golden.json")
SHARED = {"sm_80": 163, "sm_90": 227, "sm_100": 227, "gfx942": 64}  # KiB that a block may have
OLDER = {  # bytes that Triton 3.6 spills, and no other kernel
    "temporal_attention T128 D256 | float16 | sm_90": 16,
    "temporal_attention T128 D256 | bfloat16 | sm_90": 16,
    "temporal_attention T128 D256 | bfloat16 | sm_100": 16,
    "temporal_attention backward T128 D256 bias mask causal 3/3 | bfloat16 | sm_80": 24,
    "temporal_attention backward T128 D256 bias mask causal 1/3 | float32 | sm_90": 24,
}
GROWTH = 1.15  # of registers and instructions that the same compiler may show before it counts
MORE = {"barriers": "barriers", "narrow loads": "loads below 16 bytes", "narrow stores": "stores below 16 bytes"}


def complaints(key, facts, golden, same_compiler):
    """What is wrong with one compiled kernel, in itself and beside the table."""
    limit = 1024 * SHARED[key.split(" | ")[2]]
    if facts["spilled"] > (0 if same_compiler else OLDER.get(key, 0)):
        yield f"spills {facts['spilled']} bytes or registers"
    if facts["shared"] > limit:
        yield f"needs {facts['shared']} bytes of shared memory, but a block has {limit}"
    if facts["vectors"] and facts["vector loads"] == 0:
        yield "reads no 16 bytes at a time"
    if facts["dots"] and facts["matrix instructions"] == 0:
        yield "has no matrix instructions"
    if golden is None:
        yield "is not in the table: --update"
    elif same_compiler:
        if facts["registers"] > GROWTH * golden["registers"] + 8:
            yield f"takes {facts['registers']} registers, {golden['registers']} before"
        if facts["instructions"] > GROWTH * golden["instructions"] + 16:
            yield f"has {facts['instructions']} instructions, {golden['instructions']} before"
        if facts["shared"] > golden["shared"]:
            yield f"takes {facts['shared']} bytes of shared memory, {golden['shared']} before"
        if facts["resident"] < golden["resident"]:
            yield f"leaves room for {facts['resident']} programs on a multiprocessor, {golden['resident']} before"
        for what, words in MORE.items():
            if facts[what] > golden[what]:
                yield f"has {facts[what]} {words}, {golden[what]} before"
        for what in ("vector loads", "matrix instructions"):
            if facts[what] < golden[what] / 2:
                yield f"has {facts[what]} {what}, {golden[what]} before"


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """What bench.machine_code reads, in a process of its own: this one may be interpreting Triton."""
    pytest.importorskip("triton")
    path = tmp_path_factory.mktemp("aot") / "table.json"
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench.machine_code", "--no-model", "--json", str(path)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-4000:]
    return json.loads(path.read_text())


@pytest.mark.slow
def test_compiled_ahead(table):
    golden = json.loads(GOLDEN.read_text())
    same = golden["triton"] == table["triton"]
    kernels = {key: facts for key, facts in table.items() if isinstance(facts, dict)}
    wrong = [f"{key} {text}" for key, facts in kernels.items() for text in complaints(key, facts, golden.get(key), same)]
    wrong += [f"{key} is in the table alone: --update" for key in golden if key != "triton" and key not in kernels]
    assert not wrong, "\n".join(wrong)


@pytest.mark.slow
def test_every_kernel_is_in_a_table(table):
    assert table["unlisted"] == []


GOOD = {
    "registers": 64, "spilled": 0, "shared": 4096, "instructions": 400, "barriers": 2, "vector loads": 8, "narrow loads": 0,
    "vector stores": 4, "narrow stores": 0, "matrix instructions": 16, "loops": 0, "resident": 8, "dots": True, "vectors": True,
}  # fmt: skip


@pytest.mark.parametrize(
    "change, word",
    [
        ({"spilled": 8}, "spills"),
        ({"shared": 1 << 18}, "needs"),
        ({"vector loads": 0}, "reads no 16"),
        ({"vector loads": 3}, "vector loads"),
        ({"matrix instructions": 0}, "no matrix"),
        ({"registers": 90}, "registers"),
        ({"instructions": 500}, "instructions"),
        ({"resident": 7}, "room for 7 programs"),
        ({"barriers": 3}, "3 barriers, 2 before"),
        ({"narrow loads": 1}, "loads below 16 bytes"),
        ({"narrow stores": 1}, "stores below 16 bytes"),
    ],
)
def test_what_gets_worse_is_named(change, word):
    key = "some kernel | bfloat16 | sm_90"
    assert list(complaints(key, GOOD, GOOD, True)) == []
    assert word in "\n".join(complaints(key, {**GOOD, **change}, GOOD, True))
    assert "spills" in next(complaints(key, {**GOOD, "spilled": 8}, GOOD, False))
    for spilling, known in OLDER.items():
        assert list(complaints(spilling, {**GOOD, "spilled": known}, GOOD, False)) == []
        assert "spills" in next(complaints(spilling, {**GOOD, "spilled": known + 1}, GOOD, False))
    assert "not in the table" in "\n".join(complaints(key, GOOD, None, True))
