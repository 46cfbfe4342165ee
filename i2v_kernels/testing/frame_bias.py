"""What tests and benches know of ``frame_bias``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..ops import frame_bias
from .drawn import FEW, FRAMES
from .opinfo import Choose, OpInfo, Sample, inputs_and, randn, sequence_first


def _call(
    b: int, t: int, grid: tuple[int, int], h: int, d: int, c: int, prefix: int = 1
) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    shape, places = (b, t, prefix + grid[0] * grid[1], h, d), (2 * grid[0] - 1) * (2 * grid[1] - 1)
    tensors = (randn(*shape, seed=1), randn(*shape, seed=2), randn(places, c, seed=3), randn(places, c, seed=4))
    return tensors, {"grid": grid} if prefix == 1 else {"grid": grid, "prefix": prefix}


def _samples() -> list[Sample]:
    (q, k, previous, following), options = _call(2, 4, (3, 4), 3, 16, 24)
    packed = randn(2, 4, 13, 3, 3, 16)
    nan_q, inf_k, nan_weight = q.clone(), k.clone(), following.clone()
    nan_q[0, 2, 7, 1, 3] = nan_weight[17, 5] = float("nan")
    inf_k[1, 3, 4, 0, 0] = float("inf")
    large = _call(4, 4, (4, 4), 4, 16, 24)
    return [
        Sample("plain", (q, k, previous, following), options),
        Sample("two frames", *_call(2, 2, (3, 4), 3, 16, 24)),
        Sample("one frame", *_call(2, 1, (3, 4), 3, 16, 24)),
        Sample("one patch", *_call(2, 3, (1, 1), 2, 8, 16)),
        Sample("a row of patches", *_call(1, 3, (1, 7), 2, 8, 16)),
        Sample("a column of patches", *_call(1, 3, (5, 1), 2, 8, 16)),
        Sample("no prefix, scale", *_with(_call(2, 3, (4, 3), 2, 16, 8, prefix=0), scale=0.3)),
        Sample("prefix of two, D64", *_call(1, 3, (2, 9), 2, 64, 16, prefix=2)),
        Sample("groups of columns, D72", *_call(1, 2, (2, 12), 2, 72, 16)),
        Sample("a tile and a little, D88", *_call(1, 2, (5, 13), 1, 88, 8)),
        Sample("several tiles of keys, D80", *_call(1, 2, (13, 10), 1, 80, 8)),
        Sample("sequence first", (sequence_first(q), sequence_first(k), previous, following), options, telling=True),
        Sample("slices of a packed qkv", (packed[:, :, :, 0], packed[:, :, :, 1], previous, following), options),
        Sample("another scale of none", (q, k, previous, following), {**options, "scale": 0}),
        Sample("nan in q", (nan_q, k, previous, following), options),
        Sample("inf in k", (q, inf_k, previous, following), options),
        Sample("large scores", (large[0][0] * 10, *large[0][1:]), large[1]),
        Sample("no clips", (q[:0], k[:0], previous, following), options),
        Sample("no channels", (q, k, previous[:, :0], following[:, :0]), options),
        Sample("no width of heads", (q[..., :0], k[..., :0], previous, following), options),
    ]


def _with(call: tuple[tuple[Tensor, ...], dict[str, Any]], **options: Any) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    return call[0], {**call[1], **options}


def _models(clips: int) -> list[Sample]:
    found = []
    for name, grid, heads, channels in (("ViT-B/16", (14, 14), 12, 768), ("ViT-L/14", (16, 16), 16, 1024)):
        tensors, options = _call(clips, 8, grid, heads, 64, channels)
        found.append(Sample(f"EVL {name} T=8", tensors, options))
    return found


def _bad() -> list[Any]:
    q, w = torch.randn(2, 4, 13, 3, 16), torch.randn(35, 24)
    good, grid = (q, q, w, w), {"grid": (3, 4)}
    return [
        ("a list", ([1], q, w, w), grid, TypeError, "q must be a torch.Tensor"),
        ("integers", (q.int(), q.int(), w, w), grid, TypeError, "q.dtype=torch.int32"),
        ("four dimensions", (q[0], q[0], w, w), grid, ValueError, "q.shape=(4, 13, 3, 16)"),
        ("k of fewer frames", (q, q[:, :3], w, w), grid, ValueError, "k.shape=(2, 3, 13, 3, 16)"),
        ("k of another dtype", (q, q.half(), w, w), grid, TypeError, "k.dtype=torch.float16"),
        ("weights of another dtype", (q, q, w.half(), w), grid, TypeError, "weight_previous.dtype=torch.float16"),
        ("channels apart", (q.transpose(-1, -2),) * 2 + (w, w), grid, ValueError, "stride"),
        ("no heads", (q[:, :, :, :0],) * 2 + (w, w), grid, ValueError, "at least one head"),
        ("another grid", good, {"grid": (4, 4)}, ValueError, "prefix=1 + H*W of grid=(4, 4) is not N=13"),
        ("a grid of nothing", good, {"grid": (0, 4)}, ValueError, "grid[0]=0"),
        ("a grid of one number", good, {"grid": 12}, TypeError, "grid=12"),
        ("another prefix", good, {**grid, "prefix": 2}, ValueError, "prefix=2"),
        ("a negative prefix", good, {**grid, "prefix": -1}, ValueError, "prefix=-1"),
        ("half a prefix", good, {**grid, "prefix": 0.5}, TypeError, "prefix=0.5"),
        ("weights of another grid", (q, q, w[:-1], w), grid, ValueError, "weight_previous.shape=(34, 24)"),
        ("weights of another width", (q, q, w, w[:, :8]), grid, ValueError, "weight_next.shape=(35, 8)"),
        ("scale as a string", good, {**grid, "scale": "big"}, TypeError, "scale='big'"),
        ("unknown backend", good, {**grid, "backend": "magic"}, ValueError, "backend='magic'"),
        ("backend that cannot", good, {**grid, "backend": "triton"}, NotImplementedError, "the tensors are on cpu"),
    ]


def _drawn(choose: Choose) -> Sample:
    grid = choose(((2, 3), (1, 1), (3, 2), (1, 5), (4, 9), (7, 1)))
    shape = choose(FEW), choose(FRAMES[:5])
    call = _call(*shape, grid, choose((2, 1, 3)), choose((8, 1, 16, 20, 64, 0)), choose((8, 1, 3, 33, 0)), choose((1, 0, 2)))
    return Sample("drawn", *_with(call, scale=choose((None, 0.3, -1.0, 0))))


def _traffic(sample: Sample) -> int:
    q, _, weight, _ = sample.args
    return inputs_and(q.shape[:3].numel() * weight.shape[1], sample)


def _flops(sample: Sample) -> int:
    """A product of all pairs of patches for the scores, one for the weights that they reach."""
    (q, _, weight, _), (height, width) = sample.args, sample.kwargs["grid"]
    batch, frames, _, heads, dim = q.shape
    return 4 * batch * max(frames - 1, 0) * (height * width) ** 2 * (heads * dim + weight.shape[1])


INFO = OpInfo(
    "frame_bias",
    frame_bias,
    samples=_samples,
    models=_models,
    bad=_bad,
    drawn=_drawn,
    traffic=_traffic,
    flops=_flops,
    dims="BTNHD, BTNHD -> BTNC",
    rows="B",
    products=True,
)
