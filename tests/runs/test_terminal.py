"""A run on a terminal: one bar, whose lines stand above it, and tables that fit."""

from tests.terminal import terminal
from trainer.runs import runner

RECIPE = """
name: seen
data: {dataset: digits, subset: 100, validation: 60}
student: {model: lenet5, width: 2}
stages:
  - {stage: train, training: {epochs: 1, batch_size: 50}}
  - {stage: pack}
"""


def test_a_run_leaves_whole_lines_behind(tmp_path):
    (tmp_path / "seen.yaml").write_text(RECIPE)
    with terminal(60) as shown:
        result = runner.run(tmp_path / "seen.yaml", folder=tmp_path)
        again = runner.run(tmp_path / "seen.yaml", folder=tmp_path)
    assert again == result
    assert (
        "[1/2] train" in shown.text
        and "[2/2] pack " in shown.text
        and "report " in shown.text
        and "%|" in shown.text
    )
    lines = shown.screen()
    assert not [line for line in lines if "%|" in line or "<" in line]  # nothing of a bar
    assert not [line for line in lines if line.startswith("train: epoch")]  # the bar says it
    rows = [line.split(":")[0] for line in lines if line.startswith("== ")]
    assert rows == ["== trained", "== decoded"]
    heads = [at for at, line in enumerate(lines) if line.split()[:2] == ["stage", "top-1"]]
    assert len(heads) == 2  # of both runs' tables
    for head in heads:
        assert [line.split()[0] for line in lines[head + 3 : head + 5]] == ["trained", "decoded"]
