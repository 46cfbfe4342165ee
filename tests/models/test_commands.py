"""The two commands on small videos: training, a real SIGKILL, resuming, bad files, multi-view testing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch

from i2v_kernels.video import write_video
from i2v_models import checkpoint, predict
from i2v_models import eval as eval_command
from i2v_models import train as train_command
from i2v_models.config import EvalConfig, TrainConfig, parse, parser
from i2v_models.eval import load_run

from .conftest import TEXT, VISION

av = pytest.importorskip("av")
STEPS = 40


def write_audio_only(path: Path) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate, frame.pts = 16000, 0
        container.mux(stream.encode(frame))
        container.mux(stream.encode())


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    """A model configuration, four good videos of each of two classes, and three that cannot be read."""
    root = tmp_path_factory.mktemp("videos")
    (root / "tiny-vit.json").write_text(json.dumps({"embed_dim": 32, "vision_cfg": VISION, "text_cfg": TEXT}))
    resnet = {"embed_dim": 32, "vision_cfg": {"layers": [1, 1, 1, 1], "width": 8, "image_size": 32}, "text_cfg": TEXT}
    (root / "tiny-resnet.json").write_text(json.dumps(resnet))
    open_clip.add_model_config(root)
    generator = torch.Generator().manual_seed(0)
    for number in range(8):
        name = ("getting_brighter", "getting_darker")[number % 2]
        (root / "data" / name).mkdir(parents=True, exist_ok=True)
        light = torch.linspace(0, 180, 10).int().view(10, 1, 1, 1)
        noise = torch.randint(0, 70, (10, 32, 48, 3), generator=generator)
        frames = (noise + (light if number % 2 == 0 else light.flip(0))).to(torch.uint8)
        write_video(root / "data" / name / f"{number}.mp4", frames, fps=10)
    (root / "data" / "getting_darker" / "empty.mp4").touch()
    (root / "data" / "getting_darker" / "noise.mp4").write_bytes(bytes(range(256)) * 40)
    write_audio_only(root / "data" / "getting_brighter" / "audio.mp4")
    return root


def arguments(workplace: Path, output: Path, **changes) -> list[str]:
    settings = {
        "method": "st_adapter", "data": workplace / "data", "model": "tiny-vit", "pretrained": "none", "output": output,
        "frames": 4, "head": "linear", "width": 16, "batch-size": 3, "steps": STEPS, "lr": 0.01, "workers": 0,
        "save-every": 1, "log-every": 1,
    }  # fmt: skip
    return [text for name, value in (settings | changes).items() for text in (f"--{name}", str(value))]


@pytest.fixture(scope="module")
def trained(workplace) -> Path:
    train_command.main(arguments(workplace, workplace / "whole"))
    return workplace / "whole"


def lines(output: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]


def test_killed_run_resumes_to_the_same_bits(workplace, trained, tmp_path, capsys):
    script = tmp_path / "worker.py"
    script.write_text(
        "import sys, open_clip, torch\ntorch.set_num_threads(1)\nopen_clip.add_model_config(sys.argv[1])\n"
        "from i2v_models.train import main\nmain(sys.argv[2:])\n"
    )
    output = tmp_path / "killed"
    command = [sys.executable, str(script), str(workplace / "tiny-vit.json"), *arguments(workplace, output)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 120
        while len(list(output.glob("checkpoint-*[1-9][0-9]"))) < 2 and time.monotonic() < deadline:
            assert process.poll() is None
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    killed_at = checkpoint.load(output).step
    assert 10 <= killed_at < STEPS
    train_command.main(arguments(workplace, output))
    assert f"step {killed_at} of {STEPS}" in capsys.readouterr().out
    one, other = checkpoint.load(trained), checkpoint.load(output)
    assert one.step == other.step == STEPS
    assert [name for name in one.weights if not torch.equal(one.weights[name], other.weights[name])] == []
    exact = ("step", "epoch", "loss", "lr", "grad_norm")
    assert [[line[key] for key in exact] for line in lines(output)] == [[line[key] for key in exact] for line in lines(trained)]


def test_bad_videos_do_not_stop_training_and_are_named(trained):
    bad = json.loads((trained / "bad_videos.json").read_text())
    assert {Path(path).name for path in bad} == {"empty.mp4", "noise.mp4", "audio.mp4"}
    assert all(bad.values())


def test_log_and_loss(trained):
    log = lines(trained)
    assert [line["step"] for line in log] == list(range(1, STEPS + 1))
    assert set(log[0]) == {"step", "epoch", "loss", "lr", "grad_norm", "clips_per_second", "wait"}
    assert all(0 <= line["wait"] <= 1 and line["clips_per_second"] > 0 for line in log)
    assert sum(line["loss"] for line in log[-5:]) < 0.5 * sum(line["loss"] for line in log[:5])


def test_eval_averages_views_and_writes_json(workplace, trained, tmp_path, capsys):
    output = tmp_path / "result.json"
    data = str(workplace / "data")
    eval_command.main(
        ["--checkpoint", str(trained), "--data", data, "--views", "2", "3", "--workers", "0", "--output", str(output)]
    )
    result = json.loads(output.read_text())
    assert (result["top1"], result["top5"], result["videos"], result["views"]) == (1.0, 1.0, 8, [2, 3])
    assert "top-1 100.00%, top-5 100.00% on 8 videos" in capsys.readouterr().out
    assert len(result["bad"]) == 3
    model, config, classes = load_run(trained)
    assert (config.method, classes) == ("st_adapter", ["getting_brighter", "getting_darker"])
    loader = eval_command.ClipLoader(data, frames=4, size=32, batch_size=6, views=(2, 3))
    batch = next(iter(loader))  # six views of one video
    first = next(line for line in result["predictions"] if line["path"] == batch.path[0])
    assert first["probability"] == pytest.approx(float(predict(model, batch.frames).mean(0).max()), rel=1e-4)


def test_eval_maps_a_part_of_the_classes_by_name(workplace, trained, tmp_path):
    darker = sorted((workplace / "data" / "getting_darker").glob("[0-9].mp4"))
    table = tmp_path / "test.csv"
    table.write_text("path,label\n" + "".join(f"{path},getting_darker\n" for path in darker))
    common = ["--checkpoint", str(trained), "--workers", "0", "--output", str(tmp_path / "out.json")]
    eval_command.main([*common, "--data", str(table)])
    assert json.loads((tmp_path / "out.json").read_text())["top1"] == 1.0
    table.write_text(f"path,label\n{darker[0]},flickering\n")
    with pytest.raises(SystemExit, match="classes the model does not know: flickering"):
        eval_command.main([*common, "--data", str(table)])


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"lr": 0.02}, "lr was 0.01, is 0.02"),
        ({"method": "aim", "frames": 8}, "frames was 4, is 8; method was 'st_adapter', is 'aim'"),
    ],
)
def test_another_config_does_not_resume(workplace, trained, changes, text):
    with pytest.raises(SystemExit, match=f"error: cannot resume .*{text}"):
        train_command.main(arguments(workplace, trained, **changes))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"model": "ViT-B-61"}, "model='ViT-B-61' is unknown to open_clip; near it: .*ViT-B-16"),
        ({"model": "tiny-resnet"}, "model='tiny-resnet' cannot be used: .*got ModifiedResNet"),
        ({"pretrained": "laion9b"}, "pretrained='laion9b' cannot be loaded into 'tiny-vit'"),
        ({"data": "/nowhere"}, "no such folder or file: /nowhere"),
        ({"caption": "a video"}, "caption='a video' has no {}"),
        ({"method": "tokshift"}, "tokshift has no option width"),
        ({"sampling": "best"}, "sampling must be .* got 'best'"),
        ({"decoder": "decord"}, "backend must be .* got 'decord'"),
        ({"device": "tpu9"}, "device='tpu9' cannot be used"),
    ],
)
def test_what_cannot_be_is_named(workplace, tmp_path, changes, text):
    with pytest.raises(SystemExit, match=text):
        train_command.main(arguments(workplace, tmp_path, **changes))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"method": "st_adaptor"}, "argument --method: invalid choice: 'st_adaptor' (choose from"),
        ({"batch-size": "many"}, "argument --batch-size: invalid int value: 'many'"),
        ({"batch-size": 0}, "batch_size must be above 0, got 0"),
        ({"learning-rate": 1}, "unrecognized arguments: --learning-rate 1"),
    ],
)
def test_wrong_arguments_are_named(workplace, capsys, changes, text):
    with pytest.raises(SystemExit):
        parse(TrainConfig, "train", arguments(workplace, Path("out"), **changes))
    assert text in capsys.readouterr().err


def test_command_line_is_the_dataclass():
    shortest = ["--method", "aim", "--data", "d", "--pretrained", "openai"]
    assert parse(TrainConfig, "train", shortest) == TrainConfig(method="aim", data="d", pretrained="openai")
    config = parse(TrainConfig, "train", [*shortest, "--no-kernels", "--train-backbone", "--steps", "3", "--lr", "1"])
    assert (config.kernels, config.train_backbone, config.steps, config.lr) == (False, True, 3, 1.0)
    views = parse(EvalConfig, "eval", ["--checkpoint", "c", "--data", "d", "--views", "4", "3"]).views
    assert views == (4, 3)
    text = parser(TrainConfig, "train").format_help()
    assert "default: None" not in text and "--accumulate ACCUMULATE" in text
