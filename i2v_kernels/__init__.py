"""Fused kernels that turn image-language models into video models at the price of images."""

from . import _extension
from .explain import Explanation, explain
from .ops import (
    bottleneck_adapter,
    contrastive_loss,
    frame_attention,
    frame_bias,
    late_interaction,
    lora_linear,
    masked_mean,
    merge_attention,
    patch_embed,
    st_adapter,
    temporal_attention,
    temporal_conv,
    text_conditioned_pool,
    text_conditioned_similarity,
    token_shift,
    token_shift_,
    video_cross_attention,
)
from .patching import colbert_scores, kernel_mapping, patch, patched, register_attention, unpatch

__version__ = "0.1.0"
__all__ = [
    "Explanation",
    "bottleneck_adapter",
    "colbert_scores",
    "contrastive_loss",
    "explain",
    "frame_attention",
    "frame_bias",
    "kernel_mapping",
    "late_interaction",
    "lora_linear",
    "masked_mean",
    "merge_attention",
    "patch",
    "patch_embed",
    "patched",
    "register_attention",
    "st_adapter",
    "temporal_attention",
    "temporal_conv",
    "text_conditioned_pool",
    "text_conditioned_similarity",
    "token_shift",
    "token_shift_",
    "unpatch",
    "video_cross_attention",
]

_extension.load()
