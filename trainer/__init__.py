"""tiny-student: teaches small image classifiers what large ones know, prunes them, shares their weights, packs them.

In Python: `run("recipe.yaml")` gives the report; `distill`, `prune`, `share`, `pack`, `load` and `export` work on anybody's `nn.Module`, and every
loss of `trainer.losses` is a plain function or module.
"""

import importlib
from typing import Any

# Imported when first asked for: torch and what stands on it take seconds.
_WHERE = {
    "run": "trainer.runs.runner",
    "distill": "trainer.training.distilling",
    "prune": "trainer.functional",
    "share": "trainer.functional",
    "pack": "trainer.functional",
    "load": "trainer.packing.loading",
    "export": "trainer.exporting.export",
}
__all__ = ["distill", "export", "load", "pack", "prune", "run", "share"]


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(importlib.import_module(_WHERE[name]), name)
    raise AttributeError(f"module 'trainer' has no attribute {name!r}")
