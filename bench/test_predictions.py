"""What calls launch, collected on meta tensors, and the file of predictions."""

from __future__ import annotations

import json

import pytest
import torch

from i2v_kernels.testing import OPINFOS

from . import collect, machine_code, predictions

INFOS = {info.name: info for info in OPINFOS}
pytest.importorskip("triton")


def model_call(op):
    return collect.on_meta(INFOS[op], 0, torch.bfloat16)


def test_launches_of_a_call_are_collected_and_not_run():
    sample = model_call("temporal_attention")
    assert sample.args[0].is_meta and sample.args[0].shape[0] == collect.CLIPS
    found = predictions.passes(INFOS["temporal_attention"], sample)
    unit = sample.args[0].numel() * 2
    launches = {name: [launch.kernel.__name__ for launch in work.launches] for name, (work, _) in found.items()}
    assert launches["forward"] == ["temporal_attention_kernel"] and launches["backward"]
    assert launches["forward+backward"] == launches["forward"] + launches["backward"]
    floors = [found[name][1] * predictions.COPY / unit for name in ("forward", "backward")]
    assert floors == pytest.approx([4, 7])  # q, k, v, o; the gradient, q, k, v and theirs


def test_products_of_other_kernels_are_counted():
    sample = model_call("st_adapter")
    work, _ = predictions.passes(INFOS["st_adapter"], sample)["forward"]
    rows, down = sample.args[0].shape[:-1].numel(), sample.args[1].numel()
    assert sum(flops for _, flops in work.others) == 4 * rows * down
    assert "temporal_conv" in "".join(launch.kernel.__name__ for launch in work.launches)


def test_a_time_that_is_not_known_is_not_written(monkeypatch):
    monkeypatch.setattr(predictions, "seconds", lambda work: (1e-9, ["some_kernel, loops: 2 found"] if work.launches else []))
    rows = predictions.predict("token_shift", 0)
    assert all(row["share"] is None and row["microseconds"] is None and row["missing"] for row in rows)
    monkeypatch.setattr(predictions, "seconds", lambda work: (1e-9, []))
    assert all(row["share"] == 1 and row["microseconds"] == row["floor_us"] for row in predictions.predict("token_shift", 0))


def test_the_file_is_of_calls_that_the_registry_has():
    rows = json.loads(machine_code.PREDICTIONS.read_text())["rows"]
    calls = {(info.name, sample.name) for info in OPINFOS for sample in info.models(1)}
    assert {(row["op"], row["sample"]) for row in rows} == calls
    keys = [(row["op"], row["sample"], row["dtype"], row["pass"], row["backend"]) for row in rows]
    assert len(set(keys)) == len(keys) and all("uncalibrated" in row["source"] for row in rows)
    assert {("cuda", 0.93), ("cuda", 0.73)} <= {(row["backend"], row["share"]) for row in rows}
