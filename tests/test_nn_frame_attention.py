"""The modules over ``frame_attention``: each equals its method's formula, written out as the published code computes it.

Published code joins, repeats and slices; ``[B, T, L, C]`` in, the formulas here do so too.
"""

from __future__ import annotations

import copy
import doctest
import importlib

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from i2v_kernels import nn as i2v_nn
from i2v_kernels.testing.opinfo import sequence_first

C, H, PATCHES, RANK = 24, 3, 5, 4
CLIP_NAMES = ["in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias"]
SEPARATE = [f"{layer}_proj.{part}" for layer in "qkv" for part in ("weight", "bias")] + ["out_proj.weight", "out_proj.bias"]
MLP = [f"mlp.{layer}.{part}" for layer in ("{0}", "{1}") for part in ("weight", "bias")]


def attend(q, k, v):
    """``[..., L, C]`` in H heads."""
    q, k, v = (x.unflatten(-1, (H, -1)).transpose(-2, -3) for x in (q, k, v))
    return ((q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1) @ v).transpose(-2, -3).flatten(-2)


def projected(m, x):
    """q, k and v, by whatever names."""
    if hasattr(m, "q_proj"):
        return m.q_proj(x), m.k_proj(x), m.v_proj(x)
    weight, bias = (m.qkv.weight, m.qkv.bias) if hasattr(m, "qkv") else (m.in_proj_weight, m.in_proj_bias)
    return F.linear(x, weight, bias).chunk(3, -1)


def itself(m, x):
    """Multi-head self-attention of ``[..., L, C]``."""
    return m.out_proj(attend(*projected(m, x)))


def perceptron(m, first, second, x):
    hidden = getattr(m, first)(x)
    return getattr(m, second)(hidden * torch.sigmoid(1.702 * hidden))


def x_clip(m, x):
    message = m.message_fc(x[:, :, 0])  # [B, T, C]
    message = message + itself(m.message_attn, m.message_ln(message))
    x = torch.cat([x, message[:, :, None]], 2)
    x = (x + itself(m.attn, m.ln_1(x)))[:, :, :-1]
    return x + perceptron(m.mlp, "c_fc", "c_proj", m.ln_2(x))


def vita(m, x, global_prompts=None):
    b, t, length, _ = x.shape
    if global_prompts is not None:
        x = torch.cat([x[:, :, :1], global_prompts.expand(b, t, -1, -1), x[:, :, 1:]], 2)
    before = x.shape[2]
    if m.summary or m.local:
        own = m.cls_proj(x[:, :, 0])
    if m.summary:
        x = torch.cat([x, (own + itself(m.summary_attn_layer, m.summary_ln(own)))[:, :, None]], 2)
    if m.local:
        x = torch.cat([x[:, :, :1], (m.local_prompts + own)[:, None].repeat(1, t, 1, 1), x[:, :, 1:]], 2)
    x = x + itself(m.attn, m.norm1(x))
    x = x[:, :, : x.shape[2] - m.summary]
    x = torch.cat([x[:, :, :1], x[:, :, 1 + t * m.local :]], 2)
    assert x.shape[2] == before
    x = x + perceptron(m.mlp, "fc1", "fc2", m.norm2(x))  # of global prompts too
    return torch.cat([x[:, :, :1], x[:, :, 1 + before - length :]], 2)


def clip_vip(m, x, size):
    proxies, t, patches = size
    q, k, v = projected(m, x)
    k_t, v_t = (
        torch.cat([y[:, None, :proxies].repeat(1, t, 1, 1), y[:, proxies:].reshape(-1, t, patches, C)], 2) for y in (k, v)
    )
    frames = attend(q[:, proxies:].reshape(-1, t, patches, C), k_t, v_t).flatten(1, 2)
    return m.out_proj(torch.cat([attend(q[:, :proxies], k, v), frames], 1))


def open_vclip(m, x, reach):
    q, k, v = projected(m, x)
    windows = []
    for y in (k, v):  # the next frames, those before, their own; zeros where there is none, behind the projection
        parts = []
        for offset in (*range(1, reach + 1), *range(-1, -reach - 1, -1), 0):
            part = torch.zeros_like(y)
            for t in range(y.shape[1]):
                if 0 <= t + offset < y.shape[1]:
                    part[:, t] = y[:, t + offset]
            parts.append(part)
        windows.append(torch.cat(parts, 2))
    return m.out_proj(attend(q, *windows))


def zeroi2v(m, x, n_div):
    q, k, v = projected(m, x)
    fold, shifted = C // n_div, []
    for y in (k, v):
        out = y.clone()
        out[:, 1:, :, :fold] = y[:, :-1, :, :fold]
        out[:, :-1, :, fold : 2 * fold] = y[:, 1:, :, fold : 2 * fold]
        shifted.append(out)
    return m.out_proj(attend(q, *shifted))


