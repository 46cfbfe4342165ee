from .op import temporal_attention

__all__ = ["temporal_attention"]
