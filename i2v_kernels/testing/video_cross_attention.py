"""What tests and benches know of ``video_cross_attention``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..ops import video_cross_attention
from .drawn import FEW, YES_NO
from .opinfo import Choose, OpInfo, Sample, inputs_and_output, randn, sequence_first


def _qkv(b: int, q: int, t: int, n: int, h: int, d: int) -> tuple[Tensor, Tensor, Tensor]:
    return randn(b, q, h, d, seed=1), randn(b, t, n, h, d, seed=2), randn(b, t, n, h, d, seed=3)


def _queries_first(q: Tensor) -> Tensor:
    return sequence_first(q[:, None])[:, 0]


def _samples() -> list[Sample]:
    q, k, v = _qkv(2, 2, 4, 5, 3, 16)
    mask = torch.tensor([[True, False, True, True], [False] * 4])
    packed = randn(2, 4, 5, 2, 3, 16).unbind(3)
    nan_q, nan_v, inf_k = q.clone(), v.clone(), k.clone()
    nan_q[0, 1, 1, 3] = float("nan")
    nan_v[1, 2, 3, 0, 5] = float("nan")
    inf_k[1, 3, 2, 0, 0] = float("inf")
    large = _qkv(4, 6, 3, 16, 4, 16)  # exp would overflow; many, so that the error is no matter of luck
    return [
        Sample("plain", (q, k, v)),
        Sample("one query, D64", _qkv(2, 1, 3, 7, 2, 64)),
        Sample("mask with an empty clip", (q, k, v), {"mask": mask}, telling=True),
        Sample("scale", (q, k, v), {"scale": 0.3, "mask": ~mask}),
        Sample("packed keys and values", (q, *packed), telling=True),
        Sample("sequence first", (_queries_first(q), sequence_first(k), sequence_first(v)), {"mask": mask}),
        Sample("one frame", _qkv(2, 2, 1, 9, 3, 8)),
        Sample("class tokens of frames", _qkv(2, 1, 8, 1, 2, 16)),
        Sample("a tile and a bit", _qkv(1, 1, 2, 67, 1, 64)),
        Sample("a tile and a bit, masked", _qkv(2, 3, 4, 67, 1, 32), {"mask": mask}),
        Sample("7 queries", _qkv(1, 7, 3, 20, 4, 24)),
        Sample("D20", _qkv(1, 1, 3, 6, 3, 20)),
        Sample("D72", _qkv(1, 1, 3, 6, 2, 72)),  # SigLIP-so400m
        Sample("D80, 2 queries", _qkv(1, 2, 3, 6, 2, 80), {"mask": mask[:1, :3]}),
        Sample("D88", _qkv(1, 1, 3, 6, 2, 88)),
        Sample("D128", _qkv(1, 2, 2, 9, 1, 128)),
        Sample("no tokens", _qkv(2, 2, 4, 0, 3, 16)),
        Sample("no clips", _qkv(0, 2, 4, 5, 3, 16)),
        Sample("no queries", _qkv(2, 0, 4, 5, 3, 16), {"mask": mask}),
        Sample("no heads", _qkv(2, 2, 4, 5, 0, 16)),
        Sample("no channels", _qkv(2, 2, 4, 5, 3, 0), {"mask": mask}),
        Sample("nan in q", (nan_q, k, v)),
        Sample("nan in a frame that is not valid", (q, k, nan_v), {"mask": mask}),
        Sample("inf in k", (q, inf_k, v)),
        Sample("large scores", (large[0] * 5, large[1] * 5, large[2])),
    ]


def _models(clips: int) -> list[Sample]:
    return [
        Sample("EVL-B/16 T=8", _qkv(clips, 1, 8, 197, 12, 64)),
        Sample("EVL-L/14 T=8", _qkv(clips, 1, 8, 257, 16, 64)),
        Sample("EVL-B/16 T=32", _qkv(clips, 1, 32, 197, 12, 64)),
        Sample("8 queries, B/16 T=8", _qkv(clips, 8, 8, 197, 12, 64)),
        Sample("32 queries, B/16 T=8", _qkv(clips, 32, 8, 197, 12, 64)),
        Sample("EVL-B/16 T=1", _qkv(clips, 1, 1, 197, 12, 64)),
    ]


def _bad() -> list[Any]:
    q, k = torch.randn(2, 2, 3, 16), torch.randn(2, 4, 5, 3, 16)
    return [
        ("a list", ([1], k, k), {}, TypeError, "q must be a torch.Tensor"),
        ("integers", (q.int(), k.int(), k.int()), {}, TypeError, "q.dtype=torch.int32"),
        ("queries with frames", (k, k, k), {}, ValueError, "q.shape=(2, 4, 5, 3, 16), but [B, Q, H, D]"),
        ("keys without frames", (q, q, q), {}, ValueError, "k.shape=(2, 2, 3, 16), but [B, T, N, H, D]"),
        ("no v", (q, k, None), {}, TypeError, "v must be a torch.Tensor"),
        ("another v", (q, k, k[:, :2]), {}, ValueError, "v.shape=(2, 2, 5, 3, 16)"),
        ("k of other heads", (q, k[:, :, :, :2], k), {}, ValueError, "k.shape=(2, 4, 5, 2, 16)"),
        ("k of other clips", (q, k[:1], k[:1]), {}, ValueError, "k.shape=(1, 4, 5, 3, 16)"),
        ("no frame", (q, k[:, :0], k[:, :0]), {}, ValueError, "k.shape=(2, 0, 5, 3, 16), but at least one frame"),
        ("another dtype", (q, k.half(), k), {}, TypeError, "k.dtype=torch.float16"),
        ("strided heads", (q, k.transpose(-1, -2).contiguous().transpose(-1, -2), k), {}, ValueError, "stride"),
        ("float mask", (q, k, k), {"mask": torch.ones(2, 4)}, TypeError, "mask must be a bool tensor"),
        ("mask of another shape", (q, k, k), {"mask": torch.ones(2, 5).bool()}, ValueError, "mask.shape=(2, 5)"),
        ("scale as a string", (q, k, k), {"scale": "big"}, TypeError, "scale='big'"),
        ("an endless scale", (q, k, k), {"scale": 10**400}, ValueError, "scale is an int of 1329 bits"),
        ("lse as a string", (q, k, k), {"return_lse": "yes"}, TypeError, "return_lse='yes' must be a bool"),
        ("a sparse q", (q.to_sparse(), k, k), {}, TypeError, "q.layout=torch.sparse_coo"),
        ("unknown backend", (q, k, k), {"backend": "magic"}, ValueError, "backend='magic'"),
        ("backend that it has not", (q, k, k), {"backend": "cuda"}, NotImplementedError, "backend='cuda' cannot run"),
    ]


def _flops(sample: Sample) -> int:
    q, k, _ = sample.args
    return 4 * q.numel() * k.shape[1] * k.shape[2]


def _drawn(choose: Choose) -> Sample:
    batch, queries, tokens = choose(FEW), choose((1, 2, 0, 3, 9)), choose((2, 1, 3, 0, 20, 70))
    frames, heads, dim = choose((3, 1, 2, 8)), choose((2, 1, 3, 5)), choose((8, 1, 3, 16, 20, 64, 72, 0))
    q, k, v = _qkv(batch, queries, frames, tokens, heads, dim)
    if choose(YES_NO):
        k, v = randn(batch, frames, tokens, 2, heads, dim).unbind(3)
    options: dict[str, Any] = {"scale": choose((None, 0.3, -1.0, 0))}
    if choose(YES_NO):
        options["mask"] = randn(batch, frames, seed=choose(range(4))) > choose((-0.5, 5.0))
    return Sample("drawn", (q, k, v), options)


INFO = OpInfo(
    "video_cross_attention",
    video_cross_attention,
    samples=_samples,
    models=_models,
    bad=_bad,
    drawn=_drawn,
    traffic=inputs_and_output,
    flops=_flops,
    dims="BQHD, BTNHD, BTNHD -> BQHD",
    rows="BQ",
)
