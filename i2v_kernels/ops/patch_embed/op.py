"""The op ``patch_embed``: public function, checks, registration, autograd. How it computes: see README.md beside this file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ... import _extension
from .. import checks, dispatcher
from ..backends import Backend, reference_backend, triton_backend
from ..base import Op
from . import blocks, digits, reference

NAME = "patch_embed"


def patch_embed(
    frames: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    backend: str | None = None,
) -> Tensor:
    """uint8 frames to patch tokens: normalise, convolve with a stride of the patch's size, and lay the grid out as tokens.

    ``out[b, t, n] = bias + sum_k weight[:, k] * (patch_n[k] / 255 - mean) / std``: the first layer of ViT (Dosovitskiy et al.,
    arXiv 2010.11929, eq. 1) behind the normalisation that every image model has before it. The normalisation is folded into
    the weights, patches are gathered while they are loaded. For backward it keeps frames and parameters.

    Args:
        frames: ``[B, T, H, W, 3]``, uint8, last stride 1; crops, slices and strides of larger frames are not copied.
        weight, bias: ``[C, 3, ph, pw]`` and ``[C]`` or None, as in ``nn.Conv2d(3, C, (ph, pw), stride=(ph, pw))``; float64,
            float32, bfloat16 or float16. The weight may lie in any memory format.
        mean, std: three numbers each, of red, green and blue between 0 and 1, as in ``torchvision.transforms.Normalize``.
        backend: "reference", "cpu" or "triton"; None chooses (see ``i2v_kernels.explain``).

    Returns:
        ``[B, T, N, C]`` in weight's dtype, ``N = (H / ph) * (W / pw)`` patches row by row. Under ``torch.autocast`` weight and
        bias are cast like those of ``nn.Conv2d``. Frames have no gradient.

    Raises:
        TypeError, ValueError: an argument of a wrong type, dtype, shape, stride or device; patches that do not fill H and W.
        NotImplementedError: the named backend cannot run this call; the text says why.
    """
    weight, bias = checks.autocast(weight, bias)  # type: ignore[assignment]
    _check_frames(frames)
    checks.tensor(NAME, "weight", weight, (None, 3, None, None), "[C, 3, ph, pw]", any_stride=True)
    checks.same_place(NAME, "weight", weight, frames)
    for name, size, place in (("H", frames.shape[2], 2), ("W", frames.shape[3], 3)):
        patch = weight.shape[place]
        if patch < 1 or size < patch or size % patch:
            raise ValueError(
                f"{NAME}: frames.shape={tuple(frames.shape)}, but {name}={size} must be a positive multiple of the patch's "
                f"{patch}: weight.shape={tuple(weight.shape)}"
            )
    if bias is not None:
        checks.tensor(NAME, "bias", bias, (weight.shape[0],), "[C]")
        checks.same_place(NAME, "bias", bias, frames)
        if bias.dtype != weight.dtype:
            raise TypeError(f"{NAME}: bias.dtype={bias.dtype}, but weight has {weight.dtype}")
    colours = check_three(NAME, "mean", mean), check_three(NAME, "std", std, positive=True)
    return _OP(frames, weight, bias, *colours, backend=backend)


def _check_frames(frames: object) -> None:
    if not isinstance(frames, Tensor):
        raise TypeError(f"{NAME}: frames must be a torch.Tensor [B, T, H, W, 3], got {type(frames).__name__}")
    if frames.dtype != torch.uint8:
        raise TypeError(f"{NAME}: frames.dtype={frames.dtype}, but uint8 is needed: pixels as a decoder gives them")
    if frames.dim() != 5 or frames.shape[4] != 3:
        raise ValueError(f"{NAME}: frames.shape={tuple(frames.shape)}, but [B, T, H, W, 3] is needed")
    if frames.stride(4) != 1 and not dispatcher.is_transformed(frames):
        raise ValueError(
            f"{NAME}: frames.stride()={tuple(frames.stride())}, but the last dimension must have stride 1; "
            "pass frames.contiguous() or arrange the layout so"
        )


def check_three(op: str, name: str, values: Any, positive: bool = False) -> list[float]:
    """Numbers of red, green and blue that a float32 can hold, so that the normalisation folds into the weights."""
    numbers = isinstance(values, (tuple, list)) and all(
        isinstance(value, (int, float)) and not isinstance(value, bool) for value in values
    )
    if not numbers or len(values) != 3:
        raise TypeError(f"{op}: {name}={values!r} must be three numbers: of red, green and blue")
    if positive and not all(value > 0 for value in values):
        raise ValueError(f"{op}: {name}={values!r} must be above 0")
    if not all(abs(value) < 1e30 and not (positive and value < 1e-30) for value in values):
        raise ValueError(f"{op}: {name}={values!r} must be finite, and a number that float32 can hold")
    return [float(value) for value in values]


def _cpu_can_run(frames: Tensor, *_: Any) -> str | None:
    return f"the tensors are on {frames.device}" if frames.device.type != "cpu" else _extension.why_no_cpu()


def _triton_limits(frames: Tensor, weight: Tensor, *_: Any) -> str | None:
    return "float64: only reference and cpu compute in double precision" if weight.dtype == torch.float64 else None


_ARGUMENTS = "Tensor frames, Tensor weight, Tensor? bias, float[] mean, float[] std"
_OP = Op(
    name=NAME,
    schema=f"({_ARGUMENTS}) -> Tensor",
    backward_schema=f"(Tensor grad, {_ARGUMENTS}, bool[2] wanted) -> (Tensor, Tensor)",
    backends=(
        reference_backend(NAME, reference.forward),
        Backend("cpu", _cpu_can_run, digits.forward, blocks.backward),
        triton_backend(NAME, _triton_limits),
    ),
    preference={"cpu": ("cpu",), "cuda": ("triton",)},
    fake=blocks.empty_output,
    differentiable=(1, 2),
)
