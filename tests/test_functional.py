"""Pruning, sharing and packing of anybody's network by plain calls, and what bad input gets."""

import copy

import pytest
import torch
from torch import nn

import trainer
from trainer.compression.weights import weights_of
from trainer.mistakes import Mistake
from trainer.networks.build import build
from trainer.packing import network as packed


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 10), nn.ReLU(), nn.Linear(10, 4))


def test_the_whole_way(tmp_path):
    model = network()
    assert trainer.prune(model, sparsity=0.8, exclude=["last"]) == pytest.approx({"0": 0.8, "2": 0.8})
    trainer.share(model, bits=2, exclude=["last"])
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
        elif what == "tiny":
            model[2].weight.mul_(1e-6)
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
        ("fine", lambda m: trainer.prune(m, sparsity=0.5, exclude=["1"]), "there is no layer '1'"),
        ("fine", lambda m: trainer.prune(m, sensitivity=100), "'0': sensitivity 100 prunes every weight"),
        ("fine", lambda m: trainer.share(m, bits=0), "bits of '0': got 0; whole numbers from 1 to 16"),
        ("fine", lambda m: trainer.share(m, bits=17), "bits of '0': got 17; whole numbers from 1 to 16"),
        ("fine", lambda m: trainer.share(m, bits=2.5), "bits of '0': got 2.5; whole numbers from 1 to 16"),
        (
            "fine",
            lambda m: trainer.share(m, codebook="int8"),
            "codebook: got 'int8'; 'float16' and 'float32'",
        ),
        ("fine", lambda m: trainer.prune(m, sparsity="half"), "sparsity of '0': got 'half'; a number"),
        ("fine", lambda m: trainer.prune(m, sensitivity=-1), "sensitivity of '0': got -1; a number above 0"),
        (
            "fine",
            lambda m: trainer.prune(m, sparsity=0.99),
            "'4': sparsity 0.99 leaves none of its 40 weights",
        ),
        ("fine", lambda m: trainer.prune(m[1], sparsity=0.5), "there are no weights to work on"),
        (
            "tiny",
            lambda m: trainer.share(m, bits=4),
            "'2': the largest shared value is .*, too small for float16",
        ),
        ("nan", lambda m: trainer.prune(m, sparsity=0.5), "'2' has weights that are not finite"),
        ("nan", lambda m: trainer.share(m, bits=2), "'2' has weights that are not finite"),
        (
            "zero",
            lambda m: trainer.prune(m, sensitivity=1),
            "layer '2': no weights are left to prune: all are zero",
        ),
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


def test_a_layer_that_shares_already_stops_pruning_before_any_layer_is_pruned():
    model = network()
    trainer.share(model, bits=2, exclude=["0"])
    with pytest.raises(ValueError, match="'2' shares its weights already: prune before sharing"):
        trainer.prune(model, sparsity=0.5)
    assert weights_of(model)["0"].mask is None


def test_small_values_are_shared_in_float32():
    model = spoiled("tiny")
    assert trainer.share(model, bits=4, codebook="float32") == {"0": 16, "2": 16, "4": 16}
    assert len(model[2].weight.unique()) == 16


def test_copies_of_a_pruned_network_go_their_own_ways(tmp_path):
    one = network()
    trainer.prune(one, sparsity=0.5)
    two, three = copy.deepcopy(one), copy.deepcopy(one)
    x = torch.randn(3, 12)
    expected = one(x)
    trainer.share(two, bits=1)
    trainer.pack(two, tmp_path / "x.tiny")
    trainer.load(tmp_path / "x.tiny", into=three)
    assert torch.equal(one(x), expected) and torch.equal(two(x), three(x)) and not torch.equal(one(x), two(x))
    trainer.share(one, bits=4)
    assert not torch.equal(one(x), expected)


