"""Text and videos find one another: metrics of retrieval."""

from __future__ import annotations

from i2v_models.retrieval.metrics import retrieval_metrics

__all__ = ["retrieval_metrics"]
