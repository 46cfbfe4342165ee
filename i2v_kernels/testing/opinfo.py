"""One ``OpInfo`` per op: samples, bad inputs, bytes and flops. Adding an op here gives it all generated tests and benches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..ops import temporal_attention, temporal_conv, token_shift


@dataclass(frozen=True)
class Sample:
    """Arguments of one call. Floating-point tensors are float64 on the CPU until ``to`` places them."""

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)

    def to(
        self, dtype: torch.dtype = torch.float64, device: str | None = None, requires_grad: bool = False
    ) -> Sample:
        """The same call in another dtype and, if it is named, another place; strides kept, fresh leaves."""

        def place(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            if not value.is_floating_point():
                return value.to(device or value.device)
            moved = torch.empty_strided(value.shape, value.stride(), dtype=dtype, device=device or value.device)
            return moved.copy_(value).requires_grad_(requires_grad)

        return Sample(self.name, tuple(map(place, self.args)), {k: place(v) for k, v in self.kwargs.items()})

    def tensors(self) -> list[Tensor]:
        """The floating-point tensors, in order: what gradients are taken of."""
        values = (*self.args, *self.kwargs.values())
        return [v for v in values if isinstance(v, Tensor) and v.is_floating_point()]


@dataclass(frozen=True)
class OpInfo:
    """An op and all that tests and benches know of it.

    ``samples``: small calls: ordinary, then edges. ``models``: clips -> calls of real models, for benches.
    ``bad``: (what is wrong, args, kwargs, exception, a part of its text).
    ``traffic``: bytes that the forward call must move at least (every input once, every output once).
    ``flops``: floating-point operations of the forward call (a multiply-add counts 2).
    ``dtypes``: what each backend computes in.
    """

    name: str
    op: Callable[..., Tensor]
    samples: Callable[[], list[Sample]]
    models: Callable[[int], list[Sample]]
    bad: Callable[[], list[tuple[str, tuple[Any, ...], dict[str, Any], type[Exception], str]]]
    traffic: Callable[[Sample], int]
    flops: Callable[[Sample], int]
    exact: bool = False  # copies: every backend gives the reference's bits

    def __str__(self) -> str:
        return self.name


def _randn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, dtype=torch.float64, generator=generator)


def _sequence_first(x: Tensor) -> Tensor:
    """The same values as slices of a larger buffer that holds tokens first: ``[N, B, T, ...]``, as in OpenAI's CLIP."""
    order = (2, 0, 1, *range(3, x.dim()))
    permuted = x.permute(order)
    wide = torch.zeros(*permuted.shape[:-1], permuted.shape[-1] + 3, dtype=x.dtype)
    wide[..., 1:-2] = permuted
    return wide[..., 1:-2].permute(1, 2, 0, *range(3, x.dim()))


def _qkv(b: int, t: int, n: int, h: int, d: int) -> tuple[Tensor, Tensor, Tensor]:
    return _randn(b, t, n, h, d, seed=1), _randn(b, t, n, h, d, seed=2), _randn(b, t, n, h, d, seed=3)


def _attention_samples() -> list[Sample]:
    q, k, v = _qkv(2, 8, 5, 3, 16)
    bias = _randn(3, 8, 8)
    mask = torch.tensor([[True] * 5 + [False] * 3, [False] * 8])
    packed = _randn(2, 8, 5, 3, 3, 16).unbind(3)
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
        Sample("everything", (q, k, v), {"bias": bias, "mask": mask, "causal": True, "scale": 0.3}),
        Sample("packed qkv", tuple(packed)),
        Sample("sequence first", (_sequence_first(q), k, _sequence_first(v))),
        Sample("one frame", _qkv(2, 1, 3, 2, 8)),
        Sample("T8 D64, all", _qkv(2, 8, 3, 3, 64), {"bias": bias, "mask": mask, "window": (4, 1)}),
        Sample("T16 D64, offsets", _qkv(1, 16, 3, 2, 64), {"offsets": [2, 0], "causal": True}),
        Sample("T5 D40", _qkv(1, 5, 2, 3, 40)),
        Sample("T17 D24", _qkv(1, 17, 2, 1, 24)),
        Sample("T32 D64", _qkv(1, 32, 2, 1, 64), {"causal": True}),
        Sample("no tokens", _qkv(2, 8, 0, 3, 16)),
        Sample("no clips", _qkv(0, 8, 5, 3, 16)),
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
        Sample("one packed tensor", (_randn(2, 8, 5, 3, 3, 16),), {"bias": bias, "mask": mask, "causal": True}),
    ]


