"""The registry of ops: what every test, bench and table of this package iterates over."""

from . import st_adapter, temporal_attention, temporal_conv, token_shift
from .opinfo import OpInfo, Sample

OPINFOS: tuple[OpInfo, ...] = (temporal_attention.INFO, token_shift.INFO, temporal_conv.INFO, st_adapter.INFO)

__all__ = ["OPINFOS", "OpInfo", "Sample"]
