"""``patch``: one line makes a model that you already have faster."""

from .patcher import is_patched, patch, patched, unpatch
from .report import PatchReport, Row
from .seams import colbert_scores, kernel_mapping, register_attention

__all__ = [
    "PatchReport",
    "Row",
    "colbert_scores",
    "is_patched",
    "kernel_mapping",
    "patch",
    "patched",
    "register_attention",
    "unpatch",
]
