"""What a stranger gets: an sdist that is the repository, and of it a wheel that runs where only torch and numpy are."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.csrc import building

ROOT = Path(__file__).resolve().parent.parent
LEFT_OUT = (".gitignore", ".gitattributes")  # what only git reads
MADE = ("PKG-INFO", "setup.cfg", "i2v_kernels.egg-info/")  # what setuptools adds
OUTSIDE = ("pytest", "open_clip", "av", "safetensors", "tqdm", "pybind11", "pip")  # what this test's own Python has
LEFT_BEHIND = ("i2v_kernels/_C.so", "csrc/module.o", "bench/__pycache__/a.pyc", "build/b", "runs/c", "dist/d", ".venv/e")
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
WHEEL = [*PIP, "wheel", "--no-index", "--no-build-isolation", "--no-deps", "-w"]

pytestmark = pytest.mark.skipif(not (ROOT / ".git").exists(), reason="no checkout: git says what belongs into the sdist")


def run(command: list[object], cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """With the environment of a stranger: none of this package's variables, and no path to this checkout."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("I2V_", "PYTHON"))}
    done = subprocess.run(list(map(str, command)), cwd=cwd, env=environment | variables, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}:\n{done.stdout}{done.stderr}"[-6000:]
    return done


def listed(*options: str) -> set[str]:
    """What git lists, of what is there."""
    return {name for name in run(["git", "ls-files", "-z", *options], ROOT).stdout.split("\0") if (ROOT / name).is_file()}


def ours() -> set[str]:
    """What git holds or would take in."""
    return listed("--cached", "--others", "--exclude-standard")


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    """Made of a copy of this checkout in which builds and runs have left what they leave."""
    tree, dist = tmp_path_factory.mktemp("checkout"), tmp_path_factory.mktemp("sdist")
    for name in ours():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, tree / name)
    for name in LEFT_BEHIND:
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_bytes(b"")
    hook = "import setuptools.build_meta as hooks, sys; hooks.build_sdist(sys.argv[1])"
    run([sys.executable, "-c", hook, dist], tree, I2V_KERNELS_NO_EXTENSION="1")
    (made,) = dist.iterdir()
    return made


