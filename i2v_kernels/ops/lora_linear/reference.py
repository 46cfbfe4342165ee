"""The definition of ``lora_linear`` in plain PyTorch; every backend is judged against it in float64."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def forward(x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, bias: Tensor | None, scaling: float) -> Tensor:
    return F.linear(x, weight, bias) + F.linear(F.linear(x, lora_a), lora_b) * scaling
