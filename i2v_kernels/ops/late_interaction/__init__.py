from .op import late_interaction

__all__ = ["late_interaction"]
