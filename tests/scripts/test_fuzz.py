"""Mutated recipes, packed files and files of ours: a short run of scripts/fuzz.py, the same inputs every time."""

import json
import random
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import trainer
from trainer.mistakes import Mistake
from trainer.packing import container
from trainer.packing import network as packed
from trainer.storage import records

sys.path.insert(0, str(Path(trainer.__file__).parents[1] / "scripts"))
import fuzz
import fuzz_targets
import hostile
from mutations import damaged, reshaped, respelled

SEEDS = st.integers(0, 2**32)
SHORT = settings(max_examples=25, derandomize=True, deadline=None, database=None)
GOLDEN = (Path(__file__).parents[1] / "packing" / "golden.tiny").read_bytes()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


@pytest.mark.parametrize("kind", ["recipes", "checkpoints", "weights", "run_files"])
def test_a_short_run_of_each_kind(kind, folder, capsys):
    attempt = fuzz_targets.TARGETS[kind](folder)
    found = [fuzz.outcome_of(kind, attempt, number, folder) for number in range(25)]
    assert [one for one in found if one["bad"] and "slow" not in one["what"]] == []
    assert len({one["what"] for one in found}) > 1


NUM_HOSTILE = len(dict(hostile._inputs()))


def try_hostile(folder, monkeypatch, numbers):
    monkeypatch.chdir(folder)  # an attempt changes the folder and the environment
    monkeypatch.setenv("MARKER", "")
    monkeypatch.setenv("TRAINER_DATA", "")
    attempt = fuzz_targets.TARGETS["hostile"](folder)
    found = [fuzz.outcome_of("hostile", attempt, number, folder) for number in numbers]
    assert [one for one in found if one["bad"] and "slow" not in one["what"]] == []
    return {one["what"].partition(":")[2] for one in found}


def test_some_of_the_hostile_inputs(tmp_path, monkeypatch):
    assert NUM_HOSTILE >= 100
    kinds = try_hostile(tmp_path, monkeypatch, range(2, NUM_HOSTILE, 6))
    assert kinds == {" pickle", " yaml", " recipe", " packed", " bomb", " path"}


@pytest.mark.slow
def test_all_of_the_hostile_inputs(tmp_path, monkeypatch):
    try_hostile(tmp_path, monkeypatch, range(NUM_HOSTILE))


@SHORT
@given(SEEDS)
def test_a_packed_file_with_a_stale_checksum_is_never_read_as_another(seed):
    data = damaged(GOLDEN, random.Random(seed))
    try:
        found, _ = packed.tensors(data, "x.tiny")
    except Mistake as error:
        assert re.match(r"x\.tiny: .{1,290}$", str(error))
    else:
        right, _ = packed.tensors(GOLDEN)
        assert all(map(torch.equal, found.values(), right.values()))


@SHORT
@given(SEEDS, st.booleans())
def test_a_packed_file_under_a_right_checksum_is_read_or_refused_in_words(seed, header):
    chance = random.Random(seed)
    if header:
        raw = container.read_header(GOLDEN)
        data = container.encode(reshaped(raw, chance), {"a": np.arange(3, dtype=np.float32)})
    else:
        data = damaged(GOLDEN, chance)[:-4]
        data += container._checksum(data)
    for read in (packed.decode, packed.account):
        try:
            read(data, "x.tiny")
        except Mistake as error:
            assert str(error).startswith("x.tiny: ") and max(map(len, str(error).split("\n"))) <= 300


@SHORT
@given(SEEDS)
def test_json_of_ours_is_read_or_refused_in_words(seed):
    chance = random.Random(seed)
    value = {"images": ["ab", 3], "teacher": "cd", "threads": 2, "more": [{"x": 0.5}, None]}
    text = json.dumps(reshaped(value, chance)).encode()
    text = text if seed % 2 else damaged(text, chance)
    try:
        assert isinstance(records.parsed(text, "begun.json", dict[str, int | str | list]), dict)
    except Mistake as error:
        assert re.match(r"begun\.json: is damaged: .{1,270}$", str(error), re.DOTALL)


def test_the_mutations_change_something_and_are_the_same_each_time():
    changed = 0
    for seed in range(50):
        one, other = (damaged(GOLDEN, random.Random(seed)) for _ in range(2))
        assert one == other
        changed += one != GOLDEN
        text = fuzz_targets.EXTRA_RECIPE
        assert respelled(text, random.Random(seed)) == respelled(text, random.Random(seed))
    assert changed > 45


def test_what_goes_wrong_is_counted_as_bad(tmp_path):
    def broken(chance, number):
        raise [
            KeyError("x"),
            OSError("x" * 301),
            Mistake("a\x1b[31m"),
            Mistake("fine"),
            AssertionError("other"),
        ][number]

    found = [fuzz.outcome_of("x", broken, number, tmp_path) for number in range(5)]
    assert [one["bad"] for one in found] == [
        True,
        True,
        False,
        False,
        True,
    ]  # a Mistake escapes its control characters
    assert (tmp_path / "x-0.txt").read_text().startswith("traceback: KeyError")
    record = tmp_path / "x.jsonl"
    fuzz.run("x", lambda chance, number: "read", 7, tmp_path)
    assert [json.loads(line)["number"] for line in record.read_text().splitlines()] == list(range(7))
    fuzz.run("x", lambda chance, number: __import__("os")._exit(3) if number == 8 else "read", 10, tmp_path)
    assert [one["bad"] for one in fuzz.outcomes(record)] == [False] * 7 + [False, True, False]
