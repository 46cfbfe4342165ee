"""Settings as dataclasses; the command line is generated from their fields."""

from __future__ import annotations

import argparse
import math
import operator
import os
import types
import typing
from collections.abc import Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from numbers import Integral, Real
from typing import Any, TypeVar

from i2v_models.methods import METHODS
from i2v_models.spatial import BACKENDS
from i2v_models.tasks import TASKS

T = TypeVar("T")
BOUNDS: dict[str, tuple[str, Any]] = {
    "above": ("above", operator.gt),
    "least": ("at least", operator.ge),
    "below": ("below", operator.lt),
    "most": ("at most", operator.le),
}


def opt(default: Any, help: str, *, resumable: bool = True, **metadata: Any) -> Any:
    """A field with its help text. ``resumable=False``: a run that changes it is another run and must not resume."""
    metadata |= {"help": help, "resumable": resumable}
    return field(metadata=metadata) if default is MISSING else field(default=default, metadata=metadata)


def fixed(default: Any, help: str, **metadata: Any) -> Any:
    return opt(default, help, resumable=False, **metadata)


@dataclass(kw_only=True, frozen=True)
class FitConfig:
    """Everything ``i2v_models.fit`` needs to know. AdamW, linear warm-up, then cosine to zero.

    Raises ``TypeError`` and ``ValueError`` that name the setting, its value and what is accepted.
    """

    output: str | None = opt(None, "folder for checkpoints and logs; the same command again resumes from it")
    epochs: float = fixed(10.0, "passes over the data; more of them extend a finished run", above=0)
    steps: int | None = fixed(None, "optimizer steps, in place of --epochs; so too", above=0)
    accumulate: int = fixed(1, "batches per optimizer step; in retrieval each has its own negatives", above=0)
    lr: float = fixed(5e-4, "highest learning rate", above=0)
    weight_decay: float = fixed(0.05, "of weights; none on biases, norms and embeddings", least=0)
    warmup: float = fixed(0.1, "share of the steps in which the learning rate rises", least=0, most=1)
    clip_norm: float = fixed(1.0, "largest gradient norm, 0 for no limit", least=0)
    label_smoothing: float = fixed(0.0, "share of the target spread over all classes", least=0, below=1)
    precision: str = fixed("fp32", "autocast type; parameters stay fp32", choices=("fp32", "bf16", "fp16"))
    seed: int = fixed(0, "of weights, data order and dropout", least=0, most=2**31 - 1)
    save_every: int = opt(500, "steps between checkpoints", above=0)
    log_every: int = opt(10, "steps between lines of the log", above=0)

    def __post_init__(self) -> None:
        check(self)


@dataclass(kw_only=True, frozen=True)
class TrainConfig(FitConfig):
    """A whole training run, from files to checkpoints."""

    method: str = fixed(MISSING, "transfer method", choices=tuple(METHODS))
    task: str = fixed("classification", "what is learned: classes, or which captions are of which videos", choices=tuple(TASKS))
    data: str = fixed(MISSING, "folder with one folder of videos per class, or a CSV of path,label (retrieval: path,caption)")
    model: str = fixed("ViT-B-16", "name of an open_clip model with a ViT")
    pretrained: str = opt(MISSING, "open_clip tag or file of its weights; 'none' for random ones")
    output: str = opt("runs/train", "folder for checkpoints and logs; the same command again resumes from it")
    frames: int = fixed(8, "frames per clip", above=0)
    sampling: str = fixed("tsn_train", "how frames are drawn from a video")
    batch_size: int = fixed(8, "clips per batch and process; in retrieval those of all processes are negatives", above=0)
    crop: str = fixed("center", "the square of each frame that is seen", choices=("center", "random"))
    flip: bool = fixed(False, "mirror half of the clips")
    workers: int = opt(2, "decoding processes", least=0)
    decoder: str = fixed("auto", "pyav, torchcodec, dali, ...; auto takes pyav")
    index_cache: str | None = opt(None, "file that keeps the videos' frame tables between runs")
    head: str = fixed("text", "similarity to class captions, or a linear layer", choices=("text", "linear"))
    caption: str = fixed("a video of {}", "caption of a class; {} is its name")
    train_backbone: bool = fixed(False, "train the image tower too; in retrieval the text tower as well")
    width: int | None = fixed(None, "width of the adapters (default: as published)", above=0)
    adapters: int | None = fixed(None, "temporal adapters per block: 1 as for Kinetics, 2 as for Something-Something")
    kernels: bool = fixed(True, "use the package's kernels; otherwise the published PyTorch operations")
    spatial: str = fixed("sdpa", "attention within a frame: PyTorch's, flash-attn, the model's own", choices=BACKENDS)
    checkpointing: bool = fixed(False, "recompute each block in the backward pass: less memory, more time")
    device: str = fixed("auto", "cpu, cuda, ...; auto takes a GPU where there is one")

    def __post_init__(self) -> None:
        super().__post_init__()
        for item in fields(self):
            value = getattr(self, item.name)
            if item.name in TASKS[self.task].foreign and value != item.default:
                raise ValueError(f"{item.name}={value!r} means nothing to task={self.task!r}; leave it out")


