from .op import frame_attention

__all__ = ["frame_attention"]
