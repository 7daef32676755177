"""Sharing: codebooks fixed and trained, their entropy, bits by budget, importance, biases and the rest in few bits."""

import contextlib
import itertools
import time

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import nn

from tests import making
from trainer.compression import kmeans, parametrizations, units
from trainer.compression.codebooks import close_codebook, cluster, code_entropy, open_codebook, set_codebook
from trainer.compression.masks import set_mask
from trainer.compression.parametrizations import Codebook, TrainedCodebook
from trainer.compression.rounding import round_to, round_unshared, to_grid
from trainer.compression.states import dense_state
from trainer.compression.weights import weights_of
from trainer.distillation.teacher import Teacher
from trainer.mistakes import Mistake
from trainer.networks.build import build
from trainer.packing import network as packed
from trainer.recipe import shelves
from trainer.recipe.keys import StageKeys, TeacherKeys, TermKeys
from trainer.recipe.training import Training
from trainer.stages.fold import fold as fold_stage
from trainer.stages.share import share
from trainer.training import fit
from trainer.training.optimizer import make_optimizer

SPEC = {"model": "lenet300", "hidden": [16, 12]}


@pytest.fixture
def make_run(tmp_path):
    made = []

    def make(spec=SPEC, sparsity=0.6, folder=None):
        made.append(folder)
        folder = folder or tmp_path / str(len(made) - 1)
        run = making.make_run(folder, spec, stage_name="share", subset=200, validation=200)
        for place in weights_of(run.student).values() if sparsity else ():
            set_mask(place, place.value.abs() > place.value.abs().quantile(sparsity))
        return run

    return make


def training(**settings):
    return Training(**({"epochs": 3, "batch_size": 20, "lr": 3e-3} | settings))


def codes_of(run):
    return {name: place.parametrization.codes.clone() for name, place in weights_of(run.student).items()}


def bits_a_weight(run):
    """Entropy of the codes, by counting."""
    bits = number = 0.0
    for codes in codes_of(run).values():
        counts = torch.bincount(codes[codes > 0])
        counts = counts[counts > 0].double()
        bits += (counts * torch.log2(counts.sum() / counts)).sum().item()
        number += counts.sum().item()
    return bits / number


# open codebooks


def opened(code_cost=0.0, groups=1, values=4, rows=6):
    torch.manual_seed(0)
    layer = nn.Linear(10, rows)
    model = nn.Sequential(layer)
    place = weights_of(model)["0"]
    set_mask(place, torch.rand(rows, 10) < 0.7)
    weight = place.value.detach().clone()
    codes, centroids = cluster(place, values, groups=groups, code_cost=code_cost)
    open_codebook(place, codes, centroids, code_cost)
    return model, weights_of(model)["0"], weight, codes


@pytest.mark.parametrize("groups", [1, 3])
def test_an_open_codebook_begins_as_the_closed_one(groups):
    model, place, weight, codes = opened(groups=groups)
    found, centroids = close_codebook(place)
    assert torch.equal(found, codes)
    value = place.value.detach().clone()
    assert torch.equal(value == 0, weight == 0) and len(value.unique()) <= 4 * groups + 1
    assert torch.equal(place.mask, weight != 0)
    set_codebook(place, found, centroids)
    assert torch.equal(weights_of(model)["0"].value, value)


def test_codes_are_those_of_the_nearest_value_or_the_cheapest():
    model, place, _, _ = opened(code_cost=0.1)
    trained, latent = place.parametrization, model[0].parametrizations.weight.original
    with torch.no_grad():
        latent.add_(0.1 * torch.randn_like(latent))
        trained.bits.copy_(torch.tensor([[1.0, 5.0, 2.0, 3.0]]))
    codes, cost = trained.codes(latent), trained.cost.item()
    assert cost > 0
    for position in itertools.product(range(6), range(10)):
        if not trained.alive[position]:
            assert codes[position] == 0
            continue
        prices = [
            (latent[position].item() - c) ** 2 + cost * b if c else np.inf
            for c, b in zip(trained.centroids[0].tolist(), trained.bits[0].tolist(), strict=True)
        ]
        assert codes[position] == 1 + int(np.argmin(prices))