def divided(m, x, t):
    token = x[:, :1].repeat(1, t, 1)[:, :, None]  # [B, T, 1, C]
    rows = torch.cat([token, x[:, 1:].unflatten(1, (-1, t)).transpose(1, 2)], 2)
    rows = m.proj(attend(*projected(m, rows)))
    return torch.cat([rows[:, :, 0].mean(1, True), rows[:, :, 1:].transpose(1, 2).flatten(1, 2)], 1)


def discovla(m, x):
    q, k, v = ((x @ m.TVPt_LoRA_a.T) @ m.TVPt_LoRA_b.T + F.linear(x, m.in_proj_weight, m.in_proj_bias)).chunk(3, -1)
    out = m.out_proj(attend(q, k, v))
    hidden = F.linear(out[:, :, 0], m.TVPt_down_weight, m.TVPt_down_bias)
    token = F.linear(hidden * torch.sigmoid(1.702 * hidden), m.TVPt_up_weight, m.TVPt_up_bias)
    token = token + m.out_proj(attend(q[:, :, 0], k.flatten(1, 2), v.flatten(1, 2)))
    return torch.cat([token[:, :, None], out[:, :, 1:]], 2)


def frames_of(x, t):
    """``[B, T, L, C]`` of T frames as TimeSformer's ``[B, 1 + P * T, C]``, with the class token of the first."""
    return torch.cat([x[:, 0, :1], x[:, :t, 1:].transpose(1, 2).flatten(1, 2)], 1)


def proxies_of(x):
    return torch.cat([x[:, 0, :2], x[:, :, 1:].flatten(1, 2)], 1)


PROMPTS = torch.randn(3, C, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
NAMED_MLP = [name.format("c_fc", "c_proj") for name in MLP]
NORMED = ["weight", "bias"]
X_CLIP = [
    *("message_fc.weight", "message_fc.bias", "message_ln.weight", "message_ln.bias"),
    *(f"{attn}.{name}" for attn in ("message_attn", "attn") for name in CLIP_NAMES),
    *("ln_1.weight", "ln_1.bias", *NAMED_MLP, "ln_2.weight", "ln_2.bias"),
]  # fmt: skip
VITA = ["local_prompts", *(f"attn.{name}" for name in SEPARATE), *(name.format("fc1", "fc2") for name in MLP)]
VITA += [f"{norm}.{part}" for norm in ("norm1", "norm2", "cls_proj", "summary_ln") for part in NORMED]
VITA += [f"summary_attn_layer.{name}" for name in SEPARATE]
DISCOVLA = ["LoRA_a", "LoRA_b", "down_weight", "down_bias", "up_weight", "up_bias"]

# name -> how to make it for T frames, its formula, what both are given beside the module, and the published names
MODULES = {
    "X-CLIP": (lambda t: i2v_nn.MessageAttentionBlock(C, H), x_clip, lambda x: (x,), X_CLIP),
    "Vita-CLIP": (lambda t: i2v_nn.VideoPromptBlock(C, H, t), vita, lambda x: (x, PROMPTS.to(x)), VITA),
    "Vita-CLIP, local": (
        lambda t: i2v_nn.VideoPromptBlock(C, H, t, summary=False), vita, lambda x: (x,),
        [name for name in VITA if "summary" not in name],
    ),
    "Vita-CLIP, summary": (
        lambda t: i2v_nn.VideoPromptBlock(C, H, t, local=False), vita, lambda x: (x,), VITA[1:],
    ),
    "Vita-CLIP, global": (
        lambda t: i2v_nn.VideoPromptBlock(C, H, t, False, False), vita, lambda x: (x, PROMPTS.to(x)),
        [name for name in VITA if name[:4] in ("attn", "mlp.", "norm")],
    ),
    "CLIP-ViP": (
        lambda t: i2v_nn.ProxyAttention(C, H), clip_vip,
        lambda x: (proxies_of(x), (2, x.shape[1], PATCHES)), SEPARATE,
    ),
    **{
        f"Open-VCLIP {reach}": (
            lambda t, reach=reach: i2v_nn.FrameAttention.open_vclip(C, H, reach),
            lambda m, x, reach=reach: open_vclip(m, x, reach), lambda x: (x,), CLIP_NAMES,
        )
        for reach in (1, 2, 3)
    },
    "ZeroI2V": (
        lambda t: i2v_nn.FrameAttention.zeroi2v(C, H, 3), lambda m, x: zeroi2v(m, x, 3), lambda x: (x,), CLIP_NAMES,
    ),
    "divided": (
        lambda t: i2v_nn.SpaceTimeAttention(C, H), divided, lambda x: (frames_of(x, x.shape[1]), x.shape[1]),
        ["qkv.weight", "qkv.bias", "proj.weight", "proj.bias"],
    ),
    "joint": (
        lambda t: i2v_nn.SpaceTimeAttention(C, H, "joint_space_time"), lambda m, x, t: m.proj(attend(*projected(m, x))),
        lambda x: (frames_of(x, x.shape[1]), x.shape[1]), ["qkv.weight", "qkv.bias", "proj.weight", "proj.bias"],
    ),
    "DiscoVLA": (
        lambda t: i2v_nn.GlobalClassAttention(C, H, RANK), discovla, lambda x: (x,),
        CLIP_NAMES + [f"TVPt_{name}" for name in DISCOVLA],
    ),
}  # fmt: skip
# Published tokens seen as [B, T, L, C]: [B * T, L, C], [L, B * T, C]; a slice of something larger. And their order in memory.
LAYOUTS = {
    "frames first": (torch.Tensor.clone, (0, 1, 2, 3)),
    "sequence first": (lambda x: x.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3), (2, 0, 1, 3)),
    "slice": (sequence_first, None),
}


