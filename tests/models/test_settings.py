"""Settings, weights and models that cannot be: one sentence with the name, the value and what is accepted, before any work."""

from __future__ import annotations

import json
import typing
from dataclasses import MISSING, fields

import open_clip
import pytest
import torch
from safetensors.torch import save_file

from i2v_models import FitConfig, build, fit, load_clip
from i2v_models.backbone import check_vit
from i2v_models.config import EvalConfig, TrainConfig, parse
from i2v_models.train import pick_device

from .conftest import TEXT, VISION, ClipList, tiny_clip
from .test_fit import config, video_model

GIVEN = {
    FitConfig: {},
    TrainConfig: {"method": "aim", "data": "videos", "pretrained": "none"},
    EvalConfig: {"checkpoint": "run", "data": "videos"},
}


def wrong_values():
    """Of every setting of every command: other kinds, what is not finite, what lies just outside its bounds."""
    outside = {"above": lambda bound: bound, "least": lambda bound: bound - 1, "below": lambda bound: bound}
    for kind in GIVEN:
        hints = typing.get_type_hints(kind)
        for item in fields(kind):
            hint, *_ = typing.get_args(hints[item.name]) or [hints[item.name]]
            wrong: list = {
                float: [float("nan"), float("inf"), -float("inf"), "3", True, [1.0]],
                int: [2.5, "3", True, float("inf")],
                bool: [1, "yes"],
                str: ["", 3, b"x"],
            }[hint if item.name != "views" else int]
            wrong += [(1,), (1, 2, 3), ("1", "1"), (1.5, 1)] if item.name == "views" else []
            bounds = [name for name in ("above", "least", "below", "most") if name in item.metadata]
            wrong += [outside.get(name, lambda bound: bound + 1)(item.metadata[name]) for name in bounds]
            wrong += ["nonsense"] if item.metadata.get("choices") else []
            wrong += [None] if type(None) not in typing.get_args(hints[item.name]) else []
            for value in wrong:
                yield pytest.param(kind, item.name, value, id=f"{kind.__name__}-{item.name}-{value!r}")


@pytest.mark.parametrize(("kind", "name", "value"), list(wrong_values()))
def test_every_setting_says_what_it_takes(kind, name, value):
    with pytest.raises((TypeError, ValueError), match=rf"^{name}( must|=).*") as said:
        kind(**GIVEN[kind] | {name: value})
    assert str(value) in str(said.value) and "\n" not in str(said.value)


@pytest.mark.parametrize("kind", GIVEN)
def test_what_a_setting_is_by_default_is_accepted_and_can_be_written(kind):
    made = kind(**GIVEN[kind])
    assert all(getattr(made, item.name) == item.default for item in fields(kind) if item.default is not MISSING)
    json.dumps({item.name: getattr(made, item.name) for item in fields(kind)})


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--seed", "-1"], "seed must be at least 0 and at most 2147483647, got -1"),
        (["--seed", "99999999999"], "seed must be at least 0 and at most 2147483647, got 99999999999"),
        (["--label-smoothing", "5"], "label_smoothing must be at least 0 and below 1, got 5.0"),
        (["--epochs", "inf"], "epochs must be a finite number, got inf"),
        (["--warmup", "5"], "warmup must be at least 0 and at most 1, got 5.0"),
        (["--lr", "nan"], "lr must be a finite number, got nan"),
        (["--output", ""], "output must not be empty, got ''"),
    ],
)
def test_the_command_line_says_it_too(arguments, text, capsys):
    with pytest.raises(SystemExit) as end:
        parse(TrainConfig, "train", ["--method", "aim", "--data", "d", "--pretrained", "none", *arguments])
    assert end.value.code == 2 and text in capsys.readouterr().err


def test_the_largest_seed_and_the_longest_warmup_train():
    log = fit(video_model(), ClipList(), config(seed=2**31 - 1, warmup=1.0, label_smoothing=0.999, steps=2))
    assert [line["step"] for line in log] == [1, 2]


