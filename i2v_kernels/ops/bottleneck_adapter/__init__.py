from .op import bottleneck_adapter

__all__ = ["bottleneck_adapter"]
