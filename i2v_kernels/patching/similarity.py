"""Similarities of texts and videos as published: nothing of the size of all pairs of their tokens is stored."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..ops.late_interaction import late_interaction
from .rules import Found, Inputs, Replacement, random_like

FOUR = 0.25  # TS2-Net multiplies by 4


def drl(module: Any) -> Found:
    """``DRL`` with ``interaction`` "ti" or "wti"."""
    interaction = getattr(getattr(module, "config", None), "interaction", None)
    if not callable(getattr(type(module), "wti_interaction", None)) or interaction not in ("ti", "wti"):
        return None
    return Replacement(_interact, "late_interaction", _four, methods=("wti_interaction",))


def _four(module: Any) -> Inputs:
    """Features of texts and of videos, and their masks, as its loader makes them."""
    width = getattr(getattr(module, "cross_config", None), "hidden_size", 512)
    valid = torch.arange(5) < torch.tensor([[5], [2], [4]])
    return random_like(module, 3, 5, width), random_like(module, 3, 4, width), valid.long(), valid[:, 1:].long()


def _interact(module: Any, original: Any, *args: Any, **kwargs: Any) -> Any:
    config, training = module.config, module.training
    if kwargs or len(args) != 4 or (training and config.cdcr != 0):
        return original(*args, **kwargs)
    text, video, text_mask, video_mask = args
    if training and torch.cuda.is_available():  # its own, with a gradient
        gather = original.func.__globals__["allgather"]
        text, video, text_mask, video_mask = (gather(x, config) for x in args)
        torch.distributed.barrier()
    masks = text_mask.bool(), video_mask.bool()
    options: dict[str, Any] = {"text_mask": masks[0], "video_mask": masks[1], "masked": "zero", "mode": config.interaction}
    if config.interaction == "wti":
        for name, x, mask in (("text_weight", text, masks[0]), ("video_weight", video, masks[1])):
            weight = getattr(module, f"{name}_fc")(x).squeeze(2)
            options[name] = weight.masked_fill(~mask, float("-inf")).softmax(-1)
    logits = late_interaction(text, video, normalize=True, **options).to(text.dtype)
    if training:
        logits = module.clip.logit_scale.exp() * logits
    return logits, logits.T, 0.0


def ts2_net(module: Any) -> Found:
    """TS2-Net's ``CLIP4Clip``: the similarity of a sentence with the frames that go with it."""
    methods = ("get_frame_selectedcls_similarity", "get_frame_similarity")
    if not all(callable(getattr(type(module), name, None)) for name in methods):
        return None
    return Replacement(_of_frames, "late_interaction", _sentences, methods=methods)


def _sentences(module: Any) -> Inputs:
    text, video, text_mask, video_mask = _four(module)
    return text[:, :1].clone(), video, text_mask, video_mask


def _of_frames(module: Any, original: Any, *args: Any, **kwargs: Any) -> Any:
    if kwargs or len(args) != 4 or args[0].dim() != 3 or args[0].shape[1] != 1:
        return original(*args, **kwargs)
    text, video, _, video_mask = args
    scores = late_interaction(
        text,
        video,
        text_weight=_ones(text),
        video_weight=torch.zeros_like(_ones(video)),  # frames do not seek the sentence
        video_mask=video_mask.bool(),
        mode="softmax",
        temperature=FOUR,
        unit=True,
        normalize=True,
    )
    return module.clip.logit_scale.exp() * (2 * scores).to(text.dtype)


def _ones(x: Tensor) -> Tensor:
    return torch.ones(x.shape[:2], device=x.device)
