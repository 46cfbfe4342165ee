from .op import masked_mean

__all__ = ["masked_mean"]