def test_weights_that_something_else_parametrizes_are_packed_and_not_pruned(tmp_path):
    def normed():
        return nn.Sequential(torch.nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)), nn.Linear(3, 2))

    model, plain = normed(), nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    trainer.pack(model, tmp_path / "x.tiny")
    trainer.load(tmp_path / "x.tiny", into=plain)
    x = torch.randn(5, 4)
    assert torch.equal(plain(x), model(x))
    for call in (
        lambda: trainer.prune(model, sparsity=0.5),
        lambda: trainer.share(model),
        lambda: trainer.load(tmp_path / "x.tiny", into=normed()),
    ):
        with pytest.raises(ValueError, match="layer '0' is parametrized by WeightNorm already"):
            call()


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize(
    ("hooked", "kind"),
    [
        (torch.nn.utils.weight_norm, "WeightNorm"),
        (torch.nn.utils.spectral_norm, "SpectralNorm"),
        (lambda m: torch.nn.utils.prune.l1_unstructured(m, "weight", 0.5), "L1Unstructured"),
    ],
)
def test_weights_that_a_hook_computes_are_refused(hooked, kind, tmp_path):
    """A mask or codebook would be set in a tensor that the next forward pass computes anew."""
    model = nn.Sequential(hooked(nn.Linear(4, 3)), nn.Linear(3, 2))
    pack = lambda: trainer.pack(model, tmp_path / "x.tiny")
    for call in (lambda: trainer.prune(model, sparsity=0.5), lambda: trainer.share(model), pack):
        with pytest.raises(
            ValueError, match=rf"layer '0': its weight is computed by a hook \({kind}\): make it plain"
        ):
            call()


@pytest.mark.parametrize(
    ("layer", "told"),
    [
        (lambda: nn.Linear(4, 3).to(torch.complex64), "layer '1' is of torch.complex64; .* are allowed: name it in exclude"),
        (lambda: nn.Linear(4, 3).to(torch.float8_e4m3fn), "layer '1' is of torch.float8_e4m3fn; .* name it in exclude"),
        (lambda: nn.Linear(4, 3, device="meta"), "layer '1' is on the meta device and has no values"),
        (lambda: nn.LazyLinear(3), "layer '1': its weight, torch.float32 of a LazyLinear, has no shape yet: run the"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings(
    "ignore:Complex modules are a new feature", "ignore:Lazy modules are a new feature"
)
def test_layers_that_are_not_of_real_numbers_are_refused(layer, told):
    model = nn.Sequential(nn.Linear(4, 4), layer())
    before = model[0].weight.clone()
    for call in (
        lambda: trainer.prune(model, sparsity=0.5),
        lambda: trainer.prune(model, sensitivity=0.5),
        lambda: trainer.share(model, bits=2),
    ):
        with pytest.raises(ValueError, match=told):
            call()
        assert type(model[0]) is nn.Linear and torch.equal(model[0].weight, before)
    if "exclude" in told:
        assert trainer.prune(model, sparsity=0.5, exclude=["1"]) == {"0": 0.5}


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_a_lazy_layer_is_not_packed_before_it_has_a_shape(tmp_path):
    model = nn.Sequential(nn.LazyConv2d(3, 2), nn.LazyBatchNorm2d())
    with pytest.raises(
        Mistake, match="layer '0': its weight, torch.float32 of a LazyConv2d, has no shape yet"
    ):
        trainer.pack(model, tmp_path / "x.tiny")
    model(torch.randn(2, 1, 4, 4))
    assert trainer.prune(model, sparsity=0.5) == {"0": 0.5} and trainer.pack(model, tmp_path / "x.tiny")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"classes": ["a", "b"]}, r"^for 2 classes and images of 1x8x8 the network is not what 'lenet300' builds: "
         r"'fc3.bias' is \(3,\) in the file and \(2,\) in the network"),
        ({"spec": {"model": "lenet300", "hidden": [5, 6]}}, r"'fc2.bias' is \(4,\) in the file and \(6,\) in"),
        ({"shape": (1, 9, 9)}, r"for 3 classes and images of 1x9x9 .*'fc1.weight' is \(5, 64\) in .* \(5, 81\) in"),
    ],
)  # fmt: skip
def test_a_spec_that_is_not_the_networks_is_a_mistake(change, told, tmp_path):
    given = {"spec": {"model": "lenet300", "hidden": [5, 4]}, "shape": (1, 8, 8), "classes": ["a", "b", "c"]}
    model = build(given["spec"], (1, 8, 8), 3)
    assert trainer.pack(model, tmp_path / "fits.tiny", **given)
    with pytest.raises(Mistake, match=told):
        trainer.pack(model, tmp_path / "x.tiny", **(given | change))
    assert not (tmp_path / "x.tiny").exists()