@dataclass(kw_only=True, frozen=True)
class EvalConfig:
    """A test of a trained model."""

    checkpoint: str = opt(MISSING, "output folder of a training run")
    pretrained: str | None = opt(None, "where the weights that it began with are now, if they were moved")
    data: str = opt(MISSING, "folder with one folder of videos per class, or a CSV of path,label (retrieval: path,caption)")
    views: tuple[int, int] = opt((1, 1), "clips per video in time and crops in space; what they give is averaged")
    sampling: str = opt("tsn_test", "how frames are drawn from a video")
    batch_size: int = opt(8, "videos per batch", above=0)
    workers: int = opt(2, "decoding processes", least=0)
    decoder: str = opt("auto", "pyav, torchcodec, dali, ...; auto takes pyav")
    index_cache: str | None = opt(None, "file that keeps the videos' frame tables between runs")
    precision: str = opt("fp32", "autocast type", choices=("fp32", "bf16", "fp16"))
    device: str = opt("auto", "cpu, cuda, ...; auto takes a GPU where there is one")
    spatial: str | None = opt(None, "attention within a frame (default: as trained)", choices=BACKENDS)
    output: str | None = opt(None, "JSON file for the result (default: eval.json in the checkpoint folder)")

    def __post_init__(self) -> None:
        check(self)


@dataclass(kw_only=True, frozen=True)
class RetrieveConfig:
    """A search in a store of videos by text, or videos to add to it."""

    store: str = opt(MISSING, "folder of the store; --add makes a new one")
    text: tuple[str, ...] = opt((), "what to look for; may be given several times")
    top: int = opt(10, "videos to show for each text", above=0)
    json: bool = opt(False, "print JSON instead of lines")
    add: str | None = opt(None, "videos to add: a folder, one video, or a CSV of path; those that are there are passed over")
    model: str | None = opt(None, "name of an open_clip model with a ViT, for a new store (default: the store's)")
    pretrained: str | None = opt(None, "open_clip tag or file of its weights; 'none' for random ones (default: the store's)")
    checkpoint: str | None = opt(None, "output folder of a training run, whose model it is (default: the store's)")
    frames: int | None = opt(None, "frames per clip, for a new store (default: as trained, or 8)", above=0)
    sampling: str | None = opt(None, "how frames are drawn from a video, for a new store (default: tsn_test)")
    dtype: str = opt("float16", "of the vectors in a new store", choices=("float16", "bfloat16", "float32"))
    batch_size: int = opt(8, "videos per batch", above=0)
    workers: int = opt(2, "decoding processes", least=0)
    decoder: str = opt("auto", "pyav, torchcodec, dali, ...; auto takes pyav")
    index_cache: str | None = opt(None, "file that keeps the videos' frame tables between runs")
    precision: str = opt("fp32", "autocast type", choices=("fp32", "bf16", "fp16"))
    device: str = opt("auto", "cpu, cuda, ...; auto takes a GPU where there is one")

    def __post_init__(self) -> None:
        check(self)
        if any(not text.strip() for text in self.text):
            raise ValueError(f"text must not be empty, got {self.text}")
        if not self.text and self.add is None:
            raise ValueError("there is nothing to do: give --text, --add or both")
        if self.checkpoint is not None and self.model is not None:
            raise ValueError(f"model={self.model!r} means nothing beside checkpoint={self.checkpoint!r}; leave one out")


