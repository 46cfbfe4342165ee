"""From a clip's vector to class logits, or to a place among captions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class TextHead(nn.Module):
    """Cosine similarity to the classes' caption embeddings, times ``exp(logit_scale)`` (CLIP, Radford et al. 2021).

    ``text_features [classes, E]``; takes ``[B, E]``, returns ``[B, classes]``. Nothing here is trained or saved:
    the captions and the image-text model determine it.
    """

    projected = True
    text_features: Tensor
    logit_scale: Tensor

    def __init__(self, text_features: Tensor, logit_scale: Tensor) -> None:
        super().__init__()
        self.register_buffer("text_features", F.normalize(text_features.float(), dim=-1), persistent=False)
        self.register_buffer("logit_scale", logit_scale.detach().float().clone(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):  # a hundredfold cosine has no digits left in bfloat16
            return self.logit_scale.exp() * F.normalize(x.float(), dim=-1) @ self.text_features.T


class LinearHead(nn.Module):
    """Dropout and one linear layer, ``[B, C]`` to ``[B, classes]``; parameters ``fc.weight`` and ``fc.bias``."""

    projected = False

    def __init__(self, channels: int, classes: int, *, dropout: float = 0.0, std: float = 0.02) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(channels, classes)
        nn.init.normal_(self.fc.weight, std=std)
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.dropout(x))


class RetrievalHead(nn.Module):
    """Clip embeddings at unit length, ``[B, E]`` to ``[B, E]`` in float32, to be compared with those of captions.

    Parameter ``logit_scale``: the logarithm of what cosines are multiplied by in the loss. It begins as the image-text
    model's, and training keeps it in 0 .. ln 100 (CLIP, Radford et al. 2021, section 2.5).
    """

    projected = True

    def __init__(self, logit_scale: Tensor) -> None:
        super().__init__()
        self.logit_scale = nn.Parameter(logit_scale.detach().float().clone())

    def forward(self, x: Tensor) -> Tensor:
        return unit(x)


def unit(x: Tensor) -> Tensor:
    """``x [B, E]`` at unit length in float32: bfloat16's cosines have no digits left when they are multiplied by a hundred."""
    with torch.autocast(x.device.type, enabled=False):
        return F.normalize(x.float(), dim=-1)


@torch.no_grad()
def text_features(clip_model: Any, captions: Sequence[str], tokenizer: Callable[[list[str]], Tensor]) -> Tensor:
    """Embeddings ``[captions, E]`` of ``captions`` by the model's own text tower, on the model's device."""
    device = next(clip_model.parameters()).device
    return clip_model.encode_text(tokenizer(list(captions)).to(device))
