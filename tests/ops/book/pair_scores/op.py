"""The op ``pair_scores``: public function, checks, registration. It has no kernel."""

from __future__ import annotations

from torch import Tensor

from .. import checks
from ..backends import reference_backend
from ..base import Op
from . import reference

NAME = "pair_scores"


def pair_scores(text: Tensor, video: Tensor, *, backend: str | None = None) -> Tensor:
    """For every text and video: how sharply each word looks at one frame, summed over words.

    Args:
        text: ``[A, W, D]``, float64, float32, bfloat16 or float16, last stride 1.
        video: ``[V, F, D]``, at least one frame.
        backend: "reference"; None chooses.

    Returns:
        ``[A, V]`` in text's dtype. Under ``torch.autocast`` both are cast like those of a matrix product.

    Raises:
        TypeError, ValueError: an argument of a wrong type, dtype, shape, stride or device.
        NotImplementedError: the named backend cannot run this call; the text says why.
    """
    text, video = checks.autocast(text, video)  # type: ignore[assignment]
    checks.tensor(NAME, "text", text, (None,) * 3, "[A, W, D]")
    checks.tensor(NAME, "video", video, (None, None, text.shape[2]), "[V, F, D]", like=text)
    if video.shape[1] == 0:
        raise ValueError(f"{NAME}: video.shape={tuple(video.shape)}, but at least one frame is needed")
    return _OP(text, video, backend=backend)


_OP = Op(
    name=NAME,
    schema="(Tensor text, Tensor video) -> Tensor",
    backward_schema="(Tensor grad, Tensor text, Tensor video, bool[2] wanted) -> (Tensor, Tensor)",
    backends=(reference_backend(NAME, reference.forward),),
    fake=lambda text, video: text.new_empty(text.shape[0], video.shape[0]),
)
