"""A linear layer with LoRA, its parameters where PEFT has them."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..ops import checks, lora_linear
from .plain import is_plain, why_not_tensors


class LoRALinear(nn.Module):
    """``i2v_kernels.lora_linear`` around an ``nn.Linear``, which it holds as ``base_layer``.

    State dicts have PEFT's keys: ``base_layer.weight``, ``base_layer.bias``, ``lora_A.default.weight`` ``[r, C]``,
    ``lora_B.default.weight`` ``[O, r]``. As there, A starts as Kaiming's uniform and B at zero, so that a new layer gives what
    its base gives; the base is frozen unless ``freeze=False``.

    Args:
        base_layer: the linear layer to adapt; the same object, its weight is not copied.
        rank: r.
        alpha: the update is multiplied by ``alpha / rank`` (``alpha / sqrt(rank)`` with ``rslora``).
        rslora: rank-stabilised LoRA (arXiv 2312.03732).
        freeze: whether the base stops learning.

    Shape: ``[..., C]`` to ``[..., O]``.

    Examples:
        >>> import torch
        >>> layer = LoRALinear(torch.nn.Linear(768, 768), rank=8, alpha=16)
        >>> x = torch.randn(1, 8, 197, 768)
        >>> torch.equal(layer(x), layer.base_layer(x))
        True
        >>> [name for name, p in layer.named_parameters() if p.requires_grad]
        ['lora_A.default.weight', 'lora_B.default.weight']
    """

    def __init__(
        self, base_layer: nn.Linear, rank: int = 8, alpha: float = 8.0, *, rslora: bool = False, freeze: bool = True
    ) -> None:
        super().__init__()
        if not isinstance(base_layer, nn.Linear):
            raise TypeError(f"LoRALinear: base_layer must be an nn.Linear, got {type(base_layer).__name__}")
        checks.integer("LoRALinear", "rank", rank, low=1)
        checks.number("LoRALinear", "alpha", alpha, finite=True)
        checks.flag("LoRALinear", "rslora", rslora)
        checks.flag("LoRALinear", "freeze", freeze)
        self.base_layer = base_layer.requires_grad_(not freeze)
        low = nn.Linear(base_layer.in_features, rank, bias=False).to(base_layer.weight)
        high = nn.Linear(rank, base_layer.out_features, bias=False).to(base_layer.weight)
        nn.init.kaiming_uniform_(low.weight, a=math.sqrt(5))
        nn.init.zeros_(high.weight)
        self.lora_A, self.lora_B = nn.ModuleDict({"default": low}), nn.ModuleDict({"default": high})
        self.rank, self.alpha, self.scaling = rank, alpha, alpha / (math.sqrt(rank) if rslora else rank)
        self.merged = False

    def low_rank(self) -> tuple[Tensor, Tensor]:
        """A ``[r, C]`` and B ``[O, r]``."""
        return self.lora_A["default"].weight, self.lora_B["default"].weight  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Tensor:
        if self.merged:
            return self.base_layer(x)
        down, up = self.lora_A["default"], self.lora_B["default"]
        if not is_plain(self.base_layer, down, up, kind=nn.Linear):  # a base with hooks, offloaded, quantised, LoRA of its own
            return self.base_layer(x) + up(down(x)) * self.scaling
        return lora_linear(x, self.base_layer.weight, *self.low_rank(), self.base_layer.bias, scaling=self.scaling)

    def merge(self) -> None:
        """Adds the update to the base's weight, for inference at the base's price; merged layers stay as they are.

        Raises:
            ValueError: the base computes its weight anew in every call (weight_norm, pruning, LoRA of its own) or keeps it
                quantised.
        """
        if not self.merged:
            self._add(1)

    def unmerge(self) -> None:
        """Takes the update out again, to within the rounding of the base's dtype; layers not merged stay as they are."""
        if self.merged:
            self._add(-1)

    @torch.no_grad()
    def _add(self, sign: int) -> None:
        base = self.base_layer
        if (what := why_not_tensors(base)) or "weight" not in base._parameters:
            what = what or "computes its weight from other parameters"
            raise ValueError(f"LoRALinear: base_layer, a {type(base).__name__}, {what}: no update can be added to its weight")
        weight, wide = self.base_layer.weight, torch.promote_types(self.base_layer.weight.dtype, torch.float32)
        a, b = self.low_rank()
        update = b.to(wide) @ a.to(wide)
        weight.copy_(weight.to(wide) + sign * self.scaling * update)
        self.merged = sign > 0

    def extra_repr(self) -> str:
        return f"rank={self.rank}, alpha={self.alpha}, merged={self.merged}"


def merge_lora(model: nn.Module) -> int:
    """``merge()`` of every ``LoRALinear`` in the model; returns their number."""
    return _each(model, "merge")


def unmerge_lora(model: nn.Module) -> int:
    """``unmerge()`` of every ``LoRALinear`` in the model; returns their number."""
    return _each(model, "unmerge")


def _each(model: nn.Module, method: str) -> int:
    layers = [module for module in model.modules() if isinstance(module, LoRALinear)]
    for layer in layers:
        getattr(layer, method)()
    return len(layers)