@pytest.fixture(scope="module")
def unpacked(sdist, tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(place, filter="data")
    (folder,) = place.iterdir()
    assert re.fullmatch(r"i2v_kernels-\d+\.\d+\.\d+", folder.name)
    return folder


def test_sdist_is_the_repository(unpacked):
    there = {str(path.relative_to(unpacked)) for path in unpacked.rglob("*") if path.is_file()}
    there = {name for name in there if not name.startswith(MADE)}
    assert there <= ours()
    assert {name for name in listed() - there if not name.startswith(LEFT_OUT)} == set()
    assert all((unpacked / name).read_bytes() == (ROOT / name).read_bytes() for name in there)


@pytest.fixture(scope="module")
def without_compiler(sdist, tmp_path_factory) -> Path:
    """The wheel that pip makes of the archive where PATH leads to no compiler."""
    place, nothing = tmp_path_factory.mktemp("wheel"), tmp_path_factory.mktemp("nothing")
    run([*WHEEL, place, sdist], nothing, PATH=str(nothing), CXX="")
    (wheel,) = place.iterdir()
    return wheel


def test_wheel_has_every_module_and_nothing_else(without_compiler, unpacked):
    with zipfile.ZipFile(without_compiler) as archive:
        names = {name for name in archive.namelist() if ".dist-info" not in name}
        (about,) = (archive.read(name).decode() for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    there = {path.relative_to(unpacked) for folder in ("i2v_kernels", "models") for path in (unpacked / folder).rglob("*.py")}
    expected = {str(path).replace("models/", "i2v_models/", path.parts[0] == "models") for path in there}
    assert names == expected | {"i2v_kernels/py.typed"}
    for field in ("Summary", "Author", "License-Expression", "Keywords", "Project-URL", "Classifier", "Requires-Python"):
        assert f"\n{field}: " in about  # what pip show has to say


def test_versions_of_python_agree():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    tried = re.findall(r"Python :: (3\.\d+)", " ".join(settings["project"]["classifiers"]))
    assert settings["project"]["requires-python"] == f">={tried[0]}"
    assert settings["tool"]["ruff"]["target-version"] == f"py{tried[0].replace('.', '')}"
    assert settings["tool"]["mypy"]["python_version"] == tried[0]
    readme = (ROOT / "README.md").read_text()
    assert f"Python {tried[0]}+" in readme and f"Python {tried[0]} to {tried[-1]}," in readme


@pytest.fixture(scope="module")
def with_compiler(unpacked, tmp_path_factory) -> Path:
    """The wheel with what the sdist's own C++ compiles to, which is kept by content.

    It is laid where setuptools, finding it newer than the sources, leaves it alone: without ninja, for which PyTorch always
    compiles. The compiler fails, so that this is seen.
    """
    if shutil.which((os.environ.get("CXX") or "c++").split()[0]) is None:
        pytest.skip("no C++ compiler")
    made = building.extension(unpacked, I2V_KERNELS_BUILD_CUDA="0", I2V_KERNELS_FAST_BUILD="1")
    place, tree = tmp_path_factory.mktemp("wheel"), tmp_path_factory.mktemp("tree") / "i2v_kernels"
    shutil.copytree(unpacked, tree)
    target = tree / "build" / f"lib.{sysconfig.get_platform()}-{sys.implementation.cache_tag}" / "i2v_kernels" / building.NAME
    target.parent.mkdir(parents=True)
    shutil.copy(made, target)
    fails = {"PATH": "", "CXX": shutil.which("false") or "", "TORCH_DONT_CHECK_COMPILER_ABI": "1"}
    run([*WHEEL, place, tree], place, I2V_KERNELS_BUILD_CUDA="0", **fails)
    (wheel,) = place.iterdir()
    with zipfile.ZipFile(wheel) as archive:
        assert archive.read(f"i2v_kernels/{building.NAME}") == made.read_bytes()
    return wheel


def needed(*names: str) -> set[str]:
    """Distributions of that name and all that they need here."""
    todo, found = [Requirement(name) for name in names], set()
    while todo:
        wanted = todo.pop()
        if (key := (wanted.name, frozenset(wanted.extras))) in found:
            continue
        found.add(key)
        for text in metadata.requires(wanted.name) or ():
            requirement = Requirement(text)
            extras = wanted.extras or {""}
            if requirement.marker is None or any(requirement.marker.evaluate({"extra": extra}) for extra in extras):
                todo.append(requirement)
    return {metadata.distribution(name).name for name, _ in found}


def empty(place: Path) -> Path:
    """The Python of a new virtual environment that has torch, numpy and what they need, by links, and nothing else."""
    venv.create(place, symlinks=True)
    (site,) = place.glob("lib/python*/site-packages")
    wanted = needed("torch", "numpy")
    everything = {found.name: found for found in metadata.distributions()}
    others = (file for name, found in everything.items() if name not in wanted for file in found.files or ())
    shared = {folder for file in others for folder in file.parents}  # such as nvidia/, which torch's and others' lie in
    for name in wanted:
        for file in everything[name].files or ():
            if ".." in file.parts or "__pycache__" in file.parts:
                continue
            part = next(part for part in (*reversed(file.parents), file) if part not in shared)
            if not (site / part).is_symlink():
                (site / part).parent.mkdir(parents=True, exist_ok=True)
                (site / part).symlink_to(everything[name].locate_file(part))
    return place / "bin" / "python"


@pytest.mark.timeout(3600)  # where the extension is compiled
@pytest.mark.parametrize("compiler", [True, False], ids=["with a compiler", "without"])
def test_first_example_runs_where_only_torch_and_numpy_are(compiler, unpacked, tmp_path, request):
    wheel = request.getfixturevalue("with_compiler" if compiler else "without_compiler")
    python = empty(tmp_path / "environment")
    nowhere = tmp_path / "nowhere"
    nowhere.mkdir()
    run([*PIP, "--python", python, "install", "--no-index", wheel], nowhere)  # finds all that it needs
    run([*PIP, "--python", python, "check"], nowhere)
    found = "import importlib.util as u, sys; print([name for name in sys.argv[1:] if u.find_spec(name)])"
    assert run([python, "-c", found, *OUTSIDE], nowhere).stdout == "[]\n"

    example = re.search(r"^```python\n(.*?)^```", (unpacked / "README.md").read_text(), re.M | re.S)[1]
    (tmp_path / "example.py").write_text(
        f"{example}\n"
        "calls = (i2v.temporal_attention, q, k, v), (i2v.token_shift, tokens, [(96, 1)])\n"
        "print('ran', *[i2v.explain(*call).backend for call in calls])\n"
        "import i2v_models, i2v_kernels.video, i2v_kernels.info\n"
        "print(i2v_kernels.info.installed())\n"
    )
    done = run([python, tmp_path / "example.py"], nowhere)
    backend = "cpu" if compiler else "reference"
    assert f"ran {backend} {backend}\n" in done.stdout
    assert f"\nfrom a wheel for {wheel.stem.split('-', 2)[2]} in {tmp_path / 'environment'}" in done.stdout
    assert done.stderr.count("RuntimeWarning: i2v_kernels: ops on CPU tensors run on plain PyTorch") == (not compiler)
