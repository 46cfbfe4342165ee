"""Modules over the ops, with parameters named and initialised as in the published code."""

from . import functional
from .bottleneck_adapter import BottleneckAdapter
from .lora_linear import LoRALinear, merge_lora, unmerge_lora
from .patch_embed import PatchEmbed
from .st_adapter import STAdapter
from .temporal_attention import TemporalAttention
from .temporal_conv import TemporalConv
from .token_shift import TokenShift, TokenT1D, TS2NetShift

__all__ = [
    "BottleneckAdapter",
    "LoRALinear",
    "PatchEmbed",
    "STAdapter",
    "TS2NetShift",
    "TemporalAttention",
    "TemporalConv",
    "TokenShift",
    "TokenT1D",
    "functional",
    "merge_lora",
    "unmerge_lora",
]
