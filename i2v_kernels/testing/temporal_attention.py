"""What tests and benches know of ``temporal_attention``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..ops import temporal_attention
from .drawn import FEW, FRAMES, YES_NO
from .opinfo import Choose, OpInfo, Sample, inputs_and_output, randn, sequence_first


def _qkv(b: int, t: int, n: int, h: int, d: int) -> tuple[Tensor, Tensor, Tensor]:
    return randn(b, t, n, h, d, seed=1), randn(b, t, n, h, d, seed=2), randn(b, t, n, h, d, seed=3)


def _samples() -> list[Sample]:
    q, k, v = _qkv(2, 8, 5, 3, 16)
    bias = randn(3, 8, 8)
    mask = torch.tensor([[True] * 5 + [False] * 3, [False] * 8])
    packed = randn(2, 8, 5, 3, 3, 16).unbind(3)
    nan_q = q.clone()
    nan_q[0, 2, 1, 1, 3] = float("nan")
    large = _qkv(4, 8, 16, 4, 16)  # exp would overflow; many, so that the error is no matter of luck
    inf_k = k.clone()
    inf_k[1, 3, 2, 0, 0] = float("inf")
    return [
        Sample("plain", (q, k, v)),
        Sample("T4 D64", _qkv(1, 4, 3, 2, 64)),
        Sample("bias", (q, k, v), {"bias": bias}),
        Sample("mask with an empty clip", (q, k, v), {"mask": mask}),
        Sample("causal", (q, k, v), {"causal": True}),
        Sample("everything", (q, k, v), {"bias": bias, "mask": mask, "causal": True, "scale": 0.3}, telling=True),
        Sample("packed qkv", tuple(packed)),
        Sample("sequence first", (sequence_first(q), k, sequence_first(v)), telling=True),
        Sample("one frame", _qkv(2, 1, 3, 2, 8)),
        Sample("T8 D64, all", _qkv(2, 8, 3, 3, 64), {"bias": bias, "mask": mask, "window": (4, 1)}),
        Sample("T16 D64, offsets", _qkv(1, 16, 3, 2, 64), {"offsets": [2, 0], "causal": True}),
        Sample("T5 D40", _qkv(1, 5, 2, 3, 40)),
        Sample("T8 D72", _qkv(1, 8, 3, 2, 72)),  # SigLIP-so400m
        Sample("T16 D80, causal", _qkv(1, 16, 1, 2, 80), {"causal": True}),
        Sample("T8 D88, packed", tuple(randn(1, 8, 3, 3, 2, 88).unbind(3))),
        Sample("T4 D104, offsets", _qkv(2, 4, 9, 2, 104), {"offsets": [1, -2]}),
        Sample("T17 D24", _qkv(1, 17, 2, 1, 24)),
        Sample("T32 D64", _qkv(1, 32, 2, 1, 64), {"causal": True}),
        Sample("no tokens", _qkv(2, 8, 0, 3, 16)),
        Sample("no clips", _qkv(0, 8, 5, 3, 16)),
        Sample("no heads", _qkv(2, 8, 5, 0, 16), {"bias": bias[:0], "offsets": []}),
        Sample("no channels", _qkv(2, 8, 5, 3, 0), {"bias": bias, "causal": True}),
        Sample("nan in q", (nan_q, k, v)),
        Sample("inf in k", (q, inf_k, v)),
        Sample("large scores", (large[0] * 10, large[1] * 10, large[2])),
        Sample("fewer keys", (q, k[:, :3], v[:, :3]), {"mask": mask[:, 3:6], "bias": bias[:, :, :3].contiguous()}),
        Sample("more keys, causal", (q[:, :3], k, v), {"mask": mask, "bias": bias[:, :3].contiguous(), "causal": True}),
        Sample("fewer keys, causal", (q, k[:, :3], v[:, :3]), {"causal": True}),  # the first queries see nothing
        Sample("T19, 5 keys", (_qkv(1, 19, 2, 1, 24)[0], *_qkv(1, 5, 2, 1, 24)[1:])),
        Sample("window", (q, k, v), {"window": (2, 1)}),
        Sample("causal window", (q, k, v), {"window": (2, None), "causal": True, "mask": mask}),
        Sample("own frame", (q, k[:, :5], v[:, :5]), {"window": (0, 0)}),
        Sample("offsets", (q, k, v), {"offsets": [-1, 0, 2]}),
        Sample("far offsets", (q, k[:, :6], v[:, :6]), {"offsets": [-9, 4, 6], "causal": True}),
        Sample("offsets and all", (q, k, v), {"offsets": [1, 0, -3], "bias": bias, "mask": mask, "window": (3, 2)}),
        Sample("one packed tensor", (randn(2, 8, 5, 3, 3, 16),), {"bias": bias, "mask": mask, "causal": True}),
    ]


def _models(clips: int) -> list[Sample]:
    return [
        Sample(f"{name} T={frames}", _qkv(clips, frames, tokens, heads, 64))
        for name, tokens, heads in (("ViT-B/16", 197, 12), ("ViT-L/14", 257, 16))
        for frames in (8, 4, 16, 32)
    ]


def _bad() -> list[Any]:
    q = torch.randn(2, 8, 5, 3, 16)
    return [
        ("a list", ([1], q, q), {}, TypeError, "q must be a torch.Tensor"),
        ("integers", (q.int(), q.int(), q.int()), {}, TypeError, "q.dtype=torch.int32"),
        ("four dimensions", (q[0], q[0], q[0]), {}, ValueError, "q.shape=(8, 5, 3, 16)"),
        ("k without v", (q, q), {}, TypeError, "v must be a torch.Tensor"),
        ("no k and v", (q,), {}, ValueError, "q.shape=(2, 8, 5, 3, 16), but [B, T, N, 3, H, D] (or k and v)"),
        ("four packed", (q[:, :, :, None].expand(2, 8, 5, 4, 3, 16),), {}, ValueError, "q.shape=(2, 8, 5, 4, 3, 16)"),
        ("another v", (q, q[:, :4], q), {}, ValueError, "v.shape=(2, 8, 5, 3, 16)"),
        ("k of other heads", (q, q[:, :, :, :2], q), {}, ValueError, "k.shape=(2, 8, 5, 2, 16)"),
        ("no key frame", (q, q[:, :0], q[:, :0]), {}, ValueError, "k.shape=(2, 0, 5, 3, 16), but at least one frame"),
        ("another dtype", (q, q.half(), q), {}, TypeError, "k.dtype=torch.float16"),
        ("strided heads", (q.transpose(-1, -2),) * 3, {}, ValueError, "stride"),
        ("no frame", (q[:, :0],) * 3, {}, ValueError, "at least one frame"),
        ("bias of another shape", (q, q, q), {"bias": torch.zeros(8, 8)}, ValueError, "bias.shape=(8, 8)"),
        ("float mask", (q, q, q), {"mask": torch.ones(2, 8)}, TypeError, "mask must be a bool tensor"),
        ("mask of another shape", (q, q, q), {"mask": torch.ones(2, 4).bool()}, ValueError, "mask.shape=(2, 4)"),
        ("causal as a string", (q, q, q), {"causal": "yes"}, TypeError, "causal='yes'"),
        ("window of one number", (q, q, q), {"window": 3}, TypeError, "window=3 must be a pair"),
        ("negative window", (q, q, q), {"window": (-2, 1)}, ValueError, "window[0]=-2"),
        ("half a frame", (q, q, q), {"offsets": [0, 0.5, 0]}, TypeError, "offsets[1]=0.5"),
        ("an offset too few", (q, q, q), {"offsets": [0, 1]}, ValueError, "there are H=3 heads"),
        ("dropout", (q, q, q), {"dropout": 0.1}, NotImplementedError, "dropout=0.1"),
        ("lse from sdpa", (q, q, q), {"backend": "sdpa", "return_lse": True}, NotImplementedError, "no log-sum-exp"),
        ("scale as a string", (q, q, q), {"scale": "big"}, TypeError, "scale='big'"),
        ("an endless scale", (q, q, q), {"scale": 10**400}, ValueError, "scale is an int of 1329 bits"),
        ("causal as a number", (q, q, q), {"causal": 1}, TypeError, "causal=1 must be a bool"),
        ("lse as a string", (q, q, q), {"return_lse": "yes"}, TypeError, "return_lse='yes' must be a bool"),
        ("one offset for all", (q, q, q), {"offsets": 1}, TypeError, "offsets=1 must be a list of one int for each head"),
        ("offsets as a string", (q, q, q), {"offsets": "012"}, TypeError, "offsets='012'"),
        ("dropout as a string", (q, q, q), {"dropout": "0"}, TypeError, "dropout='0' must be a number"),
        ("half a window", (q, q, q), {"window": (0.5, 1)}, TypeError, "window[0]=0.5"),
        ("a sparse q", (q.to_sparse(), q, q), {}, TypeError, "q.layout=torch.sparse_coo"),
        ("backend as a number", (q, q, q), {"backend": 3}, ValueError, "backend=3 is not one of"),
        ("unknown backend", (q, q, q), {"backend": "magic"}, ValueError, "backend='magic'"),
        ("backend that cannot", (q, q, q), {"backend": "cuda"}, NotImplementedError, "backend='cuda' cannot run"),
    ]


def _flops(sample: Sample) -> int:
    q, k, _ = sample.args
    b, t, n, h, d = q.shape
    return 4 * b * n * h * t * k.shape[1] * d


def _drawn(choose: Choose) -> Sample:
    shape = (choose(FEW), choose(FRAMES), choose(FEW), choose((2, 1, 3, 5)), choose((8, 1, 3, 16, 20, 64, 72, 0)))
    batch, frames, tokens, heads, dim = shape
    keys = frames
    args: tuple[Tensor, ...]
    if choose(YES_NO):
        args = (randn(batch, frames, tokens, 3, heads, dim),)
    else:
        keys = choose((frames, *FRAMES))
        args = (randn(*shape), randn(batch, keys, tokens, heads, dim, seed=1), randn(batch, keys, tokens, heads, dim, seed=2))
    options: dict[str, Any] = {"causal": choose(YES_NO), "scale": choose((None, 0.3, -1.0, 0))}
    if choose(YES_NO):
        options["bias"] = randn(heads, frames, keys, seed=3)
    if choose(YES_NO):
        options["mask"] = randn(batch, keys, seed=choose(range(4))) > choose((-0.5, 5.0))
    if choose(YES_NO):
        options["window"] = (choose((None, 0, 1, 4, 2**40)), choose((None, -1, 0, 2)))
    if choose(YES_NO):
        options["offsets"] = [choose((0, 1, -1, 2, -9, 2**63)) for _ in range(heads)]
    return Sample("drawn", args, options)


INFO = OpInfo(
    "temporal_attention",
    temporal_attention,
    samples=_samples,
    models=_models,
    bad=_bad,
    drawn=_drawn,
    traffic=inputs_and_output,
    flops=_flops,
    dims="BTNHD, BSNHD, BSNHD -> BTNHD",
)
