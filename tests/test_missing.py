"""What is said where something is missing: the compiled kernels, or a package that only some parts need."""

import ast
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from i2v_kernels import _extension, register_attention
from i2v_kernels.extras import INSTALL, require
from i2v_kernels.video import choose_backend, decode
from i2v_models import checkpoint, load_clip
from i2v_models.demo import data, picture
from i2v_models.progress import Progress

ROOT = Path(__file__).resolve().parent.parent
CALL = "import torch, i2v_kernels as i2v\nx = torch.randn(1, 4, 3, 8)\n"


def python(code, *arguments, hidden=(), **variables):
    """A process of its own in which ``import`` finds none of ``hidden``: exit status, output and errors."""
    hide = "".join(f"sys.modules[{name!r}] = None\n" for name in hidden)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("I2V_")}
    environment |= {"PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "0", **variables}
    return subprocess.run(
        [sys.executable, "-c", f"import sys\n{hide}{code}", *arguments], env=environment, capture_output=True, text=True
    )


def warned(code, *, hidden=("i2v_kernels._C",), **variables):
    done = python(CALL + code, hidden=hidden, **variables)
    assert done.returncode == 0, done.stderr
    return [line for line in done.stderr.splitlines() if "RuntimeWarning: i2v_kernels" in line]


def test_ops_without_the_extension_say_so_once():
    code = "i2v.token_shift(x, [(2, 1)])\ni2v.token_shift(x.requires_grad_(), [(2, 1)]).sum().backward()\n"
    (line,) = warned(code + "i2v.temporal_attention(x[..., None, :], x[..., None, :], x[..., None, :])")
    for said in ("'reference'", "no C++20 compiler was found", "pip install", "I2V_KERNELS_NO_WARNING=1"):
        assert said in line
    assert not warned(code, I2V_KERNELS_NO_WARNING="1")


def test_ops_without_the_extension_say_so_when_compiled():
    code = "f = torch.compile(lambda x: i2v.token_shift(x, [(2, 1)]) + 1, fullgraph=True, backend='aot_eager')\n"
    assert len(warned(code + "f(x); f(x); f(x.requires_grad_()).sum().backward()")) == 1


def test_nothing_is_said_of_a_backend_asked_for_or_asked_about():
    assert not warned("i2v.token_shift(x, [(2, 1)], backend='reference')\ni2v.explain(i2v.token_shift, x, [(2, 1)])")
    assert not warned("i2v.token_shift(x, [(2, 1)])", I2V_KERNELS_BACKEND="reference")


@pytest.mark.skipif(_extension.why_no_cpu() is not None, reason="the extension is not built")
def test_nothing_is_said_where_the_extension_is_there():
    assert not warned("i2v.token_shift(x, [(2, 1)])", hidden=())


USES = {
    "av": lambda path: decode(path / "a.mp4", [0]),
    "torchcodec": lambda path: choose_backend("torchcodec"),
    "nvidia.dali": lambda path: choose_backend("dali"),
    "open_clip": lambda path: load_clip("ViT-B-32", None),
    "safetensors": lambda path: checkpoint.load(path),
    "tqdm": lambda path: Progress(1, "step"),
    "sklearn": lambda path: data.load("test"),
    "matplotlib": lambda path: picture.draw(path / "a.png", {}, {}),
    "transformers": lambda path: register_attention(),
}


@pytest.mark.parametrize("package", USES)
def test_a_missing_package_is_named_with_what_brings_it(package, tmp_path, monkeypatch):
    for name in [name for name in sys.modules if f"{name}.".startswith(f"{package}.")]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError) as raised:
        USES[package](tmp_path)
    assert re.search(rf"\w needs {re.escape(package)}: pip install {re.escape(INSTALL[package])}$", str(raised.value))


def test_every_package_has_a_use_and_its_extra_brings_it():
    assert {*USES, "flash_attn"} == set(INSTALL)  # of flash-attn: tests/models/test_spatial.py
    offered = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    distributions = {"open_clip": "open_clip_torch", "sklearn": "scikit-learn", "nvidia.dali": "nvidia-dali-cuda130"}
    for package, given in INSTALL.items():
        for extra in re.findall(r"\[(.*)\]", given):
            names = [re.split(r"[\[>=]", entry)[0].replace("-", "_") for entry in offered[extra]]
            assert distributions.get(package, package).replace("-", "_") in names


def test_a_package_that_is_there_but_broken_says_why(tmp_path, monkeypatch):
    (tmp_path / "flash_attn.py").write_text("raise ImportError('libcudart.so.99: cannot open shared object file')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "flash_attn", raising=False)
    with pytest.raises(ImportError, match=r"attention needs flash_attn: pip install .* \(libcudart.so.99: cannot open"):
        require("flash_attn", "attention")


def test_optional_packages_are_imported_through_require():
    """Else a newcomer reads ``No module named 'open_clip'``, and ``import i2v_models`` needs all of them."""
    optional = {name.split(".")[0] for name in INSTALL}
    here = {"transformers.integrations.sdpa_attention"}  # by a function that transformers calls
    for path in [*(ROOT / "i2v_kernels").rglob("*.py"), *(ROOT / "models").rglob("*.py")]:
        tree = ast.parse(path.read_text())
        typing = [node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)]
        unseen = {id(node) for block in typing for node in ast.walk(block)}
        for node in ast.walk(tree):
            if id(node) in unseen or not isinstance(node, (ast.Import, ast.ImportFrom)):
                continue
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            level = getattr(node, "level", 0)
            found = [name for name in names if not level and name.split(".")[0] in optional and name not in here]
            assert not found, f"{path.relative_to(ROOT)}:{node.lineno} imports {found}: use i2v_kernels.extras.require"


COMMANDS = [
    ("i2v_models.train", "--method aim --data . --pretrained none", 1, "open_clip"),
    ("i2v_models.demo", "", 1, "sklearn"),
    ("i2v_kernels.video", "check .", 2, "av"),
]


@pytest.mark.parametrize("module, arguments, status, package", COMMANDS)
def test_commands_end_with_the_sentence(module, arguments, status, package, tmp_path):
    (tmp_path / "a.mp4").touch()
    code = f"import os, runpy\nos.chdir({str(tmp_path)!r})\nrunpy.run_module({module!r}, run_name='__main__', alter_sys=True)"
    done = python(code, *arguments.split(), hidden=INSTALL)
    assert done.returncode == status and "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert f"needs {package}: pip install {INSTALL[package]}" in last
