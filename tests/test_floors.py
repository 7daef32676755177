"""Imports go down: a file imports only from the floors below its own (shelves count as one file each)."""

import ast
from pathlib import Path

import pytest

import trainer

TOP = Path(trainer.__file__).parent
FLOORS = [
    ["files", "mistakes"],
    ["bind", "channels", "drawing", "entropy", "features", "distributed", "images", "kmeans", "onednn", "projectors", "scores", "shipped_recipes"],
    ["keys"],
    ["terms", "views"],
    ["codec", "compress", "losses", "recurrent"],
    ["fold", "measure", "checkpoint", "report", "tracking", "context", "fetch"],
    ["models", "datasets", "inference"],
    ["teacher", "data"],
    ["cache", "packed", "objective"],
    ["evaluate"],
    ["fit"],
    ["stages"],
    ["recipe"],
    ["runner"],
    ["scan"],
    ["ladder"],
    ["__main__", "api", "__init__"],
]
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}


def place(path: Path) -> str:
    first = path.relative_to(TOP).parts[0]
    return first.removesuffix(".py")


def imported(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "trainer":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("trainer."):
            found.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("trainer.")}
    return found


@pytest.mark.parametrize("path", sorted(TOP.rglob("*.py")), ids=lambda p: str(p.relative_to(TOP)))
def test_imports_go_down(path):
    mine = place(path)
    assert mine in FLOOR, f"{mine} stands on no floor: name it in FLOORS and in the README's map"
    for name in imported(path):
        if path.parent != TOP and name == mine:
            pytest.fail(f"{path.name}: a shelf file never imports one of its own shelf")
        assert FLOOR[name] < FLOOR[mine], f"{mine} imports {name}, which is not below it"