@pytest.mark.parametrize("code_cost", [0.0, 0.1])
@pytest.mark.parametrize("groups", [1, 3])
def test_the_codes_of_many_values_are_found_without_comparing_all(monkeypatch, groups, code_cost):
    """Twelve values of thirty rows, of which the last group has no weight left."""
    model, place, _, _ = opened(values=12, groups=groups, rows=30, code_cost=code_cost)
    trained, latent = place.parametrization, model[0].parametrizations.weight.original
    with torch.no_grad():
        latent.add_(0.1 * torch.randn_like(latent))
        trained.bits.copy_(10 * torch.rand(groups, 12))
        trained.centroids[0, 5] = 0
    every = trained.codes(latent)
    monkeypatch.setattr(parametrizations, "MOST_COMPARED", 11)
    assert torch.equal(trained.codes(latent), every) and every.dtype == torch.int32
    assert 6 not in every and (every != 0).sum() == trained.alive.sum()


def test_a_step_with_as_many_values_as_weights_takes_no_table():
    """Each of 40,000 weights compared with each of 40,000 values took 7 s."""
    latent = torch.randn(200, 200)
    trained = TrainedCodebook(
        torch.ones(200, 200, dtype=torch.bool), latent.reshape(1, -1).sort().values, torch.zeros(1, 1)
    )
    started = time.process_time()
    value = trained(latent)
    assert time.process_time() - started < 2
    assert torch.equal(value, latent)


def test_no_more_values_than_weights():
    torch.manual_seed(0)
    place = weights_of(nn.Sequential(nn.Linear(10, 6)))["0"]
    codes, centroids = cluster(place, 65536)
    assert centroids.shape == (60,) and torch.equal(centroids[codes.long() - 1], place.value)
    set_mask(place, torch.arange(60).reshape(6, 10) < 25)  # three rows have 10, 10 and 5, three have none
    codes, centroids = cluster(place, 65536, groups=6)
    assert centroids.shape == (6, 10) and (centroids[3:] == 0).all()
    table = torch.cat([torch.zeros(1), centroids.reshape(-1)])
    assert torch.equal(table[codes.long()], place.value)
    set_mask(place, torch.zeros(6, 10, dtype=torch.bool))
    with pytest.raises(Mistake, match="no weights left"):
        cluster(place, 4)


def test_the_gradient_goes_straight_through_and_to_the_centroids():
    model, place, _, codes = opened()
    x = torch.randn(5, 10)
    model(x).square().sum().backward()
    plain = nn.Linear(10, 6)
    plain.load_state_dict({"weight": place.value.detach(), "bias": model[0].bias.detach()})
    plain(x).square().sum().backward()
    own = model[0].parametrizations.weight
    torch.testing.assert_close(own.original.grad, torch.where(codes != 0, plain.weight.grad, 0.0))
    expected = torch.stack([plain.weight.grad[codes == c + 1].sum() for c in range(4)])
    torch.testing.assert_close(own[0].centroids.grad[0], expected)


def test_the_bits_of_codes_are_counted_in_training_alone():
    model, place, _, _ = opened(code_cost=0.1)
    trained = place.parametrization
    with torch.no_grad():
        trained.bits.fill_(9.0)
    model.eval()(torch.randn(2, 10))
    assert (trained.bits == 9).all()
    model.train()
    codes = trained.codes(model[0].parametrizations.weight.original)
    model(torch.randn(2, 10))
    used = torch.bincount(codes.flatten(), minlength=5)[1:] + 0.5
    torch.testing.assert_close(trained.bits[0], torch.log2(used.sum() / used))


