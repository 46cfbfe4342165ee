"""What the Triton launchers share: a launch as data, so that the ahead-of-time test compiles what a GPU would run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .backends import INTERPRETED

WARP = 64 if torch.version.hip else 32  # AMD's data-centre GPUs run 64 lanes together
TYPES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.uint8: "u8",
    torch.int16: "i16",
    torch.int32: "i32",
}


@dataclass(frozen=True)
class Launch:
    """One kernel launch; ``args`` by the kernel's names. ``None`` and the int 1 become constants, as in Triton.

    ``loops``: how often a program goes through each loop that the compiler leaves, in order of their ends in the code, an inner
    loop each time that it is entered; 0: not at all (the path for NaN), zeros alone: through none. For those who read the code.
    """

    kernel: Any
    programs: int
    args: dict[str, Tensor | int | float | None]
    constexprs: dict[str, Any]
    threads: int = 128
    stages: int = 1
    options: dict[str, Any] = field(default_factory=lambda: {"enable_fp_fusion": True})
    loops: tuple[int, ...] = ()

    def run(self) -> Any:
        """The compiled kernel, or None in the interpreter."""
        # fusion is named because Triton's default for it changes between versions, and results with it
        return self.kernel[(self.programs,)](
            **self.args, **self.constexprs, num_warps=self.threads // WARP, num_stages=self.stages, **self.options
        )

    def specialised(self) -> tuple[dict[str, str], dict[str, Any], list[str]]:
        """``(signature, constants, names divisible by 16)`` that Triton derives from these arguments at a launch.

        Pointers count as 16-byte aligned, as those of PyTorch's allocator are.
        """
        signature, constants, divisible = {}, dict(self.constexprs), []
        general, unaligned = (
            {param.name for param in self.kernel.params if getattr(param, name)}
            for name in ("do_not_specialize", "do_not_specialize_on_alignment")
        )
        for name, value in self.args.items():
            if value is None or (isinstance(value, int) and value == 1 and name not in general):
                constants[name] = value
                continue
            if isinstance(value, float):
                signature[name] = "fp32"
                continue
            if isinstance(value, Tensor):
                signature[name], aligned = "*" + TYPES[value.dtype], True
            else:
                signature[name], aligned = "i32" if -(2**31) <= value < 2**31 else "i64", value % 16 == 0
            if aligned and name not in general | unaligned:
                divisible.append(name)
        return {**signature, **dict.fromkeys(constants, "constexpr")}, constants, divisible


@dataclass(frozen=True)
class Entry:
    """One row of a table ``AOT``: ``launch(dtype)`` on meta tensors of a real model's shape, for each of ``dtypes``.

    What the model calls of the registry launch needs none.
    ``dots``: the kernel multiplies matrices, so its 16-bit versions must hold matrix instructions.
    ``vectors``: it must read global memory 16 bytes at a time.
    ``everywhere``: it is compiled for every GPU that the tests know.
    """

    name: str
    launch: Callable[[torch.dtype], Launch]
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float16, torch.bfloat16)
    dots: bool = False
    vectors: bool = True
    everywhere: bool = True


def pow2(n: int) -> int:
    """The smallest power of two that is at least n (and 1)."""
    return 1 << max(n - 1, 0).bit_length()


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def dot_precision(dtype: torch.dtype) -> str:
    """True fp32 products unless the user has switched PyTorch's own to TF32, by its new setting or the old one."""
    if dtype != torch.float32 or torch.version.hip is not None:
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def dots_in_fp32(dtype: torch.dtype) -> bool:
    """Whether dot operands are widened: in Triton's interpreter only, whose bfloat16 arithmetic is wrong."""
    return INTERPRETED and dtype == torch.bfloat16
