from .op import token_shift

__all__ = ["token_shift"]
