"""All rules. The first that knows a module decides about it."""

from . import (
    adapter,
    attention,
    clip_blocks,
    conv,
    evl,
    frame_attention,
    lora,
    mlp,
    readout,
    shift,
    similarity,
    timesformer,
    x_pool,
)
from .rules import Rule

RULES: tuple[Rule, ...] = (
    timesformer.divided_layer,
    timesformer.self_attention,
    attention.multihead_attention,
    mlp.perceptron,
    shift.temporal_shift,
    conv.depthwise_conv3d,
    conv.patches,
    lora.peft_lora,
    adapter.aim_adapter,
    adapter.st_adapter_module,
    clip_blocks.aim_block,
    clip_blocks.x_clip_block,
    frame_attention.open_vclip,
    frame_attention.clip_vip,
    evl.attention,
    evl.encoder_layer,
    evl.cross_attention,
    evl.decoder,
    readout.evl_decoder_layer,
    readout.uniformer_extractor,
    x_pool.transformer,
    similarity.drl,
    similarity.ts2_net,
)
