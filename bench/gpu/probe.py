"""Prints, as JSON, what the results are taken on, and whether the compiled extension is there."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence

from . import place


def output_of(command: Sequence[str]) -> str | None:
    """The first line that a program prints, or None where there is no such program or it fails."""
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, cwd=place.ROOT, capture_output=True, text=True, timeout=20)
    return done.stdout.splitlines()[0].strip() if done.returncode == 0 and done.stdout else None


def versions() -> dict[str, object]:
    import torch

    from i2v_kernels import _extension

    return {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": importlib.metadata.version("triton") if importlib.util.find_spec("triton") else None,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
        "why_no_extension": _extension.why_no_cpu() if place.STUB else _extension.why_no_cuda(),
    }


def device() -> dict[str, object]:
    import torch

    query = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,clocks.max.mem,power.limit", "--format=csv,noheader"]
    properties = torch.cuda.get_device_properties(0)
    return {
        "device": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "l2_mib": round(properties.L2_cache_size / 2**20, 1),
        "multiprocessors": properties.multi_processor_count,
        "driver, max sm clock, max memory clock, power limit": output_of(query),
    }


def main() -> int:
    import torch

    if place.STUB:
        found: dict[str, object] = {"device": "stub", "capability": "0.0"}
    elif torch.cuda.is_available() and torch.version.cuda is not None:
        found = device()
    else:
        print(f"torch {torch.__version__} sees no NVIDIA GPU", file=sys.stderr)
        return 2
    print(json.dumps(found | versions()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
