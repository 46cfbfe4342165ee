from .bottleneck_adapter import bottleneck_adapter
from .contrastive_loss import contrastive_loss
from .frame_attention import frame_attention
from .frame_bias import frame_bias
from .late_interaction import late_interaction
from .lora_linear import lora_linear
from .masked_mean import masked_mean
from .merge import merge_attention
from .patch_embed import patch_embed
from .st_adapter import st_adapter
from .temporal_attention import temporal_attention
from .temporal_conv import temporal_conv
from .text_conditioned_pool import text_conditioned_pool
from .text_conditioned_similarity import text_conditioned_similarity
from .token_shift import token_shift, token_shift_
from .video_cross_attention import video_cross_attention

__all__ = [
    "bottleneck_adapter",
    "contrastive_loss",
    "frame_attention",
    "frame_bias",
    "late_interaction",
    "lora_linear",
    "masked_mean",
    "merge_attention",
    "patch_embed",
    "st_adapter",
    "temporal_attention",
    "temporal_conv",
    "text_conditioned_pool",
    "text_conditioned_similarity",
    "token_shift",
    "token_shift_",
    "video_cross_attention",
]
