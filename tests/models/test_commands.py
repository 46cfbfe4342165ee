"""The two commands on small videos: training, a real SIGKILL, resuming, bad files, multi-view testing."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import save_file

from i2v_kernels.video import write_video
from i2v_models import checkpoint, predict
from i2v_models import eval as eval_command
from i2v_models import train as train_command
from i2v_models.config import EvalConfig, TrainConfig, parse, parser
from i2v_models.eval import load_run
from i2v_models.tasks import Classification

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


def test_eval_leaves_out_what_has_no_label_and_says_so(workplace, trained, tmp_path, capsys):
    videos = sorted((workplace / "data").glob("*/[0-9].mp4"))
    table = tmp_path / "test.csv"
    rows = [f"{path},{path.parent.name}" for path in videos[:3]] + [f"{path}," for path in videos[3:5]]
    noise = workplace / "data" / "getting_darker" / "noise.mp4"
    table.write_text("\n".join(["path,label", *rows, f"{noise},getting_darker\n"]))
    output = tmp_path / "out.json"
    common = ["--checkpoint", str(trained), "--workers", "0", "--output", str(output)]
    eval_command.main([*common, "--data", str(table)])
    result = json.loads(output.read_text())
    assert (result["videos"], result["top1"]) == (3, 1.0)
    assert set(result["left_out"]) == {str(path) for path in videos[3:5]} | set(result["bad"])
    said = capsys.readouterr().out
    assert "top-1 100.00%, top-5 100.00% on 3 videos; left out: 2 without a label, 1 that cannot be read" in said
    for lines, text in (
        ([f"{path},{number}" for number, path in enumerate(videos[:2])], "labels classes by number, the model was trained on"),
        ([f"{path}," for path in videos[:2]], "has no video with a label"),
    ):
        table.write_text("\n".join(["path,label", *lines]) + "\n")
        with pytest.raises(SystemExit, match=f"error: data=.*{text}"):
            eval_command.main([*common, "--data", str(table)])


def test_eval_of_nothing_readable_is_no_accuracy_of_0(workplace, trained, tmp_path):
    table = tmp_path / "test.csv"
    bad = [workplace / "data" / "getting_darker" / name for name in ("noise.mp4", "empty.mp4")]
    table.write_text("path,label\n" + "".join(f"{path},getting_darker\n" for path in bad))
    arguments = ["--checkpoint", str(trained), "--workers", "0", "--data", str(table), "--output", str(tmp_path / "out.json")]
    with pytest.raises(SystemExit, match=r"error: there is no video to score; 2 were left out \(.*noise.mp4: "):
        eval_command.main(arguments)
    assert not (tmp_path / "out.json").exists()


def test_classes_that_are_numbers(workplace, tmp_path):
    videos = sorted((workplace / "data").glob("*/[0-9].mp4"))
    table, output = tmp_path / "numbers.csv", tmp_path / "out.json"
    table.write_text("path,label\n" + "".join(f"{path},{int(path.parent.name == 'getting_darker')}\n" for path in videos))
    train_command.main(arguments(workplace, tmp_path / "run", data=table, steps=2))
    common = ["--checkpoint", str(tmp_path / "run"), "--workers", "0", "--output", str(output)]
    eval_command.main([*common, "--data", str(table)])
    assert {line["label"] for line in json.loads(output.read_text())["predictions"]} == {0, 1}
    table.write_text("path,label\n" + "".join(f"{path},{number % 2}\n" for number, path in enumerate(videos)))
    with pytest.raises(SystemExit, match=r"error: cannot resume .*: data_digest was"):
        train_command.main(arguments(workplace, tmp_path / "run", data=table, steps=3))  # relabelled, under the same name
    table.write_text(f"path,label\n{videos[0]},0\n{videos[1]},2\n")
    with pytest.raises(SystemExit, match="has the label 2; the model has classes 0 to 1"):
        eval_command.main([*common, "--data", str(table)])
    with pytest.raises(SystemExit, match="classes the model does not know: getting_brighter, getting_darker"):
        eval_command.main([*common, "--data", str(workplace / "data")])
    table.write_text(f"path,label\n{videos[0]},0\n{videos[1]},1000000000\n")
    with pytest.raises(SystemExit, match=r"must number classes 0, 1, ... below 1000000, got 1000000000: "):
        train_command.main(arguments(workplace, tmp_path / "other", data=table))


def test_a_result_that_cannot_be_written_is_found_first_and_printed_anyway(workplace, trained, tmp_path, monkeypatch, capsys):
    common = ["--checkpoint", str(trained), "--workers", "0", "--data", str(workplace / "data")]
    (tmp_path / "file").touch()
    with monkeypatch.context() as patch:
        patch.setattr(Classification, "test", lambda *_: pytest.fail("it was tested"))
        for output in (tmp_path, tmp_path / "file" / "out.json"):
            with pytest.raises(SystemExit, match=f"error: {output} cannot be written"):
                eval_command.main([*common, "--output", str(output)])

    def full(path, content):
        raise OSError(f"{path} cannot be written: [Errno 28] No space left on device")

    monkeypatch.setattr(checkpoint, "write_json", full)
    with pytest.raises(SystemExit, match=r"error: .*out.json cannot be written"):
        eval_command.main([*common, "--output", str(tmp_path / "new" / "out.json")])
    assert "top-1 100.00%" in capsys.readouterr().out


def test_eval_on_a_run_that_is_not_one(workplace, trained, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    record = json.loads((run / "config.json").read_text())
    common = ["--checkpoint", str(run), "--workers", "0", "--data", str(workplace / "data")]
    for change, text in (
        ({"classes": ["a", "b", "c"]}, "state does not fit this model: fc.bias is"),
        ({"classes": None}, "is not of a training run: it has no classes"),
        ({"spatial": "flash"}, "spatial='flash' cannot be used"),
    ):
        (run / "config.json").write_text(json.dumps(record | change))
        with pytest.raises(SystemExit, match=f"error: .*{text}"):
            eval_command.main(common)
    eval_command.main([*common, "--spatial", "sdpa"])
    (run / "config.json").write_text(json.dumps({name: record[name] for name in record if name not in ("method", "flip")}))
    with pytest.raises(SystemExit, match="is not of a training run: it has no method"):
        eval_command.main(common)
    (run / "config.json").write_text("{")
    with pytest.raises(SystemExit, match=r"config.json cannot be read"):
        eval_command.main(common)


def test_weights_that_were_moved_are_given_anew(workplace, tmp_path):
    state = open_clip.create_model("tiny-vit").state_dict()
    old, new, other = (tmp_path / name for name in ("old.pt", "new.safetensors", "other.pt"))
    torch.save(state, old)
    torch.save(state | {"logit_scale": state["logit_scale"] + 1}, other)
    output = tmp_path / "run"
    train_command.main(arguments(workplace, output, pretrained=old, steps=2))
    save_file({name: value.contiguous() for name, value in state.items()}, new)
    old.unlink()
    common = ["--checkpoint", str(output), "--workers", "0", "--data", str(workplace / "data")]
    with pytest.raises(SystemExit, match=r"error: pretrained='.*old.pt' cannot be loaded"):
        eval_command.main(common)
    eval_command.main([*common, "--pretrained", str(new)])
    with pytest.raises(SystemExit, match=r"error: pretrained='.*other.pt' holds other weights .* than the run began with"):
        eval_command.main([*common, "--pretrained", str(other)])
    with pytest.raises(SystemExit, match=r"error: cannot resume .*pretrained_digest was '.*', is '"):
        train_command.main(arguments(workplace, output, pretrained=other, steps=3))
    train_command.main(arguments(workplace, output, pretrained=new, steps=3))
    assert checkpoint.load(output).step == 3


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_command_that_is_told_to_stop_saves_and_ends_with_its_code(workplace, tmp_path, number, monkeypatch, capsys):
    save = checkpoint.save

    def save_and_be_told(folder, step, *rest, **options):
        if step == 2:
            os.kill(os.getpid(), number)
        return save(folder, step, *rest, **options)

    monkeypatch.setattr(checkpoint, "save", save_and_be_told)
    with pytest.raises(SystemExit) as end:
        train_command.main(arguments(workplace, tmp_path / "run"))
    assert end.value.code == 128 + number and checkpoint.load(tmp_path / "run").step in (2, 3)
    assert f"{number.name}: step " in capsys.readouterr().err
    test = ["--checkpoint", "c", "--data", "d"]
    for command, name, argv in (
        (train_command, "prepare", arguments(workplace, tmp_path / "run")),
        (eval_command, "open_run", test),
    ):
        monkeypatch.setattr(command, name, lambda *_, **__: os.kill(os.getpid(), number))  # before the first step
        with pytest.raises(SystemExit) as end:
            command.main(argv)
        assert end.value.code == 128 + number
