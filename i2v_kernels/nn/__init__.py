"""Modules over the ops, with parameters named and initialised as in the published code."""

from . import functional
from .temporal_attention import TemporalAttention
from .temporal_conv import TemporalConv
from .token_shift import TokenShift

__all__ = ["TemporalAttention", "TemporalConv", "TokenShift", "functional"]
