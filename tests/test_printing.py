"""What a file names cannot change a terminal: control characters are printed as escapes, other alphabets as they are."""

import numpy as np
import pytest
from PIL import Image

from trainer.cli import main
from trainer.mistakes import Mistake, printable, say
from trainer.networks.build import build
from trainer.packing import container
from trainer.packing import network as packed


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("red\x1b[31m", "red\\x1b[31m"),
        ("\x9b2J\x07\0", "\\x9b2J\\x07\\x00"),
        ("a\u202eb\u2028", "a\\u202eb\\u2028"),
        ("half \ud800", "half \\ud800"),
        ("Löwe 狮子 😀 می\u200cخواهم a\u00a0b", "Löwe 狮子 😀 می\u200cخواهم a\u00a0b"),
        ("two\nlines", "two\nlines"),
    ],
)
def test_control_characters_are_shown_as_escapes(text, shown, capsys):
    assert printable(text) == shown
    say(text)
    told = capsys.readouterr().err
    assert told.split("trainer:")[1].strip() == shown.strip()
    assert str(Mistake(text)) == shown


def test_predict_and_inspect_print_names_as_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    spec = {"model": "lenet300", "hidden": [2]}
    facts = {"shape": [1, 8, 8], "mean": [0.1], "std": [0.3], "classes": ["a\nb: 99.9 %", "\x1b[2J"]}
    (tmp_path / "x.tiny").write_bytes(packed.encode(build(spec, (1, 8, 8), 2), spec, facts))
    Image.new("L", (8, 8)).save(tmp_path / "i.png")
    assert main(["predict", "x.tiny", "i.png"]) == 0
    [line] = capsys.readouterr().out.splitlines()
    assert "a\\nb: 99.9 %" in line and "\\x1b[2J" in line
    (tmp_path / "y.tiny").write_bytes(container.encode(facts, {"w\x1b[0m\n": np.ones((2, 2), np.float32)}))
    assert main(["inspect", "y.tiny"]) == 0
    out = capsys.readouterr().out
    assert "w\\x1b[0m\\n" in out and "\x1b" not in out
