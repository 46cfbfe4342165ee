"""``python -m bench.patch``: models as their users have them, before and after ``i2v_kernels.patch``.

Forward without gradients, and forward and backward of a training step, by turns in one process, with random weights of the real
architecture. How many times faster is the median of the rounds' ratios. "At most" is, on a CPU, the same had the patched model
only its matrix products and dense convolutions to compute. Peak memory is what a call takes beyond the parameters.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import logging
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torchvision
import transformers
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import i2v_kernels as i2v

from . import memory
from .__main__ import DTYPES, machine, write
from .measure import rounds, start, summary
from .published import CLIPViPAttention, OpenVCLIPAttention, STAdapter, TemporalShift, XCLIPBlock

FRAMES = 8


class Adapted(nn.Module):
    def __init__(self, block: nn.Module, kernel: tuple[int, int, int]) -> None:
        super().__init__()
        self.adapter, self.block = STAdapter(768, 384, kernel), block

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.block(self.adapter(x, FRAMES), *args, **kwargs)


# Nothing is measured on so little: it shows that the bench runs
TINY = {"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "image_size": 32}


def timesformer(clips: int, tiny: bool) -> tuple[nn.Module, Tensor]:
    config = transformers.TimesformerConfig(num_frames=FRAMES, **(TINY if tiny else {}))
    return transformers.TimesformerModel(config), torch.randn(clips, FRAMES, 3, config.image_size, config.image_size)


def xclip(clips: int, tiny: bool) -> tuple[nn.Module, Tensor]:
    more = {**TINY, "mit_hidden_size": 64, "mit_intermediate_size": 64, "mit_num_attention_heads": 2} if tiny else {}
    config = transformers.XCLIPVisionConfig(patch_size=16, num_frames=FRAMES, **more)
    return transformers.XCLIPVisionModel(config), torch.randn(clips * FRAMES, 3, config.image_size, config.image_size)


def adapted_vit(clips: int, tiny: bool, kernel: tuple[int, int, int]) -> tuple[nn.Module, Tensor]:
    import open_clip  # the other models need none

    if tiny:
        raise ModuleNotFoundError("open_clip names no tiny model")
    model = open_clip.create_model("ViT-B-16").visual.requires_grad_(False)
    model.transformer.resblocks = nn.ModuleList(Adapted(block, kernel) for block in model.transformer.resblocks)
    return model, torch.randn(clips * FRAMES, 3, 224, 224)


def tsm_resnet(clips: int, tiny: bool) -> tuple[nn.Module, Tensor]:
    resnet = torchvision.models.resnet
    model = resnet.ResNet(resnet.Bottleneck, [1, 1, 1, 1] if tiny else [3, 4, 6, 3])
    for layer in (model.layer1, model.layer2, model.layer3, model.layer4):
        for block in layer:
            block.conv1 = TemporalShift(block.conv1, FRAMES)
    side = 32 if tiny else 224
    return model, torch.randn(clips * FRAMES, 3, side, side)


class Called(nn.Module):
    """Attention, called as its block calls it."""

    def __init__(self, attention: nn.Module, arguments: Callable[[Tensor], tuple[Any, ...]]) -> None:
        super().__init__()
        self.attention, self.arguments = attention, arguments

    def forward(self, x: Tensor) -> Any:
        return self.attention(*self.arguments(x))


def x_clip_block(clips: int, tiny: bool) -> tuple[nn.Module, Tensor]:
    channels, tokens = (64, 5) if tiny else (768, 197)
    return XCLIPBlock(channels, channels // 64, FRAMES), torch.randn(tokens, clips * FRAMES, channels)


def open_vclip_attention(clips: int, tiny: bool) -> tuple[nn.Module, Tensor]:
    channels, tokens = (64, 5) if tiny else (768, 197)
    attention = OpenVCLIPAttention(channels, channels // 64, FRAMES)
    return Called(attention, lambda x: (x, x, x, None, False)), torch.randn(tokens, clips * FRAMES, channels)


def clip_vip_attention(clips: int, tiny: bool) -> tuple[nn.Module, Tensor]:
    channels, patches = (64, 4) if tiny else (768, 196)
    attention = CLIPViPAttention(channels, channels // 64)
    x = torch.randn(clips, 4 + FRAMES * patches, channels)
    return Called(attention, lambda x: (x, (4, FRAMES, patches))), x


MODELS: dict[str, Callable[[int, bool], tuple[nn.Module, Tensor]]] = {
    "transformers TimeSformer-B": timesformer,
    "transformers X-CLIP-B/16, vision": xclip,
    "open_clip ViT-B/16, ST-Adapter 3x1x1": partial(adapted_vit, kernel=(3, 1, 1)),
    "open_clip ViT-B/16, ST-Adapter 3x3x3": partial(adapted_vit, kernel=(3, 3, 3)),
    "torchvision ResNet-50, TSM": tsm_resnet,
    "X-CLIP's block, ViT-B/16": x_clip_block,
    "Open-VCLIP's attention, 3 frames": open_vclip_attention,
    "CLIP-ViP's attention, ViT-B/16": clip_vip_attention,
}


def output(model: nn.Module, x: Tensor, dtype: torch.dtype) -> Tensor:
    with torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32):
        result = model(x)
    return result if isinstance(result, Tensor) else result[0]


def forward(model: nn.Module, x: Tensor, dtype: torch.dtype) -> None:
    with torch.no_grad():
        output(model, x, dtype)


def step(model: nn.Module, x: Tensor, dtype: torch.dtype) -> None:
    """Gradients are overwritten, as an optimizer that sets them to None at each step has them."""
    output(model, x, dtype).float().square().mean().backward()
    model.zero_grad()


def dense_share(call: Callable[[], None]) -> float:
    """The share of a call's time that matrix products and dense convolutions take."""
    with memory.quiet(), profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen:
        call()
    events = seen.key_averages(group_by_input_shape=True)
    dense = sum(event.self_cpu_time_total for event in events if is_dense(event.key, event.input_shapes))
    return dense / sum(event.self_cpu_time_total for event in events)


