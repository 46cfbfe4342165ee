"""The registry of ops: what every test, bench and table of this package iterates over."""

from .opinfo import OPINFOS, OpInfo, Sample

__all__ = ["OPINFOS", "OpInfo", "Sample"]
