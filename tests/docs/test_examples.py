"""Every Python example of README, docs/ and the READMEs beside the code runs, page by page, in a folder with a few videos."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from i2v_kernels.video import write_video

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("i2v_kernels/**/README.md"))]
EXAMPLES = {
    path.relative_to(ROOT).as_posix(): re.findall(r"^```python\n(.*?)^```", path.read_text(), re.M | re.S) for path in PAGES
}
BEFORE = {"i2v_kernels/patching/README.md": "import torch\nmodel = torch.nn.Linear(2, 2)"}  # "a model that you have"


@pytest.mark.parametrize("page", [name for name, blocks in EXAMPLES.items() if blocks])
def test_examples_run(page, tmp_path):
    for place, label in enumerate(("left", "right")):
        folder = tmp_path / "videos" / "train" / label
        folder.mkdir(parents=True)
        write_video(folder / "clip.mp4", torch.full((8, 64, 64, 3), 80 * place, dtype=torch.uint8), fps=8)
    rows = [f"videos/train/{label}/clip.mp4,a dog runs {label}" for label in ("left", "right")]
    (tmp_path / "captions.csv").write_text("\n".join(["path,caption", *rows]))
    (tmp_path / "page.py").write_text("\n".join([BEFORE.get(page, ""), *EXAMPLES[page]]))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "page.py"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_bars_are_what_bench_traffic_says(capsys):
    from bench import traffic

    traffic.main()
    said, op = {}, ""
    for line in capsys.readouterr().out.splitlines():
        if not line.startswith(" "):
            op = line.partition(",")[0]
        else:
            name, units, _ = line.split()
            said[op, name] = units
    bar = r"(?:<th.*>(\w+)</th>)?<td>(\w+)</td><td style=\"--bytes: (.+)\">(.+)</td>"
    bars = re.findall(bar, (ROOT / "docs/index.md").read_text())
    assert bars
    for name, candidate, length, label in bars:
        op = name or op
        assert said[op, candidate] == length == label, f"{op}, {candidate}"
