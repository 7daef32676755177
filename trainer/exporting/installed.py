"""What a machine may lack: a program, or a package of an extra."""

import importlib
from types import ModuleType

from trainer.mistakes import Mistake


class NotInstalled(Mistake):
    """A program or package that a target needs is not on this machine; the exports to other targets go on."""


def needed(module: str, extra: str) -> ModuleType:
    """Imports a package of an extra. Raises NotInstalled, with what to install, if it is not there."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        if error.name != module.partition(".")[0]:
            raise
        raise NotInstalled(
            f"needs the package {error.name}: pip install {error.name}, or the extra {extra} (pip install '.[{extra}]')"
        ) from None