def made(name, t):
    """With weights as after training: prompts, updates and biases that begin at zero are not."""
    torch.manual_seed(0)
    module = MODULES[name][0](t)
    with torch.no_grad():
        for p in module.parameters():
            p += 0.3 * torch.randn(p.shape) if p.dim() == 1 else torch.randn(p.shape) * p.shape[-1] ** -0.5
    return module


def results(call, module, given):
    """Output and all gradients, of inputs and parameters."""
    given = [x.detach().requires_grad_() if isinstance(x, torch.Tensor) else x for x in given]
    out = call(*given)
    weights = torch.cos(torch.arange(out.numel())).view(out.shape).to(out)
    wanted = {f"input {i}": x for i, x in enumerate(given) if isinstance(x, torch.Tensor)} | dict(module.named_parameters())
    grads = torch.autograd.grad(out, list(wanted.values()), weights)
    return {"output": out.detach()} | dict(zip(wanted, grads))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("frames", [1, 4])
@pytest.mark.parametrize("name", MODULES)
def test_equals_its_formula(name, frames, layout):
    """To float64's rounding, edge frames and every gradient included."""
    module = made(name, frames).double()
    _, formula, inputs, _ = MODULES[name]
    laid, order = LAYOUTS[layout]
    x = laid(torch.randn(2, frames, 1 + PATCHES, C, dtype=torch.float64))
    given = inputs(x)
    want = results(lambda *args: formula(module, *args), module, given)
    got = results(module, module, given)
    assert got.keys() == want.keys()
    for what, expected in want.items():
        torch.testing.assert_close(got[what], expected, rtol=1e-9, atol=1e-11 * max(1, expected.abs().max().item()), msg=what)
    if given[0] is x and order is not None:
        assert got["output"].permute(order).is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", MODULES)
def test_is_as_exact_as_its_formula(name, dtype):
    """In the narrower dtypes, against float64: as far off as PyTorch's operators one by one, all gradients too.

    Not 1.5 times, as ops are held to: gradients are small differences of what an op rounds, which the next layer sums up.
    """
    module = made(name, 4).to(dtype)
    _, formula, inputs, _ = MODULES[name]
    given = inputs(torch.randn(2, 4, 1 + PATCHES, C, dtype=dtype))
    exact = copy.deepcopy(module).double()
    wide = [x.double() if isinstance(x, torch.Tensor) else x for x in given]
    want = results(lambda *args: formula(exact, *args), exact, wide)
    eager = results(lambda *args: formula(module, *args), module, given)
    got = results(module, module, given)
    for what, expected in want.items():
        assert got[what].dtype == dtype
        # the gradient of a bias of keys may be zero but for rounding
        size = expected.norm() if not what.endswith("k_proj.bias") else max(x.norm() for x in want.values())
        limit = 3 * (eager[what].double() - expected).norm() + torch.finfo(dtype).eps * size
        assert (got[what].double() - expected).norm() <= limit, what


@pytest.mark.parametrize("name", MODULES)
def test_published_names(name):
    assert sorted(made(name, 4).state_dict()) == sorted(MODULES[name][3])