def test_soft_entropy_by_hand_and_its_gradient():
    model, place, _, _ = opened()
    value = code_entropy([place])
    trained, latent = place.parametrization, model[0].parametrizations.weight.original
    centroids = trained.centroids[0].detach().sort().values
    width = (centroids[-1] - centroids[0]) / 3 / 2
    alive = latent.detach()[trained.alive]
    shares = (-((alive[:, None] - centroids) ** 2) / (2 * width**2)).softmax(1).mean(0)
    torch.testing.assert_close(value.detach(), -(shares * shares.log2()).sum())
    value.backward()
    assert latent.grad[trained.alive].any() and not latent.grad[~trained.alive].any()
    assert trained.centroids.grad is None


def test_soft_entropy_of_groups_is_that_of_each_by_itself():
    layer = nn.Linear(6, 4)
    with torch.no_grad():
        layer.weight[2:] = 0  # a group without survivors
        layer.weight[0, :3] = 0
    place = weights_of(nn.Sequential(layer))["0"]
    weight = place.value.detach().clone()
    open_codebook(place, *cluster(place, 2, groups=2))
    alone = nn.Linear(6, 2)
    alone.weight.data = weight[:2]
    by_itself = weights_of(nn.Sequential(alone))["0"]
    open_codebook(by_itself, *cluster(by_itself, 2))
    torch.testing.assert_close(code_entropy([place]), code_entropy([by_itself]))
    assert place.parametrization.sizes == [9, 0]


@pytest.mark.parametrize("values", [1, 2, 64])
def test_soft_entropy_is_finite_where_values_are_unused_or_coincide(values):
    model, place, _, _ = opened(values=values, groups=2)
    with torch.no_grad():
        place.parametrization.centroids[0].clamp_(0.01, 0.01)
    value = code_entropy([place])
    value.backward()
    assert torch.isfinite(value) and torch.isfinite(model[0].parametrizations.weight.original.grad).all()


@pytest.mark.parametrize("given", [{"bits": 11}, {"bits": {"fc1": 3, "fc2": 11}}, {"values": 1025}])
def test_the_entropy_of_very_many_values_is_refused(given):
    entry = shelves.checker(share, StageKeys)
    settings = {"stage": "share", "assign": "trained", "training": {"epochs": 1}, **given}
    assert entry.model_validate(settings).entropy == 0
    with pytest.raises(ValidationError, match=r"1,024 values \(10 bits\) are the most"):
        entry.model_validate(settings | {"entropy": 0.1})
    assert entry.model_validate(settings | {"entropy": 0.1, **dict.fromkeys(given, 10)}).entropy == 0.1


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_no_weight_decay_on_what_is_shared(optimizer):
    model, _, _, _ = opened()
    settings = Training(epochs=1, optimizer=optimizer, weight_decay=0.1, decay_all=True)
    groups = make_optimizer(nn.ModuleDict({"student": model}), settings).param_groups
    decays = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    own = model[0].parametrizations.weight
    assert decays == {id(own.original): 0.0, id(own[0].centroids): 0.0, id(model[0].bias): 0.1}


def test_a_tied_weight_opens_and_closes_as_one():
    embed, out = nn.Embedding(12, 8), nn.Linear(8, 12, bias=False)
    out.weight = embed.weight
    model = nn.Sequential(embed, out)
    (place,) = weights_of(model).values()
    open_codebook(place, *cluster(place, 4))
    model(torch.arange(12)).square().sum().backward()
    assert torch.equal(embed.weight, out.weight)
    assert len([p for p in model.parameters() if p.requires_grad]) == 2
    set_codebook(place, *close_codebook(place))
    assert torch.equal(embed.weight, out.weight) and len(embed.weight.unique()) <= 5


@pytest.mark.parametrize("cell", [nn.LSTM, nn.GRU])
def test_recurrent_weights_open(cell):
    torch.manual_seed(0)
    net = cell(6, 5, batch_first=True)
    for place in weights_of(net).values():
        open_codebook(place, *cluster(place, 4))
    net(torch.randn(2, 3, 6))[0].sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in net.parameters())


# clustering


