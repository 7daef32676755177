"""`trainer bench`: options without effect, an output that exists, what it prints."""

import json

import pytest

from trainer.cli import main
from trainer.runs import bench as benching

ROW = {
    "file": "a/s.onnx", "name": "s.onnx", "runtime": "onnxruntime", "threads": 1, "file_bytes": 1234, "top1": 96.5,
    "load_seconds": 0.02, "own_bytes": 5_000_000, "latency_seconds": 0.001, "latency_p95_seconds": 0.002,
    "batch_seconds": 0.032, "batch_p95_seconds": 0.04, "images_per_second": 2000.0,
}  # fmt: skip


@pytest.fixture
def found(monkeypatch):
    result = {"rows": [ROW], "sparsity": {}, "missing": [], "num_images": 10}
    asked = []
    monkeypatch.setattr(benching, "bench", lambda *given: (asked.append(given), result)[1])
    return result, asked


def test_a_table_or_one_line(found, capsys):
    assert main(["bench", "a/s.onnx", "--seconds", "0.5"]) == 0
    row = capsys.readouterr().out.splitlines()[2]
    assert [cell.strip() for cell in row.split("|")[1:-1]] == [
        *("s.onnx", "onnxruntime", "1", "1,234", "96.50", "20.0", "5.0"),
        *("1.000", "2.000", "32.00", "40.00", "2,000"),
    ]
    assert main(["bench", "a/s.onnx", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == [ROW]
    [(files, recipe, own, allowed, seconds), _] = found[1]
    assert (list(map(str, files)), recipe, own, allowed, seconds) == (["a/s.onnx"], None, None, False, 0.5)


def test_what_is_missing_is_said_and_the_status_is_1(found, capsys):
    found[0]["missing"].append("s.tiny in C: needs gcc")
    assert main(["bench", "a/s.onnx"]) == 1
    assert "needs gcc" in capsys.readouterr().err


def test_a_plot(found, tmp_path, capsys):
    plot = tmp_path / "b.png"
    assert main(["bench", "a", "--recipe", "quickstart", "--plot", str(plot)]) == 0
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert main(["bench", "a", "--recipe", "quickstart", "--plot", str(plot)]) == 2
    assert "b.png: is there already; --force replaces it" in capsys.readouterr().err
    assert main(["bench", "a", "--recipe", "quickstart", "--plot", str(plot), "--force"]) == 0
    found[0]["rows"] = [{**ROW, "top1": None}]
    assert main(["bench", "a", "--recipe", "quickstart", "--plot", str(plot), "--force"]) == 2
    assert "no accuracy to draw" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, said",
    [
        (["--force"], "--force has no effect without --plot"),
        (["--plot", "b.png"], "--plot needs --recipe"),
        (["--plot", "b.jpg", "--recipe", "r"], "--plot: got b.jpg; a file ending in .png is allowed"),
        (["--seconds", "0"], "--seconds: got 0; more than 0 is allowed"),
    ],
)
def test_options_that_do_not_go_together(found, capsys, options, said):
    assert main(["bench", "a", *options]) == 2
    assert said in capsys.readouterr().err
