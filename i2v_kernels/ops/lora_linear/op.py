"""The op ``lora_linear``: public function, checks, registration, autograd. How it computes: see README.md beside this file."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import checks
from ..backends import Backend, reference_backend
from ..base import Op
from ..layout import empty_tokens
from . import library, reference

NAME = "lora_linear"


def lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    bias: Tensor | None = None,
    *,
    scaling: float = 1.0,
    backend: str | None = None,
) -> Tensor:
    """A linear layer with a low-rank update: ``x weight^T + bias + scaling * (x lora_a^T) lora_b^T``.

    LoRA (Hu et al., arXiv 2106.09685, eq. 3). For backward it keeps x and the parameters; autograd over the
    formula keeps the low-rank product too, and makes two more tensors of the output's size on the way.

    Args:
        x: ``[..., C]``, float64, float32, bfloat16 or float16, last stride 1.
        weight, bias: ``[O, C]`` and ``[O]`` or None, as in ``nn.Linear(C, O)``; frozen or trained.
        lora_a, lora_b: ``[r, C]`` and ``[O, r]``, as PEFT's ``lora_A.default.weight`` and ``lora_B.default.weight``.
        scaling: a number; LoRA's ``alpha / r``.
        backend: "reference" or "library"; None chooses (see ``i2v_kernels.explain``).

    Returns:
        ``[..., O]`` in x's dtype, its dimensions in x's order in memory. Under ``torch.autocast`` all tensors are cast like
        those of ``nn.Linear``.

    Raises:
        TypeError, ValueError: an argument of a wrong type, dtype, shape, stride or device.
        NotImplementedError: the named backend cannot run this call; the text says why.
    """
    x, weight, lora_a, lora_b, bias = checks.autocast(x, weight, lora_a, lora_b, bias)  # type: ignore[assignment]
    if not isinstance(x, Tensor) or x.dim() < 1:
        got = type(x).__name__ if not isinstance(x, Tensor) else "one without a dimension"
        raise TypeError(f"{NAME}: x must be a torch.Tensor [..., C], got {got}")
    checks.tensor(NAME, "x", x, (None,) * x.dim(), "[..., C]")
    channels = x.shape[-1]
    checks.tensor(NAME, "weight", weight, (None, channels), "[O, C]", like=x)
    checks.tensor(NAME, "lora_a", lora_a, (None, channels), "[r, C]", like=x)
    checks.tensor(NAME, "lora_b", lora_b, (weight.shape[0], lora_a.shape[0]), "[O, r]", like=x)
    if bias is not None:
        checks.tensor(NAME, "bias", bias, (weight.shape[0],), "[O]", like=x)
    return _OP(x, weight, lora_a, lora_b, bias, checks.number(NAME, "scaling", scaling), backend=backend)


def _empty(x: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return empty_tokens(x, weight.shape[0])


_ARGUMENTS = "Tensor x, Tensor weight, Tensor lora_a, Tensor lora_b, Tensor? bias, float scaling"
_OP = Op(
    name=NAME,
    schema=f"({_ARGUMENTS}) -> Tensor",
    backward_schema=f"(Tensor grad, {_ARGUMENTS}, bool[5] wanted) -> ({', '.join(['Tensor'] * 5)})",
    backends=(
        reference_backend(NAME, reference.forward),
        Backend("library", lambda *args: None, library.forward, library.backward, formula=reference.forward),
    ),
    preference={"cpu": ("library",), "cuda": ("library",)},
    fake=_empty,
)
