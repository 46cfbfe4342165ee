"""Sources: labels as they are written, lists as programs write them, folders as they lie on disks; what is not used is said."""

from __future__ import annotations

import csv
import enum
import json
import os
import warnings
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest
import torch

from i2v_kernels.video import ClipLoader, IndexCache, Report, VideoError, index
from i2v_kernels.video.__main__ import main

from .clips import coded_frames, encode


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("video") / "a.mp4"
    return encode(path, coded_frames(6, 32, 64), preset="ultrafast").read_bytes()


@pytest.fixture
def folder(video: bytes, tmp_path: Path) -> Path:
    """a.mp4, b.mp4, "c d.mp4" and "e, f.mp4"."""
    for name in ("a", "b", "c d", "e, f"):
        (tmp_path / f"{name}.mp4").write_bytes(video)
    return tmp_path


def load(sources: object, **options: object) -> ClipLoader:
    return ClipLoader(sources, **({"frames": 2, "size": 32, "batch_size": 4} | options))  # type: ignore[arg-type]


def labels(sources: object) -> list[int]:
    return [video.label for video in load(sources).videos]


class Kind(enum.IntEnum):
    THIRD = 3


WHOLE = {
    "0": 0, "10": 10, "2": 2, "0.0": 0, "10.0": 10, "2.": 2, " 7 ": 7, "007": 7, "+3": 3, "1e3": 1000,
    "9007199254740993": 2**53 + 1, "-1": -1, "-1.0": -1, "": -1, "nan": -1, "NaN": -1, "<NA>": -1,
}  # fmt: skip
VALUES = [
    (3, 3), (3.0, 3), (True, 1), (False, 0), (np.int64(4), 4), (np.uint8(200), 200), (np.float32(5.0), 5), (np.bool_(True), 1),
    (np.array(6), 6), (torch.tensor(7), 7), (torch.tensor(8.0), 8), (torch.tensor(True), 1), (Kind.THIRD, 3),
    (Decimal("9.0"), 9), (None, -1), (float("nan"), -1), (np.float64("nan"), -1), (-1, -1), (np.str_("11"), 11),
]  # fmt: skip
WRONG = ["1.5", "-2", "0,0", "1,000", "1e30", "-0.5"]
WRONG_VALUES = [1.5, -2, np.float64(2.5), float("inf"), 10**30, torch.tensor([1]), np.array(["a"]), (1, 2), b"ape", 1j, {}]


def test_numbers_are_what_they_say(folder: Path) -> None:
    table = folder / "list.csv"
    with table.open("w", newline="") as file:
        csv.writer(file).writerows([("path", "label"), *(("a.mp4", text) for text in WHOLE)])
    with pytest.warns(UserWarning, match="several labels"):
        assert dict(zip(WHOLE, labels(table))) == WHOLE
    with pytest.warns(UserWarning, match="several labels"):
        loader = load([("a.mp4", text) for text in WHOLE])
    assert [video.label for video in loader.videos] == list(WHOLE.values()) and loader.classes == ()
    assert [labels([("a.mp4", value)]) for value, _ in VALUES] == [[label] for _, label in VALUES]


@pytest.mark.parametrize("label", WRONG)
def test_other_numbers_are_refused_with_line_and_value(label: str, folder: Path) -> None:
    (folder / "list.csv").write_text(f'path,label\na.mp4,1\n\nb.mp4,"{label}"\n')
    with pytest.raises(ValueError, match=f"list.csv, line 4: label '{label}'"):
        load(folder / "list.csv")


@pytest.mark.parametrize("label", WRONG_VALUES, ids=repr)
def test_other_values_are_refused_with_place(label: object) -> None:
    with pytest.raises((ValueError, TypeError), match=r"sources\[1\]: .*label"):
        load([("a.mp4", 1), ("b.mp4", label)])


