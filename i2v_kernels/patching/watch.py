"""What has to hold at each call: a replacement was proved for a module as it was when it was patched."""

from __future__ import annotations

from collections.abc import Iterator
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._device import DeviceContext

from ..nn.plain import is_plain, why_not_tensors
from ..ops import dispatcher

OF_ALL = frozenset(vars(nn.Module())) | {"forward", "_replicate_for_data_parallel"}
CALLS = frozenset(("gradient_checkpointing",))  # what ``__call__`` reads, not ``forward``
READ = CALLS.union(("p", "inplace", "in_features", "out_features"))  # of PyTorch's layers: read at each call, or no difference
PLAIN = (bool, int, float, str, type(None))
NUMBERS_AND_TEXT = frozenset((*PLAIN, torch.dtype))
FEW = 1024  # numbers of a tensor that are compared at each call


def is_ordinary(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether this is a call like those of the trial: of strided floats with something in them, under no mode.

    So traces (jit, fx, export, ONNX) hold PyTorch's operators alone, and vmap, grad and forward-mode derivatives go through.
    """
    if torch.compiler.is_compiling():
        if torch.compiler.is_exporting():
            return False
    elif (
        dispatcher.included().raw_repr() not in dispatcher.ORDINARY
        or forward_ad._current_level >= 0
        or (torch._C._len_torch_function_stack() > 0 and not _only_devices())
    ):
        return False
    return all(map(_fits, args)) and all(map(_fits, kwargs.values()))


def _only_devices() -> bool:
    """Whether all that looks at calls of functions are default devices."""
    stack = (torch._C._get_function_stack_at(i) for i in range(torch._C._len_torch_function_stack()))
    return all(type(mode) is DeviceContext for mode in stack)


def _fits(value: Any) -> bool:
    kind = type(value)
    if kind is Tensor or kind is nn.Parameter:
        if value.dtype == torch.float64 and torch.is_autocast_enabled(value.device.type):  # which leaves it as it is
            return False
        strided = value.layout == torch.strided and not value.is_nested and not value.is_complex()
        return strided and not value.is_meta and value.numel() > 0
    if kind is list or kind is tuple:
        return all(map(_fits, value))
    if kind is dict:
        return all(map(_fits, value.values()))
    return kind in NUMBERS_AND_TEXT or isinstance(value, (torch.SymInt, torch.SymFloat))


class Watch:
    """A module's settings and those of the children that are not called; ``holds`` says whether they are the same still.

    Args:
        module: as it is when it is patched.
        uncalled: paths of the children that the replacement does not call.
        reads: attributes of the module that the replacement reads at each call.
    """

    def __init__(self, module: nn.Module, uncalled: tuple[str, ...], reads: tuple[str, ...]) -> None:
        self.forward = type(module).forward
        self.own = _Settings(module, CALLS.union(reads))
        self.parts = [
            (
                tuple(path.split(".")),
                type(part),
                type(part).forward,
                _Settings(part, READ if type(part).__module__.startswith("torch.") else CALLS),
            )
            for path in uncalled
            for part in (module.get_submodule(path),)
        ]

    def holds(self, module: nn.Module) -> bool:
        if type(module).forward is not self.forward or why_not_tensors(module) is not None or not self.own.hold(module):
            return False
        for path, kind, forward, settings in self.parts:
            part: Any = module
            for name in path:
                part = part._modules.get(name)
                if part is None:
                    return False
            if type(part) is not kind or kind.forward is not forward or not is_plain(part) or not settings.hold(part):
                return False
        return True


class _Settings:
    """The attributes of one module: values, what configurations hold, and tensors that are no parameters."""

    def __init__(self, module: nn.Module, ignored: frozenset[str]) -> None:
        own = vars(module)
        # replicas of DataParallel have their weights as plain attributes
        self.names, self.ignored, self.count = frozenset((*own, *module._parameters)), ignored, _count(own)
        self.children, self.parameters = len(module._modules), len(module._parameters)
        self.values: list[tuple[str, Any]] = []
        self.configs: list[tuple[str, type, list[tuple[str, Any]]]] = []
        self.tensors: list[tuple[str, Tensor]] = []
        for name, value in (*attributes(module), *class_values(module)):
            if name in ignored:
                continue
            if isinstance(value, Tensor):
                self.tensors.append((name, value.detach().clone()))
            elif is_config(value):
                self.configs.append((name, type(value), plain_values(value)))
            else:
                self.values.append((name, _kept(value)))

    def hold(self, module: nn.Module) -> bool:
        own = module.__dict__
        if len(own["_modules"]) != self.children or len(own["_parameters"]) > self.parameters:
            return False
        if _count(own) != self.count:
            for name in own:
                new = name not in self.names and name not in OF_ALL and name not in self.ignored
                if new and (not name.startswith("_") or hasattr(type(module), name)):
                    return False
        for name, value in self.values:
            now = getattr(module, name, Watch)
            if now is not value and not _same(now, value):
                return False
        for name, kind, values in self.configs:
            config = getattr(module, name, None)
            if type(config) is not kind:
                return False
            held = config.__dict__  # configurations of transformers compute what is asked for by getattr
            for key, value in values:
                now = held.get(key, Watch)
                if now is not value and not _same(now, value):
                    return False
        if not self.tensors:
            return True
        return not torch.compiler.is_compiling() and all(self._equal(getattr(module, n, None), t) for n, t in self.tensors)

    @staticmethod
    def _equal(now: Any, then: Tensor) -> bool:
        """Small ones on the CPU are compared; of others the numbers are not read back, so that they count as changed."""
        if type(now) not in (Tensor, nn.Parameter) or now.is_meta or now.numel() > FEW or not now.is_cpu:
            return False
        return now.dtype == then.dtype and torch.equal(now, then)


def _count(own: dict[str, Any]) -> int:
    """Of attributes, whether it is patched or not."""
    return len(own) - ("forward" in own) - ("_replicate_for_data_parallel" in own)


def attributes(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """What it holds beside what every module has, parameters and children: plain attributes and buffers."""
    yield from ((name, value) for name, value in vars(module).items() if name not in OF_ALL)
    yield from ((name, value) for name, value in module._buffers.items())


def class_values(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Values that stand in its classes, and may be covered by attributes of the instance later."""
    seen = set(vars(module))
    for kind in type(module).__mro__:
        if kind is nn.Module:
            return
        if kind.__module__.startswith("torch."):
            continue
        for name, value in vars(kind).items():
            if not name.startswith("__") and name not in seen and isinstance(value, (*PLAIN, tuple, Tensor)):
                seen.add(name)
                yield name, value


def is_config(value: Any) -> bool:
    """Whether it is an object that holds settings."""
    callable_or_tensor = callable(value) or isinstance(value, (Tensor, *PLAIN, torch.dtype, torch.device))
    return not callable_or_tensor and hasattr(value, "__dict__")


def plain_values(config: Any) -> list[tuple[str, Any]]:
    """Its settings, without names and versions."""
    kept = []
    for name, value in vars(config).items():
        private = name.startswith("_") and not name.startswith("_attn_implementation")
        if not private and name not in ("dtype", "torch_dtype", "transformers_version") and type(value) in PLAIN:
            kept.append((name, value))
    return kept


def _kept(value: Any) -> Any:
    return value.copy() if type(value) in (list, dict, set) else value


def _same(now: Any, then: Any) -> bool:
    if now is then:
        return True
    if type(now) is not type(then) or isinstance(then, FunctionType):
        return False
    if isinstance(then, MethodType):  # of a copy
        return now.__func__ is then.__func__
    try:
        return bool(now == then)
    except Exception:  # tensors within
        return False
