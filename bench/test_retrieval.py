"""The bench of retrieval on a store that takes no time."""

from __future__ import annotations

import json

import pytest

from . import retrieval


def test_a_small_store(tmp_path, capsys):
    arguments = ["--clips", "5000", "--dim", "32", "--queries", "2", "--dtype", "float16", "--rounds", "3", "--cold"]
    assert retrieval.main([*arguments, "--folder", str(tmp_path), "--json", str(tmp_path / "rows.json")]) == 0
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [(row["cold"], row["queries"], row["clips"], row["dtype"]) for row in rows] == [
        (False, 2, 5000, "float16"),
        (True, 2, 5000, "float16"),
    ]
    for row in rows:
        assert 0 < row["low"] <= row["ratio"] <= row["high"]
        assert row["top_k"] > 0 and row["read"] > 0 and row["load"] > 0
        assert 50 < row["import_mib"] <= row["peak_mib"] + 20  # processes differ by a few
    assert [path.name for path in tmp_path.iterdir()] == ["rows.json"]  # the store is gone
    assert capsys.readouterr().out.count("float16, top 10") == 1


def test_no_room_is_said_before_anything_is_written(tmp_path):
    with pytest.raises(SystemExit, match=r"MiB left, the store needs \d+; see --folder"):
        retrieval.main(["--clips", str(10**12), "--folder", str(tmp_path)])
    assert list(tmp_path.iterdir()) == []
