"""Whether a child may be passed over: its weights read, and it not called."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.modules import module as hooks_of_all

FORWARDS = {
    kind: kind.forward
    for kind in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.MultiheadAttention, nn.Dropout, nn.Identity, nn.GELU)
}  # as torch defines them
PATCHED = "i2v_kernels_replacement"


def is_plain(*modules: nn.Module, kind: type[nn.Module] | None = None) -> bool:
    """Whether calling these modules does what their class says with their own weights, and nothing else; now, so ask each time.

    LoRA tools and offloading replace ``forward`` on the instance or put another class in the module's place; hooks, of one
    module or of all, weight_norm and pruning act when it is called; quantised weights are tensors of a class of their own.

    Args:
        modules: what is not going to be called.
        kind: the class that all of them must be of, no class derived from it.
    """
    if (
        hooks_of_all._global_forward_hooks
        or hooks_of_all._global_forward_pre_hooks
        or hooks_of_all._global_backward_hooks
        or hooks_of_all._global_backward_pre_hooks
    ):
        return False
    return all(why_not_plain(module, kind) is None for module in modules)


def why_not_plain(module: nn.Module, kind: type[nn.Module] | None = None) -> str | None:
    """What makes ``is_plain`` say no to this module, to follow its name; hooks of all modules do not count: they pass."""
    cls, own = type(module), module.__dict__
    if kind is not None and cls is not kind:
        package = cls.__module__.split(".")[0]
        return f"is a {cls.__name__} of {package}, which computes something else than its weight says"
    if own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]:
        return "has hooks, which would not be called"
    if "forward" in own and not is_replaced(module):
        return "has a forward of its own, which other code gave it"
    if cls in FORWARDS and cls.forward is not FORWARDS[cls]:
        return f"is a {cls.__name__}, whose class other code gave another forward"
    return why_not_tensors(module)


def why_not_tensors(module: nn.Module) -> str | None:
    """Likewise, if a parameter of the module itself is of a class that computes in its own way, such as a quantised one."""
    for name, weight in module.__dict__["_parameters"].items():
        if weight is not None and type(weight) is not nn.Parameter and type(weight) is not Tensor:
            return f"has a {name} that is a {type(weight).__name__}, a kind of tensor that computes in its own way"
    return None


def is_replaced(module: nn.Module) -> bool:
    """Whether the forward of this instance is one that ``i2v_kernels.patch`` gave it, which does what its class says."""
    return hasattr(getattr(module.__dict__.get("forward"), "__func__", None), PATCHED)
