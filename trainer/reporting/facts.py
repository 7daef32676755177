"""Collects facts of a run's environment: hardware, versions, the command."""

import importlib.metadata
import platform
import shlex
import sys
from pathlib import Path
from typing import Any

PACKAGES = (
    "torch", "torchvision", "timm", "accelerate", "numpy", "scipy", "scikit-learn", "safetensors", "pydantic",
    "matplotlib", "torch-pruning", "wandb",
)  # fmt: skip


def hardware() -> dict[str, Any]:
    """Returns "cpu", "cores" (that the process may use), "torch_threads", "gpu" (names or None) and "system"."""
    import torch  # here: `trainer --version` needs none

    from trainer.distributed import usable_cores

    gpus = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    return {
        "cpu": _cpu_name(),
        "cores": usable_cores(),
        "torch_threads": torch.get_num_threads(),
        "gpu": ", ".join(gpus) or None,
        "system": platform.platform(),
    }


def command() -> str:
    """Returns the command line of this process, without the program's folder."""
    program = Path(sys.argv[0])
    name = "python -m trainer" if program.name == "__main__.py" else program.name
    return f"{name} {shlex.join(sys.argv[1:])}".rstrip()


def versions() -> dict[str, str]:
    """Returns the versions of Python, of this package ("source" if not installed) and of the installed libraries."""
    found = {"python": platform.python_version(), "trainer": own_version()}
    return found | {name: version for name in PACKAGES if (version := _version(name))}


def own_version() -> str:
    """Returns the version of this package; "source" where it is not installed."""
    return _version("tiny-student") or "source"


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