def naive_cost(values, weights, centroids, codes, price):
    counts = np.bincount(codes)
    bits = -np.log2(counts[counts > 0] / counts.sum()) @ counts[counts > 0]
    return float(weights @ (values - centroids[codes]) ** 2 + price * bits)


def test_code_cost_lowers_entropy_and_the_whole_cost():
    torch.manual_seed(0)
    place = weights_of(nn.Sequential(nn.Linear(50, 40)))["0"]
    nn.init.normal_(place.value)
    values = place.value.detach().numpy().ravel()
    price, weights = 0.1 * float((values.astype(float) ** 2).mean()), np.ones(len(values))
    costs, entropies = [], []
    for code_cost in (0.0, 0.1):
        codes, centroids = cluster(place, 8, code_cost=code_cost)
        flat = codes.numpy().ravel() - 1
        counts = np.bincount(flat)
        entropies.append(-(counts / counts.sum()) @ np.log2(np.maximum(counts, 1) / counts.sum()))
        costs.append(naive_cost(values, weights, centroids.numpy(), flat, price))
    assert entropies[1] < entropies[0] - 0.1 and costs[1] < costs[0]


def test_importance_pulls_values_to_where_it_is():
    torch.manual_seed(0)
    layer = nn.Linear(30, 30)
    place = weights_of(nn.Sequential(layer))["0"]
    importance = torch.where(place.value > 0, 100.0, 0.01).detach()

    def error(codes, centroids):
        table = torch.cat([torch.zeros(1), centroids])
        return (importance * (table[codes.long()] - layer.weight.detach()) ** 2).sum().item()

    plain, weighted = cluster(place, 4), cluster(place, 4, importance=importance)
    assert error(*weighted) < 0.6 * error(*plain)
    assert error(*cluster(place, 4, importance=importance, code_cost=0.01)) < 0.7 * error(*plain)
    with pytest.raises(ValueError, match="'0'.*no gradient reaches"):
        cluster(place, 4, importance=torch.zeros(30, 30))


# rounding


def test_a_grid_of_a_power_of_two_that_fits():
    values = torch.tensor([0.9, -0.31, 0.001, 0.0, -0.0])
    for bits in (2, 4, 8):
        found = to_grid(values, bits)
        (step,) = packed.grid_steps({"a": found.numpy()}).values()
        assert (found.abs().max() / step) <= 2 ** (bits - 1) - 1
        assert (found - values).abs().max() <= 0.9 / (2 ** (bits - 1) - 1)
        assert not torch.signbit(found[found == 0]).any()
    assert not to_grid(torch.zeros(3), 4).any()
    assert torch.isfinite(to_grid(torch.tensor([1e-44, 0.0]), 8)).all()
    with pytest.raises(ValueError, match=r"a value of 3.3e\+38 is too large for 2 bits"):
        to_grid(torch.tensor([1e38, -3.3e38]), 2)


def test_rounding_to_bits_of_the_fraction():
    values = torch.tensor([1.3, -0.011, 700.0, 0.0, -0.0])
    for bits in (1, 4, 10):
        found = round_to(values, bits)
        assert ((found - values).abs() <= values.abs() * 2.0 ** -(bits + 1)).all()
        assert not torch.signbit(found[found == 0]).any()
    torch.testing.assert_close(round_to(values, 10), round_to(values, "float16"))


def test_round_unshared_leaves_shared_values_alone():
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 4))
    first, last = weights_of(model).values()
    set_codebook(first, *cluster(first, 4))
    set_mask(last, torch.rand(4, 5) < 0.5)
    with torch.no_grad():
        model[0].bias.copy_(torch.randn(5))
    before = first.value.detach().clone()
    round_unshared(model, biases=4, rest="float16")
    assert torch.equal(first.value, before)
    assert packed.grid_steps({"a": model[0].bias.detach().numpy()})
    for tensor in (last.value, model[1].weight, model[1].running_var):
        assert torch.equal(tensor, tensor.half().float())
    with torch.no_grad():
        model[1].running_var[0] = 1e6
    with pytest.raises(ValueError, match="1.running_var.*too large for float16"):
        round_unshared(model, rest="float16")