def test_flash_attention_without_a_gpu_is_refused_before_a_batch_is_read():
    class Untouched(ClipList):
        def __iter__(self):
            raise AssertionError("a batch was asked for")

    with pytest.raises(ValueError, match=r"spatial='flash' cannot be used: the tensors are on cpu, .*; spatial='sdpa' gives"):
        fit(video_model(spatial="flash"), Untouched(), config())


@pytest.mark.parametrize("name", ["meta", "tpu9", "cuda:99", ""])
def test_devices_that_hold_nothing_are_refused(name):
    with pytest.raises(ValueError, match=f"device='{name}' cannot be used"):
        pick_device(name)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    (root / "settings-vit.json").write_text(json.dumps({"embed_dim": 32, "vision_cfg": VISION, "text_cfg": TEXT}))
    coca = {
        "embed_dim": 32, "custom_text": True,
        "vision_cfg": {**VISION, "attentional_pool": True, "attn_pooler_heads": 4, "output_tokens": True},
        "text_cfg": {**TEXT, "embed_cls": True, "output_tokens": True},
        "multimodal_cfg": {**TEXT, "attn_pooler_heads": 2},
    }  # fmt: skip
    (root / "settings-coca.json").write_text(json.dumps(coca))
    open_clip.add_model_config(root)
    return root


def weights(kind: str) -> bytes | dict:
    state = tiny_clip().state_dict()
    first = "visual.conv1.weight"
    return {
        "empty": b"",
        "text": b"<html>404</html>",
        "of another model": torch.nn.Linear(3, 3).state_dict(),
        "a list": [1, 2],
        "nothing": {},
        "numbers": {"a": 1},
        "of another shape": state | {first: state[first][:, :, :4, :4]},
        "without a part": {name: value for name, value in state.items() if name != first},
        "with a part more": state | {"adapter.weight": torch.ones(1)},
        "with NaN": state | {first: state[first] * float("nan")},
        "code": tiny_clip(),
    }[kind]


@pytest.mark.parametrize(
    "kind",
    ["empty", "text", "of another model", "a list", "nothing", "numbers", "of another shape", "without a part",
     "with a part more", "with NaN", "code", "truncated", "truncated safetensors", "folder", "missing"],
)  # fmt: skip
def test_weights_that_are_damaged_or_foreign_are_refused_in_one_sentence(models, tmp_path, kind):
    path = tmp_path / "weights.pt"
    if kind == "truncated":
        torch.save(tiny_clip().state_dict(), path)
        path.write_bytes(path.read_bytes()[:100_000])
    elif kind == "truncated safetensors":
        path = tmp_path / "weights.safetensors"
        save_file({name: value.contiguous() for name, value in tiny_clip().state_dict().items()}, path)
        path.write_bytes(path.read_bytes()[:100_000])
    elif kind == "folder":
        path.mkdir()
    elif kind != "missing":
        content = weights(kind)
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(ValueError, match=r"^pretrained='[^']*' (cannot be loaded into 'settings-vit', which|holds)") as said:
        load_clip("settings-vit", str(path))
    assert "\n" not in str(said.value) and len(str(said.value)) < 700


def test_whole_weights_load(models, tmp_path):
    torch.save(tiny_clip(3).state_dict(), tmp_path / "weights.pt")
    loaded, _ = load_clip("settings-vit", str(tmp_path / "weights.pt"))
    assert torch.equal(loaded.visual.conv1.weight, tiny_clip(3).visual.conv1.weight)


def test_coca_is_refused_by_name(models):
    coca, _ = load_clip("settings-coca", None)
    with pytest.raises(NotImplementedError, match=r"CoCa must pool by .*, and have no text decoder; CoCa models"):
        build(coca, "frame_mean", captions=["a"])
    coca.visual.attn_pool = None  # one that pools by class token
    with pytest.raises(NotImplementedError, match=r"CoCa must pool by .*, and have no text decoder; CoCa models"):
        check_vit(coca)
