from .op import token_shift, token_shift_

__all__ = ["token_shift", "token_shift_"]
