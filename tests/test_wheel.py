"""What a wheel carries: a stranger installs it, and never sees this folder."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_wheel_has_every_module_and_imports(tmp_path):
    environment = os.environ | {"I2V_KERNELS_NO_EXTENSION": "1"}
    build = [sys.executable, "setup.py", "-q", "build", "-b", tmp_path / "build", "bdist_wheel", "-d", tmp_path / "dist"]
    build[3:3] = ["egg_info", "-e", tmp_path]
    subprocess.run(build, cwd=ROOT, env=environment, check=True, capture_output=True)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info" not in name}
        archive.extractall(tmp_path / "installed")
    there = {path.relative_to(ROOT) for folder in ("i2v_kernels", "models") for path in (ROOT / folder).rglob("*.py")}
    expected = {str(path).replace("models/", "i2v_models/", path.parts[0] == "models") for path in there}
    assert names == expected | {"i2v_kernels/py.typed"}
    code = "import i2v_kernels, i2v_models, i2v_kernels.nn, i2v_kernels.video; print(i2v_kernels.__file__)"
    seen = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment | {"PYTHONPATH": str(tmp_path / "installed")},
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert seen.stdout.strip() == str(tmp_path / "installed" / "i2v_kernels" / "__init__.py")