# the stage


def test_trained_assignments_move_and_are_kept_as_a_plain_codebook(make_run):
    found = {}
    for assign in ("fixed", "trained"):
        run = make_run()
        masks = {name: place.mask.clone() for name, place in weights_of(run.student).items()}
        share(run, bits=2, assign=assign, training=training())
        for name, place in weights_of(run.student).items():
            assert isinstance(place.parametrization, Codebook)
            assert torch.equal(place.mask, masks[name]) and len(place.value.unique()) <= 5
            centroids = place.value.unique()
            assert torch.equal(centroids, centroids.half().float())
        found[assign] = codes_of(run)
        assert [row["stage"] for row in run.rows] == ["clustered", "shared"]
        assert run.layers["fc1"]["clusters"] == 4 and run.layers["fc1"]["bits"] == 2
    changed = sum(int((found["fixed"][name] != found["trained"][name]).sum()) for name in found["fixed"])
    assert changed > 20


@pytest.mark.parametrize(
    "settings",
    [
        {"bits": 4, "code_cost": 0.3, "assign": "trained", "training": training()},
        {"values": 14, "spacing": "even", "assign": "trained", "entropy": 0.5, "training": training()},
        {"bits": 4, "codebook": 1},
        {"bits": 4, "codebook": 1, "training": training()},
        {"bits": 3, "per": "group", "groups": 2, "codebook": 1, "training": training()},
    ],
)
def test_the_layer_table_counts_the_values_that_the_file_has(make_run, settings):
    run = make_run()
    share(run, biases=5, **settings)
    data = packed.encode(run.student, run.student_spec, packed.facts_of(run.data))
    groups, asked, told = settings.get("groups", 1), settings.get("values") or 2 ** settings["bits"], []
    for name, place in weights_of(packed.decode(data)[0]).items():
        blocks = np.split(place.value.detach().numpy(), groups)
        used = max(len(np.unique(block[block != 0])) for block in blocks)
        facts = run.layers[name]
        assert (facts["clusters"], facts["groups"]) == (used, groups)
        assert 2 ** (facts["bits"] - 1) < used <= 2 ** facts["bits"]
        told.append(used)
    assert min(told) < asked, "some value is left unused, or two are rounded to the same"


def test_the_entropy_term_lowers_the_bits_of_the_codes(make_run):
    bits = []
    for entropy in (0.0, 0.5):
        run = make_run()
        share(run, bits=3, assign="trained", entropy=entropy, training=training(epochs=6, lr=1e-2))
        bits.append(bits_a_weight(run))
    assert bits[1] < bits[0] - 0.1


def test_bits_of_codes_count_in_trained_assignments(make_run):
    run = make_run()
    share(run, bits=3, assign="trained", code_cost=0.1, training=training())
    cheap = bits_a_weight(run)
    run = make_run()
    share(run, bits=3, assign="trained", training=training())
    assert cheap < bits_a_weight(run) - 0.1


def test_an_interrupted_training_of_assignments_goes_on_bit_for_bit(make_run, tmp_path, monkeypatch):
    settings = {
        "bits": 2,
        "assign": "trained",
        "entropy": 0.1,
        "code_cost": 0.02,
        "training": training(optimizer="adamw", weight_decay=0.01, ema=0.9),
    }
    whole = make_run()
    share(whole, **settings)
    monkeypatch.setattr(fit, "CHECKPOINT_SECONDS", -1.0)
    validate, calls = fit._validate, []

    def stop(*given):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return validate(*given)

    monkeypatch.setattr(fit, "_validate", stop)
    with pytest.raises(KeyboardInterrupt):
        share(make_run(folder=tmp_path / "cut"), **settings)
    resumed = make_run(folder=tmp_path / "cut")
    share(resumed, **settings)
    assert len(calls) < 6, "it began anew"
    mine, theirs = (dense_state(run.student) for run in (whole, resumed))
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_auto_bits_keep_the_budget_and_spend_it(make_run):
    sizes = {}
    for budget in (900, 1150):
        run = make_run()
        share(run, bits="auto", budget_bytes=budget)
        sizes[budget] = run.rows[-1]["file_bytes"], sum(layer["bits"] for layer in run.layers.values())
        assert sizes[budget][0] <= budget
    assert sizes[900][1] < sizes[1150][1]
    with pytest.raises(ValueError, match="budget_bytes: 200 are too few even with 1 bit"):
        share(make_run(), bits="auto", budget_bytes=200)


