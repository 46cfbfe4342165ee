from .op import st_adapter

__all__ = ["st_adapter"]
