"""The two commands on small videos with captions: training, resuming, testing, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import open_clip
import pytest
import torch

pytest.importorskip("av")

from i2v_kernels.video import write_video
from i2v_models import checkpoint
from i2v_models import eval as eval_command
from i2v_models import train as train_command
from i2v_models.config import TrainConfig, parser
from i2v_models.eval import load_run

from ..conftest import TEXT, VISION

SAID = [["it is getting brighter", "from dark to light"], ["it is getting darker", "from light to dark"]]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    """A model configuration, six videos in ``videos``, one that cannot be read, and a list of what they show."""
    root = tmp_path_factory.mktemp("captions")
    (root / "said-vit.json").write_text(json.dumps({"embed_dim": 32, "vision_cfg": VISION, "text_cfg": TEXT}))
    open_clip.add_model_config(root)
    (root / "videos").mkdir()
    generator = torch.Generator().manual_seed(0)
    lines = ["path,caption"]
    for number in range(6):
        light = torch.linspace(0, 180, 8).int().view(8, 1, 1, 1)
        noise = torch.randint(0, 70, (8, 32, 48, 3), generator=generator)
        frames = (noise + (light.flip(0) if number % 2 else light)).to(torch.uint8)
        write_video(root / "videos" / f"{number}.mp4", frames, fps=8)
        lines += [f"videos/{number}.mp4,{caption}" for caption in SAID[number % 2]]
    (root / "videos" / "noise.mp4").write_bytes(bytes(range(256)) * 40)
    (root / "captions.csv").write_text("\n".join([*lines, "videos/noise.mp4,a storm\n"]))
    return root


def arguments(workplace: Path, output: Path, **changes) -> list[str]:
    settings = {
        "task": "retrieval", "method": "st_adapter", "data": workplace / "captions.csv", "model": "said-vit",
        "pretrained": "none", "output": output, "frames": 4, "width": 32, "batch-size": 6, "steps": 160, "lr": 0.02,
        "workers": 0,
    }  # fmt: skip
    return [text for name, value in (settings | changes).items() for text in (f"--{name}", str(value))]


@pytest.fixture(scope="module")
def trained(workplace) -> Path:
    train_command.main(arguments(workplace, workplace / "run"))
    return workplace / "run"


def test_a_run_learns_the_order_of_frames_and_eval_says_both_directions(workplace, trained, tmp_path, capsys):
    assert {Path(path).name for path in json.loads((trained / "bad_videos.json").read_text())} == {"noise.mp4"}
    test = ["--checkpoint", str(trained), "--data", str(workplace / "captions.csv"), "--workers", "0", "--views", "2", "3"]
    eval_command.main([*test, "--output", str(tmp_path / "out.json")])
    result = json.loads((tmp_path / "out.json").read_text())
    perfect = {"R@1": 100.0, "R@5": 100.0, "R@10": 100.0, "MdR": 1.0, "MnR": 1.0}
    assert result["text_to_video"] == {**perfect, "queries": 4} and result["video_to_text"] == {**perfect, "queries": 6}
    assert (result["texts"], result["videos"], result["chance"]) == (4, 6, 50.0)
    assert [Path(path).name for path in result["left_out"]] == ["noise.mp4"]
    assert (result["views"], result["checkpoint"]) == ([2, 3], str(trained))
    said = capsys.readouterr().out
    assert "text to video: R@1 100.0 %, R@5 100.0 %, R@10 100.0 %, MdR 1, MnR 1.0\nvideo to text: R@1 100.0 %" in said
    assert "of 4 texts and 6 videos; chance: R@1 50 %; left out: 1 that cannot be read\n" in said


def test_a_run_can_be_used_from_python(workplace, trained):
    model, config, classes = load_run(trained)
    assert (config.task, classes) == ("retrieval", [])
    clips = model(torch.randint(0, 256, (2, 4, 32, 32, 3), dtype=torch.uint8))
    text = model.encode_text(open_clip.get_tokenizer("said-vit")(["from dark to light"]))
    assert clips.norm(dim=1).tolist() == pytest.approx([1, 1]) and (text @ clips.T).shape == (1, 2)


def test_it_resumes_with_the_same_captions_alone(workplace, trained, capsys):
    train_command.main(arguments(workplace, trained, steps=161))
    assert "step 160 of 161" in capsys.readouterr().out and checkpoint.load(trained).step == 161
    other = workplace / "other.csv"
    other.write_text((workplace / "captions.csv").read_text().replace("a storm", "a calm"))
    with pytest.raises(SystemExit, match=r"error: cannot resume .*: captions_digest was '\w+', is '\w+'"):
        train_command.main(arguments(workplace, trained, steps=162, data=other))
    with pytest.raises(SystemExit, match=r"error: cannot resume .* task was 'retrieval', is 'classification'"):
        labels = workplace / "labels.csv"
        labels.write_text("path,label\nvideos/0.mp4,light\nvideos/1.mp4,dark\n")
        train_command.main(arguments(workplace, trained, task="classification", data=labels))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"data": "labels"}, "has no captions; retrieval needs a list whose first line names the columns path and caption"),
        ({"data": "gap"}, "has no caption in row 2 of 2: .*1.mp4"),
        ({"data": "videos"}, "no class folders with videos"),
        ({"batch-size": 1}, "batch_size=1 leaves a clip without another to be told from"),
        ({"method": "frame_mean", "width": ""}, "nothing to train: FrameMean has no parameters"),
    ],
)
def test_what_cannot_be_is_named(workplace, tmp_path, changes, text):
    (tmp_path / "labels").write_text(f"path,label\n{workplace}/videos/0.mp4,light\n")
    (tmp_path / "gap").write_text(f"path,caption\n{workplace}/videos/0.mp4,light\n{workplace}/videos/1.mp4,\n")
    (tmp_path / "videos").mkdir()
    if "data" in changes:
        changes = changes | {"data": tmp_path / changes["data"]}
    given = arguments(workplace, tmp_path / "run", **changes)
    if "width" in changes:
        del given[given.index("--width") : given.index("--width") + 2]
    with pytest.raises(SystemExit, match=text):
        train_command.main(given)


@pytest.mark.filterwarnings("ignore:ClipLoader. epoch 0 gave no batch")
def test_eval_names_what_is_missing(workplace, trained, tmp_path):
    table = tmp_path / "test.csv"
    for content, text in (("", "has no caption in row 1 of 2"), ("x", "there is no video to score; 1 were left out")):
        table.write_text(f"path,caption\n{workplace}/videos/noise.mp4,{content}\n{workplace}/videos/noise.mp4,y\n")
        with pytest.raises(SystemExit, match=f"error: .*{text}"):
            eval_command.main(["--checkpoint", str(trained), "--data", str(table), "--workers", "0"])


def test_help_says_what_the_negatives_are():
    text = " ".join(parser(TrainConfig, "train").format_help().split())
    assert "batches per optimizer step; in retrieval each has its own negatives" in text
    assert "train the image tower too; in retrieval the text tower as well" in text
