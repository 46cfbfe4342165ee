"""The demo: ``python -m i2v_models.demo``. It ends with 1 if what it claims does not hold."""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from i2v_kernels.extras import require
from i2v_kernels.video import VideoError
from i2v_models.checkpoint import replacing, write_json
from i2v_models.demo import captions, data, full_size, picture, report, stills
from i2v_models.demo.transfer import RECIPES, Recipe, Transfer
from i2v_models.train import pick_device

STAGES = 6


def say(text: str) -> None:
    print(text, flush=True)


class Demo:
    """The stages in their order; ``results`` grows into ``results.json``."""

    def __init__(self, out: Path, *, quick: bool, seed: int, device: torch.device) -> None:
        self.out, self.quick, self.seed, self.device = out, quick, seed, device
        self.begun, self.stage_number = time.perf_counter(), 0
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
        self.results: dict[str, Any] = {"seed": seed, "quick": quick, "device": name, "torch": torch.__version__}
        self.results["stage_seconds"] = {}

    @contextmanager
    def stage(self, title: str) -> Iterator[None]:
        self.stage_number += 1
        started = time.perf_counter()
        minutes, seconds = divmod(int(started - self.begun), 60)
        say(f"\n{minutes}:{seconds:02d}  [{self.stage_number}/{STAGES}] {title}")
        yield
        self.results["stage_seconds"][title] = round(time.perf_counter() - started, 1)

    def run(self) -> bool:
        """Everything; whether the claims hold. ``quick`` makes none."""
        real = full_size.real_clips()
        self.out.mkdir(parents=True, exist_ok=True)
        with self.stage("Moving digits, as H.264 files"):
            self.write_data()
        with self.stage("A small image-text model, trained on still frames"):
            clip_model = self.train_stills()
        with self.stage("Frozen, and made a video model in four ways"):
            models, predictions = self.transfer(clip_model)
        with self.stage("Captions of digit and motion find their clips"):
            self.captions(clip_model)
        with self.stage("Real clips"):
            self.results["real_clips"] = [full_size.describe(path, models["aim"]) for path in real]
            for clip in self.results["real_clips"]:
                say(report.clip_text(clip))
        with self.stage("One training step at full size, ViT-B/16"):
            seconds, rounds = full_size.time_steps(real[0], self.device, seed=self.seed, quick=self.quick)
            self.results |= {"step_seconds": seconds, "rounds": rounds}
            say(report.steps_table(seconds))
        self.results["claims"] = [] if self.quick else report.claims(self.results)
        self.results["seconds"] = round(time.perf_counter() - self.begun, 1)
        self.save(predictions)
        return all(claim["holds"] for claim in self.results["claims"])

    def write_data(self) -> None:
        config = data.DataConfig(train=64, test=64) if self.quick else data.DataConfig()
        config = replace(config, seed=self.seed)
        fresh = data.write(self.out / "data", config)
        self.results["test_clips"] = config.test
        say(
            f"{config.train} clips to train on, {config.test} of other digits to test on"
            f"{'' if fresh else ' (already there)'}: {self.out / 'data'}"
        )

    def train_stills(self) -> torch.nn.Module:
        config = stills.StillsConfig(seed=self.seed, steps=30 if self.quick else stills.StillsConfig().steps)

        def progress(step: int, loss: float) -> None:
            if step % max(1, config.steps // 6) == 0:
                say(f"step {step:4d} of {config.steps}   loss {loss:.2f}")

        clip_model, found = stills.get(self.out, config, self.device, progress)
        shares = stills.accuracy(clip_model)
        self.results["stills"] = shares
        say(
            f"{'(trained before) ' if found else ''}unseen digits, read by choosing a caption: "
            + ", ".join(f"{family} {report.percent(share)}" for family, share in shares.items())
        )
        return clip_model

    def transfer(self, clip_model: torch.nn.Module) -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]]]:
        transfer = Transfer(clip_model, self.out / "data", seed=self.seed)
        self.results["methods"], models, predictions = {}, {}, {}
        for name, recipe in RECIPES.items():
            if self.quick and recipe.steps:
                recipe = replace(recipe, steps=2)
            models[name], row, predictions[name] = self.row(transfer, recipe)
            self.results["methods"][name] = row
        say(report.methods_table(self.results["methods"]))
        return models, predictions

    def row(self, transfer: Transfer, recipe: Recipe) -> tuple[Any, dict[str, Any], list[dict[str, Any]]]:
        model, ours = transfer.run(recipe)
        plain = transfer.run(recipe, kernels=False)[1] if recipe.twin else None
        row = {
            "title": recipe.title,
            "note": recipe.note,
            "accuracy": ours.accuracy,
            "accuracy_plain": plain and plain.accuracy,
            "parameters": ours.parameters,
            "clips_per_second": ours.clips_per_second,
            "clips_per_second_plain": plain and plain.clips_per_second,
            "decode_share": ours.decode_share,
        }
        say(
            f"{recipe.title}: {report.percent(ours.accuracy)}"
            + (f" with the kernels, {report.percent(plain.accuracy)} without" if plain else "")
        )
        return model, row, ours.predictions

    def captions(self, clip_model: torch.nn.Module) -> None:
        lists = self.out / "data" / "train.csv", self.out / "data" / "test.csv"
        self.results["captions"] = captions.run(
            clip_model, *lists, seed=self.seed, steps=2 if self.quick else captions.STEPS
        )
        say(report.captions_text(self.results["captions"]))

    def save(self, predictions: dict[str, list[dict[str, Any]]]) -> None:
        write_json(self.out / "results.json", self.results)
        with replacing(self.out / "table.md") as temporary:
            temporary.write_text(report.markdown(self.results))
        picture.draw(self.out / "demo.png", self.results, predictions)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m i2v_models.demo", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder for all that is written")
    parser.add_argument("--quick", action="store_true", help="everything in small, to see that it runs; claims nothing")
    parser.add_argument("--seed", type=int, default=0, help="of data, weights and order")
    arguments = parser.parse_args(argv)
    logging.getLogger().setLevel(logging.ERROR)  # open_clip warns that it has no weights to load, which is meant
    demo = Demo(arguments.out, quick=arguments.quick, seed=arguments.seed, device=pick_device("auto"))
    try:
        for package in ("sklearn", "matplotlib", "open_clip", "safetensors", "tqdm", "av"):  # before minutes are spent
            require(package, "python -m i2v_models.demo")
        held = demo.run()
    except (ValueError, OSError, ImportError, FloatingPointError, VideoError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    say("")
    for claim in demo.results["claims"]:
        say(f"{'ok ' if claim['holds'] else 'NO '} {claim['claim']}: {claim['found']}")
    written = ", ".join(str(arguments.out / name) for name in ("demo.png", "table.md", "results.json"))
    say(f"{demo.results['seconds']:.0f} seconds. Written: {written}")
    if not held:
        print("demo: what is marked NO above does not hold", file=sys.stderr)
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
