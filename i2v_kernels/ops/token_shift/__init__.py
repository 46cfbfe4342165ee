from .in_place import token_shift_
from .op import token_shift

__all__ = ["token_shift", "token_shift_"]
