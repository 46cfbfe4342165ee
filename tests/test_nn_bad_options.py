"""Options of the modules are refused where the module is made, as the ops refuse theirs."""

from __future__ import annotations

import pytest
from torch import nn

import i2v_kernels.nn as i2v_nn

BAD = [
    (i2v_nn.TemporalConv, (0,), {}, "channels=0 must be at least 1"),
    (i2v_nn.TemporalConv, (8, (3, 0, 1)), {}, "kernel_size[1]=0"),
    (i2v_nn.TemporalConv, (8, (-3, 1, 1)), {}, "kernel_size[0]=-3"),
    (i2v_nn.TemporalConv, (8, (2, 1, 1)), {}, "kernel_size=(2, 1, 1), but kt, kh and kw must be odd"),
    (i2v_nn.TemporalConv, (8, 3), {}, "kernel_size=3 must be 3 ints (kt, kh, kw)"),
    (i2v_nn.TemporalConv, (8,), {"prefix": -1}, "prefix=-1"),
    (i2v_nn.TemporalConv, (8,), {"prefix_mode": "zeros"}, "prefix_mode='zeros'"),
    (i2v_nn.TemporalConv, (8,), {"dilation": 0}, "dilation=0"),
    (i2v_nn.TemporalConv, (8,), {"activation": "tanh"}, "activation='tanh'"),
    (i2v_nn.TemporalConv, (8,), {"residual": 1}, "residual=1"),
    (i2v_nn.TemporalConv, (8,), {"bias": "no"}, "bias='no'"),
    (i2v_nn.STAdapter, (8, 0), {}, "width=0"),
    (i2v_nn.STAdapter, (8, 4, (3, 2, 1)), {}, "must be odd"),
    (i2v_nn.STAdapter, (8, 4), {"prefix": 1.0}, "prefix=1.0 must be an int"),
    (i2v_nn.BottleneckAdapter, (8, -1), {}, "width=-1"),
    (i2v_nn.BottleneckAdapter, (8, 4, "tanh"), {}, "activation='tanh'"),
    (i2v_nn.BottleneckAdapter, (8, 4), {"scale": "1"}, "scale='1'"),
    (i2v_nn.BottleneckAdapter, (8, 4), {"residual": 0}, "residual=0"),
    (i2v_nn.BottleneckAdapter, (8, 4), {"published": ["aim"]}, "published=['aim']"),
    (i2v_nn.LoRALinear, (nn.Linear(4, 4), True), {}, "rank=True"),
    (i2v_nn.LoRALinear, (nn.Linear(4, 4), 0), {}, "rank=0"),
    (i2v_nn.LoRALinear, (nn.Linear(4, 4), 2), {"alpha": float("nan")}, "alpha=nan"),
    (i2v_nn.LoRALinear, (nn.Linear(4, 4), 2), {"rslora": 1}, "rslora=1"),
    (i2v_nn.PatchEmbed, (8, 0), {}, "patch_size[0]=0"),
    (i2v_nn.PatchEmbed, (8, (4,)), {}, "patch_size=(4,) must be 2 ints"),
    (i2v_nn.PatchEmbed, (8, 4), {"mean": (0, float("inf"), 0)}, "mean=(0, inf, 0)"),
    (i2v_nn.PatchEmbed, (8, 4), {"std": (0, 1, 1)}, "std=(0, 1, 1) must be above 0"),
    (i2v_nn.PatchEmbed, (8, 4), {"std": "abc"}, "std='abc'"),
    (i2v_nn.TemporalCrossAttention, (0,), {}, "channels=0"),
    (i2v_nn.TemporalCrossAttention, (8, (3, 0)), {}, "grid[1]=0"),
    (i2v_nn.TemporalCrossAttention, (8, 3), {}, "grid=3 must be 2 ints"),
    (i2v_nn.TemporalCrossAttention, (8, (3, 3)), {"prefix": -1}, "prefix=-1"),
    (i2v_nn.TemporalAttention, (8, 0), {}, "heads=0"),
    (i2v_nn.TemporalAttention, (8, 2.0), {}, "heads=2.0 must be an int"),
    (i2v_nn.TemporalAttention, (8, 2), {"causal": 1}, "causal=1"),
    (i2v_nn.TemporalAttention, (8, 2), {"window": (1,)}, "window=(1,)"),
    (i2v_nn.TemporalAttention, (8, 2), {"offsets": [0]}, "there are H=2 heads"),
    (i2v_nn.FrameAttention, (8, 3), {}, "FrameAttention: heads=3 must divide channels=8"),
    (i2v_nn.FrameAttention, (8, 2, "every"), {}, "frames='every'"),
    (i2v_nn.FrameAttention, (8, 2, [(0,)]), {}, "there are H=2"),
    (i2v_nn.FrameAttention, (8, 2), {"edges": "wrap"}, "edges='wrap'"),
    (i2v_nn.FrameAttention, (8, 2), {"published": "aim"}, "published='aim'"),
    (i2v_nn.FrameAttention.open_vclip, (8, 2, -1), {}, "reach=-1"),
    (i2v_nn.FrameAttention.zeroi2v, (8, 4, 3), {}, "n_div=3 must be at least 2 and divide heads=4"),
    (i2v_nn.MessageAttentionBlock, (8, 0), {}, "heads=0"),
    (i2v_nn.MessageAttentionBlock, (0, 1), {}, "channels=0"),
    (i2v_nn.VideoPromptBlock, (8, 2, 0), {}, "frames=0"),
    (i2v_nn.VideoPromptBlock, (8, 2), {"local": 1}, "local=1"),
    (i2v_nn.ProxyAttention, (8, 3), {}, "ProxyAttention: heads=3"),
    (i2v_nn.SpaceTimeAttention, (8, 2, "space_only"), {}, "attention_type='space_only'"),
    (i2v_nn.GlobalClassAttention, (8, 2, 0), {}, "rank=0"),
    (i2v_nn.TokenShift, ([(1, 0.5)],), {}, "groups[0][1]=0.5"),
    (i2v_nn.TokenShift, (3,), {}, "groups=3"),
    (i2v_nn.TokenShift, ([(1, 1)], "zero"), {}, "padding='zero'"),
    (i2v_nn.TokenShift, ([(1, 1)],), {"tokens": (0, 1, 0)}, "tokens[2]=0"),
    (i2v_nn.TokenShift, ([(1, 1)],), {"tokens": 3}, "tokens=3"),
    (i2v_nn.TokenShift, ([(1, 1)],), {"residual": 1}, "residual=1"),
    (i2v_nn.TokenShift.tsm, (8, 2.5), {}, "n_div=2.5"),
    (i2v_nn.TS2NetShift, (8, 0), {}, "n_div=0"),
]


@pytest.mark.parametrize("make, args, kwargs, text", BAD, ids=[f"{make.__qualname__}-{text}" for make, _, _, text in BAD])
def test_bad_option(make, args, kwargs, text):
    with pytest.raises((TypeError, ValueError)) as raised:
        make(*args, **kwargs)
    assert text in str(raised.value)
