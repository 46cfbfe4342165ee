"""``patch``: one line makes a model that you already have faster."""

from .patcher import is_patched, patch, patched, unpatch
from .report import PatchReport, Row

__all__ = ["PatchReport", "Row", "is_patched", "patch", "patched", "unpatch"]