def test_names(folder: Path) -> None:
    given = ["bee", "Ape", " bee ", None, float("nan"), "1_0"]
    loader = load([(f"{i}.mp4", label) for i, label in enumerate(given)])
    assert loader.classes == ("1_0", "Ape", "bee")
    assert [video.label for video in loader.videos] == [2, 1, 2, -1, -1, 0]
    with pytest.raises(ValueError, match=r"all numbers or all names, got 1 \(sources\[0\]\) and 'ape' \(sources\[2\]\)"):
        load([("a.mp4", 1), ("b.mp4", -1), ("c.mp4", "ape")])
    with pytest.warns(UserWarning, match="'Ape' and 'ape' differ in case"):
        assert load([("a.mp4", "ape"), ("b.mp4", "Ape")]).classes == ("Ape", "ape")
    both = r"1 videos have several labels.*'a.mp4' has 'x' \(sources\[0\]\) and 'y' \(sources\[2\]\)"
    with pytest.warns(UserWarning, match=both):
        assert labels([("a.mp4", "x"), ("b.mp4", "y"), ("a.mp4", "y")]) == [0, 1, 1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load([("a.mp4", "x", "one caption"), ("a.mp4", "x", "another")])


HEADERS = [
    ("video", "class", "caption"), ("filename", "target", "text"), ("File", "Label", "Sentence"),
    ("video_path", "category", "description"), ("Video Path", "Class Name", "Caption"), ("clip-name", "y", "captions"),
    ("filepath", "action", "title"), ("#path", "labels", "query"), ("video_id", "class_id", "narration"),
]  # fmt: skip


@pytest.mark.parametrize("header", HEADERS, ids="-".join)
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
@pytest.mark.parametrize("delimiter", ",;\t|")
def test_headers(header: Sequence[str], order: Sequence[int], delimiter: str, folder: Path) -> None:
    rows = [header, ("a.mp4", "3", f"one{delimiter} two"), ("e, f.mp4", "0", "")]
    with (folder / "list.txt").open("w", newline="") as file:
        csv.writer(file, delimiter=delimiter).writerows([[row[i] for i in order] for row in rows])
    loader = load(folder / "list.txt")
    assert loader.videos == [(f"{folder}/a.mp4", 3, f"one{delimiter} two"), (f"{folder}/e, f.mp4", 0, "")]


def test_columns_that_are_not_used_are_said(folder: Path) -> None:
    (folder / "list.csv").write_text(",label,label_name,fps,path\n0,1,ape,25,a.mp4\n1,0,bee,25,b.mp4\n")  # as pandas writes it
    with pytest.warns(UserWarning, match="not used: label_name, fps$"):
        assert labels(folder / "list.csv") == [1, 0]
    (folder / "list.csv").write_text("path,kind\na.mp4,1\n")
    with pytest.warns(UserWarning, match=r"not used: kind; none is called label, class or the like$"):
        assert labels(folder / "list.csv") == [-1]


WITHOUT_HEADER = {
    "a.mp4,3\nb.mp4,1\n": [("a", 3), ("b", 1)],
    "a.mp4;3\r\nb.mp4;1": [("a", 3), ("b", 1)],
    "a.mp4\t3\tone; two, three\n\n\nb.mp4\t1\n": [("a", 3, "one; two, three"), ("b", 1)],
    "a.mp4 3\nc d.mp4 1\n": [("a", 3), ("c d", 1)],
    "e, f.mp4 3\nb.mp4\n": [("e, f", 3), ("b", -1)],
    "a.mp4\ne, f.mp4\nc d.mp4\n": [("a", -1), ("e, f", -1), ("c d", -1)],
    '"e, f.mp4"\na.mp4\n': [("e, f", -1), ("a", -1)],
    'path\n"e, f.mp4"\n': [("e, f", -1)],
    "path label\nc d.mp4 5\n": [("c d", 5)],
    'a.mp4,3,"one\ntwo"\nb.mp4,1,\n': [("a", 3, "one\ntwo"), ("b", 1)],
    "a.mp4,video\nb.mp4,clip\n": [("a", 1), ("b", 0)],  # class names that could be a header's
    "a.mp4,3\rb.mp4,1\r": [("a", 3), ("b", 1)],
}


@pytest.mark.parametrize("text", WITHOUT_HEADER)
def test_lists_without_a_header(text: str, folder: Path) -> None:
    (folder / "list.csv").write_bytes(text.encode())
    expected = [(f"{folder}/{row[0]}.mp4", row[1], "".join(row[2:])) for row in WITHOUT_HEADER[text]]
    assert load(folder / "list.csv").videos == expected


BAD_LISTS = {
    "clip_no,target\na.mp4,1\n": "line 1: 'clip_no,target' neither begins with a video nor calls a column path",
    "label,caption\n1,one\n": "line 1: 'label,caption' neither begins with a video",
    "3,a.mp4\n": "line 1: '3,a.mp4' neither begins with a video",
    "0,a.mp4,3\n1,b.mp4,4\n": "line 1: '0,a.mp4,3' neither begins with a video",
    "a.mp4,1\nb.mp4;2\n": "line 2: 'b.mp4;2' is no file",
    "a.mp4 1\n\nb 2\n": "line 3: 'b' is no file",
    "a.mp4,1,x,y\n": "line 1: 4 columns where 3 are expected",
    "path,label\na.mp4,1\nb.mp4,1,2\n": "line 3: 3 columns where 2 are expected",
    "path,label\n\n,1\n": "line 3: no path, in ',1'",
    "file,file_name\na.mp4,b.mp4\n": "line 1: which column is the path: 'file', 'file_name'",
    "path,path\na.mp4,b.mp4\n": "line 1: which column is the path",
    'a.mp4,1,"open\nb.mp4,1,x\n': "line 1: unexpected end of data",
    'a.mp4,1\nb.mp4,2,"x" y\n': "line 2: ',' expected after '\"'",
    "path\n": "no videos in",
    "": "no videos in",
    "a.mp4,1\nb\0.mp4,2\n": "line 2: a byte of 0",
    "# a list\na.mp4,1\n": "line 1: '# a list' neither begins",
    '[{"path": "a.mp4"}]\n': "line 1: ",
}


@pytest.mark.parametrize("text", BAD_LISTS)
def test_bad_lists_are_refused_with_line_and_value(text: str, folder: Path) -> None:
    (folder / "list.csv").write_text(text)
    with pytest.raises(ValueError) as caught:
        load(folder / "list.csv")
    assert BAD_LISTS[text] in str(caught.value) and "list.csv" in str(caught.value)


def test_a_list_without_any_of_its_videos(folder: Path) -> None:
    (folder / "list.csv").write_text("x/a.mp4,1\nx/b.mp4,2\n")
    with pytest.raises(FileNotFoundError, match=r"list.csv, line 1: no such file: .*/x/a.mp4; nor is any other"):
        load(folder / "list.csv")
    (folder / "list.csv").write_text("x/a.mp4,1\nb.mp4,2\n")  # some may be missing: told when they are read
    loader = load(folder / "list.csv")
    (batch,) = loader
    assert batch.item.tolist() == [1, 1] and list(loader.report().bad) == [f"{folder}/x/a.mp4"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "cp1252"])
