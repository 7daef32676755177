"""Tables on a terminal: no line is longer than it, and what matters most stays."""

import pytest

from tests.terminal import terminal
from trainer.reporting.tables import layer_table, table, terminal_width

ROWS = [
    {"stage": "teacher", "top1": 98.89, "agreement": 100.0, "num_nonzero": 480120, "sparsity": 0.0,
     "file_bytes": 1924136, "ratio_teacher": 1.0},
    {"stage": "recovered", "top1": 96.39, "agreement": 97.5, "num_nonzero": 10196, "sparsity": 0.6684,
     "file_bytes": 37902, "ratio_student": 3.3, "ratio_teacher": 50.8},
]  # fmt: skip
LAYERS = [
    {"layer": "conv1", "shape": [6, 1, 5, 5], "num_weights": 150, "num_nonzero": 60, "sparsity": 0.6, "thresholds": 0.138,
     "clusters": 16, "bits": 4, "ratio_sharing": 2.6, "file_bytes": 74, "csr_bytes": 508, "csc_bytes": 584},
]  # fmt: skip


def test_a_wide_terminal_has_the_whole_table():
    for text in (table, layer_table):
        given = ROWS if text is table else LAYERS
        assert (
            text(given)
            == text(given, None)
            == text(given, 200)
            == text(given, len(text(given).splitlines()[0]))
        )
        assert text(given).startswith("| ")


def test_80_columns():
    assert table(ROWS, 80).splitlines() == [
        "stage        top-1    agreement    zeros      bytes         to         to",
        "                 %            %        %               student    teacher",
        "---------  -------  -----------  -------  ---------  ---------  ---------",
        "teacher      98.89       100.00     0.00  1,924,136          –       1.0×",
        "recovered    96.39        97.50    66.84     37,902       3.3×      50.8×",
    ]
    assert layer_table(LAYERS, 80).splitlines() == [
        "layer    shape      non-zero    zeros    threshold    clusters    bits    bytes",
        "                                    %",
        "-------  -------  ----------  -------  -----------  ----------  ------  -------",
        "conv1    6×1×5×5          60    60.00        0.138          16       4       74",
    ]


def test_40_columns():
    assert table(ROWS, 40).splitlines() == [
        "stage        top-1      bytes         to",
        "                 %               teacher",
        "---------  -------  ---------  ---------",
        "teacher      98.89  1,924,136       1.0×",
        "recovered    96.39     37,902      50.8×",
    ]
    assert layer_table(LAYERS, 40).splitlines() == [
        "layer      zeros    clusters    bytes",
        "               %",
        "-------  -------  ----------  -------",
        "conv1      60.00          16       74",
    ]


def test_a_table_is_shown_even_where_it_cannot_fit():
    assert table(ROWS, 10).splitlines()[-1].split() == ["recovered", "96.39", "37,902", "50.8×"]


@pytest.mark.parametrize("columns", [40, 80])
def test_the_width_of_the_terminal(columns):
    with terminal(columns):
        assert terminal_width() == columns


def test_no_terminal(capfd):
    assert terminal_width() is None
