"""``python -m i2v_models.retrieve``: videos go into a store, and text finds them there."""

from __future__ import annotations

import json
import shutil
from contextlib import contextmanager
from pathlib import Path

import open_clip
import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("av")

from i2v_kernels.video import ClipLoader, write_video
from i2v_models import build, load_clip, run
from i2v_models import train as train_command
from i2v_models.config import RetrieveConfig
from i2v_models.retrieval import FeatureStore, top_k
from i2v_models.retrieve import main, signals

from .conftest import TEXT, VISION

TEXTS = ["a thing moves left", "nothing happens"]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    """Model configurations, five videos in two folders, and two files that cannot be read."""
    root = tmp_path_factory.mktemp("retrieve")
    for name, width in (("seek-vit", 32), ("seek-wide", 48)):
        (root / f"{name}.json").write_text(json.dumps({"embed_dim": width, "vision_cfg": VISION, "text_cfg": TEXT}))
    other = {"embed_dim": 32, "vision_cfg": VISION | {"layers": 2}, "text_cfg": TEXT}
    (root / "seek-other.json").write_text(json.dumps(other))
    open_clip.add_model_config(root)
    generator = torch.Generator().manual_seed(0)
    for number in range(5):
        folder = root / "videos" / ("a", "b")[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        frames = torch.randint(0, 256, (8, 32, 48, 3), dtype=torch.uint8, generator=generator)
        write_video(folder / f"{number}.mp4", frames, fps=8)
    (root / "videos" / "a" / "empty.mp4").touch()
    (root / "videos" / "a" / "notes.txt").touch()
    (root / "videos" / ".hidden").mkdir()
    (root / "videos" / ".hidden" / "hidden.mp4").touch()
    (root / "videos" / "b" / "noise.mp4").write_bytes(bytes(range(256)) * 40)
    return root


@pytest.fixture(autouse=True)
def there(workplace, monkeypatch):
    monkeypatch.chdir(workplace)


def call(store: Path, *arguments: str) -> None:
    main(["--store", str(store), "--workers", "0", *arguments])


NEW = ("--add", "videos", "--model", "seek-vit", "--pretrained", "none", "--frames", "4", "--batch-size", "2")


@pytest.fixture(scope="module")
def store(workplace, tmp_path_factory) -> Path:
    """All that can be read of ``videos``."""
    folder = tmp_path_factory.mktemp("store") / "store"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(workplace)
        call(folder, *NEW)
    return folder


def contents(folder: Path) -> dict[str, torch.Tensor]:
    store = FeatureStore(folder, verify=True)
    return dict(zip(store.all_names(), torch.cat([part.features.clone() for part in store.read()])))


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    """The same videos with the same features, but for what a batch of another size may round otherwise."""
    assert one.keys() == other.keys()
    for name, features in one.items():
        torch.testing.assert_close(features, other[name], rtol=0, atol=1e-3)


def cosines(names: list[str]) -> torch.Tensor:
    """``[texts, videos]`` by the image model itself."""
    torch.manual_seed(0)
    clip, tokenizer = load_clip("seek-vit", None)
    model = build(clip, "frame_mean", frames=4, head=None).eval()
    loader = ClipLoader(names, frames=4, size=32, batch_size=1)
    with torch.no_grad():
        video = torch.cat([model.encode(batch.frames) for batch in loader])
        return F.cosine_similarity(clip.encode_text(tokenizer(TEXTS))[:, None], video, dim=-1)


def test_text_finds_what_was_added(store, capsys):
    call(store, "--text", TEXTS[0], "--text", TEXTS[1], "--top", "3", "--json")
    found = json.loads(capsys.readouterr().out)
    assert found["store"] == str(store) and found["videos"] == 5
    names = list(contents(store))
    assert sorted(names) == [f"videos/{folder}/{number}.mp4" for folder, number in zip("aaabb", (0, 2, 4, 1, 3))]
    want = cosines(names).topk(3)
    for result, text, scores, places in zip(found["results"], TEXTS, want.values.tolist(), want.indices.tolist()):
        assert result["text"] == text and not result["cut"]
        assert [hit["rank"] for hit in result["hits"]] == [1, 2, 3]
        assert [hit["name"] for hit in result["hits"]] == [names[place] for place in places]
        assert [hit["score"] for hit in result["hits"]] == pytest.approx(scores, abs=1e-3)  # stored in float16

    call(store, "--text", TEXTS[0], "--top", "100")  # more than there are
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == TEXTS[0] and len(lines) == 6
    assert lines[1] == f"    1  {want.values[0, 0]:7.4f}  {names[want.indices[0, 0]]}"


def test_what_a_store_says_of_its_model(store):
    opened = FeatureStore(store)
    torch.manual_seed(0)
    model = build(load_clip("seek-vit", None)[0], "frame_mean", frames=4, head=None)
    assert opened.model == {
        "model": "seek-vit", "pretrained": "none", "checkpoint": None, "method": "frame_mean", "frames": 4,
        "sampling": "tsn_test", "digest": run.digest(model.state_dict()),
    }  # fmt: skip
    assert opened.normalize and opened.dtype is torch.float16 and opened.dim == 32
    for features in contents(store).values():
        assert float(features.float().norm()) == pytest.approx(1, abs=1e-3)
    queries = torch.randn(1, 32)
    assert float(top_k(queries, opened, 1).scores) <= 1.001


def test_more_is_added_and_bad_videos_are_named(workplace, store, tmp_path, capsys):
    call(tmp_path / "store", *NEW[:1], "videos/a", *NEW[2:])
    said = capsys.readouterr().out
    assert "bad video: videos/a/empty.mp4: " in said
    assert said.endswith("3 videos added, 1 bad; the store has 3\n")
    call(tmp_path / "store", "--add", "videos", "--text", TEXTS[0])  # the model is the store's
    said = capsys.readouterr().out
    assert "2 videos added, 3 were there, 2 bad; the store has 5\n" in said and f"\n{TEXTS[0]}\n    1  " in said
    same(contents(tmp_path / "store"), contents(store))
    listed = tmp_path / "list.csv"
    listed.write_text("path,caption\n" + "".join(f"{workplace}/videos/a/0.mp4,text {i}\n" for i in range(3)))
    call(tmp_path / "store", "--add", str(listed), "--json")
    assert json.loads(capsys.readouterr().out)["add"] == {"added": 1, "present": 0, "bad": {}}  # each video once
    call(tmp_path / "store", "--add", str(listed), "--json")
    found = json.loads(capsys.readouterr().out)
    assert found == {
        "store": str(tmp_path / "store"), "add": {"added": 0, "present": 1, "bad": {}}, "videos": 6, "results": [],
    }  # fmt: skip


def test_a_signal_keeps_what_was_encoded(store, tmp_path, monkeypatch):
    """It waits for the batch at hand; the same command goes on."""
    batches = []

    @contextmanager
    def put_off():
        yield lambda: batches.append(1) or 15 * (len(batches) == 2)

    with monkeypatch.context() as patch:
        patch.setattr(signals, "put_off", put_off)
        call(tmp_path / "store", *NEW[:-1], "1")
    assert len(FeatureStore(tmp_path / "store")) == len(batches) == 2
    call(tmp_path / "store", *NEW)
    same(contents(tmp_path / "store"), contents(store))


def test_what_is_flushed_survives_a_kill(tmp_path, monkeypatch):
    monkeypatch.setattr("i2v_models.retrieve.FLUSH_SECONDS", 0)
    monkeypatch.setattr("i2v_models.retrieve.Progress.update", Killed(3))
    with pytest.raises(Killed):
        call(tmp_path / "store", *NEW[:-1], "1")
    assert len(FeatureStore(tmp_path / "store", verify=True)) == 3


class Killed(BaseException):
    """Raises itself at its ``number``-th call."""

    def __init__(self, number: int) -> None:
        self.left = number

    def __call__(self) -> None:
        self.left -= 1
        if not self.left:
            raise self


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--model", "seek-other", "--pretrained", "none"), r"was made with digest \w+ \(seek-vit, none, no checkpoint\)"),
        (("--model", "seek-wide", "--pretrained", "none"), "was made with digest"),
        (("--frames", "8"), "was made with frames 4 .*; this would be 8"),
        (("--sampling", "tsn_train"), "was made with sampling tsn_test"),
        (("--model", "no-vit", "--pretrained", "none"), "model='no-vit' is unknown to open_clip"),
        (("--checkpoint", "nowhere"), "checkpoint='nowhere' is not the output folder"),
    ],
)
@pytest.mark.parametrize("action", [("--add", "videos"), ("--text", TEXTS[0])])
def test_another_model_is_refused(store, action, arguments, says):
    before = sorted(path.name for path in store.iterdir())
    with pytest.raises(SystemExit, match=f"error: .*{says}"):
        call(store, *action, *arguments)
    assert sorted(path.name for path in store.iterdir()) == before


