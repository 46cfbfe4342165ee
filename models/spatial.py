"""Attention among the tokens of a frame: the image model's own weights, read packed, through PyTorch or flash-attn."""

from __future__ import annotations

import importlib
import importlib.util
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from i2v_kernels.extras import missing

BACKENDS = ("sdpa", "flash", "module")


def spatial_attention(block: Any, x: Tensor, backend: str = "sdpa") -> Tensor:
    """The attention branch of an open_clip block, without the residual; ``x [batch, tokens, C]`` is normalised.

    ``backend="sdpa"`` reads q, k and v as strided views of one projection, where ``nn.MultiheadAttention`` copies them apart
    first; ``"flash"`` gives the same views to flash-attn (version 4 on Hopper and Blackwell if it is installed, else 2), and
    raises ``NotImplementedError`` where that cannot run; ``"module"`` calls the block's own attention, as do the other two
    where it is another module than ``nn.MultiheadAttention`` or carries hooks. All give the same numbers up to rounding.
    """
    if backend not in BACKENDS:
        raise ValueError(f"spatial attention {backend!r} is unknown; there are {', '.join(BACKENDS)}")
    attn = block.attn
    if backend == "module" or not _is_plain(attn):
        return block.ls_1(block.attention(x) if hasattr(block, "attention") else block.ln_attn(attn(x)))
    qkv = F.linear(x, attn.in_proj_weight, attn.in_proj_bias).unflatten(2, (3, attn.num_heads, attn.head_dim))
    if backend == "flash":
        reason = why_not_flash(qkv)
        if reason is not None:
            raise NotImplementedError(f"spatial attention 'flash' cannot run: {reason}")
        out = _flash(flash_version(qkv.device))(*qkv.unbind(2))
        out = out[0] if isinstance(out, tuple) else out  # version 4 returns its log-sum-exp too
    else:
        out = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4).unbind(0)).transpose(1, 2)
    return block.ls_1(attn.out_proj(out.flatten(2)))


def _is_plain(attn: nn.Module) -> bool:
    """``nn.MultiheadAttention`` as CLIP has it, so that projection, attention and projection are all it does."""
    if type(attn) is not nn.MultiheadAttention or attn._forward_hooks or attn._forward_pre_hooks:
        return False
    whole = attn._qkv_same_embed_dim and attn.bias_k is None and not attn.add_zero_attn and attn.batch_first
    return whole and (attn.dropout == 0.0 or not attn.training)


def flash_version(device: torch.device) -> int | None:
    """4 or 2: the flash-attn that would run on this device; None if none is installed."""
    if importlib.util.find_spec("flash_attn") is None:
        return None
    if torch.cuda.get_device_capability(device)[0] >= 9 and importlib.util.find_spec("flash_attn.cute") is not None:
        return 4
    return 2


def why_not_flash(qkv: Tensor) -> str | None:
    """None if flash-attn takes this ``[batch, tokens, 3, H, D]``, else the reason."""
    if qkv.device.type != "cuda":
        return f"the tensors are on {qkv.device}, flash-attn needs a GPU"
    if qkv.dtype not in (torch.float16, torch.bfloat16):
        return f"the tensors are {qkv.dtype}, flash-attn takes float16 and bfloat16 (train with --precision bf16)"
    if qkv.shape[-1] > 256 or qkv.shape[-1] % 8:
        return f"heads of {qkv.shape[-1]} channels; flash-attn takes multiples of 8 up to 256"
    if flash_version(qkv.device) is None:
        return missing("flash_attn", "spatial='flash'")
    return None


def check_flash(model: Any, dtype: torch.dtype) -> None:
    """``ValueError`` if ``model``, a ``VideoCLIP``, asks for flash-attn where it cannot run (autocast to ``dtype``)."""
    if getattr(getattr(model, "method", None), "spatial", None) != "flash":
        return
    for attn in (block.attn for block in model.visual.transformer.resblocks):
        if _is_plain(attn):
            weight = attn.in_proj_weight
            dtype = weight.dtype if dtype == torch.float32 else dtype
            reason = why_not_flash(torch.empty(0, 1, 3, attn.num_heads, attn.head_dim, dtype=dtype, device=weight.device))
            if reason is not None:
                raise ValueError(f"spatial='flash' cannot be used: {reason}; spatial='sdpa' gives the same numbers")


@cache
def _flash(version: int | None) -> Any:
    return importlib.import_module("flash_attn.cute" if version == 4 else "flash_attn").flash_attn_func