def is_dense(op: str, shapes: list[list[int]]) -> bool:
    if op in ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm"):
        return True
    weight = {"aten::mkldnn_convolution": 1, "aten::convolution_backward": 2}.get(op)
    return weight is not None and shapes[weight][1] > 1  # one channel for each filter: depthwise


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.patch", description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--model", choices=list(MODELS), action="append", help="only this model")
    parser.add_argument("--clips", type=int, help="clips a call; 1 on a CPU, 16 on a GPU")
    parser.add_argument("--dtype", choices=list(DTYPES), action="append", help="only this dtype")
    parser.add_argument("--seconds", type=float, default=30.0, help="measuring time per model, dtype and mode")
    parser.add_argument("--tiny", action="store_true", help="models of one layer: to see that the bench runs")
    parser.add_argument("--json", type=Path, help="write every figure here, after every model")
    options = parser.parse_args(argv)
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    device, clips = options.device, options.clips or (16 if options.device == "cuda" else 1)
    about = machine(device)
    print(f"{about['device']}, {about['threads']} threads, torch {about['torch']}, load {about['load']:.1f}\n")
    head = f"{'model':<38}{'dtype':<10}{'mode':<9}{'patched ms (20-80 %)':<24}{'plain ms':<10}"
    print(f"{head}{'times faster':<18}at most  peak MiB, plain")
    wide = device == "cuda" or torch.cpu._is_avx512_bf16_supported()  # elsewhere bfloat16 is emulated
    dtypes = options.dtype or ("float32", "bfloat16")[: 1 + wide]
    rows: list[dict[str, Any]] = []
    failed = 0
    for name in options.model or MODELS:
        torch.manual_seed(0)
        try:
            plain, x = MODELS[name](clips, options.tiny)
        except ModuleNotFoundError as error:
            print(f"{name}: left out: {error}", flush=True)
            continue
        try:
            rows += measure(name, clips, plain.to(device).eval(), x.to(device), dtypes, options.seconds)
        except Exception as error:  # the other models are measured all the same
            if options.model:
                raise
            failed += 1
            print(f"{name}: {type(error).__name__}: {error}", flush=True)
        if options.json:
            write(options.json, about, rows)
    return int(failed > 0)


def measure(name: str, clips: int, plain: nn.Module, x: Tensor, dtypes: Sequence[str], seconds: float) -> list[dict[str, Any]]:
    """One row per dtype and mode."""
    device, rows = x.device.type, []
    # With the same weights: where a copy of them came to lie would be measured too.
    patched = copy.deepcopy(plain, {id(tensor): tensor for tensor in (*plain.parameters(), *plain.buffers())})
    i2v.patch(patched)
    for dtype, (mode, run) in itertools.product(dtypes, (("forward", forward), ("step", step))):
        for model in (plain, patched):
            model.train(mode == "step")
        calls = {label: partial(run, m, x, DTYPES[dtype]) for label, m in (("plain", plain), ("patched", patched))}
        times = rounds(calls, device, seconds, cold=True)
        ms = {label: summary(each) for label, each in times.items()}
        faster = summary([a / b for a, b in zip(times["plain"], times["patched"])])
        bound = faster.median / dense_share(calls["patched"]) if device == "cpu" else None
        peak = {label: memory.peak(call, device) for label, call in calls.items()}
        rows.append({
            "model": name, "clips": clips, "dtype": dtype, "mode": mode, "rounds": len(times["plain"]),
            "faster": vars(faster), "at_most": bound, "peak_mib": peak,
            "ms": {label: vars(timing) for label, timing in ms.items()},
        })  # fmt: skip
        spread = f"{ms['patched'].median:.0f} ({ms['patched'].low:.0f}-{ms['patched'].high:.0f})"
        ratio = f"{faster.median:.2f} ({faster.low:.2f}-{faster.high:.2f})"
        limit = "" if bound is None else f"{bound:.2f}"
        shown = f"{name:<38}{dtype:<10}{mode:<9}{spread:<24}{ms['plain'].median:<10.0f}{ratio:<18}{limit:<9}"
        print(f"{shown}{peak['patched']:.0f}, {peak['plain']:.0f}", flush=True)
    return rows


if __name__ == "__main__":
    start(main)
