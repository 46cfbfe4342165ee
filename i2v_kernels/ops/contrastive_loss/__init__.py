from .loss import contrastive_loss

__all__ = ["contrastive_loss"]
