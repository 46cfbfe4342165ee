"""``python -m i2v_kernels.video check DIR``: a look at a data set before training on it."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from .backends import index
from .check import check_folder, summary, write_json
from .index_cache import IndexCache
from .sources import files_below


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m i2v_kernels.video", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    text = "what is in a folder, what would fail and why, what key frames cost; exit status 1 if a file cannot be used whole"
    check = commands.add_parser("check", help=text, description=text)
    check.add_argument("folder", type=Path, help="a folder, searched at every depth, or one video")
    check.add_argument("--thorough", action="store_true", help="decode every frame, not the first, middle and last alone")
    check.add_argument("--all", action="store_true", help="a line for every file, not for every kind")
    check.add_argument("--json", type=Path, help="write what was found of every file here")
    check.add_argument("--index-cache", type=Path, help="keep indices here, for ClipLoader(index_cache=...)")
    check.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="files at a time")
    options = parser.parse_args(argv)
    if not options.folder.exists():
        parser.error(f"no such folder or file: {options.folder}")
    if options.threads < 1:
        parser.error(f"--threads must be at least 1, got {options.threads}")
    if options.json is not None and not options.json.parent.is_dir():
        parser.error(f"--json: no such folder: {options.json.parent}")
    paths = files_below(options.folder) if options.folder.is_dir() else [options.folder]
    if not paths:
        parser.error(f"no videos in {options.folder}")
    cache = IndexCache(index, options.index_cache)
    how = {"thorough": options.thorough, "threads": options.threads, "progress": sys.stderr.isatty()}
    found = check_folder(paths, cache, **how)
    print(summary(found, options.all))
    if cache.trouble is not None:
        print(cache.trouble, file=sys.stderr)
    if options.json is not None:
        write_json(options.json, found)
        print(f"written to {options.json}")
    return int(any(one.state != "ok" for one in found))


if __name__ == "__main__":
    sys.exit(main())