def test_the_same_weights_from_another_place(store, tmp_path, capsys):
    torch.manual_seed(0)
    torch.save(load_clip("seek-vit", None)[0].state_dict(), tmp_path / "weights.pt")
    call(store, "--text", TEXTS[0], "--pretrained", str(tmp_path / "weights.pt"))
    assert TEXTS[0] in capsys.readouterr().out


@pytest.fixture(scope="module")
def trained(workplace) -> Path:
    """A run of which only the beginning matters, with modules that changed."""
    data = workplace / "captions.csv"
    data.write_text("path,caption\n" + "".join(f"videos/{f}/{n}.mp4,number {n}\n" for f, n in zip("aab", (0, 2, 1))))
    arguments = {
        "task": "retrieval", "method": "st_adapter", "data": data, "model": "seek-vit", "pretrained": "none", "frames": 4,
        "width": 16, "batch-size": 3, "steps": 3, "lr": 0.01, "workers": 0, "output": workplace / "run",
    }  # fmt: skip
    train_command.main([text for name, value in arguments.items() for text in (f"--{name}", str(value))])
    return workplace / "run"


def test_a_run_encodes(trained, store, tmp_path, capsys):
    call(tmp_path / "store", "--add", "videos", "--checkpoint", str(trained), "--dtype", "float32")
    assert FeatureStore(tmp_path / "store").model["method"] == "st_adapter"
    assert FeatureStore(tmp_path / "store").model["frames"] == 4
    one, other = contents(tmp_path / "store"), contents(store)
    assert one.keys() == other.keys() and not any(torch.allclose(one[name], other[name].float(), atol=1e-2) for name in one)
    capsys.readouterr()
    call(tmp_path / "store", "--text", TEXTS[0], "--json")  # by the run that the store names
    here = json.loads(capsys.readouterr().out)["results"]
    moved = tmp_path / "moved"
    shutil.copytree(trained, moved)
    call(tmp_path / "store", "--text", TEXTS[0], "--json", "--checkpoint", str(moved))
    assert json.loads(capsys.readouterr().out)["results"] == here
    with pytest.raises(SystemExit, match=r"error: store=.* was made with method st_adapter"):
        call(tmp_path / "store", "--text", TEXTS[0], "--model", "seek-vit", "--pretrained", "none")
    with pytest.raises(SystemExit, match=r"error: frames=8 is not what checkpoint=.* was trained with, 4"):
        call(tmp_path / "new", "--add", "videos", "--checkpoint", str(trained), "--frames", "8")
    assert not (tmp_path / "new").exists()


