"""Modules over the ops, with parameters named and initialised as in the published code."""

from .temporal_conv import TemporalConv
from .token_shift import TokenShift

__all__ = ["TemporalConv", "TokenShift"]
