"""The decoder layers of EVL and UniFormerV2: a few queries read the features of a whole clip."""

from __future__ import annotations

from collections import OrderedDict
from typing import cast

from torch import Tensor, nn

from ..ops import checks, video_cross_attention
from .functional import projected_cross_attention
from .plain import is_plain
from .tokens import QuickGELU, in_order


class _DecoderLayer(nn.Module):
    """``x + attention(norm(x), norm(features))``, then the perceptron; which child is which is for the classes to say."""

    def __init__(self, channels: int, heads: int, width: int, mlp_factor: float, dropout: float) -> None:
        super().__init__()
        name = type(self).__name__
        checks.integer(name, "channels", channels, low=1)
        checks.integer(name, "width", width, low=1)
        if checks.integer(name, "heads", heads) < 1 or width % heads:
            raise ValueError(f"{name}: heads={heads} must divide {width}")
        hidden = round(checks.number(name, "mlp_factor", mlp_factor, finite=True) * channels)
        if hidden < 1:
            raise ValueError(f"{name}: mlp_factor={mlp_factor!r} of channels={channels} leaves {hidden} hidden channels")
        if not 0 <= checks.number(name, "dropout", dropout) <= 1:
            raise ValueError(f"{name}: dropout={dropout!r} must lie in [0, 1]")
        self.channels, self.heads = channels, heads
        self.hidden, self.dropout = hidden, float(dropout)

    def _perceptron(self, first: str, activation: str, last: str) -> nn.Sequential:
        layers = [nn.Linear(self.channels, self.hidden), QuickGELU(), nn.Dropout(self.dropout)]
        return nn.Sequential(
            OrderedDict(zip((first, activation, "dropout", last), [*layers, nn.Linear(self.hidden, self.channels)]))
        )

    def _check(self, x: Tensor, features: Tensor) -> None:
        name = type(self).__name__
        if x.dim() != 3 or x.shape[2] != self.channels:
            raise ValueError(f"{name}: x.shape={tuple(x.shape)}, but [B, Q, {self.channels}] is needed")
        if features.dim() != 4 or features.shape[3] != self.channels or features.shape[0] != x.shape[0]:
            wanted = f"[{x.shape[0]}, T, N, {self.channels}]"
            raise ValueError(f"{name}: features.shape={tuple(features.shape)}, but {wanted} is needed")

    def extra_repr(self) -> str:
        return f"{self.channels}, heads={self.heads}"


