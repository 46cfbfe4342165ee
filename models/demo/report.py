"""What the demo claims, checked, and its table in Markdown."""

from __future__ import annotations

from typing import Any

from i2v_models.demo.full_size import METHODS
from i2v_models.demo.transfer import RECIPES

CHANCE = 1 / 8


def claims(results: dict[str, Any]) -> list[dict[str, Any]]:
    """What has to hold, as ``{"claim", "found", "holds"}``; a run in which one does not hold has failed."""
    rows, captions = results["methods"], results["captions"]["methods"]
    zero_shot, head = rows["zero_shot"]["accuracy"], rows["frame_mean"]["accuracy"]
    found = [
        ("zero-shot frame-mean CLIP is within 5 points of chance", percent(zero_shot), abs(zero_shot - CHANCE) <= 0.05),
        ("a head trained on frame means stays at or below 55 %", percent(head), head <= 0.55),
    ]
    for name in ("st_adapter", "aim"):
        row = rows[name]
        found.append((f"{row['title']} is above 90 %", percent(row["accuracy"]), row["accuracy"] > 0.9))
    for row in rows.values():
        if row["accuracy_plain"] is not None:
            both = f"{percent(row['accuracy'])} and {percent(row['accuracy_plain'])}"
            equal = row["accuracy"] == row["accuracy_plain"]
            found.append((f"{row['title']}: the same accuracy with and without the kernels", both, equal))
    blind, seeing = captions["frame_mean"], captions["tokshift"]
    for way in ("text_to_video", "video_to_text"):
        both = f"{percent(seeing[way])} and {percent(blind[way])}"
        claim = f"captions, R@1 {way.replace('_', ' ')}: TokShift is 15 points above the order-blind frame mean"
        found.append((claim, both, seeing[way] >= blind[way] + 0.15))
    return [{"claim": claim, "found": value, "holds": holds} for claim, value, holds in found]


def percent(share: float | None) -> str:
    return "–" if share is None else f"{share:.1%}".replace("%", " %")


def number(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}"


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table that also reads well as it is; the first column is text, the others are numbers."""
    widths = [max(map(len, column)) for column in zip(header, *rows)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    padded = [[row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:]))] for row in [header, *rows]]
    return "\n".join("| " + " | ".join(row) + " |" for row in [padded[0], rule, *padded[1:]])


def methods_table(rows: dict[str, dict[str, Any]]) -> str:
    plain = "plain PyTorch"
    header = ["method", "accuracy", plain, "chance", "trained", "clips/s", f"{plain}, clips/s", "decoding"]
    return table(
        header,
        [
            [
                row["title"],
                percent(row["accuracy"]),
                percent(row["accuracy_plain"]),
                percent(CHANCE),
                number(row["parameters"]),
                number(row["clips_per_second"]),
                number(row["clips_per_second_plain"]),
                percent(row["decode_share"]),
            ]
            for row in rows.values()
        ],
    )


def steps_table(seconds: dict[str, dict[str, float]]) -> str:
    return table(
        ["ViT-B/16, one training step", "kernels", "plain PyTorch", "ratio"],
        [
            [
                RECIPES[method].title,
                f"{ways['kernels']:.2f} s",
                f"{ways['plain']:.2f} s" if "plain" in ways else "–",
                f"{ways['plain'] / ways['kernels']:.2f}" if "plain" in ways else "–",
            ]
            for method, ways in ((method, seconds[method]) for method in METHODS)
        ],
    )


def captions_text(found: dict[str, Any]) -> str:
    """R@1 in both directions, in one line."""
    rows = found["methods"].values()
    shares = [f"{row['title']} {percent(row['text_to_video'])} and {percent(row['video_to_text'])}" for row in rows]
    where = f"R@1 from {found['texts']} captions to {found['videos']} clips and back"
    return f"{where}: {', '.join(shares)} (chance {percent(found['chance'])})"


def clip_text(clip: dict[str, Any]) -> str:
    width, height = clip["size"]
    return (
        f"{clip['file']}: {clip['frames']} frames of {width} x {height}, {clip['codec']} {clip['pix_fmt']}, "
        f"key frames {', '.join(map(str, clip['key_frames']))}\n"
        f"  8 frames: {', '.join(map(str, clip['frame_index']))}\n"
        f"  at seconds: {', '.join(f'{s:.2f}' for s in clip['pts'])}; batch {clip['batch']} uint8\n"
        f'  the model of moving digits, which has seen nothing else, calls it "{clip["digits_model"]}" '
        f"({percent(clip['probability'])})"
    )


def markdown(results: dict[str, Any]) -> str:
    stills = results["stills"]
    lines = [
        "# From an image-text model to a video model",
        f"The image-text model reads still frames of unseen digits: digit {percent(stills['digit'])} (chance 10 %), "
        f"place {percent(stills['place'])} (11 %), size {percent(stills['size'])} (33 %). Frozen, it is then asked which "
        f"of eight ways a digit moves, on {results['test_clips']} held-out clips, each there forwards and backwards: half "
        "is the limit of any model that does not look at the order of frames.",
        methods_table(results["methods"]),
        '"plain PyTorch" is the same training from the same seed without the package\'s kernels; "trained" counts '
        'parameters, heads included; "decoding" is the share of training time spent reading H.264.',
        "\n".join(f"- {row['title']}: {row['note']}" for row in results["methods"].values()),
        "Trained on captions that name digit and motion instead, both towers, without a new parameter: "
        f"{captions_text(results['captions'])}.",
        "## What has to hold",
        "\n".join(f"- {c['claim']}: {c['found']}, {'holds' if c['holds'] else 'DOES NOT HOLD'}" for c in results["claims"])
        or "Nothing after a quick run.",
        "## Real clips",
        *("```\n" + clip_text(clip) + "\n```" for clip in results["real_clips"]),
        "## At full size",
        "ViT-B/16 with random weights, 1 clip of 8 frames at 224 x 224, forward, backward and AdamW; "
        f"median of {results['rounds']} rounds on {results['device']}.",
        steps_table(results["step_seconds"]),
    ]
    return "\n\n".join(lines) + "\n"
