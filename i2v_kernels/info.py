"""``python -m i2v_kernels.info``: versions, devices, what was built, and which backend each op would use, with reasons."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import re
from pathlib import Path

import torch

from . import __version__, _extension, explain
from .ops import base
from .testing import OPINFOS


def report() -> str:
    """The text that belongs into a bug report."""
    lines = [f"i2v_kernels {__version__}, {installed()}   python {platform.python_version()}   {platform.platform()}"]
    names = ("torch", "numpy", "triton", "open_clip_torch", "av", "flash_attn", "nvidia-dali-cuda130", "torchcodec")
    lines.append("   ".join(f"{name} {_version(name)}" for name in names))
    module, reason = _extension.load()
    if module is None:
        lines.append(f"extension: none, {reason}")
    else:
        info = module.build_info()
        cuda = info["cuda_architectures"] or "none"
        lines.append(f"extension: compiler {info['compiler']}, torch >= {info['torch_target']}, CUDA architectures {cuda}")
        lines.append(f"           instruction sets {', '.join(info['instruction_sets'])}; in use: {info['instruction_set']}")
    if base.FORCED:
        without = ", ".join(sorted(name for name, op in base.OPS.items() if not op.forced)) or "none"
        lines.append(f"I2V_KERNELS_BACKEND={base.FORCED}: for every op that has it; without it: {without}")
    devices = ["cpu"]
    if torch.cuda.is_available():
        devices.append("cuda")
        for i in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(i)
            lines.append(f"cuda:{i}: {torch.cuda.get_device_name(i)}, compute capability {major}.{minor}")
    else:
        lines.append("cuda: no device")
    for device in devices:
        lines += ["", f"on {device}, first call of each op's registry in float32:"]
        for op in OPINFOS:
            sample = op.samples()[0].to(torch.float32, device)
            try:
                lines.append(str(explain(op.op, *sample.args, **sample.kwargs)))
            except NotImplementedError as error:  # I2V_KERNELS_BACKEND names one that cannot
                lines.append(str(error))
    return "\n".join(lines)


def installed() -> str:
    """How the package that is running came here."""
    package = Path(__file__).parent
    for found in importlib.metadata.distributions(name="i2v-kernels"):
        origin = json.loads(found.read_text("direct_url.json") or "{}")
        if origin.get("dir_info", {}).get("editable") and origin["url"] == package.parent.as_uri():
            return f"editable in {package.parent}"
        tags = re.findall(r"^Tag: (.*)", found.read_text("WHEEL") or "", re.M)
        if tags and found.locate_file(package.name) == package:
            return f"from a wheel for {', '.join(tags)} in {package.parent}"
    return f"not installed, found in {package.parent}"


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "-"


if __name__ == "__main__":
    print(report())