def _attention_models(clips: int) -> list[Sample]:
    return [
        Sample(f"{name} T={frames}", _qkv(clips, frames, tokens, heads, 64))
        for name, tokens, heads in (("ViT-B/16", 197, 12), ("ViT-L/14", 257, 16))
        for frames in (8, 4, 16, 32)
    ]


def _attention_bad() -> list[Any]:
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
        ("unknown backend", (q, q, q), {"backend": "magic"}, ValueError, "backend='magic'"),
        ("backend that cannot", (q, q, q), {"backend": "cuda"}, NotImplementedError, "backend='cuda' cannot run"),
    ]


def _attention_flops(sample: Sample) -> int:
    q, k, _ = sample.args
    b, t, n, h, d = q.shape
    return 4 * b * n * h * t * k.shape[1] * d


def _shift_samples() -> list[Sample]:
    x = _randn(2, 8, 5, 24)
    tsm = [(3, -1), (3, 1)]
    return [
        Sample("tsm", (x, tsm)),
        Sample("edge", (x, tsm), {"padding": "edge"}),
        Sample("wrap", (x, tsm), {"padding": "wrap"}),
        Sample("class token", (x, tsm), {"tokens": (0, 1)}),
        Sample("patches, edge", (x, tsm), {"tokens": (1, 5), "padding": "edge"}),
        Sample("all channels", (x, [(12, -1), (12, 1)])),
        Sample("odd groups, far", (_randn(2, 6, 3, 33), [(5, 2), (1, -3), (0, 4), (7, 9), (11, -9)]), {"padding": "edge"}),
        Sample("far, wrap", (_randn(2, 6, 3, 33), [(5, 2), (1, -3), (7, 13)]), {"padding": "wrap"}),
        Sample("no groups", (x, [])),
        Sample("sequence first", (_sequence_first(x), tsm)),
        Sample("one frame", (x[:, :1], tsm), {"padding": "edge"}),
        Sample("no frames", (x[:, :0], tsm)),
        Sample("no tokens", (x[:, :, :0], tsm)),
        Sample("no clips", (x[:0], tsm)),
    ]


def _shift_models(clips: int) -> list[Sample]:
    return [
        Sample("TSM ViT-B/16 T=8", (_randn(clips, 8, 197, 768), [(96, -1), (96, 1)])),
        Sample("ZeroI2V ViT-B/16 T=8", (_randn(clips, 8, 197, 768), [(64, 1), (64, -1)]), {"padding": "edge"}),
    ]


def _shift_bad() -> list[Any]:
    x = torch.randn(2, 8, 5, 24)
    return [
        ("three dimensions", (x[0], [(3, 1)]), {}, ValueError, "x.shape=(8, 5, 24)"),
        ("integers", (x.int(), [(3, 1)]), {}, TypeError, "x.dtype=torch.int32"),
        ("too many channels", (x, [(20, 1), (5, 1)]), {}, ValueError, "name 25 channels"),
        ("negative channels", (x, [(-1, 1)]), {}, ValueError, "groups[0][0]=-1"),
        ("a half offset", (x, [(3, 0.5)]), {}, TypeError, "groups[0][1]=0.5"),
        ("no pair", (x, [3]), {}, TypeError, "groups[0]=3"),
        ("unknown padding", (x, [(3, 1)]), {"padding": "zero"}, ValueError, "padding='zero'"),
        ("tokens out of range", (x, [(3, 1)]), {"tokens": (0, 6)}, ValueError, "tokens[1]=6"),
        ("channels apart", (x.transpose(2, 3), [(3, 1)]), {}, ValueError, "stride"),
        ("unknown backend", (x, [(3, 1)]), {"backend": "magic"}, ValueError, "backend='magic'"),
        ("backend that cannot", (x, [(3, 1)]), {"backend": "cuda"}, NotImplementedError, "the tensor is on cpu"),
    ]


