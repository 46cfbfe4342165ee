from .op import video_cross_attention

__all__ = ["video_cross_attention"]
