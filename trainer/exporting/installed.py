"""What a machine may lack: a program, or a package of an extra."""

import importlib
from types import ModuleType

from trainer.mistakes import Mistake


class NotInstalled(Mistake):
    """A program or package that a target needs is not on this machine; the exports to other targets go on."""


def needed(module: str, extra: str, package: str | None = None) -> ModuleType:
    """Imports a package of an extra. Raises NotInstalled, with what to install, if it is not there.

    package: what pip calls it, where that is not the module's name.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        if error.name != module.partition(".")[0]:
            raise
        name = package or error.name
        raise NotInstalled(
            f"needs the package {name}: pip install {name}, or the extra {extra} (pip install '.[{extra}]')"
        ) from None
