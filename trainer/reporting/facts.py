"""What a run ran on: hardware, versions, the command."""

import importlib.metadata
import os
import platform
import shlex
import sys
from pathlib import Path
from typing import Any

import torch

PACKAGES = (
    "torch", "torchvision", "timm", "accelerate", "numpy", "scipy", "scikit-learn", "safetensors", "pydantic",
    "matplotlib", "torch-pruning", "wandb",
)  # fmt: skip


def hardware() -> dict[str, Any]:
    """What this runs on: "cpu", "cores" (it may use), "torch_threads", "gpu" (names or None), "system"."""
    gpus = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    affinity = getattr(os, "sched_getaffinity", None)  # not on macOS and Windows
    return {
        "cpu": _cpu_name(),
        "cores": len(affinity(0)) if affinity else os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "gpu": ", ".join(gpus) or None,
        "system": platform.platform(),
    }


def command() -> str:
    """The command line that this process was started with, without the folders that programs lie in."""
    program = Path(sys.argv[0])
    name = "python -m trainer" if program.name == "__main__.py" else program.name
    return f"{name} {shlex.join(sys.argv[1:])}".rstrip()


def versions() -> dict[str, str]:
    """Versions of Python, of this package ("source" when not installed) and of the installed libraries."""
    found = {"python": platform.python_version(), "trainer": _version("tiny-student") or "source"}
    return found | {name: version for name in PACKAGES if (version := _version(name))}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    listed = Path("/proc/cpuinfo")
    if listed.is_file():
        for line in listed.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