def test_importance_by_fisher_is_the_mean_squared_gradient(make_run):
    from trainer.stages.share import _fisher

    run = make_run()
    run.data.train.ids = run.data.train.ids[:16]  # one batch
    places = weights_of(run.student)
    found = _fisher(run, places, [TermKeys(loss="cross_entropy")])
    images, labels, _ = run.data.train.__getitems__(torch.arange(16))
    logits = run.student((images.float() / 255 - run.data.mean[0]) / run.data.std[0])
    nn.functional.cross_entropy(logits, labels).backward()
    expected = run.student.fc2.parametrizations.weight.original.grad**2
    torch.testing.assert_close(found["fc2"], expected)
    assert not found["fc2"][~places["fc2"].mask].any()
    share(make_run(), bits=2, weighting="fisher")


def test_a_layer_that_no_loss_reaches_has_no_importance(make_run):
    losses = [shelves.checker(shelves.find("loss", "hint"), TermKeys)(loss="hint", at=["fc1"])]
    told = r"layer 'fc2': no gradient reaches its weights.*exclude leaves the layer alone"
    for exclude, fault in (
        (None, pytest.raises(Mistake, match=told)),
        (["fc2", "fc3"], contextlib.nullcontext()),
    ):
        run = make_run()
        teacher = build(SPEC, run.data.shape, 10)
        run.teacher = Teacher([teacher], [TeacherKeys(model="x")], run.data.mean, run.data.std)
        with fault:
            share(run, bits=2, weighting="fisher", losses=losses, exclude=exclude or [])
    assert set(run.layers) == {"fc1"}


def test_biases_and_the_rest_are_rounded_before_they_are_measured(make_run):
    sizes = []
    for settings in (
        {},
        {"biases": 5},
        {"biases": 5, "codebook": 4},
        {"exclude": ["fc3"]},
        {"exclude": ["fc3"], "rest": "float16"},
    ):
        run = make_run()
        share(run, bits=2, **settings)
        sizes.append(run.rows[-1]["file_bytes"])
        again = packed.encode(run.student, run.student_spec, packed.facts_of(run.data))
        assert len(again) == sizes[-1], "what is measured is what is packed"
    plain, biases, books, kept, rest = sizes
    assert biases < plain - 38 * 2 and books < biases and rest < kept - 38 * 1
    run = make_run()
    share(run, bits=2, biases=5, training=training(epochs=1))
    assert packed.grid_steps({"a": run.student.fc1.bias.detach().numpy()})


def test_dead_units_go_before_their_biases_are_rounded(make_run):
    run = make_run()
    place = weights_of(run.student)["fc1"]
    set_mask(place, place.mask & (torch.arange(16)[:, None] != 4))
    with torch.no_grad():
        run.student.fc1.bias[4] = 0.37
    share(run, bits=2, biases=5)
    assert not run.student.fc1.bias[4] and not run.student.fc2.weight[:, 4].any()
    assert units.drop_dead(run.student)["fc1"] >= 1


@pytest.mark.parametrize("per", ["layer", "channel", "group"])
def test_a_codebook_a_layer_a_channel_or_a_group(make_run, per):
    run = make_run()
    groups = {"groups": 2} if per == "group" else {}
    share(
        run,
        values={"fc1": 3, "fc2": 2, "fc3": 2},
        per=per,
        **groups,
        assign="trained",
        training=training(epochs=1),
    )
    expected = {"layer": 1, "channel": 16, "group": 2}[per]
    assert run.layers["fc1"]["groups"] == expected and run.layers["fc1"]["clusters"] == 3
    for rows in run.student.fc1.weight.chunk(expected):
        assert len(rows[rows != 0].unique()) <= 3