def test_a_run_without_text_is_refused(workplace, tmp_path):
    arguments = {
        "method": "frame_mean", "data": "videos", "model": "seek-vit", "pretrained": "none", "frames": 2, "head": "linear",
        "batch-size": 2, "steps": 1, "workers": 0, "output": tmp_path / "run",
    }  # fmt: skip
    train_command.main([text for name, value in arguments.items() for text in (f"--{name}", str(value))])
    with pytest.raises(SystemExit, match="has head='linear', which does not bring videos to where texts are"):
        call(tmp_path / "store", "--add", "videos", "--checkpoint", str(tmp_path / "run"))


def test_a_long_text_is_said_to_be_cut(store, capsys):
    fits, longer = "walk " * 14, "walk " * 15  # the context holds 16 tokens, two of which are its ends
    call(store, "--text", fits, "--text", longer, "--json")
    results = json.loads(capsys.readouterr().out)["results"]
    assert [result["cut"] for result in results] == [False, True]
    assert results[0]["hits"] == results[1]["hits"]
    call(store, "--text", longer)
    assert "(longer than what the model reads: its end is left out)" in capsys.readouterr().out


def test_an_empty_store(tmp_path, capsys):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "empty.mp4").touch()
    call(tmp_path / "store", "--add", str(tmp_path / "bad"), *NEW[2:], "--text", TEXTS[0])
    said = capsys.readouterr().out
    assert "0 videos added, 1 bad; the store has 0\n" in said and said.endswith(f"{TEXTS[0]}\n  the store has no videos\n")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--text", "dog"), r"'.*gone' is not a feature store: it has no index\.json"),
        (("--add", "videos"), "names no model; give --model and --pretrained, or --checkpoint"),
        (("--add", "videos", "--model", "seek-vit"), "names no pretrained; give"),
        (("--add", "nothing", "--model", "seek-vit", "--pretrained", "none"), "add='nothing' holds no file that is named like"),
        (("--add", "nowhere", "--model", "seek-vit", "--pretrained", "none"), "sources: no such folder or file: nowhere"),
    ],
)
def test_errors_are_one_sentence(workplace, tmp_path, arguments, says):
    (workplace / "nothing").mkdir(exist_ok=True)
    with pytest.raises(SystemExit, match=f"^error: .*{says}"):
        call(tmp_path / "gone", *arguments)


