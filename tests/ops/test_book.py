"""CONTRIBUTING, "Adding an op", as tests: every op has what it asks for, and throw-away ops are added by it.

Those in book/ have what the ops of this package do not. ``frame_pool``: one differentiable input, an output with fewer
dimensions, no preference for CPUs, no table AOT. ``pair_scores``: ``[A, W, D]`` and ``[V, F, D]`` to ``[A, V]``, no kernel.
Neither has an entry in bench/peers.py.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import i2v_kernels
from i2v_kernels.ops.backends import OPS, reference_backend
from i2v_kernels.ops.base import Op
from i2v_kernels.testing import OPINFOS

ROOT = Path(__file__).resolve().parents[2]
BOOK = Path(__file__).resolve().parent / "book"
SECTIONS = ("What it computes", "Layout, bytes, flops")
OF_KERNELS = "What is proved, and what is not"


def wanting() -> Iterator[str]:
    """A sentence for each thing that an op lacks."""
    infos, readme = {info.name: info for info in OPINFOS}, (ROOT / "README.md").read_text()
    rows = re.findall(r"^\| \[`(\w+)`\]\(i2v_kernels/ops/\1/README\.md\) \|.*?\| ([a-z, ]+) \|.*?\|$", readme, re.M)
    for folder in sorted(path.parent for path in ROOT.glob("i2v_kernels/ops/*/op.py")):
        name = folder.name
        if name not in OPS or name not in i2v_kernels.__all__:
            yield f"{name}: export it in i2v_kernels/ops/__init__.py and i2v_kernels/__init__.py"
            continue
        if name not in infos or infos[name].op is not getattr(i2v_kernels, name):
            yield f"{name}: nothing tests it: list its OpInfo in i2v_kernels/testing/__init__.py"
        text = (folder / "README.md").read_text() if (folder / "README.md").exists() else ""
        needed = (*SECTIONS, OF_KERNELS) if (folder / "triton_kernels.py").exists() else SECTIONS
        lines = text.splitlines()
        lacking = [heading for heading in (f"# {name}", *(f"## {section}" for section in needed)) if heading not in lines]
        if lacking:
            yield f"{name}: its README.md lacks {', '.join(lacking)}"
        backends = ", ".join(backend.name for backend in OPS[name].backends)
        if (name, backends) not in rows:
            yield f"{name}: README.md's table of ops lacks its row, with the backends {backends}"
    yield from (f"{name}: README.md's table of ops has it, but there is no such op" for name, _ in rows if name not in OPS)


def test_every_op_has_what_the_book_asks_for():
    assert list(wanting()) == []


@pytest.mark.parametrize(
    "changes, text",
    [
        ({"backends": ()}, "slip: backends=[] lack reference"),
        ({"preference": {"cpu": ("cpu", "trition")}}, "slip: backends=['reference'] lack cpu, trition"),
        ({"schema": "(int i, Tensor x) -> Tensor"}, "slip: schema='(int i, Tensor x) -> Tensor', but tensors must come first"),
        ({"backward_schema": "(Tensor grad, Tensor x) -> (Tensor, Tensor)"}, "returns 2 gradients of 1 tensors"),
        ({"differentiable": (0, 1)}, "returns 1 gradients of 1 tensors, differentiable=(0, 1)"),
    ],
)
def test_a_slip_in_an_op_is_said_when_it_is_registered(changes, text):
    right = {"schema": "(Tensor x) -> Tensor", "backward_schema": "(Tensor grad, Tensor x) -> Tensor", "fake": torch.empty_like}
    with pytest.raises(ValueError) as raised:
        Op(**{"name": "slip", "backends": (reference_backend("slip", torch.sin),), **right, **changes})
    assert text in str(raised.value) and "slip" not in OPS


class Tree:
    """A copy of the repository in which an op is added."""

    def __init__(self, root: Path):
        self.root = root
        for name in ("i2v_kernels", "bench", "tests"):
            shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("README.md", "pyproject.toml", "Makefile"):
            shutil.copy(ROOT / name, root)

    def edit(self, path: str, before: str, added: str) -> None:
        """Text in front of the first such line."""
        text = (self.root / path).read_text()
        assert before in text, (path, before)
        (self.root / path).write_text(text.replace(before, added + before, 1))

    def run(self, *command: str, **variables: str) -> subprocess.CompletedProcess[str]:
        left_out = ("TRITON_INTERPRET", "I2V_KERNELS_BACKEND", "PYTHONPATH")
        environment = {name: value for name, value in os.environ.items() if name not in left_out}
        environment |= {"CUDA_VISIBLE_DEVICES": "", **variables}
        return subprocess.run([sys.executable, *command], cwd=self.root, env=environment, capture_output=True, text=True)

    def pytest(self, *arguments: str, those: str = "frame_pool", **variables: str) -> int:
        """How many tests passed; none fails."""
        options = ("-q", "--no-header", "-p", "no:cacheprovider", "--benchmark-disable", "-W", "ignore", "-k", those)
        done = self.run("-m", "pytest", *options, *arguments, **variables)
        passed = re.search(r"(\d+) passed", done.stdout)
        assert done.returncode == 0 and passed, done.stdout[-6000:] + done.stderr[-2000:]
        return int(passed[1])

    def wanting(self) -> str:
        done = self.run("-c", "from tests.ops.test_book import wanting; print(*wanting(), sep='\\n')")
        assert done.returncode == 0, done.stderr
        return done.stdout


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """With both ops, step by step as CONTRIBUTING has them; what a step is for is named where it is missing."""
    tree, added = Tree(tmp_path_factory.mktemp("tree")), {"frame_pool": "reference, triton", "pair_scores": "reference"}
    exporting = ("i2v_kernels/ops/__init__.py", "i2v_kernels/__init__.py")
    for op in added:
        folder = tree.root / "i2v_kernels" / "ops" / op
        shutil.copytree(BOOK / op, folder, ignore=shutil.ignore_patterns("testing.py", "README.md"))
        (folder / "__init__.py").write_text(f'from .op import {op}\n\n__all__ = ["{op}"]\n')
    assert tree.wanting() == "".join(f"{op}: export it in {' and '.join(exporting)}\n" for op in added)
    for op in added:
        tree.edit(exporting[0], "from .lora_linear", f"from .{op} import {op}\n")
        tree.edit(exporting[1], "    lora_linear,\n", f"    {op},\n")
        for path in exporting:
            tree.edit(path, '    "lora_linear",\n', f'    "{op}",\n')
    said = tree.wanting()
    for op, backends in added.items():
        assert f"{op}: nothing tests it: list its OpInfo in i2v_kernels/testing/__init__.py\n" in said
        assert f"{op}: its README.md lacks # {op}, ## What it computes, ## Layout, bytes, flops" in said
        assert f"{op}: README.md's table of ops lacks its row, with the backends {backends}\n" in said
        shutil.copy(BOOK / op / "testing.py", tree.root / "i2v_kernels" / "testing" / f"{op}.py")
        tree.edit("i2v_kernels/testing/__init__.py", "    lora_linear,\n", f"    {op},\n")
        tree.edit("i2v_kernels/testing/__init__.py", "    lora_linear.INFO,\n", f"    {op}.INFO,\n")
        shutil.copy(BOOK / op / "README.md", tree.root / "i2v_kernels" / "ops" / op)
        row = f"| [`{op}`](i2v_kernels/ops/{op}/README.md) | nothing of use | {backends} | tests |\n"
        tree.edit("README.md", "| [`lora_linear`](", row)
    assert said.count(", ## What is proved, and what is not\n") == 1  # of that with kernels
    assert tree.wanting() == "\n"
    return tree


def test_their_tests_are_generated_and_pass(tree):
    names = ("correct", "pytorch", "layouts", "derivatives", "special_values", "fuzz", "registry")
    files = (*(f"tests/ops/test_{name}.py" for name in names), "bench/test_ops.py")
    assert tree.pytest(*files, those="frame_pool or pair_scores") > 250


def test_kernels_are_interpreted(tree):
    assert tree.pytest("tests/ops/_interpreter.py", TRITON_INTERPRET="1") > 10


def test_launches_are_planned(tree):
    assert tree.pytest("tests/ops/_launches.py") > 10


def test_kernels_are_compiled_ahead_without_a_table(tree):
    more = "import triton\n\n\n@triton.jit\ndef forgotten_kernel(x):\n    pass\n"
    (tree.root / "i2v_kernels/ops/frame_pool/triton_more.py").write_text(more)
    options = ("--op", "frame_pool", "--target", "sm_90", "--no-model", "--json", "table.json")
    done = tree.run("-m", "bench.machine_code", *options)
    assert done.returncode == 0, done.stderr[-3000:]
    table = json.loads((tree.root / "table.json").read_text())
    rows = {name: facts for name, facts in table.items() if isinstance(facts, dict)}
    for kernel in ("frame_pool_kernel", "frame_pool_backward_kernel"):
        assert sum(name.startswith(f"{kernel}, ViT-B/16 T=8") for name in rows) == 3  # dtypes
    assert all(facts["vector loads"] and not facts["spilled"] for facts in rows.values())
    assert table["unlisted"] == ["frame_pool/triton_more.py: forgotten_kernel"]


def test_predictions_are_added(tree):
    """Those of the other ops stay."""
    done = tree.run("-m", "bench.machine_code", "--predict", "--op", "frame_pool", "--op", "pair_scores")
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads((tree.root / "bench/predictions.json").read_text())["rows"]
    assert [(row["pass"], row["launches"]) for row in rows if row["op"] == "frame_pool"] == [
        ("forward", 1), ("backward", 1), ("forward+backward", 2),
    ]  # fmt: skip
    missing = {kernel for row in rows if row["op"] == "frame_pool" for kernel in row["missing"]}  # it does not say how often
    assert {text.split(",")[0] for text in missing} == {"frame_pool_kernel", "frame_pool_backward_kernel"}
    assert tree.pytest("bench/test_predictions.py", those="registry_has") == 1


def test_ops_are_benched_without_peers(tree):
    ops = ("frame_pool", "pair_scores")
    options = ("--seconds", "0.1", "--clips", "1", "--dtype", "float32", "--json", "bench.json")
    done = tree.run("-m", "bench", *(word for op in ops for word in ("--op", op)), *options)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads((tree.root / "bench.json").read_text())["rows"]
    assert [(row["op"], row["backend"]) for row in rows] == [(op, "reference") for op in ops for _ in range(2)]


def test_a_card_measures_what_has_kernels(tree):
    """``bench.short`` has an order of the ops that it knows; others come last."""
    code = "from bench import short; print(*(info.name for info, _ in short.calls()))"
    done = tree.run("-c", code, I2V_GPU_STUB="1", TRITON_INTERPRET="1")
    assert done.stdout.split()[-1:] == ["frame_pool"], done.stderr[-3000:]


def test_what_was_compiled_is_not_taken_for_another_shape(tree):
    """Inductor's cache knows graphs, not what an op gives: tests of one that has changed must not meet what it gave before."""
    file, those = "tests/ops/test_pytorch.py", "frame_pool and test_compile and inductor"
    assert tree.pytest(file, those=those) == 1
    folder = tree.root / "i2v_kernels/ops/frame_pool"
    for name, before, after in (("reference.py", "mean(1)", "mean(1, keepdim=True)"), ("op.py", "x[:, 0]", "x[:, :1]")):
        text = (folder / name).read_text()
        assert before in text
        (folder / name).write_text(text.replace(before, after))
    assert tree.pytest(file, those=those) == 1
