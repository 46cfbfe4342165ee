from .op import frame_bias

__all__ = ["frame_bias"]
