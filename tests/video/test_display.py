"""What is shown: turned and mirrored as the file says, of the stream that it says, in its colours."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from i2v_kernels.video import ClipLoader, VideoError, decode, index
from i2v_kernels.video import dali as dali_backend
from i2v_kernels.video.check import check_file, summary

from .clips import coded_frames, read_number

VP9 = {"codec": "libvpx-vp9", "deadline": "realtime", "cpu-used": "8"}
UNIT = 1 << 16
MATRICES = [(a, 0, 0, d) for a in (1, -1) for d in (1, -1)] + [(0, b, c, 0) for b in (1, -1) for c in (1, -1)]


def corners(image: torch.Tensor) -> list[int]:
    """The grey of upper left, upper right, lower left, lower right, in steps of 60."""
    return [round(float(image[y, x].float().mean()) / 60) for y in (4, -5) for x in (4, -5)]


def with_matrix(path: Path, matrix: tuple[float, float, float, float], codec: str = "libx264", **options: str) -> Path:
    """A picture 64 high and 96 wide, dark to bright from corner to corner, with a display matrix."""
    image = np.zeros((64, 96, 3), np.uint8)
    image[:32, 48:], image[32:, :48], image[32:, 48:] = 60, 120, 180
    a, b, c, d = (round(value * UNIT) for value in matrix)
    with av.open(str(path), "w") as file:
        stream = file.add_stream(codec, rate=25, options=options)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        stream.set_display_matrix([a, b, 0, c, d, 0, 0, 0, 1 << 30])
        for _ in range(3):
            file.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        file.mux(stream.encode())
    return path


def displayed(matrix: tuple[float, float, float, float]) -> list[int]:
    """Where the corners go: (p, q) is shown at (a p + c q, b p + d q)."""
    a, b, c, d = matrix
    stored = {(-1, -1): 0, (1, -1): 1, (-1, 1): 2, (1, 1): 3}
    where = {(a * p + c * q, b * p + d * q): value for (p, q), value in stored.items()}
    return [where[p, q] for q in (-1, 1) for p in (-1, 1)]


@pytest.mark.parametrize("matrix", MATRICES, ids=str)
def test_every_turn_and_mirror(matrix: tuple[int, int, int, int], tmp_path: Path) -> None:
    path = with_matrix(tmp_path / "a.mp4", matrix)
    table = index(path)
    a, b, c, d = matrix
    assert table.mirrored == (a * d - b * c < 0)
    image = decode(path, [1])[0]
    assert image.shape[:2] == (table.height, table.width) == ((64, 96) if b == 0 else (96, 64))
    assert corners(image) == displayed(matrix)
    assert corners(decode(path, [1], (48, 48))[0]) == displayed(matrix)
    if table.mirrored:
        found = check_file(path, index)
        assert found.mirrored and "stored turned or mirrored" in summary([found])


@pytest.mark.parametrize("matrix", MATRICES, ids=str)
def test_every_turn_and_mirror_by_dali(matrix: tuple[int, int, int, int], tmp_path: Path, by_pyav: list[Path]) -> None:
    pytest.importorskip("nvidia.dali")
    path = with_matrix(tmp_path / "a.mp4", matrix, "libvpx-vp9", deadline="realtime")
    assert corners(decode(path, [1], backend="dali")[0]) == displayed(matrix)
    how = {"frames": 2, "size": 40, "batch_size": 3, "views": (1, 3), "workers": 1}
    (mine,), (theirs,) = (list(ClipLoader([path], backend=name, **how)) for name in ("dali", "pyav"))
    assert (mine.frames.int() - theirs.frames.int()).abs().float().mean() < 2
    assert by_pyav == [], "in this process, where DALI is; the other loader has its own"


def test_other_angles_are_refused(tmp_path: Path) -> None:
    path = with_matrix(tmp_path / "a.mp4", (0.866, 0.5, -0.5, 0.866))
    with pytest.raises(VideoError, match="turned by 30 degrees, which is not a multiple of 90"):
        index(path)


def streams(path: Path, *kinds: tuple[int, bool]) -> Path:
    """A stream of VP9 for each of (first number, whether it is marked default)."""
    with av.open(str(path), "w") as file:
        made = [file.add_stream("libvpx-vp9", rate=25, options={"deadline": "realtime", "cpu-used": "8"}) for _ in kinds]
        for stream, (_, default) in zip(made, kinds):
            stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
            stream.disposition = av.stream.Disposition.default if default else av.stream.Disposition(0)
        packets = []
        for stream, (first, _) in zip(made, kinds):
            for image in coded_frames(first + 10)[first:]:
                packets += stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24"))
            packets += stream.encode()
        for packet in sorted(packets, key=lambda packet: packet.dts * packet.time_base):
            file.mux(packet)
    return path


@pytest.mark.parametrize("backend", ["pyav", "dali"])
def test_the_stream_marked_default_is_shown(backend: str, tmp_path: Path) -> None:
    if backend == "dali":
        pytest.importorskip("nvidia.dali")
    for marks, right in (((False, True), 1), ((False, False), 0), ((True, True), 0), ((False, True, True), 1)):
        path = streams(tmp_path / "a.mkv", *((20 * i, mark) for i, mark in enumerate(marks)))
        table = index(path, backend=backend)
        assert table.stream == right
        assert [read_number(frame) for frame in decode(path, [0, 7], backend=backend)] == [20 * right, 20 * right + 7]


def test_a_single_picture_is_not_the_video(tmp_path: Path) -> None:
    path = tmp_path / "a.mov"
    with av.open(str(path), "w") as file:
        picture, video = file.add_stream("png", rate=25), file.add_stream("libx264", rate=25)
        for stream, pixels in ((picture, "rgb24"), (video, "yuv420p")):
            stream.width, stream.height, stream.pix_fmt = 96, 64, pixels
        for stream, images in ((picture, coded_frames(41)[40:]), (video, coded_frames(12))):
            for image in images:
                file.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
            file.mux(stream.encode())
    assert index(path).stream == 1
    assert [read_number(frame) for frame in decode(path, [0, 11])] == [0, 11]


def test_pixels_that_are_not_square_are_told(tmp_path: Path) -> None:
    for name, rotation, right in (("a.mp4", 0, Fraction(16, 15)), ("b.mp4", 90, Fraction(15, 16))):
        path = tmp_path / name
        with av.open(str(path), "w") as file:
            stream = file.add_stream("libx264", rate=25)
            stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
            stream.codec_context.sample_aspect_ratio = Fraction(16, 15)
            if rotation:
                stream.set_display_rotation(rotation)
            file.mux(stream.encode(av.VideoFrame.from_ndarray(coded_frames(1)[0], format="rgb24")))
            file.mux(stream.encode())
        assert index(path).pixel_aspect == right
    assert "1 files are not square, 0.938 times as wide as high (1)" in summary([check_file(path, index)])


def tagged(path: Path, space: str, full: bool, codec: str) -> tuple[Path, np.ndarray]:
    """A picture of three colours, stored by the matrix and range that the file names; and the picture."""
    image = np.zeros((144, 192, 3), np.uint8)
    image[:, :64], image[:, 64:128], image[:, 128:] = (200, 40, 60), (30, 180, 50), (40, 60, 210)
    with av.open(str(path), "w") as file:
        stream = file.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = 192, 144, "yuv420p"
        context = stream.codec_context
        context.colorspace = av.video.reformatter.Colorspace[space].value
        context.color_range = av.video.reformatter.ColorRange["JPEG" if full else "MPEG"].value
        for _ in range(3):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame = frame.reformat(format="yuv420p", dst_colorspace=space, dst_color_range="JPEG" if full else "MPEG")
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return path, image


@pytest.mark.parametrize("backend", ["pyav", "dali"])
@pytest.mark.parametrize(("space", "full"), [("ITU709", False), ("ITU601", False), ("ITU709", True), ("ITU601", True)])
def test_colours_as_tagged(space: str, full: bool, backend: str, tmp_path: Path, by_pyav: list[Path]) -> None:
    if backend == "dali":
        pytest.importorskip("nvidia.dali")
    path, image = tagged(tmp_path / "a.webm", space, full, "libvpx-vp9")
    table = index(path)
    assert (table.color_space in (5, 6)) == (space == "ITU601") and (table.color_range == 2) == full
    found = decode(path, [1], backend=backend)[0]
    for left in (32, 96, 160):
        assert (found[72, left].int() - torch.from_numpy(image[72, left]).int()).abs().max() <= 6
    if backend == "dali":
        assert by_pyav == ([] if (space, full) == ("ITU601", False) else [path])
        assert (dali_backend.why_not(table, "cuda") is None) == ((space, full) == ("ITU601", False))
