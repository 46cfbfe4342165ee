"""Models as users have them, small and seeded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from published import (
    EVL,
    AIMAdapter,
    AIMBlock,
    CLIPViPLayer,
    OpenVCLIPBlock,
    STBlock,
    TemporalShift,
    TimeSformerBlock,
    XCLIPBlock,
)
from torch import Tensor, nn


class OtherShift(TemporalShift):
    """A fork that turns the clip round: the same parts, another result."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flip(0))


SMALL = {
    "image_size": 32, "num_frames": 4, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3,
    "intermediate_size": 96,
}  # fmt: skip


def timesformer(attention_type: str = "divided_space_time", **options: Any) -> tuple[nn.Module, Tensor]:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.TimesformerConfig(**SMALL, patch_size=8, attention_type=attention_type, **options)
    return transformers.TimesformerModel(config).eval(), torch.randn(2, 4, 3, 32, 32)


def xclip() -> tuple[nn.Module, Tensor]:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.XCLIPVisionConfig(**SMALL, patch_size=8)
    return transformers.XCLIPVisionModel(config).eval(), torch.randn(8, 3, 32, 32)


def videomae() -> tuple[nn.Module, Tensor]:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.VideoMAEConfig(**SMALL, patch_size=8)
    return transformers.VideoMAEModel(config).eval(), torch.randn(2, 4, 3, 32, 32)


def vivit() -> tuple[nn.Module, Tensor]:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.VivitConfig(**SMALL, tubelet_size=[2, 8, 8])
    return transformers.VivitModel(config).eval(), torch.randn(2, 4, 3, 32, 32)


def vjepa2() -> tuple[nn.Module, Tensor]:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.VJEPA2Config(
        crop_size=32, patch_size=8, frames_per_clip=4, tubelet_size=2, hidden_size=48, num_hidden_layers=2,
        num_attention_heads=2, pred_hidden_size=48, pred_num_hidden_layers=1, pred_num_attention_heads=2,
    )  # fmt: skip
    return transformers.VJEPA2Model(config).eval(), torch.randn(2, 4, 3, 32, 32)


def open_clip() -> tuple[nn.Module, Tensor]:
    open_clip = pytest.importorskip("open_clip")
    torch.manual_seed(0)
    visual = open_clip.transformer.VisionTransformer(
        32, 8, 48, 2, 3, 2.0, output_dim=16, act_layer=open_clip.transformer.QuickGELU
    )
    return visual.eval(), torch.randn(4, 3, 32, 32)


def timm_vit() -> tuple[nn.Module, Tensor]:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.models.vision_transformer.VisionTransformer(img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3)
    return model.eval(), torch.randn(4, 3, 32, 32)


def tsm() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    blocks = [TemporalShift(nn.Conv2d(16, 16, 1), 4), nn.ReLU(), TemporalShift(nn.Conv2d(16, 24, 3, padding=1), 4)]
    return nn.Sequential(*blocks), torch.randn(8, 16, 6, 5)


def conv_adapters() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    kernels = ((3, 1, 1), (1, 3, 3), (3, 3, 3), (5, 1, 1), (7, 1, 1))
    convs = [nn.Conv3d(8, 8, k, padding=tuple(size // 2 for size in k), groups=8) for k in kernels]
    dilated = nn.Conv3d(8, 8, (3, 1, 1), padding="same", dilation=(2, 1, 1), groups=8, bias=False)
    return nn.Sequential(*convs, dilated), torch.randn(2, 8, 4, 5, 6)


def trained(model: nn.Module) -> nn.Module:
    """With weights that are not zero, as adapters have them at first."""
    for p in model.parameters():
        nn.init.normal_(p, std=0.2 if p.dim() > 1 else 0.1)
    return model


def aim_adapters() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return trained(nn.Sequential(AIMAdapter(16), AIMAdapter(16, skip_connect=False))), torch.randn(2, 5, 16)


def aim_blocks() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return trained(nn.Sequential(AIMBlock(32, 2, 4), AIMBlock(32, 2, 4, adapters=2))).eval(), torch.randn(6, 8, 32)


def xclip_blocks() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return trained(nn.Sequential(XCLIPBlock(32, 2, 4), XCLIPBlock(32, 2, 4))).eval(), torch.randn(6, 8, 32)


def open_vclip_blocks() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    blocks = (OpenVCLIPBlock(32, 2, 4), OpenVCLIPBlock(32, 2, 4, "expand_temporal_view_step3"))
    return trained(nn.Sequential(*blocks)).eval(), torch.randn(6, 8, 32)


def clip_vip_layers() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return trained(nn.Sequential(CLIPViPLayer(32, 2), CLIPViPLayer(32, 2))).eval(), torch.randn(2, 14, 32)


def st_blocks() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return trained(nn.Sequential(STBlock(16), STBlock(16, (3, 3, 3)))).eval(), torch.randn(8, 10, 16)


def timesformer_blocks() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return trained(nn.Sequential(TimeSformerBlock(32, 2), TimeSformerBlock(32, 2))).eval(), torch.randn(2, 25, 32)


def evl() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return trained(EVL()).eval(), torch.randn(2, 4, 6, 48)


def peft_lora() -> tuple[nn.Module, Tensor]:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 16))
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["0", "2"], init_lora_weights=False))
    return model.eval(), torch.randn(2, 5, 16)


# name -> (a maker, the classes that are replaced in it)
MODELS = {
    "timesformer divided": (timesformer, {"TimesformerLayer", "TimesformerSelfAttention", "Conv2d"}),
    "timesformer joint": (lambda: timesformer("joint_space_time"), {"TimesformerSelfAttention", "Conv2d"}),
    "timesformer space only": (lambda: timesformer("space_only"), {"TimesformerSelfAttention", "Conv2d"}),
    "xclip": (xclip, {"XCLIPMLP", "Conv2d"}),
    "videomae": (videomae, {"Conv3d"}),
    "vivit": (vivit, {"Conv3d"}),
    "vjepa2": (vjepa2, {"Conv3d", "VJEPA2MLP"}),
    "open_clip": (open_clip, {"MultiheadAttention", "Sequential", "Conv2d"}),
    "timm": (timm_vit, {"Conv2d", "Mlp"}),
    "tsm": (tsm, {"TemporalShift"}),
    "conv adapters": (conv_adapters, {"Conv3d"}),
    "aim adapters": (aim_adapters, {"AIMAdapter"}),
    "aim blocks": (aim_blocks, {"AIMBlock", "AIMAdapter", "MultiheadAttention", "Sequential"}),
    "x-clip blocks": (xclip_blocks, {"XCLIPBlock", "MultiheadAttention", "Sequential"}),
    "open-vclip blocks": (open_vclip_blocks, {"OpenVCLIPAttention", "Sequential"}),
    "clip-vip layers": (clip_vip_layers, {"CLIPViPAttention", "Sequential"}),
    "st-adapter blocks": (st_blocks, {"STAdapter", "Conv3d", "Sequential"}),
    "timesformer blocks": (timesformer_blocks, {"TimeSformerBlock", "Attention", "Sequential"}),
    "evl": (evl, {"EVLDecoder", "EVLDecoderLayer", "EVLEncoderLayer", "EVLAttention", "Sequential"}),
    "peft lora": (peft_lora, {"Linear"}),
}
