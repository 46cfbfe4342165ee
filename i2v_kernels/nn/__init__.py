"""Modules over the ops, with parameters named and initialised as in the published code."""

from . import functional
from .st_adapter import STAdapter
from .temporal_attention import TemporalAttention
from .temporal_conv import TemporalConv
from .token_shift import TokenShift

__all__ = ["STAdapter", "TemporalAttention", "TemporalConv", "TokenShift", "functional"]
