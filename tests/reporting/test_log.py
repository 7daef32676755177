"""The log is the record: valid, appended, never silently lost."""

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from trainer.reporting.log import Log


def lines(path: Path) -> list[dict]:
    def refuse(constant: str):
        raise AssertionError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


# -- the file


def test_lines(tmp_path):
    path = tmp_path / "runs" / "x" / "log.jsonl"
    with Log(path) as log:
        log.numbers("distill", 3, loss=0.5, **{"hint/layer3": torch.tensor(2.0)})
        assert lines(path)[0]["loss"] == 0.5  # on the disk at once
        log.row({"stage": "pruned", "index": 1, "top1": 98.25, "agreement": None})
        log.summary({"top1": 98.25, "recipe": Path("x.yaml")})
    numbers, row, summary = lines(path)
    assert all(abs(line.pop("time") - os.stat(path).st_mtime) < 60 for line in (numbers, row, summary))
    assert numbers == {"kind": "numbers", "stage": "distill", "step": 3, "loss": 0.5, "hint/layer3": 2.0}
    assert row == {"kind": "row", "stage": "pruned", "index": 1, "top1": 98.25, "agreement": None}
    assert summary == {"kind": "summary", "top1": 98.25, "recipe": "x.yaml"}


def test_numbers_of_all_kinds_become_valid_json(tmp_path):
    with Log(tmp_path / "log.jsonl") as log:
        log.numbers(
            "train", 1, a=float("nan"), b=float("inf"), c=torch.tensor(-math.inf), d=np.float32("nan"),
            e=np.int64(4), f=np.float64(0.1), g=[1.0, (float("nan"), True)], h={1: None},
            i=torch.tensor([1.0, math.inf]), j=np.bool_(False),
        )  # fmt: skip
    [line] = lines(tmp_path / "log.jsonl")
    for key in ("time", "kind", "stage", "step"):
        del line[key]
    assert line == {
        "a": "nan", "b": "inf", "c": "-inf", "d": "nan", "e": 4, "f": 0.1, "g": [1.0, ["nan", True]],
        "h": {"1": None}, "i": [1.0, "inf"], "j": False,
    }  # fmt: skip
    assert math.isnan(float(line["a"]))


def test_a_resumed_run_appends(tmp_path):
    for step in (1, 2):
        with Log(tmp_path / "log.jsonl") as log:
            log.numbers("train", step)
    assert [line["step"] for line in lines(tmp_path / "log.jsonl")] == [1, 2]


@pytest.mark.parametrize("torn", [b'{"time": 3, "st', b"\n\n{", b'{"time": 3}'])
def test_a_line_cut_off_by_a_kill_is_removed(tmp_path, torn):
    path = tmp_path / "log.jsonl"
    with Log(path) as log:
        log.numbers("train", 1)
    whole = path.read_bytes()
    path.write_bytes(whole + torn)
    with Log(path) as log:
        log.numbers("train", 2)
    assert path.read_bytes().startswith(whole)
    found = [json.loads(line) for line in path.read_bytes().split(b"\n") if line]
    assert [line["step"] for line in found] == [1, 2]


def test_a_log_of_one_torn_line(tmp_path):
    (tmp_path / "log.jsonl").write_bytes(b'{"ti')
    with Log(tmp_path / "log.jsonl") as log:
        log.numbers("train", 1)
    assert len(lines(tmp_path / "log.jsonl")) == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_not_swallowed(tmp_path):
    (tmp_path / "log.jsonl").symlink_to("/dev/full")
    with (
        Log(tmp_path / "log.jsonl") as log,
        pytest.raises(OSError, match=r"log cannot be written.*No space left") as caught,
    ):
        log.numbers("train", 1)
    assert caught.value.filename == str(tmp_path / "log.jsonl")


def test_other_processes_write_nothing(tmp_path):
    class Second:
        is_main_process = False

    with Log(tmp_path / "log.jsonl", Second()) as log:
        log.numbers("train", 1)
        log.row({"stage": "trained"})
        log.summary({})
    assert list(tmp_path.iterdir()) == []
