"""Modules over the ops, with parameters named and initialised as in the published code."""

from . import functional
from .bottleneck_adapter import BottleneckAdapter
from .decoder_layer import EVLDecoderLayer, UniFormerV2Extractor
from .frame_attention import FrameAttention
from .global_class_attention import GlobalClassAttention
from .lora_linear import LoRALinear, merge_lora, unmerge_lora
from .message_attention import MessageAttentionBlock
from .patch_embed import PatchEmbed
from .proxy_attention import ProxyAttention
from .space_time_attention import SpaceTimeAttention
from .st_adapter import STAdapter
from .temporal_attention import TemporalAttention
from .temporal_conv import TemporalConv
from .temporal_cross_attention import TemporalCrossAttention
from .text_conditioned_pool import TextConditionedPool
from .token_shift import TokenShift, TokenT1D, TS2NetShift
from .video_prompts import VideoPromptBlock

__all__ = [
    "BottleneckAdapter",
    "EVLDecoderLayer",
    "FrameAttention",
    "GlobalClassAttention",
    "LoRALinear",
    "MessageAttentionBlock",
    "PatchEmbed",
    "ProxyAttention",
    "STAdapter",
    "SpaceTimeAttention",
    "TS2NetShift",
    "TemporalAttention",
    "TemporalConv",
    "TemporalCrossAttention",
    "TextConditionedPool",
    "TokenShift",
    "TokenT1D",
    "UniFormerV2Extractor",
    "VideoPromptBlock",
    "functional",
    "merge_lora",
    "unmerge_lora",
]