def test_the_folding_stage_tells_how_far_apart_outputs_are(make_run):
    run = make_run({"model": "lenet5", "width": 2, "batch_norm": True})
    run.student.train()
    for seed in range(2):
        run.student(torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(seed)))
    fold_stage(run)
    told = run.rows[-1]
    assert told["num_changed"] == 0 and 0 <= told["max_difference"] < 1e-4
    assert run.student_spec == {"model": "lenet5", "width": 2} and run.rows[-1]["stage"] == "folded"
    share(run, bits=2)


EVEN = {"spacing": "even", "assign": "trained", "training": {"epochs": 1}}


class TestBadInput:
    @pytest.mark.parametrize(
        ("settings", "told"),
        [
            ({"bits": 0}, "greater than or equal to 1"),
            ({"bits": 17}, "less than or equal to 16"),
            ({"bits": {"fc1": 17}}, "less than or equal to 16"),
            ({"values": 0}, "greater than or equal to 1"),
            ({}, "exactly one of bits and values"),
            ({"bits": 2, "values": 4}, "exactly one of bits and values"),
            ({"bits": "auto"}, "needs budget_bytes"),
            ({"bits": 2, "budget_bytes": 100}, "nothing else does"),
            ({"bits": 2, "assign": "trained"}, "no effect without training"),
            ({"bits": 2, "entropy": 0.1}, "no effect with assign 'fixed'"),
            ({"bits": 2, "init": "linear", "code_cost": 0.1}, "no effect with init 'linear'"),
            ({"bits": 2, "per": "group"}, "needs groups"),
            ({"bits": 2, "groups": 2}, "no effect with per 'layer'"),
            ({"bits": 2, "biases": 1}, "greater than or equal to 2"),
            ({"bits": 2, "codebook": "float8"}, "float16"),
            ({"bits": 2, "spacing": "even"}, "spacing 'even' needs assign 'trained'"),
            (EVEN | {"values": 5}, "values: got 5; spacing 'even' has as many below zero as above"),
            (EVEN | {"values": {"fc1": 4, "fc2": 3}}, "values: got 3"),
            (EVEN | {"values": 4, "code_cost": 0.1}, "code_cost has no effect with spacing 'even'"),
            (EVEN | {"values": 4, "per": "channel"}, "no effect with bits 'auto' or codebooks for parts"),
        ],
    )
    def test_settings(self, settings, told):
        checker = shelves.checker(share, StageKeys)
        with pytest.raises(ValidationError, match=told):
            checker.model_validate({"stage": "share"} | settings)

    def test_layers(self, make_run):
        run = make_run(sparsity=0)
        with torch.no_grad():
            run.student.fc2.weight.zero_()
        with pytest.raises(ValueError, match="'fc2' has no weights left to share"):
            share(run, bits=2)
        with torch.no_grad():
            run.student.fc2.weight[0, 0] = torch.nan
        with pytest.raises(ValueError, match="'fc2'.*not finite"):
            share(run, bits=2)
        with pytest.raises(ValueError, match="'fc2'.*not finite"):
            cluster(weights_of(run.student)["fc2"], 2)
        run = make_run(sparsity=0)
        run.student.fc1.weight.requires_grad_(False)
        with pytest.raises(ValueError, match="'fc1' is frozen"):
            share(run, bits=2)

    @pytest.mark.parametrize("assign", ["fixed", "trained"])
    def test_fewer_survivors_than_values_and_constant_layers(self, make_run, assign):
        run = make_run()
        mask = torch.zeros(12, 16, dtype=torch.bool)
        mask[0, 1] = mask[2, 3] = True
        set_mask(weights_of(run.student)["fc2"], mask)
        with torch.no_grad():
            run.student.fc3.parametrizations.weight.original.fill_(0.25)
        expected = run.student.fc2.weight.detach().clone()
        share(run, bits=4, codebook="float32", assign=assign, training=training(epochs=1, lr=1e-6))
        torch.testing.assert_close(run.student.fc2.weight.detach(), expected, rtol=1e-3, atol=1e-4)
        assert torch.equal(run.student.fc2.weight != 0, mask)
        assert run.student.fc3.weight[run.student.fc3.weight != 0].unique().numel() == 1

    def test_a_tied_weight(self):
        embed, out = nn.Embedding(12, 8), nn.Linear(8, 12, bias=False)
        out.weight = embed.weight
        place = weights_of(nn.Sequential(embed, out))["0"]
        set_codebook(place, *cluster(place, 4, kmeans.kmeans_optimal))
        assert torch.equal(embed.weight, out.weight) and len(embed.weight.unique()) <= 4