class EVLAttention(nn.Module):
    """The projections of EVL's ``Attention``; Xavier's weights, biases of zero."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        for name in ("q_proj", "k_proj", "v_proj"):
            self.add_module(name, nn.Linear(channels, width))
        self.out_proj = nn.Linear(width, channels)
        for layer in self.children():
            nn.init.xavier_uniform_(cast(nn.Linear, layer).weight)
            nn.init.zeros_(cast(nn.Linear, layer).bias)


class EVLDecoderLayer(_DecoderLayer):
    """EVL's ``TransformerDecoderLayer`` (arXiv 2208.03550): a clip's queries read all tokens of its frames.

    ``x + attn(norm1(x), norm3(f), norm3(f))``, then ``x + mlp(norm2(x))``, under the published names and with the published
    initialisation: ``attn.{q,k,v,out}_proj``, ``mlp.{fc1,fc2}``, ``norm1``, ``norm2``, ``norm3``. Where queries are few the
    projections of keys and values are folded, see ``functional.projected_cross_attention``: features are normalised and read,
    and nothing else of their size is computed or kept.

    Children that are more than their class, by LoRA, hooks, offloading or quantised weights, are called one by one.

    Args:
        channels: C of queries and features.
        heads: H.
        width: of queries, keys and values together, ``H * D``; C if None.
        mlp_factor: hidden channels of the perceptron, in C.
        dropout: behind the perceptron's activation; EVL trains with 0.5.

    Shape: ``forward(x [B, Q, C], features [B, T, N, C], mask=None)`` to ``[B, Q, C]``; features of any strides, so a
    backbone's ``[B*T, N, C]`` and ``[N, B*T, C]`` by a view; ``mask [B, T]`` is True where a frame is valid.

    Raises:
        TypeError, ValueError: an option, or a shape that does not fit; the text says which.

    Examples:
        >>> import torch
        >>> layer = EVLDecoderLayer(64, heads=4)
        >>> features = torch.randn(2 * 8, 50, 64)  # of 2 clips of 8 frames
        >>> layer(torch.zeros(2, 1, 64), features.unflatten(0, (2, 8))).shape
        torch.Size([2, 1, 64])
    """

    def __init__(
        self, channels: int, heads: int, width: int | None = None, mlp_factor: float = 4.0, dropout: float = 0.0
    ) -> None:
        width = channels if width is None else width
        super().__init__(channels, heads, width, mlp_factor, dropout)
        self.attn = EVLAttention(channels, width)
        self.mlp = self._perceptron("fc1", "act", "fc2")
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(channels) for _ in range(3))
        for layer in (self.mlp.fc1, self.mlp.fc2):
            nn.init.xavier_uniform_(cast(nn.Linear, layer).weight)
            nn.init.normal_(cast(nn.Linear, layer).bias, std=1e-6)

    def forward(self, x: Tensor, features: Tensor, mask: Tensor | None = None) -> Tensor:
        self._check(x, features)
        x = x + self._attend(self.norm1(x), features, mask)
        return x + self.mlp(self.norm2(x))

    def _attend(self, x: Tensor, features: Tensor, mask: Tensor | None) -> Tensor:
        layers = [cast(nn.Linear, layer) for layer in self.attn.children()]
        if is_plain(*layers, kind=nn.Linear) and is_plain(self.norm3, kind=nn.LayerNorm) and is_plain(self.attn):
            norm = (self.norm3.weight, self.norm3.bias, self.norm3.eps)
            q, k, v, out = ((layer.weight, layer.bias) for layer in layers)
            return projected_cross_attention(x, features, self.heads, q, k, v, out, norm, mask=mask)
        seen = in_order(self.norm3, features)
        asked, keys, values = (in_order(layer, y).unflatten(-1, (self.heads, -1)) for layer, y in zip(layers, (x, seen, seen)))
        return layers[3](video_cross_attention(asked, keys, values, mask=mask).flatten(2))


class UniFormerV2Extractor(_DecoderLayer):
    """UniFormerV2's ``Extractor``, its global block (arXiv 2211.09552): as ``EVLDecoderLayer`` under other names.

    ``attn`` holds the parameters of an ``nn.MultiheadAttention``: ``attn.in_proj_weight``, ``attn.in_proj_bias``,
    ``attn.out_proj``; besides ``ln_1``, ``mlp.{c_fc,c_proj}``, ``ln_2``, ``ln_3``. As published, ``out_proj`` and ``c_proj``
    start at zero, so that a new layer gives x. The published module takes ``x [Q, B, C]`` and features ``[T * N, B, C]``; its
    stochastic depth is left to the caller.

    Args:
        channels: C of queries and features.
        heads: H, a divisor of C.
        mlp_factor: hidden channels of the perceptron, in C.
        dropout: behind the perceptron's activation; UniFormerV2 trains with 0.5.

    Shape: ``forward(x [B, Q, C], features [B, T, N, C], mask=None)`` to ``[B, Q, C]``, as for ``EVLDecoderLayer``.

    Raises:
        TypeError, ValueError: an option, or a shape that does not fit; the text says which.

    Examples:
        >>> import torch
        >>> layer = UniFormerV2Extractor(64, heads=4)
        >>> features = torch.randn(50, 2 * 8, 64)  # [N, B * T, C], as CLIP has them
        >>> x, frames = torch.randn(2, 1, 64), features.unflatten(1, (2, 8))
        >>> torch.equal(layer(x, frames.permute(1, 2, 0, 3)), x)
        True
    """

    def __init__(self, channels: int, heads: int, mlp_factor: float = 4.0, dropout: float = 0.0) -> None:
        super().__init__(channels, heads, channels, mlp_factor, dropout)
        self.attn = nn.MultiheadAttention(channels, heads)
        self.ln_1 = nn.LayerNorm(channels)
        self.mlp = self._perceptron("c_fc", "gelu", "c_proj")
        self.ln_2, self.ln_3 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        nn.init.xavier_uniform_(cast(nn.Linear, self.mlp.c_fc).weight)
        for layer in (self.attn.out_proj, cast(nn.Linear, self.mlp.c_proj)):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, features: Tensor, mask: Tensor | None = None) -> Tensor:
        self._check(x, features)
        x = x + self._attend(self.ln_1(x), features, mask)
        return x + self.mlp(self.ln_2(x))

    def _attend(self, x: Tensor, features: Tensor, mask: Tensor | None) -> Tensor:
        attn, out = self.attn, self.attn.out_proj
        if is_plain(attn, kind=nn.MultiheadAttention) and is_plain(self.ln_3, kind=nn.LayerNorm) and is_plain(out):
            q, k, v = zip(attn.in_proj_weight.chunk(3), attn.in_proj_bias.chunk(3))
            norm = (self.ln_3.weight, self.ln_3.bias, self.ln_3.eps)
            return projected_cross_attention(x, features, self.heads, q, k, v, (out.weight, out.bias), norm, mask=mask)
        seen = self.ln_3(features).flatten(1, 2).transpose(0, 1)
        hidden = None if mask is None else (~mask).repeat_interleave(features.shape[2], 1)
        found = attn(x.transpose(0, 1), seen, seen, key_padding_mask=hidden, need_weights=False)[0]
        return cast(Tensor, found).transpose(0, 1)
