from .op import text_conditioned_pool

__all__ = ["text_conditioned_pool"]
