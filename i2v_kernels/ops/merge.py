"""Partial attentions of the same queries joined into one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import checks
from .base import accumulate_dtype

NAME = "merge_attention"


def merge_attention(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Attention of queries to several sets of keys, from that to each set: what ``return_lse=True`` of every op is for.

    ``lse = log sum_i exp(lses[i])``, ``out = sum_i exp(lses[i] - lse) * outs[i]`` (arXiv 2112.05682, 2501.01005): keys that
    several devices hold, that come piece by piece, or that two ops attend to. Written in PyTorch's operators, which
    ``torch.compile`` makes one kernel.

    Args:
        outs: two or more ``[..., D]`` of one shape and dtype: float64, float32, bfloat16 or float16.
        lses: as many ``[...]``, natural logarithms, float32 (float64 for float64), -inf where a query has no key.

    Returns:
        ``(out [..., D], lse [...])``. Sums are kept in float32 (float64 for float64); a query that has no key anywhere gives
        zeros and -inf. Both are differentiable with respect to all arguments.

    Raises:
        TypeError, ValueError: an argument of a wrong type, number, dtype, shape or device; an out that autograd records while
            its lse is not, as those of this package's ops: gradients would miss what the weights owe to queries and keys. Merge
            under ``torch.no_grad()``, or attend in one call.

    Examples:
        >>> import torch
        >>> from i2v_kernels import temporal_attention
        >>> q, k, v = torch.randn(3, 2, 8, 5, 3, 16)
        >>> parts = [temporal_attention(q, k[:, s], v[:, s], return_lse=True)
        ...          for s in (slice(0, 3), slice(3, 8))]
        >>> out, lse = merge_attention(*zip(*parts))
        >>> torch.allclose(out, temporal_attention(q, k, v), atol=1e-5)
        True
    """
    outs, lses = checks.items(NAME, "outs", outs, "a list of tensors"), checks.items(NAME, "lses", lses, "a list of tensors")
    if len(outs) < 2 or len(outs) != len(lses):
        raise ValueError(f"{NAME}: {len(outs)} outs and {len(lses)} lses, but two or more are needed, as many of both")
    for i, (out, lse) in enumerate(zip(outs, lses)):
        shape = outs[0].shape if isinstance(outs[0], Tensor) else (None,)
        checks.tensor(NAME, f"outs[{i}]", out, tuple(shape), "[..., D]", like=outs[0], any_stride=True)
        if not isinstance(lse, Tensor) or lse.dtype != accumulate_dtype(out.dtype):
            got = getattr(lse, "dtype", type(lse).__name__)
            raise TypeError(f"{NAME}: lses[{i}] must be a tensor [...] of {accumulate_dtype(out.dtype)}, got {got}")
        if lse.shape != out.shape[:-1]:
            raise ValueError(f"{NAME}: lses[{i}].shape={tuple(lse.shape)}, but {tuple(out.shape[:-1])} is needed")
        checks.same_place(NAME, f"lses[{i}]", lse, out)
        if torch.is_grad_enabled() and out.requires_grad and not lse.requires_grad:
            raise ValueError(
                f"{NAME}: outs[{i}].requires_grad=True, but lses[{i}].requires_grad=False: gradients would miss what the "
                "weights owe to queries and keys; merge under torch.no_grad(), or attend to all keys in one call"
            )
    sums = torch.stack(lses)
    lse = sums.logsumexp(0)
    weights = (sums - lse.masked_fill(lse == -torch.inf, 0.0)).exp()
    merged = sum(weight[..., None] * out for weight, out in zip(weights, outs))
    return merged.to(outs[0].dtype), lse