def test_stores_that_others_made(tmp_path):
    FeatureStore.create(tmp_path / "bare", 32)
    with pytest.raises(SystemExit, match=r"names no model"):
        call(tmp_path / "bare", "--text", "dog")
    call(tmp_path / "bare", "--text", "dog", "--model", "seek-vit", "--pretrained", "none")
    FeatureStore.create(tmp_path / "hub", 32, model={"model": "hf-hub:some/thing", "pretrained": "none"})
    with pytest.raises(SystemExit, match=r"names 'hf-hub:some/thing', which open_clip fetches; give --model if it is meant"):
        call(tmp_path / "hub", "--text", "dog")
    FeatureStore.create(tmp_path / "tokens", 32, tokens=4)
    with pytest.raises(SystemExit, match="holds other features than seek-vit's, one vector of 32 a clip"):
        call(tmp_path / "tokens", "--text", "dog", "--model", "seek-vit", "--pretrained", "none")
    FeatureStore.create(tmp_path / "wide", 48)
    with pytest.raises(SystemExit, match="holds other features than seek-vit's"):
        call(tmp_path / "wide", "--add", "videos", "--model", "seek-vit", "--pretrained", "none")


@pytest.mark.parametrize(
    ("settings", "error", "says"),
    [
        ({}, ValueError, "nothing to do: give --text, --add or both"),
        ({"text": ("dog", " ")}, ValueError, r"text must not be empty, got \('dog', ' '\)"),
        ({"text": "dog"}, TypeError, "text must be several texts, got 'dog'"),
        ({"text": ("dog",), "top": 0}, ValueError, "top must be above 0, got 0"),
        ({"add": "videos", "dtype": "int8"}, ValueError, "dtype='int8' is unknown"),
        ({"add": "videos", "model": "a", "checkpoint": "b"}, ValueError, "model='a' means nothing beside checkpoint='b'"),
    ],
)
def test_settings_that_cannot_be(settings, error, says):
    with pytest.raises(error, match=says):
        RetrieveConfig(store="store", **settings)
