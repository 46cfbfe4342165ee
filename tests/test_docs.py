"""Every Python example of the README and of docs/ runs, page by page, in a folder with a few videos."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from i2v_kernels.video import write_video

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
EXAMPLES = {page.name: re.findall(r"^```python\n(.*?)^```", page.read_text(), re.M | re.S) for page in PAGES}


@pytest.mark.parametrize("page", [name for name, blocks in EXAMPLES.items() if blocks])
def test_examples_run(page, tmp_path):
    for place, label in enumerate(("left", "right")):
        folder = tmp_path / "videos" / "train" / label
        folder.mkdir(parents=True)
        write_video(folder / "clip.mp4", torch.full((8, 64, 64, 3), 80 * place, dtype=torch.uint8), fps=8)
    (tmp_path / "page.py").write_text("\n".join(EXAMPLES[page]))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "page.py"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_site_builds(tmp_path):
    pytest.importorskip("material", reason="mkdocs-material is not installed")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for page in (ROOT / "docs").glob("*.md"):
        built = tmp_path / ("index.html" if page.stem == "index" else f"{page.stem}/index.html")
        title = page.read_text().splitlines()[0].removeprefix("# ")
        assert title in built.read_text()


def test_pages_are_in_the_navigation():
    listed = re.findall(r"[\w]+\.md", (ROOT / "mkdocs.yml").read_text())
    assert sorted(listed) == sorted(path.name for path in (ROOT / "docs").iterdir())


def test_links_lead_somewhere():
    for page in [*PAGES, *ROOT.glob("i2v_kernels/**/README.md")]:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