def test_encodings(encoding: str, folder: Path, video: bytes) -> None:
    (folder / "é.mp4").write_bytes(video)
    (folder / "list.csv").write_bytes("path,label\na.mp4,été\né.mp4,ape\n".encode(encoding))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        loader = load(folder / "list.csv")
    assert loader.classes == ("ape", "été") and loader.videos[1].path == f"{folder}/é.mp4"
    told = ["not UTF-8, read as Windows-1252"] if encoding == "cp1252" else []
    assert [str(one.message).split(": ")[1] for one in seen] == told
    (batch,) = loader
    assert batch.valid.all()


def test_names_of_files_that_are_no_text(video: bytes, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """In a folder, a list of bytes, the index cache, the report, what `check` prints and its JSON."""
    name = os.fsdecode(b"caf\xe9 1.mp4")
    (tmp_path / "data" / "ape").mkdir(parents=True)
    (tmp_path / "data" / "ape" / name).write_bytes(video)
    (tmp_path / "data" / "ape" / f"bad {name}").write_bytes(b"no video")
    cache = tmp_path / "index.sqlite"
    for workers in (0, 1):
        loader = load(tmp_path / "data", index_cache=cache, workers=workers)
        (batch,) = loader
        assert batch.path[0].endswith(name) and batch.valid.tolist() == [False, True]
        assert "bad caf\\xe9 1.mp4" in str(loader.report()).encode().decode()
    options = ["--all", "--json", str(tmp_path / "found.json"), "--index-cache", str(cache)]
    assert main(["check", str(tmp_path / "data"), *options]) == 1
    assert "caf\\xe9 1.mp4" in capsys.readouterr().out
    assert {Path(one["path"]).name for one in json.loads((tmp_path / "found.json").read_text())} == {name, f"bad {name}"}
    (tmp_path / "list.csv").write_bytes(b"data/ape/caf\xe9 1.mp4,2\n")
    with pytest.warns(UserWarning, match="line 1: not UTF-8"):
        (batch,) = load(tmp_path / "list.csv")
    assert batch.valid.all() and batch.label.tolist() == [2]
    report = Report()
    report.add("a\nb.mp4", "why")
    assert len(str(report).splitlines()) == 2
    assert str(VideoError(name, "why")).encode() == b"caf\\xe9 1.mp4: why"


def test_one_video(folder: Path, capsys: pytest.CaptureFixture) -> None:
    for source in (folder / "a.mp4", str(folder / "c d.mp4")):
        (batch,) = load(source)
        assert batch.path == [str(source)] and batch.label.tolist() == [-1]
    (folder / "loose.mp4").symlink_to(folder / "gone.mp4")
    with pytest.raises(FileNotFoundError, match=r"dangling link to .*gone.mp4"):
        load(folder / "loose.mp4")
    os.mkfifo(folder / "list.fifo")
    with pytest.raises(ValueError, match=r"neither a folder nor a file: .*list\.fifo"):
        load(folder / "list.fifo")
    with pytest.raises(ValueError, match="the path is empty"):
        load("")
    (folder / "a.mp4").rename(folder / "a.xyz")
    with pytest.raises(ValueError, match=r"a\.xyz, line 1: a byte of 0, so it is no list; nor is it named like a video"):
        load(folder / "a.xyz")
    (folder / "list.csv").write_text("a.xyz,1\nb.mp4,0\nb.mp4,0\n")  # what is named is used, whatever its name
    (batch,) = load(folder / "list.csv")
    assert batch.valid.all()
    assert main(["check", str(folder / "list.csv")]) == 0
    assert "2 of 2 files are good" in capsys.readouterr().out
    (folder / "list.csv").write_text("nothing\n")
    with pytest.raises(SystemExit):
        main(["check", str(folder / "list.csv")])
    assert "line 1: 'nothing' neither begins" in capsys.readouterr().err


@pytest.mark.parametrize("names", [["0", "1", "2", "10"], ["Bee", "ape"], ["1", "10", "2.5", "ape"], ["01", "2", "10.0"]])
def test_class_folders_in_order(names: list[str], video: bytes, tmp_path: Path) -> None:
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.mp4").write_bytes(video)
    loader = load(tmp_path)
    assert list(loader.classes) == names and [Path(v.path).parent.name for v in loader.videos] == names


def messy(root: Path, video: bytes) -> Path:
    """Class folders ape, bee (behind a link) and cat (empty), and what lies about in data sets."""
    for name in ("data/ape/deep", "data/cat", "data/.cache", "elsewhere"):
        (root / name).mkdir(parents=True)
    for name in (
        "ape/1.MP4", "ape/2.vob", "ape/deep/3.m2ts", "ape/1.mp4", "ape/4.xyz", "ape/5.txt", "ape/6.txt", "ape/noname",
        "ape/.7.mp4", ".cache/8.mp4", "9.mp4", "../elsewhere/10.avi",
    ):  # fmt: skip
        (root / "data" / name).write_bytes(video)
    (root / "data" / "bee").symlink_to("../elsewhere")
    (root / "data" / "ape" / "11.mkv").symlink_to("../../elsewhere/10.avi")
    (root / "data" / "ape" / "dangling.mp4").symlink_to("../../gone.mp4")
    (root / "data" / "ape" / "itself.mp4").symlink_to("itself.mp4")
    (root / "data" / "ape" / "deep" / "up").symlink_to("..")
    os.mkfifo(root / "data" / "ape" / "pipe.mp4")
    return root / "data"


def test_what_lies_about_is_used_or_said(video: bytes, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    data = messy(tmp_path, video)
    with pytest.warns(UserWarning) as seen:
        loader = load(data)
    kept = ["ape/1.MP4", "ape/1.mp4", "ape/11.mkv", "ape/2.vob", "ape/deep/3.m2ts", "bee/10.avi"]
    assert [os.path.relpath(v.path, data) for v in loader.videos] == kept
    assert loader.classes == ("ape", "bee", "cat") and {v.label for v in loader.videos} == {0, 1}
    left, empty = (str(one.message) for one in seen)
    assert "cat" in empty and "without a video" in empty
    assert "11 files left out of" in left
    for text in (
        ".txt (2)", ".xyz (1)", "hidden (2)", "no suffix (1)", "video beside the class folders (1)",
        "link to a folder that is read already (1)", "dangling.mp4: dangling link to ../../gone.mp4",
        "itself.mp4: cannot be read: Too many levels", "pipe.mp4: neither a file nor a folder",
    ):  # fmt: skip
        assert text in left, left
    assert sum(one.files for one in loader.left_out) == 11
    assert (f"{data}/ape/5.txt", ".txt", "", 2) in loader.left_out
    assert {Path(path).name for path in loader.report().bad} == {"dangling.mp4", "itself.mp4", "pipe.mp4"}
    assert sum(len(batch) for batch in loader) == 6 and loader.stats()["bad_files"] == 3
    assert main(["check", str(data), "--json", str(tmp_path / "found.json")]) == 1
    found = {os.path.relpath(one["path"], data): one for one in json.loads((tmp_path / "found.json").read_text())}
    assert set(found) == {*kept, "9.mp4", "ape/dangling.mp4", "ape/itself.mp4", "ape/pipe.mp4"}
    assert found["ape/dangling.mp4"]["reason"] == "dangling link to ../../gone.mp4"
    printed = capsys.readouterr().out
    assert "10 files left out of" in printed and ".txt (2)" in printed and "link (2)" in printed


@pytest.mark.parametrize("name", ["a\0.mp4", "a\ud800.mp4", "dangling.mp4"])
def test_paths_of_no_file_are_a_video_error(name: str, tmp_path: Path) -> None:
    (tmp_path / "dangling.mp4").symlink_to("gone.mp4")
    why = "dangling link to gone.mp4" if name == "dangling.mp4" else "null byte|surrogates"
    for read in (index, IndexCache(index, tmp_path / "index.sqlite")):
        with pytest.raises(VideoError, match=why):
            read(tmp_path / name)


def test_folders_that_cannot_be_read_are_said(video: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ape", "bee"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.mp4").write_bytes(video)
    scandir = os.scandir

    def refuses(path: os.PathLike) -> object:
        if Path(path).name == "bee":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuses)
    with pytest.warns(UserWarning, match="bee: cannot be read: Permission denied"):
        loader = load(tmp_path)
    assert loader.classes == ("ape", "bee") and str(tmp_path / "bee") in loader.report().bad
    assert main(["check", str(tmp_path)]) == 1


def test_only_videos_beside_is_an_error_that_says_so(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"no class folders with videos in .*; 4 files left out .*video beside .* \(4\)"):
        load(folder)


@pytest.mark.parametrize("sources", [{"a.mp4": 1}, {"a.mp4", "b.mp4"}, type("Frame", (list,), {"columns": ["path"]})(["path"])])
def test_what_has_no_order_or_hides_its_labels_is_refused(sources: object) -> None:
    with pytest.raises(TypeError, match="is no list of paths"):
        load(sources)


@pytest.mark.parametrize(
    "entry", ["", "a\0.mp4", "a\ud800.mp4", ("", 1), (3, 4), ("a.mp4", 1, 2), b"a.mp4", ("a.mp4", 1, "x", "y")], ids=ascii
)
def test_bad_entries_are_named(entry: object) -> None:
    with pytest.raises((ValueError, TypeError), match=r"sources\[1\]: "):
        load(["a.mp4", entry])
