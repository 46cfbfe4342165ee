"""The result as one picture: who can tell the order of frames, shown on clips beside their own reversals."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from i2v_kernels.extras import require
from i2v_kernels.video import decode
from i2v_models.checkpoint import replacing
from i2v_models.demo import data
from i2v_models.demo.full_size import METHODS
from i2v_models.demo.report import CHANCE, number, percent
from i2v_models.demo.transfer import RECIPES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLIND, SEEING, PLAIN, RIGHT, WRONG = "#8a94a6", "#1f77b4", "#c3c9d4", "#1a8a3a", "#c62828"
SHOWN = {"frame_mean": "frame mean", "st_adapter": "ST-Adapter", "aim": "AIM"}


def draw(path: Path, results: dict[str, Any], predictions: dict[str, list[dict[str, Any]]]) -> None:
    """Write ``path`` (png). ``predictions`` has the test clips in the same order for every method."""
    require("matplotlib", "i2v_models.demo").use("Agg")  # no display is needed, nor looked for
    plt = require("matplotlib.pyplot", "i2v_models.demo")
    figure = plt.figure(figsize=(14, 8), layout="constrained")
    figure.suptitle("Same frames, other order: which models can tell?", fontsize=19, fontweight="bold")
    left, right = figure.subfigures(1, 2, width_ratios=(1, 1.08))
    top, bottom = left.subplots(2, 1, height_ratios=(1.35, 1))
    accuracy_bars(top, results["methods"])
    step_bars(bottom, results["step_seconds"])
    strips(right, predictions)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
    plt.close(figure)


def accuracy_bars(axes: Axes, rows: dict[str, dict[str, Any]]) -> None:
    titles = [textwrap.fill(row["title"], 16) for row in rows.values()]
    shares = [100 * row["accuracy"] for row in rows.values()]
    places = range(len(rows))
    colours = [SEEING if share > 55 else BLIND for share in shares]
    axes.barh(places, shares, color=colours, height=0.66)
    for place, share, row in zip(places, shares, rows.values()):
        trained = f"{number(row['parameters'])} trained" if row["parameters"] else "nothing trained"
        inside = share > 60
        axes.text(
            share + (-1.5 if inside else 1.5),
            place,
            f"{percent(row['accuracy'])}   {trained}",
            va="center",
            ha="right" if inside else "left",
            color="white" if inside else "black",
            bbox={"color": colours[place] if inside else "white", "pad": 1.5},
            fontweight="bold" if inside else "normal",
        )
    for share, name in ((100 * CHANCE, "chance"), (50, "limit without order")):
        axes.axvline(share, color="black", linewidth=1, linestyle=":")
        axes.text(share, -0.55, name, ha="center", va="bottom", fontsize=9)
    axes.set_yticks(places, titles)
    axes.set_ylim(len(rows) - 0.5, -0.95)
    axes.set_xlim(0, 101)
    axes.set_xlabel("held-out clips right, %")
    axes.set_title("One frozen image-text model, eight motions to tell apart", fontsize=12)
    axes.spines[["top", "right"]].set_visible(False)


def step_bars(axes: Axes, seconds: dict[str, dict[str, float]]) -> None:
    for place, method in enumerate(METHODS):
        ways = seconds[method]
        axes.barh(place - 0.19, ways["kernels"], color=SEEING, height=0.36)
        axes.text(ways["kernels"], place - 0.19, f" {ways['kernels']:.2f} s", va="center", fontsize=9)
        if "plain" in ways:
            axes.barh(place + 0.19, ways["plain"], color=PLAIN, height=0.36)
            axes.text(ways["plain"], place + 0.19, f" {ways['plain']:.2f} s", va="center", fontsize=9)
    axes.set_yticks(range(len(METHODS)), [textwrap.fill(RECIPES[method].title, 16) for method in METHODS])
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel("seconds per training step, 1 clip of 8 frames")
    axes.set_title("The same at full size: ViT-B/16 on a real clip", fontsize=12)
    ways = {"with the kernels": SEEING, "plain PyTorch": PLAIN}
    Patch = require("matplotlib.patches", "i2v_models.demo").Patch
    axes.legend([Patch(color=colour) for colour in ways.values()], list(ways), frameon=False, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)


def strips(figure: Figure, predictions: dict[str, list[dict[str, Any]]]) -> None:
    """Two clips and their reversals as film strips, each with what three of the models say."""
    clips = predictions["aim"]
    kinds = [data.MOTIONS[clip["label"]] for clip in clips]
    right, growing = kinds.index("right"), kinds.index("growing") + 2  # another digit than in the first
    shown = (right, right + 1, growing, growing + 1)
    for axes, row in zip(figure.subplots(len(shown), 1), shown):
        axes.imshow(strip(decode(clips[row]["path"], range(data.FRAMES))), interpolation="nearest")
        axes.set_axis_off()
        digit = Path(clips[row]["path"]).stem.split("_")[1]
        backwards = "   (the same frames, backwards)" if row % 2 else ""
        axes.set_title(f"“{data.caption(digit, kinds[row])}”{backwards}", loc="left", fontsize=12, fontweight="bold")
        for column, (method, name) in enumerate(SHOWN.items()):
            said = predictions[method][row]["prediction"]
            correct = said == clips[row]["label"]
            axes.text(
                column / len(SHOWN),
                -0.07,
                f"{'✓' if correct else '✗'} {name}: {data.MOTIONS[said].replace('_', ' ')}",
                color=RIGHT if correct else WRONG,
                transform=axes.transAxes,
                va="top",
                fontsize=11,
            )


def strip(frames: Tensor) -> Tensor:
    """``[T, H, W, 3]`` side by side, with thin white lines between."""
    line = torch.full_like(frames[0][:, :1], 255)
    return torch.cat([part for frame in frames for part in (frame, line)][:-1], dim=1)
