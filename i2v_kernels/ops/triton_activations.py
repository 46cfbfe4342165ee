"""The activations of ``activations.py`` for Triton kernels, on float32."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def activate(b_x, ACTIVATION: tl.constexpr):
    if ACTIVATION == "gelu":
        b_x = 0.5 * b_x * (1.0 + tl.erf(b_x * 0.7071067811865476))
    elif ACTIVATION == "quick_gelu":
        b_x = b_x * tl.sigmoid(1.702 * b_x)
    elif ACTIVATION == "relu":
        b_x = tl.where(b_x < 0, 0.0, b_x)  # NaN stays
    elif ACTIVATION == "silu":
        b_x = b_x * tl.sigmoid(b_x)
    return b_x


@triton.jit
def activation_gradient(b_g, b_x, ACTIVATION: tl.constexpr):
    """The gradient before the activation, of that behind it."""
    if ACTIVATION == "gelu":
        b_cdf = 0.5 * (1.0 + tl.erf(b_x * 0.7071067811865476))
        b_g = b_g * (b_cdf + b_x * tl.exp(-0.5 * b_x * b_x) * 0.3989422804014327)
    elif ACTIVATION == "quick_gelu":
        b_s = tl.sigmoid(1.702 * b_x)
        b_g = b_g * (b_s + 1.702 * b_x * b_s * (1.0 - b_s))
    elif ACTIVATION == "relu":
        b_g = tl.where(b_x <= 0, 0.0, b_g)  # NaN passes, as in PyTorch
    elif ACTIVATION == "silu":
        b_s = tl.sigmoid(b_x)
        b_g = b_g * (b_s + b_x * b_s * (1.0 - b_s))
    return b_g
