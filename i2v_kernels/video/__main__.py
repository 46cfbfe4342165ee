"""``python -m i2v_kernels.video check DIR``: a look at a data set before training on it."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from .backends import choose_backend
from .check import Found, check_folder, summary, write_json
from .errors import shown
from .index_cache import IndexCache
from .sources import LeftOut, read_sources, told, walk
from .tables import named_like_a_video


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m i2v_kernels.video", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    text = "what is in a folder, what would fail and why, what key frames cost; exit status 1 if a file cannot be used whole"
    check = commands.add_parser("check", help=text, description=text)
    check.add_argument("folder", type=Path, help="a folder, searched at every depth, one video, or a list (CSV) of videos")
    check.add_argument("--thorough", action="store_true", help="decode every frame, not the first, middle and last alone")
    check.add_argument("--all", action="store_true", help="a line for every file, not for every kind")
    check.add_argument("--json", type=Path, help="write what was found of every file here")
    check.add_argument("--index-cache", type=Path, help="keep indices here, for ClipLoader(index_cache=...)")
    check.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="files at a time")
    options = parser.parse_args(argv)
    if not options.folder.exists():
        parser.error(f"no such folder or file: {shown(options.folder)}")
    if options.threads < 1:
        parser.error(f"--threads must be at least 1, got {options.threads}")
    if options.json is not None and not options.json.parent.is_dir():
        parser.error(f"--json: no such folder: {options.json.parent}")
    left: Sequence[LeftOut] = ()
    if options.folder.is_dir():
        paths, left = walk(options.folder)
    elif named_like_a_video(options.folder.name):
        paths = [options.folder]
    else:
        try:
            paths = list(dict.fromkeys(Path(video.path) for video in read_sources(options.folder).videos))
        except (ValueError, OSError) as error:
            parser.error(str(error))
    lost = [Found(one.path, "bad", one.reason) for one in left if one.reason]
    if not paths and not lost:
        parser.error(f"no videos in {shown(options.folder)}{'; ' + told(left, str(options.folder)) if left else ''}")
    try:
        decoder = choose_backend()[1]
    except ImportError as error:
        parser.error(str(error))
    cache = IndexCache(decoder.index, options.index_cache)
    how = {"thorough": options.thorough, "threads": options.threads, "progress": sys.stderr.isatty()}
    found = [*check_folder(paths, cache, **how), *lost]
    print("\n".join(map(shown, summary(found, options.all).split("\n"))))  # whatever is in a file's name
    if left:
        print(told(left, str(options.folder)))
    if options.json is not None:
        write_json(options.json, found)
        print(f"written to {shown(options.json)}")
    return int(any(one.state != "ok" for one in found))


if __name__ == "__main__":
    sys.exit(main())
