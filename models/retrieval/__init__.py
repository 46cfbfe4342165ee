"""Text and videos find one another: metrics of retrieval, a store of features on disk, and the search in it."""

from __future__ import annotations

from i2v_models.retrieval.metrics import retrieval_metrics
from i2v_models.retrieval.search import TopK, top_k
from i2v_models.retrieval.store import FeatureStore
from i2v_models.retrieval.writer import Writer

__all__ = ["FeatureStore", "TopK", "Writer", "retrieval_metrics", "top_k"]