@pytest.mark.parametrize("name", MODULES)
def test_autocast(name):
    module, formula = made(name, 4), MODULES[name][1]
    given = MODULES[name][2](torch.randn(2, 4, 1 + PATCHES, C))
    want = module(*given)
    with torch.autocast("cpu", torch.bfloat16):
        got, eager = module(*given), formula(module, *given)
    assert got.dtype == eager.dtype
    torch.testing.assert_close(got.float(), want, rtol=0.1, atol=0.05 * want.abs().max().item())


@pytest.mark.parametrize("name", ["X-CLIP", "Vita-CLIP", "CLIP-ViP", "ZeroI2V", "divided", "DiscoVLA"])
def test_compiles_whole(name):
    module = made(name, 4)
    given = MODULES[name][2](torch.randn(2, 4, 1 + PATCHES, C))
    want = module(*given)
    torch._dynamo.reset()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*given), want)


def test_multihead_attention_is_frame_attention_within_frames():
    theirs = nn.MultiheadAttention(C, H, batch_first=True)
    nn.init.normal_(theirs.in_proj_bias)
    ours = i2v_nn.FrameAttention(C, H)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 4, 6, C)
    rows = x.flatten(0, 1)
    torch.testing.assert_close(ours(x), theirs(rows, rows, rows)[0].view(x.shape))


def test_zero_keys_make_the_bias_of_keys_matter():
    """Where all keys have it, it adds the same to every score of a query, which softmax takes out."""

    def learns(module):
        module = module.double()
        out = module(torch.randn(2, 3, 4, C, dtype=torch.float64))
        grad = torch.autograd.grad(out.square().sum(), module.in_proj_bias)[0]
        return grad[C : 2 * C].abs().max() > 1e-9

    assert learns(i2v_nn.FrameAttention.open_vclip(C, H)) and not learns(i2v_nn.FrameAttention(C, H, (-1, 0, 1)))


def test_masked_frames_are_no_keys():
    module, mask = i2v_nn.FrameAttention(C, H, "all"), torch.tensor([[True, True, False], [True, True, True]])
    x = torch.randn(2, 3, 4, C)
    torch.testing.assert_close(module(x, mask=mask)[0, :2], module(x[:1, :2])[0])


def test_no_patch_and_no_prompt():
    """A clip of class tokens alone; a block without any prompt is CLIP's."""
    token = torch.randn(2, 1, C)
    assert i2v_nn.SpaceTimeAttention(C, H)(token, 4).shape == token.shape
    plain = i2v_nn.VideoPromptBlock(C, H, summary=False, local=False)
    x = torch.randn(2, 3, 4, C)
    torch.testing.assert_close(plain(x), vita(plain, x))


@pytest.mark.parametrize(
    "call, text",
    [
        (lambda: i2v_nn.FrameAttention(C, H)(torch.zeros(2, 4, C)), f"x.shape=(2, 4, {C}), but [B, T, N, {C}]"),
        (lambda: i2v_nn.FrameAttention(C, H)(torch.zeros(1, 2, 3, C), torch.zeros(2, C)), "extra.shape=(2, 24)"),
        (lambda: i2v_nn.FrameAttention(C, H)(torch.zeros(1, 2, 3, C), [None]), "extra must be a torch.Tensor, got NoneType"),
        (lambda: i2v_nn.VideoPromptBlock(C, H, 8)(torch.zeros(1, 2, 3, C)), "local prompts for 8 frames"),
        (lambda: i2v_nn.ProxyAttention(C, H)(torch.zeros(1, 9, C), (2, 4, 2)), "x.shape=(1, 9, 24) and size=(2, 4, 2)"),
        (lambda: i2v_nn.ProxyAttention(C, H)(torch.zeros(1, 9, C), (2, 4)), "size=(2, 4) must be 3 ints (M, T, P)"),
        (lambda: i2v_nn.SpaceTimeAttention(C, H)(torch.zeros(1, 9, C), 3), "but [B, 1 + P * 3, 24]"),
        (lambda: i2v_nn.SpaceTimeAttention(C, H)(torch.zeros(1, 9, C), 0), "frames=0"),
        (lambda: i2v_nn.GlobalClassAttention(C, H)(torch.zeros(2, 4, C)), "x.shape=(2, 4, 24)"),
    ],
)
def test_refuses_what_does_not_fit(call, text):
    with pytest.raises((TypeError, ValueError)) as raised:
        call()
    assert text in str(raised.value)


@pytest.mark.parametrize(
    "module",
    [
        "frame_attention",
        "global_class_attention",
        "message_attention",
        "proxy_attention",
        "space_time_attention",
        "video_prompts",
    ],
)
def test_docstring_examples(module):
    result = doctest.testmod(importlib.import_module(f"i2v_kernels.nn.{module}"))
    assert result.attempted > 0 and result.failed == 0
