"""The bottleneck adapter of AIM, AdaptFormer and others."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from ..ops import bottleneck_adapter, checks
from ..ops.activations import ACTIVATIONS, activate
from .plain import is_plain

NAMES = {"aim": ("D_fc1", "D_fc2"), "adaptformer": ("down_proj", "up_proj")}


class BottleneckAdapter(nn.Module):
    """``i2v_kernels.bottleneck_adapter`` with its two ``nn.Linear``, named and initialised as in published code.

    The second one and the biases start at zero, so that a new adapter adds nothing.

    Args:
        channels: C.
        width: R, of the bottleneck; AIM takes C / 4, AdaptFormer 64.
        activation, scale, residual: see ``i2v_kernels.bottleneck_adapter``.
        published: "aim" (``D_fc1``, ``D_fc2``; the first normal, 0.02) or "adaptformer" (``down_proj``, ``up_proj``; the first
            uniform, as Kaiming's). AdaptFormer's activation is "relu", its scale 0.1, its residual outside.

    Children that are more than an ``nn.Linear``, by LoRA, hooks, offloading or quantised weights, are called one by one.

    Shape: ``[..., C]`` to the same.

    Examples:
        >>> import torch
        >>> adapter = BottleneckAdapter(768, 192)
        >>> x = torch.randn(1, 8, 197, 768)
        >>> torch.equal(adapter(x), x), list(adapter.state_dict())[0]
        (True, 'D_fc1.weight')
    """

    def __init__(
        self,
        channels: int,
        width: int,
        activation: str | None = "gelu",
        scale: float = 1.0,
        residual: bool = True,
        published: str = "aim",
    ) -> None:
        super().__init__()
        name = "BottleneckAdapter"
        checks.integer(name, "channels", channels, low=1)
        checks.integer(name, "width", width, low=0)
        if activation is not None:
            checks.one_of(name, "activation", activation, ACTIVATIONS)
        checks.number(name, "scale", scale)
        checks.flag(name, "residual", residual)
        checks.one_of(name, "published", published, NAMES)
        self.activation, self.scale, self.residual, self.names = activation, scale, residual, NAMES[published]
        down, up = nn.Linear(channels, width), nn.Linear(width, channels)
        if published == "adaptformer":
            nn.init.kaiming_uniform_(down.weight, a=5**0.5)
        else:
            nn.init.trunc_normal_(down.weight, std=0.02)
        for zero in (down.bias, up.weight, up.bias):
            nn.init.zeros_(zero)
        for name, linear in zip(self.names, (down, up)):
            self.add_module(name, linear)

    def forward(self, x: Tensor) -> Tensor:
        down, up = (self.get_submodule(name) for name in self.names)
        if not is_plain(down, up, kind=nn.Linear):
            x = cast(Tensor, checks.autocast(x)[0])  # as the op does, so that the sum's dtype is the same
            update = up(activate(down(x), self.activation or "")) * self.scale
            return x + update if self.residual else update
        parts = (down.weight, down.bias, up.weight, up.bias)
        options = {"activation": self.activation, "scale": self.scale, "residual": self.residual}
        return bottleneck_adapter(x, *parts, **options)  # type: ignore[arg-type]

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}, scale={self.scale}, residual={self.residual}"
