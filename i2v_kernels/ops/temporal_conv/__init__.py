from .op import temporal_conv

__all__ = ["temporal_conv"]
