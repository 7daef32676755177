"""The last state of an LSTM or GRU: parts of the layer's outputs; what is not among these is refused in words."""

import pytest
import torch
from torch import nn

import trainer
from trainer.mistakes import Mistake


class Last(nn.Module):
    def __init__(self, kind: type[nn.RNNBase], state: str, **settings) -> None:
        super().__init__()
        self.read = kind(6, 5, batch_first=True, **settings)
        self.state = state
        self.fc = nn.Linear(10 if settings.get("bidirectional") else 5, 3)

    def forward(self, x):
        _, state = self.read(x.squeeze(1))
        output, cell = state if isinstance(self.read, nn.LSTM) else (state, None)
        chosen = cell if self.state == "cell" else output
        return self.fc(torch.cat(list(chosen), 1) if self.read.bidirectional else chosen[-1])


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_the_last_state_of_one_layer_is_exported(kind, bidirectional, tmp_path):
    pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    net = Last(kind, "output", bidirectional=bidirectional)
    [row] = trainer.export(net, tmp_path / "out", "onnx", shape=(1, 4, 6))
    assert row["agreement_student"] == 100


@pytest.mark.parametrize("state, settings", [("output", {"num_layers": 2}), ("cell", {})])
def test_other_states_are_refused_in_words(state, settings, tmp_path):
    with pytest.raises(Mistake, match=r"result [12] of operator lstm\.input cannot be exported"):
        trainer.export(Last(nn.LSTM, state, **settings), tmp_path / "out", "onnx", shape=(1, 4, 6))
