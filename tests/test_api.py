"""Pruning, sharing and packing of anybody's network by plain calls, and what bad input gets."""

import pytest
import torch
from torch import nn

import trainer
from trainer import compress


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 10), nn.ReLU(), nn.Linear(10, 4))


def test_the_whole_way(tmp_path):
    model = network()
    assert trainer.prune(model, sparsity=0.8, keep=["last"]) == pytest.approx({"0": 0.8, "2": 0.8})
    trainer.share(model, bits=2, keep=["last"])
    size = trainer.pack(model, tmp_path / "x.tiny")
    assert size == (tmp_path / "x.tiny").stat().st_size
    same = trainer.load(tmp_path / "x.tiny", into=network())
    x = torch.randn(3, 12)
    assert torch.equal(same(x), model(x))
    assert int((same[0].weight != 0).sum()) == 48 and len(same[0].weight.unique()) <= 5


def spoiled(what):
    model = network()
    with torch.no_grad():
        if what == "nan":
            model[2].weight[1, 1] = torch.nan
        elif what == "zero":
            model[2].weight.zero_()
        elif what == "frozen":
            model[2].weight.requires_grad_(False)
        else:
            model[2].weight.fill_(0.5)
    return model


@pytest.mark.parametrize(
    ("what", "call", "told"),
    [
        ("fine", lambda m: trainer.prune(m), "exactly one of sensitivity and sparsity"),
        ("fine", lambda m: trainer.prune(m, sensitivity=1, sparsity=0.5), "exactly one of sensitivity and"),
        ("fine", lambda m: trainer.prune(m, sparsity=1.0), "sparsity of '0': got 1.0; 0 up to, but not, 1"),
        ("fine", lambda m: trainer.prune(m, sparsity=-0.1), "sparsity of '0': got -0.1"),
        ("fine", lambda m: trainer.prune(m, sparsity={"0": 0.5}), "nothing is given for 2, 4"),
        ("fine", lambda m: trainer.prune(m, sparsity=0.5, keep=["1"]), "there is no layer '1'"),
        ("fine", lambda m: trainer.prune(m, sensitivity=100), "'0': sensitivity 100 prunes every weight"),
        ("fine", lambda m: trainer.share(m, bits=0), "bits of '0': got 0; 1 to 16"),
        ("fine", lambda m: trainer.share(m, bits=17), "bits of '0': got 17; 1 to 16"),
        ("nan", lambda m: trainer.prune(m, sparsity=0.5), "'2' has weights that are not finite"),
        ("nan", lambda m: trainer.share(m, bits=2), "'2' has weights that are not finite"),
        ("zero", lambda m: trainer.prune(m, sensitivity=1), "'2' has no weights left to prune"),
        ("zero", lambda m: trainer.share(m, bits=2), "'2' has no weights left to share"),
        ("frozen", lambda m: trainer.prune(m, sparsity=0.5), "'2' is frozen"),
        ("frozen", lambda m: trainer.share(m, bits=2), "'2' is frozen"),
        ("constant", lambda m: trainer.prune(m, sensitivity=1), "'2': all weights left are 0.5"),
    ],
)
def test_bad_input_leaves_the_network_as_it_was(what, call, told):
    model = spoiled(what)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=told):
        call(model)
    after = model.state_dict()
    assert after.keys() == before.keys(), "no mask and no codebook is left behind by a call that failed"
    assert all(torch.equal(tensor.nan_to_num(7), before[key].nan_to_num(7)) for key, tensor in after.items())


def test_constant_layers_and_few_survivors_are_shared_exactly():
    model = spoiled("constant")
    expected = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    trainer.prune(model, sparsity={"0": 0.99, "2": 0.5, "4": 0.5})
    assert trainer.share(model, bits=4) == {"0": 2, "2": 1, "4": 16}
    kept = model[0].weight != 0
    torch.testing.assert_close(model[0].weight[kept], expected["0.weight"][kept], rtol=1e-3, atol=0)
    assert torch.equal(model[2].weight[model[2].weight != 0], torch.full((100,), 0.5))


def test_tied_weights_have_one_mask_and_one_codebook():
    model = nn.ModuleDict({"embed": nn.Embedding(12, 8), "out": nn.Linear(8, 12, bias=False)})
    model["out"].weight = model["embed"].weight
    assert trainer.prune(model, sparsity=0.5) == {"embed": 0.5}
    assert torch.equal(model["embed"].weight, model["out"].weight)
    assert int((model["out"].weight == 0).sum()) == 48
    trainer.share(model, bits=2)
    assert torch.equal(model["embed"].weight, model["out"].weight)
    assert list(compress.weights(model)) == ["embed"] and len(model["out"].weight.unique()) == 5
