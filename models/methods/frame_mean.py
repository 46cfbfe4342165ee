"""CLIP4Clip with mean pooling (Luo et al. 2021, arXiv 2104.08860): the mean of the normalised frame embeddings."""

from __future__ import annotations

from i2v_models.backbone import Method, ViT


class FrameMean(Method):
    """No temporal module and no parameter. It cannot tell a video from its frames in another order."""

    mixes_frames = False
    normalize_frames = True

    def __init__(self, visual: ViT, *, frames: int, kernels: bool = True) -> None:
        super().__init__()