def test_a_spec_needs_classes(tmp_path):
    spec = {"model": "lenet300", "hidden": [5, 4]}
    with pytest.raises(ValueError, match="classes: got none; with a spec their names are needed"):
        trainer.pack(nn.Linear(4, 3), tmp_path / "x.tiny", shape=(1, 8, 8), spec=spec)
    assert not (tmp_path / "x.tiny").exists()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda m: m.double(), "'weight' is torch.float32 in the file and torch.float64 in the network"),
        (lambda m: nn.Sequential(m), "'weight' is not in the network"),
        (lambda m: nn.Linear(4, 4), r"'bias' is \(3,\) in the file and \(4,\) in the network"),
        (lambda m: nn.Linear(4, 3, bias=False), "'bias' is not in the network"),
    ],
)
def test_a_network_that_cannot_hold_the_files_numbers_stays_as_it_was(change, told, tmp_path):
    trainer.pack(nn.Linear(4, 3), tmp_path / "x.tiny")
    model = change(nn.Linear(4, 3))
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match="x.tiny: does not fit the network: .*" + told):
        trainer.load(tmp_path / "x.tiny", into=model)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_scalars_come_back_as_scalars(tmp_path):
    trainer.pack(nn.BatchNorm1d(3), tmp_path / "x.tiny")
    state, _ = packed.tensors((tmp_path / "x.tiny").read_bytes())
    assert {name: tuple(t.shape) for name, t in state.items() if not t.dim()} == {"num_batches_tracked": ()}


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(8, 4))
        self.embedding = nn.Embedding(8, 4)
        self.embedding.weight = self.kernel

    def forward(self, x):
        return self.embedding(x) @ self.kernel.t()


def test_a_weight_that_is_tied_to_one_of_another_name(tmp_path):
    model = Tied()
    assert trainer.prune(model, sparsity=0.5) == {"embedding": 0.5}
    assert torch.equal(model.kernel, model.embedding.weight) and int((model.kernel == 0).sum()) == 16
    assert trainer.share(model, bits=2) == {"embedding": 4}
    trainer.pack(model, tmp_path / "x.tiny")
    x = torch.arange(8)
    assert torch.equal(trainer.load(tmp_path / "x.tiny", into=Tied())(x), model(x))


def test_tensors_that_differ_do_not_go_into_tied_ones(tmp_path):
    trainer.pack(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)), tmp_path / "x.tiny")
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    before = model[0].weight.clone()
    with pytest.raises(
        ValueError, match="'0.weight' and '1.weight' are one in the network and differ in the file"
    ):
        trainer.load(tmp_path / "x.tiny", into=model)
    assert torch.equal(model[0].weight, before)


def test_what_cannot_be_packed_says_so(tmp_path):
    with pytest.raises(ValueError, match="'weight' is of type bfloat16, which cannot be packed: float32, "):
        trainer.pack(nn.Linear(3, 2).bfloat16(), tmp_path / "x.tiny")
    with pytest.raises(
        ValueError, match=r"shape: got \(\); with a spec the images' \(channels, height, width\)"
    ):
        trainer.pack(network(), tmp_path / "x.tiny", spec={"model": "lenet300"})
    assert not (tmp_path / "x.tiny").exists()


def test_norms_are_no_weights_and_cells_have_gates():
    model = nn.ModuleDict(
        {
            "conv": nn.Conv2d(3, 4, 3),
            "norm": nn.LayerNorm([4, 6, 6]),
            "lstm": nn.LSTMCell(3, 4),
            "gru": nn.GRUCell(3, 4),
        }
    )
    parts = {name: place.parts for name, place in weights_of(model).items()}
    assert parts == {
        "conv": 1,
        "lstm.weight_hh": 4,
        "lstm.weight_ih": 4,
        "gru.weight_hh": 3,
        "gru.weight_ih": 3,
    }


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
    assert list(weights_of(model)) == ["embed"] and len(model["out"].weight.unique()) == 5


def test_keep_is_still_taken_for_exclude():
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 4))
    with pytest.warns(DeprecationWarning, match="keep is called exclude now"):
        assert set(trainer.prune(model, sparsity=0.5, keep=["last"])) == {"0"}
    with pytest.warns(DeprecationWarning, match="keep is called exclude now"):
        assert set(trainer.share(model, bits=2, keep=["last"])) == {"0"}