RECIPE = """
name: folded
data: {dataset: digits, subset: 200, validation: 100}
student: {model: lenet5, width: 2, batch_norm: true}
stages:
  - {stage: train, training: {epochs: 2, lr: 1e-2, batch_size: 50}}
  - {stage: prune, method: magnitude, sparsity: 0.7}
  - {stage: fold}
  - {stage: share, bits: 2, biases: 6, assign: trained, entropy: 0.05, training: {epochs: 1, batch_size: 50}}
  - {stage: pack, tidy: true}
"""


def test_a_run_that_folds_and_tidies_goes_on_after_an_interruption(tmp_path, monkeypatch):
    from trainer.runs import runner
    from trainer.stages import share

    recipe = tmp_path / "folded.yaml"
    recipe.write_text(RECIPE)
    whole = runner.run(recipe, folder=tmp_path / "whole")
    rows = {row["stage"]: row for row in whole["rows"]}
    assert rows["folded"]["top1"] == rows["pruned"]["top1"] and rows["folded"]["max_difference"] < 1e-4
    assert (
        rows["decoded"]["num_changed"] == 0 and rows["decoded"]["file_bytes"] < rows["shared"]["file_bytes"]
    )
    assert rows["decoded"]["num_dropped"] > 0

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(share, "fit", stop)
        runner.run(recipe, folder=tmp_path / "cut")
    runner.run(recipe, folder=tmp_path / "cut")
    files = [(tmp_path / folder / "folded" / "student.tiny").read_bytes() for folder in ("whole", "cut")]
    assert files[0] == files[1]


@pytest.mark.parametrize(
    ("stages", "told"),
    [
        ("[{stage: share, bits: 2}, {stage: fold}]", "folds after sharing"),
        ("[{stage: pack, tidy: true}]", "'norm1' stands between"),
        ("[{stage: fold}, {stage: fold}]", "no BatchNorm after a layer"),
    ],
)
def test_orders_that_make_no_sense_are_seen_before_anything_is_trained(tmp_path, stages, told):
    from trainer.recipe.text import RecipeError
    from trainer.runs import runner

    recipe = tmp_path / "x.yaml"
    recipe.write_text(RECIPE.partition("stages:")[0] + f"stages: {stages}\n")
    with pytest.raises(RecipeError, match=told):
        runner.run(recipe, folder=tmp_path)


@pytest.mark.parametrize("assign", ["fixed", "trained"])
def test_layers_with_fewer_weights_than_values_are_told(make_run, capsys, assign):
    run = make_run()
    left = {name: int(place.value.count_nonzero()) for name, place in weights_of(run.student).items()}
    share(run, bits=16, assign=assign, training=Training(epochs=1, batch_size=50))
    told = ", ".join(f"{name} {number:,} of 65,536" for name, number in left.items())
    assert f"share: no layer gets more values than it has weights: {told}\n" in capsys.readouterr().out
    for name, place in weights_of(run.student).items():
        codebook = place.parametrization
        assert isinstance(codebook, Codebook) and place.parameter.shape == (left[name],)
    assert run.rows[-1]["stage"] == "shared" and run.rows[-1]["top1_validation"] > 0
