"""What tests and benches know of ``frame_attention``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..ops import frame_attention
from ..ops.frame_attention.frames import head_groups, sources
from ..ops.frame_attention.op import EDGES, check_frames
from .drawn import FEW, YES_NO
from .opinfo import Choose, OpInfo, Sample, inputs_and, randn, sequence_first

WINDOW = (-1, 0, 1)


def _qkv(b: int, t: int, n: int, h: int, d: int, keys: int = -1) -> tuple[Tensor, Tensor, Tensor]:
    keys = n if keys < 0 else keys
    return randn(b, t, n, h, d, seed=1), randn(b, t, keys, h, d, seed=2), randn(b, t, keys, h, d, seed=3)


def _extra(b: int, t: int, m: int, h: int, d: int) -> tuple[Tensor, Tensor]:
    return randn(b, t, m, h, d, seed=4), randn(b, t, m, h, d, seed=5)


def _changed(x: Tensor, value: float, *place: int) -> Tensor:
    x = x.clone()
    x[place] = value
    return x


def _samples() -> list[Sample]:
    q, k, v = _qkv(2, 3, 5, 2, 16)
    mask = torch.tensor([[True, False, True], [False] * 3])
    extra, message = _extra(2, 3, 2, 2, 16), _extra(2, 3, 1, 2, 16)
    common = (randn(1, 1, 3, 2, 16), randn(2, 1, 3, 2, 16, seed=1))
    expanded = tuple(x[:, :1].expand(2, 3, 2, 2, 16) for x in extra)
    heads = ((-1,), (1,))
    lying = tuple(map(sequence_first, _qkv(2, 3, 18, 2, 16)))
    zero = {"frames": WINDOW, "edges": "zero"}
    large = _qkv(1, 3, 40, 2, 64)
    many = (randn(1, 3, 9, 2, 64, seed=4) * 5, randn(1, 3, 9, 2, 64, seed=5))
    return [
        Sample("own frame", (q, k, v), {"frames": (0,)}),
        Sample("message token", (q, k, v), {"frames": (0,), "extra": message}),
        Sample("window", (q, k, v), {"frames": WINDOW}, telling=True),
        Sample("window, zero edges", (q, k, v), zero),
        Sample("window, clamped", (q, k, v), {"frames": WINDOW, "edges": "clamp"}),
        Sample("all frames", (q, k, v), {"frames": "all"}),
        Sample("all, extra, mask", (q, k, v), {"frames": "all", "extra": extra, "mask": mask}),
        Sample("everything", (q, k, v), {**zero, "extra": extra, "mask": mask, "scale": 0.3}, telling=True),
        Sample("heads", (q, k, v), {"frames": heads, "edges": "clamp"}),
        Sample("heads of different windows", (q, k, v), {"frames": ((1, 1), (-2, 0, 2)), "extra": extra}),
        Sample("mask, zero edges", (q, k, v), {"frames": (-1, 1), "edges": "zero", "mask": mask}),
        Sample("mask, clamped", (q, k, v), {"frames": (-1, 0), "edges": "clamp", "mask": mask}),
        Sample("far and near", (q, k, v), {"frames": (-9, 0, 2**40), "edges": "clamp"}),
        Sample("nothing but edges", (q, k, v), {"frames": (9,), "edges": "zero"}),
        Sample("nothing at all", (q, k, v), {"frames": (-9,)}),
        Sample("unordered, with a gap", (q, k, v), {"frames": (2, -1, 0)}),
        Sample("twice the own frame", (q, k, v), {"frames": (0, 0, -1)}),
        Sample("common extra", (q, k, v), {"frames": (0,), "extra": common}),
        Sample("expanded extra", (q, k, v), {"frames": "all", "extra": expanded}),
        Sample("one packed tensor", (randn(2, 3, 5, 3, 2, 16),), {**zero, "extra": message}),
        Sample("packed qkv", tuple(randn(2, 3, 5, 3, 2, 16).unbind(3)), {"frames": "all"}),
        Sample("sequence first", lying, {"frames": WINDOW, "extra": extra}, telling=True),
        Sample("sequence first, all", tuple(map(sequence_first, (q, k, v))), {"frames": "all", "edges": "zero"}),
        Sample("sequence first, packed", (sequence_first(randn(2, 3, 5, 3, 2, 16)),), {"frames": (0,), "extra": message}),
        Sample("one frame", _qkv(2, 1, 3, 2, 8), zero),
        Sample("one frame, clamped", _qkv(2, 1, 9, 2, 16), {"frames": WINDOW, "edges": "clamp"}),
        Sample("one query", _qkv(2, 3, 1, 2, 16, keys=7), {"frames": "all", "extra": _extra(2, 3, 1, 2, 16)}),
        Sample("fewer keys", _qkv(1, 3, 9, 2, 16, keys=2), {"frames": (-1, 1)}),
        Sample("partial tiles, D64", _qkv(1, 3, 67, 1, 64), {**zero, "extra": _extra(1, 3, 17, 1, 64)}),
        Sample("partial tiles, D40", _qkv(1, 2, 33, 2, 40, keys=70), {"frames": "all"}),
        Sample("D72", _qkv(1, 3, 18, 2, 72), {"frames": WINDOW, "edges": "clamp"}),  # SigLIP-so400m
        Sample("D80, heads", _qkv(1, 3, 17, 2, 80), {"frames": ((-1,), (0, 1))}),
        Sample("D88, packed", tuple(randn(1, 3, 16, 3, 2, 88).unbind(3)), {"frames": WINDOW}),
        Sample("D128", _qkv(1, 2, 20, 1, 128), {"frames": "all", "extra": _extra(1, 2, 3, 1, 128)}),
        Sample("no queries", (q[:, :, :0], k, v), {"frames": WINDOW, "extra": extra}),
        Sample("no keys", (q, k[:, :, :0], v[:, :, :0]), zero),
        Sample("extra keys alone", (q, k[:, :, :0], v[:, :, :0]), {"frames": "all", "extra": extra}),
        Sample("no extra tokens", (q, k, v), {"frames": (0,), "extra": tuple(x[:, :, :0] for x in extra)}),
        Sample("no clips", (q[:0], k[:0], v[:0]), {"frames": WINDOW, "extra": tuple(x[:0] for x in extra)}),
        Sample("no heads", (q[:, :, :, :0], k[:, :, :, :0], v[:, :, :, :0]), {"frames": WINDOW}),
        Sample("no channels", (q[..., :0], k[..., :0], v[..., :0]), zero),
        Sample("nan in q", (_changed(q, float("nan"), 0, 2, 1, 1, 3), k, v), {"frames": WINDOW, "extra": message}),
        Sample("nan in a masked frame", (q, k, _changed(v, float("nan"), 0, 1, 2, 0, 0)), {"frames": WINDOW, "mask": mask}),
        Sample("inf in k", (q, _changed(k, float("inf"), 1, 2, 2, 0, 0), v), {"frames": "all", "edges": "zero"}),
        Sample("large scores", (large[0] * 4, large[1] * 5, large[2]), {"frames": WINDOW, "extra": many}),
    ]  # fmt: skip


def _models(clips: int) -> list[Sample]:
    b16, l14 = _qkv(clips, 8, 197, 12, 64), _qkv(clips, 8, 257, 16, 64)
    packed = randn(clips, 8, 197, 3, 12, 64)
    shift = ((-1,), (1,), *[(0,)] * 10)
    joint = _qkv(clips, 8, 196, 12, 64)
    return [
        Sample("X-CLIP ViT-B/16 T=8", b16, {"frames": (0,), "extra": _extra(clips, 8, 1, 12, 64)}),
        Sample("Open-VCLIP ViT-B/16 T=8", b16, {"frames": WINDOW, "edges": "zero"}),
        Sample("Open-VCLIP ViT-B/16 T=8, 5 frames", b16, {"frames": (-2, -1, 0, 1, 2), "edges": "zero"}),
        Sample("CLIP-ViP ViT-B/16 T=8 patches", joint, {"frames": (0,), "extra": _extra(clips, 1, 4, 12, 64)}),
        Sample("Vita-CLIP ViT-B/16 T=8", b16, {"frames": (0,), "extra": _extra(clips, 8, 17, 12, 64)}),
        Sample("ZeroI2V ViT-B/16 T=8", (packed,), {"frames": shift, "edges": "clamp"}),
        Sample("joint ViT-B/16 T=8", joint, {"frames": "all", "extra": _extra(clips, 1, 1, 12, 64)}),
        Sample("X-CLIP ViT-L/14 T=8", l14, {"frames": (0,), "extra": _extra(clips, 8, 1, 16, 64)}),
        Sample("Open-VCLIP ViT-L/14 T=8", l14, {"frames": WINDOW, "edges": "zero"}),
    ]


def _bad() -> list[Any]:
    q = torch.randn(2, 4, 5, 3, 16)
    own, call, e = {"frames": (0,)}, (q, q, q), torch.randn(2, 4, 1, 3, 16)
    return [
        ("a list", ([1], q, q), own, TypeError, "q must be a torch.Tensor"),
        ("integers", (q.int(),) * 3, own, TypeError, "q.dtype=torch.int32"),
        ("four dimensions", (q[0],) * 3, own, ValueError, "q.shape=(4, 5, 3, 16)"),
        ("no k and v", (q,), own, ValueError, "but [B, T, L, 3, H, D] (or k and v)"),
        ("k without v", (q, q), own, TypeError, "v must be a torch.Tensor"),
        ("k of fewer frames", (q, q[:, :3], q[:, :3]), own, ValueError, "k.shape=(2, 3, 5, 3, 16)"),
        ("another v", (q, q, q[:, :, :4]), own, ValueError, "v.shape=(2, 4, 4, 3, 16)"),
        ("another dtype", (q, q.half(), q), own, TypeError, "k.dtype=torch.float16"),
        ("strided heads", (q.transpose(-1, -2),) * 3, own, ValueError, "stride"),
        ("no frame", (q[:, :0],) * 3, own, ValueError, "at least one frame"),
        ("frames as a word", call, {"frames": "every"}, ValueError, "frames='every' is not one of 'all'"),
        ("frames as a number", call, {"frames": 1}, TypeError, "frames=1 must be a tuple of offsets"),
        ("no offset", call, {"frames": ()}, ValueError, "frames=() names no frame"),
        ("half a frame", call, {"frames": (0, 0.5)}, TypeError, "frames[1]=0.5"),
        ("a head too few", call, {"frames": ((0,), (1,))}, ValueError, "there are H=3"),
        ("a head without frames", call, {"frames": ((0,), (), (1,))}, ValueError, "frames[1]=()"),
        ("a number among tuples", call, {"frames": ((0,), 1, (1,))}, ValueError, "frames[1]=1"),
        ("half a frame of a head", call, {"frames": ((0,), (1,), (1, 0.5))}, TypeError, "frames[2][1]=0.5"),
        ("unknown edges", call, {**own, "edges": "wrap"}, ValueError, "edges='wrap'"),
        ("extra as a tensor", call, {**own, "extra": e}, TypeError, "extra=Tensor must be a pair"),
        ("extra of one", call, {**own, "extra": (e, None)}, TypeError, "extra[1] must be a torch.Tensor"),
        ("extra of other heads", call, {**own, "extra": (e[:, :, :, :2], e)}, ValueError, "extra[0].shape=(2, 4, 1, 2, 16)"),
        ("extra of other clips", call, {**own, "extra": (e, torch.cat([e, e]))}, ValueError, "extra[1].shape=(4, 4, 1, 3, 16)"),
        ("extra of two lengths", call, {**own, "extra": (e, e.repeat(1, 1, 2, 1, 1))}, ValueError, "extra[0] has M=1"),
        ("extra of another dtype", call, {**own, "extra": (e, e.half())}, TypeError, "extra[1].dtype=torch.float16"),
        ("float mask", call, {**own, "mask": torch.ones(2, 4)}, TypeError, "mask must be a bool tensor"),
        ("mask of another shape", call, {**own, "mask": torch.ones(2, 5).bool()}, ValueError, "mask.shape=(2, 5)"),
        ("scale as a string", call, {**own, "scale": "1"}, TypeError, "scale='1'"),
        ("lse as a number", call, {**own, "return_lse": 1}, TypeError, "return_lse=1"),
        ("unknown backend", call, {**own, "backend": "magic"}, ValueError, "backend='magic'"),
        ("backend that cannot", call, {**own, "backend": "triton"}, NotImplementedError, "the tensors are on cpu"),
    ]  # fmt: skip


def _drawn(choose: Choose) -> Sample:
    b, t, h, d = choose(FEW), choose((3, 1, 2, 5)), choose((2, 1, 3)), choose((16, 8, 20, 33, 64, 0))
    n = choose((5, 1, 17, 0))
    own = ((0,), WINDOW, (-1,), (2, -1), (1, 1), "all")
    options: dict[str, Any] = {"frames": choose(own), "edges": choose(EDGES)}
    if choose(YES_NO):
        options["frames"] = tuple(choose(own[:-1]) for _ in range(h))
    if choose(YES_NO):
        options["extra"] = _extra(choose((b, 1)), choose((t, 1)), choose((1, 3, 0, 18)), h, d)
    if choose(YES_NO):
        options["mask"] = torch.rand(b, t, generator=torch.Generator().manual_seed(b + 7 * t)) > 0.4
    args = (randn(b, t, n, 3, h, d),) if choose(YES_NO) else _qkv(b, t, n, h, d, choose((5, 1, 9, 0)))
    return Sample("drawn", args, {**options, "scale": choose((None, 0.5, 0.0))})


def _output(sample: Sample) -> int:
    q = sample.args[0]
    return q.numel() // (3 if q.dim() == 6 else 1)


def pairs(sample: Sample) -> int:
    """Queries times the keys that they attend to, over clips, frames and heads."""
    q: Tensor = sample.args[0]
    k: Tensor = sample.args[min(1, len(sample.args) - 1)]
    batch, frames, queries, heads = *q.shape[:3], q.shape[-2]
    extra = sample.kwargs["extra"][0].shape[2] if sample.kwargs.get("extra") else 0
    offsets, counts = check_frames(sample.kwargs["frames"], heads)
    found = 0
    for first, last, own in head_groups(offsets, counts, heads):
        read = sum(s >= 0 for seen in sources(frames, own, sample.kwargs.get("edges", "mask")) for s in seen)
        found += (last - first) * (read * k.shape[2] + frames * extra)
    return batch * queries * found


def _flops(sample: Sample) -> int:
    return 4 * pairs(sample) * sample.args[0].shape[-1]


INFO = OpInfo(
    "frame_attention",
    frame_attention,
    samples=_samples,
    models=_models,
    bad=_bad,
    drawn=_drawn,
    traffic=lambda sample: inputs_and(_output(sample), sample),
    flops=_flops,
    dims="BTNHD, BTLHD, BTLHD -> BTNHD",
    rows="BH",
)
