"""The registry of ops: what every test, bench and table of this package iterates over."""

from . import (
    bottleneck_adapter,
    frame_attention,
    frame_bias,
    late_interaction,
    lora_linear,
    masked_mean,
    patch_embed,
    st_adapter,
    temporal_attention,
    temporal_conv,
    text_conditioned_pool,
    text_conditioned_similarity,
    token_shift,
    video_cross_attention,
)
from .opinfo import OpInfo, Sample

OPINFOS: tuple[OpInfo, ...] = (
    temporal_attention.INFO,
    frame_attention.INFO,
    video_cross_attention.INFO,
    frame_bias.INFO,
    late_interaction.INFO,
    token_shift.INFO,
    temporal_conv.INFO,
    st_adapter.INFO,
    bottleneck_adapter.INFO,
    lora_linear.INFO,
    patch_embed.INFO,
    masked_mean.INFO,
    text_conditioned_pool.INFO,
    text_conditioned_similarity.INFO,
)

__all__ = ["OPINFOS", "OpInfo", "Sample"]
