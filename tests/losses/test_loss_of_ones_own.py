"""The README's own loss, dropped into the shelf of a copy of the package: whatever tests a loss of the shelf passes on it."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parents[2]


FILES = [
    "test_floors.py",
    "losses/test_contract.py",
    "distillation/test_objective.py",
    "scripts/test_compare_losses.py",
    "recipe/test_recipe.py",
]
REFERENCE = """
from tests.losses.numbers_in_lists import dot, mean, norm


def naive_cosine(x, loss, margin=0.0):
    pairs = zip(x["projected_embedding"], x["teacher_embedding"], strict=True)
    return mean(max(0.0, 1 - dot(a, b) / (norm(a) * norm(b)) - margin) for a, b in pairs)


MORE = {"cosine": [({"margin": 0.9},)]}
"""


@pytest.mark.parametrize(
    ("files", "num_tests"),
    [(FILES, 30), pytest.param(["losses/test_two_processes.py"], 1, marks=pytest.mark.slow)],
    ids=["one-process", "two-processes"],
)
def test_the_readmes_loss_is_droppable(files, num_tests, tmp_path):
    told = (HERE / "README.md").read_text(encoding="utf-8").partition("## Extending")[2]
    (source,) = re.findall(r"```python\n(.*?\ndef cosine\(.*?)```", told, re.DOTALL)
    for name in ("trainer", "tests", "scripts", "recipes"):
        shutil.copytree(HERE / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(HERE / "pyproject.toml", tmp_path)
    (tmp_path / "trainer" / "losses" / "cosine.py").write_text(source)
    (tmp_path / "tests" / "losses" / "references_ones_own.py").write_text(REFERENCE)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-v", "-k", "cosine or vocabulary or row_is_of or the_schema_knows",
         *(f"tests/{file}" for file in files)],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) >= num_tests, done.stdout
