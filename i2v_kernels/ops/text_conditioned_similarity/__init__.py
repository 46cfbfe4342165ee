from .op import text_conditioned_similarity

__all__ = ["text_conditioned_similarity"]
