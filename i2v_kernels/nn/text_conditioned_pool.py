"""X-Pool's layer as a module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..ops import checks, text_conditioned_pool
from ..ops.text_conditioned_similarity.reference import over_length
from .folded_pool import Cosines, by_frames, drops, folded, probabilities
from .plain import is_plain

NAME = "TextConditionedPool"
CHUNK = {"cpu": 16 << 20, "cuda": 256 << 20}  # bytes of scores, or of output, that a chunk of texts has


class TextConditionedPool(nn.Module):
    """X-Pool's ``Transformer`` (arXiv 2203.15086): every video as every text sees it, and their similarities.

    The text attends to a video's frames, then norm, linear layer, dropout, norm. Parameters have the published names,
    ``cross_attn.{q_proj,k_proj,v_proj,out_proj}``, ``linear_proj``, ``layer_norm1`` to ``layer_norm3``, shapes and
    initialisation (identities), so state dicts pass both ways.

    Of one head, and where there are more texts than frames, all that is linear is folded into the frames: no pair of
    text and video meets a matrix of ``C * C``. ``similarity`` does so without ``[V, A, C]``, as long as nothing is dropped.

    Args:
        channels: of texts and frames, C.
        heads: of the attention; a divisor of C. Published: 1.
        dropout: probability, of the linear layer's output.

    Shape: ``text [A, C]``, ``video [V, F, C]``, ``mask [V, F]`` (True where valid; of a video without a valid frame the
    attention gives zeros) to ``[V, A, C]``; ``similarity`` to ``[A, V]``, float32 at least.

    Examples:
        >>> import torch
        >>> layer = TextConditionedPool(64)
        >>> text, video = torch.randn(20, 64), torch.randn(3, 12, 64)
        >>> layer.eval()(text, video).shape, layer.similarity(text, video).shape
        (torch.Size([3, 20, 64]), torch.Size([20, 3]))
    """

    def __init__(self, channels: int = 512, heads: int = 1, dropout: float = 0.3) -> None:
        super().__init__()
        checks.integer(NAME, "channels", channels, low=1)
        checks.integer(NAME, "heads", heads, low=1)
        if channels % heads:
            raise ValueError(f"{NAME}: heads={heads} does not divide channels={channels}")
        if not 0 <= checks.number(NAME, "dropout", dropout) <= 1:
            raise ValueError(f"{NAME}: dropout={dropout!r} must lie in [0, 1]")
        self.heads = heads
        self.cross_attn: Any = nn.Module()
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            self.cross_attn.add_module(name, _identity(channels))
        self.linear_proj = _identity(channels)
        self.layer_norm1, self.layer_norm2, self.layer_norm3 = (nn.LayerNorm(channels) for _ in range(3))
        self.dropout = nn.Dropout(dropout)

    def forward(self, text: Tensor, video: Tensor, *, mask: Tensor | None = None) -> Tensor:
        video, mask = self._checked(text, video, mask)
        if len(text) > video.shape[1] and self._folds():
            return by_frames(self, text, video, mask)
        return self._whole(text, video, mask)

    def similarity(self, text: Tensor, video: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """``[A, V]``: the cosines of each text and its output for each video, as X-Pool compares them.

        Chunks of texts at a time, computed again for backward where there are several.
        """
        video, mask = self._checked(text, video, mask)
        (videos, frames, channels), size = video.shape, max(text.element_size(), 4)
        if drops(self.dropout) or not self._folds(self.layer_norm3):
            return _in_chunks(lambda part: self._compared(part, video, mask), videos * channels * size, text)
        q, k, of_video = folded(self, text, video)
        with torch.autocast(text.device.type, enabled=False):
            cosines = Cosines.of(self, of_video)

            def some(q: Tensor, target: Tensor) -> Tensor:
                with torch.autocast(text.device.type, enabled=False):
                    return cosines(target, of_video.weights(probabilities(q, k, mask)))

            return _in_chunks(some, videos * frames * size, q, _unit(text))

    def _folds(self, *others: nn.Module) -> bool:
        """Whether the weights of layers that would not be called, or not with what they are meant for, say all of them."""
        attn, norms = self.cross_attn, (self.layer_norm2, *others)
        return (
            self.heads == 1
            and is_plain(attn)
            and is_plain(attn.out_proj, self.linear_proj, kind=nn.Linear)
            and is_plain(*norms, kind=nn.LayerNorm)
            and is_plain(self.dropout, kind=nn.Dropout)
        )

    def _whole(self, text: Tensor, video: Tensor, mask: Tensor | None) -> Tensor:
        """Layer by layer."""
        attn, heads = self.cross_attn, self.heads
        text, video = self.layer_norm1(text), self.layer_norm1(video)
        q, k, v = (
            layer(x).unflatten(-1, (heads, -1))
            for layer, x in ((attn.q_proj, text), (attn.k_proj, video), (attn.v_proj, video))
        )
        parts = [text_conditioned_pool(q[:, h], k[:, :, h], v[:, :, h], mask=mask) for h in range(heads)]
        x = attn.out_proj(parts[0] if heads == 1 else torch.cat(parts, -1))
        if mask is not None:
            x = x * mask.any(1)[:, None, None]  # without out_proj's bias
        x = self.layer_norm2(x)
        return self.layer_norm3(x + self.dropout(self.linear_proj(x)))

    def _compared(self, text: Tensor, video: Tensor, mask: Tensor | None) -> Tensor:
        return torch.einsum("ac,vac->av", _unit(text), _unit(self(text, video, mask=mask)))

    def _checked(self, text: Tensor, video: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The video, zeros where it is not valid, and the mask."""
        channels = self.linear_proj.out_features
        checks.tensor(NAME, "text", text, (None, channels), "[A, C]", any_stride=True)
        checks.tensor(NAME, "video", video, (None, None, channels), "[V, F, C]", like=text, any_stride=True)
        if video.shape[1] < 1:
            raise ValueError(f"{NAME}: video.shape={tuple(video.shape)}, but at least one frame is needed")
        if mask is None:
            return video, None
        mask = checks.mask(NAME, mask, "[V, F]", tuple(video.shape[:2]), text)
        return video.masked_fill(~mask[:, :, None], 0), mask

    def extra_repr(self) -> str:
        return f"heads={self.heads}"


def _identity(channels: int) -> nn.Linear:
    layer = nn.Linear(channels, channels)
    nn.init.eye_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def _unit(x: Tensor) -> Tensor:
    """Of unit length, float32 at least; zeros stay zeros."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return wide * over_length(wide.square().sum(-1, keepdim=True))


def _in_chunks(function: Callable[..., Tensor], bytes_each: int, *rows: Tensor) -> Tensor:
    """``function`` of as many rows at a time as have a chunk's bytes; of several, autograd keeps the rows alone."""
    count = max(1, CHUNK.get(rows[0].device.type, CHUNK["cuda"]) // max(bytes_each, 1))
    if count >= len(rows[0]):
        return function(*rows)
    parts = list(zip(*(x.split(count) for x in rows)))
    if not torch.is_grad_enabled():
        return torch.cat([function(*part) for part in parts])
    return torch.cat([checkpoint(function, *part, use_reentrant=False) for part in parts])
