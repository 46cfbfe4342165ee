"""The seams that other libraries have themselves: an attention implementation (transformers), layers (the hub's
``kernels``), a score (PyLate).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..extras import require
from ..ops.late_interaction import late_interaction
from ..ops.temporal_attention import temporal_attention
from . import layers

NAME = "i2v_kernels"
# Where temporal_attention is faster than scaled_dot_product_attention, measured on a CPU: 1.1 to 2.2 times within these bounds;
# 0.5 to 1.1 times for fewer numbers, whose time is the way through Python.
SHORT = 64  # tokens of a row
MANY = 2**19  # numbers of q


def register_attention() -> str:
    """Registers ``attn_implementation="i2v_kernels"`` with transformers, for every model that takes one.

    Many rows of up to 64 tokens, such as the frames of a clip for every patch, are attended to by ``temporal_attention``,
    whatever the layout and with no limit on their number; the rest, masks, dropout and grouped heads by transformers' "sdpa".

    Returns:
        The name, ``"i2v_kernels"``.

    Raises:
        ImportError: transformers is not installed, or older than 4.48.

    Examples:
        >>> from transformers import VivitConfig, VivitModel
        >>> config = VivitConfig(image_size=32, num_frames=4, num_hidden_layers=1)
        >>> name = register_attention()
        >>> model = VivitModel._from_config(config, attn_implementation=name)
    """
    masks = require("transformers.masking_utils", "i2v_kernels.register_attention")
    require("transformers", "i2v_kernels.register_attention").AttentionInterface.register(NAME, attention_forward)
    masks.AttentionMaskInterface.register(NAME, masks.sdpa_mask)
    return NAME


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: ``[B, H, L, D]`` to ``[B, L, H, D]``, and no attention weights."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if (
        query.shape[2] > SHORT
        or query.numel() < MANY
        or not query.shape == key.shape == value.shape
        or attention_mask is not None
        or dropout > 0
        or kwargs.get("position_bias") is not None
        or kwargs.get("softcap") is not None
        or any(x.stride(-1) != 1 or x.dtype != query.dtype for x in (query, key, value))
    ):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
        )
    q, k, v = (x.transpose(1, 2).unsqueeze(2) for x in (query, key, value))  # [B, T = L, N = 1, H, D]
    return temporal_attention(q, k, v, scale=scaling, causal=bool(causal)).squeeze(2), None


def colbert_scores(
    queries_embeddings: Any, documents_embeddings: Any, queries_mask: Any = None, documents_mask: Any = None
) -> Tensor:
    """PyLate's score of that name by ``late_interaction``: what its losses take as ``score_metric``.

    The sum over the query's tokens of the largest similarity to a token of the document; those of tokens that are not valid
    count as 0, as in PyLate.

    Args:
        queries_embeddings: ``[A, Nt, D]``: a tensor, an array or a list.
        documents_embeddings: ``[V, Nv, D]``.
        queries_mask, documents_mask: ``[A, Nt]`` and ``[V, Nv]``, 1 or True where the token is valid.

    Returns:
        ``[A, V]`` float32 (float64 for float64).

    Raises:
        TypeError, ValueError: as ``late_interaction``, whose text is the queries and whose video the documents.

    Examples:
        >>> import torch
        >>> queries, documents = torch.eye(3)[:, None], torch.eye(3).expand(2, 3, 3)
        >>> colbert_scores(queries, 2 * documents)
        tensor([[2., 2.],
                [2., 2.],
                [2., 2.]])
    """
    queries, documents = torch.as_tensor(queries_embeddings), torch.as_tensor(documents_embeddings)
    masks = (None if m is None else torch.as_tensor(m, device=queries.device) != 0 for m in (queries_mask, documents_mask))
    options: dict[str, Any] = dict(zip(("text_mask", "video_mask"), masks))
    return late_interaction(queries, documents, mode="maxsim", masked="zero", **options)


@dataclass(frozen=True)
class InstalledLayer:
    """A layer of this package where the hub's ``kernels`` wants a repository: nothing is downloaded."""

    layer_name: str

    def load(self) -> type[nn.Module]:
        return getattr(layers, self.layer_name)

    def __str__(self) -> str:
        return f"i2v_kernels.patching.layers.{self.layer_name}"


def kernel_mapping() -> dict[str, dict[str, InstalledLayer]]:
    """This package's layers as a mapping for the hub's ``kernels``: name of the layer to device to layer.

    They are stateless, ``forward`` alone, with the signature of the class that they stand in for; they compile and have a
    backward. A class takes part once it is declared, by ``kernels.use_kernel_forward_from_hub(name)`` on one's own or
    ``kernels.replace_kernel_forward_from_hub(class, name)`` on another's.

    Examples:
        >>> import kernels
        >>> from transformers import TimesformerConfig, TimesformerModel
        >>> from transformers.models.timesformer import modeling_timesformer
        >>> layer = modeling_timesformer.TimesformerLayer
        >>> kernels.replace_kernel_forward_from_hub(layer, "TimesformerLayer")
        >>> model = TimesformerModel(TimesformerConfig(hidden_size=48, num_hidden_layers=1))
        >>> mode = kernels.Mode.TRAINING | kernels.Mode.TORCH_COMPILE
        >>> with kernels.use_kernel_mapping(kernel_mapping(), inherit_mapping=False):
        ...     _ = kernels.kernelize(model, mode=mode, device="cpu")
        >>> "forward" in vars(model.encoder.layer[0])
        True
    """
    return {name: {device: InstalledLayer(name) for device in ("cpu", "cuda", "rocm")} for name in layers.__all__}