def check(config: Any) -> None:
    """Raise ``TypeError`` or ``ValueError`` naming the field, its value and what is accepted; plain numbers and text stay."""
    hints = typing.get_type_hints(type(config))
    for item in fields(config):
        value = _plain(item.name, getattr(config, item.name), hints[item.name])
        object.__setattr__(config, item.name, value)  # frozen for everybody else
        choices = item.metadata.get("choices")
        if value is None:
            continue
        if choices and value not in choices:
            raise ValueError(f"{item.name}={value!r} is unknown; there are {', '.join(choices)}")
        if isinstance(value, str) and not value:
            raise ValueError(f"{item.name} must not be empty, got {value!r}")
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{item.name} must be a finite number, got {value}")
        bounds = {name: item.metadata[name] for name in BOUNDS if name in item.metadata}
        if not all(BOUNDS[name][1](value, bound) for name, bound in bounds.items()):
            limits = " and ".join(f"{BOUNDS[name][0]} {bound}" for name, bound in bounds.items())
            raise ValueError(f"{item.name} must be {limits}, got {value}")


def _plain(name: str, value: Any, hint: Any) -> Any:
    """``value`` as JSON can hold it; ``TypeError`` if it is not of the kind that the field takes."""
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None and type(None) in kinds:
        return None
    kind = kinds[0]
    parts = value if isinstance(value, (tuple, list)) else ()
    whole = all(isinstance(part, Integral) and not isinstance(part, bool) for part in parts)
    if kind == tuple[str, ...] and isinstance(value, (tuple, list)) and all(isinstance(part, str) for part in parts):
        return tuple(parts)
    if typing.get_origin(kind) is tuple and whole and len(parts) == len(typing.get_args(kind)):
        return tuple(map(int, parts))
    if kind is str and isinstance(value, (str, os.PathLike)):
        return os.fspath(value)
    if kind is bool and isinstance(value, bool):
        return value
    if kind in (int, float) and isinstance(value, Integral if kind is int else Real) and not isinstance(value, bool):
        return kind(value)
    names = {str: "text", tuple[str, ...]: "several texts", bool: "True or False", int: "a whole number", float: "a number"}
    raise TypeError(f"{name} must be {names.get(kind, 'a pair of whole numbers')}, got {value!r}")


def parser(config: type[Any], prog: str) -> argparse.ArgumentParser:
    """One argument per field of the dataclass ``config``."""
    hints = typing.get_type_hints(config)
    items = sorted(fields(config), key=lambda item: item.default is not MISSING)
    required = " ".join(f"--{item.name} {item.name.upper()}" for item in items if item.default is MISSING)
    out = argparse.ArgumentParser(prog, description=config.__doc__, usage=f"%(prog)s {required} [options]")
    for item in items:
        out.add_argument("--" + item.name.replace("_", "-"), **_argument(item, hints[item.name]))
    return out


def parse(config: type[T], prog: str, argv: Sequence[str] | None = None) -> T:
    """The dataclass from a command line; a wrong value ends the program with a message that names argument and
    value.
    """
    arguments = parser(config, prog)
    values = vars(arguments.parse_args(argv))
    if "views" in values:
        values["views"] = tuple(values["views"])
    try:
        return config(**values)
    except (TypeError, ValueError) as error:
        arguments.error(str(error))


def _argument(item: Field[Any], kind: Any) -> dict[str, Any]:
    arguments: dict[str, Any] = {"help": item.metadata["help"], "required": item.default is MISSING}
    if item.default is not MISSING:
        arguments["default"] = item.default
        arguments["help"] += f" (default: {item.default})" if item.default is not None else ""
    if typing.get_origin(kind) is types.UnionType:
        kind = typing.get_args(kind)[0]
    if kind is bool:
        arguments["action"] = argparse.BooleanOptionalAction
    elif kind == tuple[str, ...]:
        arguments |= {"action": "append", "default": [], "help": item.metadata["help"]}
    elif typing.get_origin(kind) is tuple:
        arguments |= {"type": typing.get_args(kind)[0], "nargs": 2, "metavar": ("TIME", "SPACE")}
    else:
        arguments |= {"type": kind, "choices": item.metadata.get("choices")}
    return arguments