def _conv_samples() -> list[Sample]:
    x, grid = _randn(2, 8, 13, 20), {"grid": (3, 4), "prefix": 1}

    def weight(c: int, *kernel: int) -> Tensor:
        return _randn(c, 1, *kernel, seed=4)

    return [
        Sample("(3,1,1)", (x, weight(20, 3, 1, 1), _randn(20))),
        Sample("no bias", (x, weight(20, 3, 1, 1)), {"prefix": 1}),
        Sample("copied prefix", (x, weight(20, 3, 1, 1), _randn(20)), {"prefix": 1, "prefix_mode": "copy"}),
        Sample("(5,1,1)", (x, weight(20, 5, 1, 1), _randn(20)), grid),
        Sample("(7,1,1)", (x[:, :3], weight(20, 7, 1, 1), _randn(20)), grid),
        Sample("(3,3,3)", (x, weight(20, 3, 3, 3), _randn(20)), grid),
        Sample("(1,3,3)", (x, weight(20, 1, 3, 3), _randn(20)), {**grid, "prefix_mode": "copy"}),
        Sample("(1,5,3)", (x, weight(20, 1, 5, 3)), grid),
        Sample("(1,1,1)", (x, weight(20, 1, 1, 1), _randn(20))),
        Sample("C=130", (_randn(1, 4, 5, 130), weight(130, 3, 1, 1), _randn(130))),
        Sample("sequence first", (_sequence_first(x), weight(20, 3, 1, 1), _randn(20)), {"prefix": 1}),
        Sample("one frame", (x[:, :1], weight(20, 3, 3, 3), _randn(20)), grid),
        Sample("no frames", (x[:, :0], weight(20, 3, 1, 1), _randn(20))),
        Sample("no tokens", (x[:, :, :0], weight(20, 3, 1, 1), _randn(20))),
        Sample("only prefix", (x[:, :, :1], weight(20, 3, 1, 1), _randn(20)), {"prefix": 1}),
        Sample("no clips", (x[:0], weight(20, 3, 1, 1), _randn(20))),
    ]


def _conv_models(clips: int) -> list[Sample]:
    def call(name: str, b: int, t: int, n: int, c: int, kernel: tuple[int, int, int], side: int) -> Sample:
        weight = _randn(c, 1, *kernel, seed=4)
        return Sample(name, (_randn(b, t, n, c), weight, _randn(c)), {"grid": (side, side), "prefix": 1})

    return [
        call("ViT-B/16 T=8 (3,1,1)", clips, 8, 197, 768, (3, 1, 1), 14),
        call("ST-Adapter ViT-B/16 T=8 C=384 (3,1,1)", clips, 8, 197, 384, (3, 1, 1), 14),
        call("ViT-B/16 T=8 (3,3,3)", clips, 8, 197, 768, (3, 3, 3), 14),
    ]


def _conv_bad() -> list[Any]:
    x, w = torch.randn(2, 8, 13, 20), torch.randn(20, 1, 3, 1, 1)
    return [
        ("three dimensions", (x[0], w), {}, ValueError, "x.shape=(8, 13, 20)"),
        ("integers", (x.int(), w.int()), {}, TypeError, "x.dtype=torch.int32"),
        ("weight of another C", (x, w[:10]), {}, ValueError, "weight.shape=(10, 1, 3, 1, 1)"),
        ("weight of another dtype", (x, w.half()), {}, TypeError, "weight.dtype=torch.float16"),
        ("even kernel", (x, torch.randn(20, 1, 2, 1, 1)), {}, ValueError, "must be odd"),
        ("no grid", (x, torch.randn(20, 1, 3, 3, 3)), {}, ValueError, "grid=None"),
        ("another grid", (x, w), {"grid": (3, 3), "prefix": 1}, ValueError, "is not N=13"),
        ("prefix too long", (x, w), {"prefix": 14}, ValueError, "prefix=14"),
        ("unknown prefix mode", (x, w), {"prefix_mode": "zeros"}, ValueError, "prefix_mode='zeros'"),
        ("bias of another shape", (x, w, torch.zeros(3)), {}, ValueError, "bias.shape=(3,)"),
        ("unknown backend", (x, w), {"backend": "magic"}, ValueError, "backend='magic'"),
        ("backend that cannot", (x, w), {"backend": "cuda"}, NotImplementedError, "no such backend"),
    ]


def _conv_flops(sample: Sample) -> int:
    x, weight = sample.args[:2]
    patches = x.shape[2] - sample.kwargs.get("prefix", 0)
    return 2 * x.shape[0] * x.shape[1] * patches * weight.numel()


def _inputs_and_output(sample: Sample) -> int:
    """Every tensor argument once, and an output of the first one's size."""
    return sum(t.numel() * t.element_size() for t in (*sample.tensors(), sample.args[0]))


OPINFOS: tuple[OpInfo, ...] = (
    OpInfo(
        "temporal_attention",
        temporal_attention,
        _attention_samples,
        _attention_models,
        _attention_bad,
        _inputs_and_output,
        _attention_flops,
    ),
    OpInfo(
        "token_shift",
        token_shift,
        _shift_samples,
        _shift_models,
        _shift_bad,
        _inputs_and_output,
        lambda sample: 0,
        exact=True,
    ),
    OpInfo("temporal_conv", temporal_conv, _conv_samples, _conv_models, _conv_bad, _inputs_and_output, _conv_flops),
)
