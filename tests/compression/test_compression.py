"""Masks and codebooks on every kind of layer: exact sparsity, zeros and ties that hold under any optimizer."""

import copy

import numpy as np
import pytest
import timm.layers
import torch
from torch import nn

from trainer.compression.codebooks import cluster, set_codebook
from trainer.compression.masks import (
    ask,
    cubic,
    geometric,
    score_masks,
    set_mask,
    set_power,
    unwatch_gradients,
    watch_gradients,
)
from trainer.compression.rounding import round_to
from trainer.compression.states import bake, dense_state, restore, rewind_weights
from trainer.compression.weights import choose, per_layer, weights_of
from trainer.criteria.magnitude import magnitude
from trainer.criteria.movement import movement
from trainer.criteria.std import std
from trainer.distillation.onednn import attach
from trainer.training.optimizer import Averaged

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x)[0]


class OtherKeys(nn.Module):
    """Attention whose keys and values have widths of their own: query, key and value are three parameters."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, kdim=6, vdim=4, batch_first=True)

    def forward(self, x):
        return self.attention(x, x[..., :6], x[..., :4])[0]


class Recurrent(nn.Module):
    def __init__(self, kind, **settings):
        super().__init__()
        self.cell = kind(6, 5, num_layers=2, batch_first=True, **settings)

    def forward(self, x):
        return self.cell(x)[0]


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(12, 8)
        self.out = nn.Linear(8, 12, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, x):
        return self.out(self.embed(x))


LAYERS = {
    "linear": (lambda: nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 4)), (4, 8)),
    "conv1d": (lambda: nn.Sequential(nn.Conv1d(3, 8, 3)), (4, 3, 9)),
    "conv2d": (
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, groups=8)),
        (4, 3, 9, 9),
    ),
    "conv3d": (lambda: nn.Sequential(nn.Conv3d(2, 6, 3)), (2, 2, 5, 5, 5)),
    "transposed1d": (lambda: nn.Sequential(nn.ConvTranspose1d(3, 8, 3)), (4, 3, 5)),
    "transposed2d": (lambda: nn.Sequential(nn.ConvTranspose2d(3, 8, 3)), (4, 3, 5, 5)),
    "transposed3d": (lambda: nn.Sequential(nn.ConvTranspose3d(2, 6, 3)), (2, 2, 3, 3, 3)),
    "embedding": (lambda: nn.Sequential(nn.Embedding(20, 8)), None),
    "lstm": (lambda: Recurrent(nn.LSTM), (4, 7, 6)),
    "lstm_projected": (lambda: Recurrent(nn.LSTM, bidirectional=True, proj_size=3), (4, 7, 6)),
    "gru": (lambda: Recurrent(nn.GRU), (4, 7, 6)),
    "attention": (lambda: Attention(), (4, 7, 8)),
    "attention_other_keys": (lambda: OtherKeys(), (4, 7, 8)),
    "fused_qkv": (lambda: timm.layers.Attention(8, num_heads=2, qkv_bias=True), (4, 7, 8)),
    "tied": (lambda: Tied(), None),
}
OPTIMIZERS = {
    "adam": lambda p: torch.optim.Adam(p, lr=0.05),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.1),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
}


def make(kind):
    torch.manual_seed(0)
    build, shape = LAYERS[kind]
    x = torch.randn(shape) if shape else torch.arange(10).reshape(2, 5)
    return build(), x


def make_optimizer(model, optimizer):
    return OPTIMIZERS[optimizer]([p for p in model.parameters() if p.requires_grad])


def train(model, x, optimizer, steps=5, accumulate=1, dtype=None):
    optimizer = make_optimizer(model, optimizer) if isinstance(optimizer, str) else optimizer
    for _ in range(steps):
        optimizer.zero_grad()
        for _ in range(accumulate):
            with torch.autocast("cpu", dtype, enabled=dtype is not None):
                loss = (model(x) - 1).float().square().mean()
            loss.backward()
        optimizer.step()


def prune(model, sparsity=0.7):
    """By magnitude, every part of a layer for itself."""
    places = weights_of(model)
    values = {name: magnitude(place.value) for name, place in places.items()}
    alive, parts = {n: p.mask for n, p in places.items()}, {n: p.parts for n, p in places.items()}
    masks = score_masks(values, alive, dict.fromkeys(places, sparsity), together=False, parts=parts)
    for name, (mask, _) in masks.items():
        set_mask(places[name], mask)
    return {name: mask for name, (mask, _) in masks.items()}


def assert_pruned(model, masks, sparsity=0.7):
    """Exactly so many zeros in all, in each part as many to within one, and where the masks say."""
    places = weights_of(model)
    assert set(places) == set(masks)
    for name, place in places.items():
        value = place.value.detach()
        assert int((value == 0).sum()) == round(sparsity * value.numel()), name
        for part in value.chunk(place.parts):
            assert abs(int((part == 0).sum()) - sparsity * part.numel()) < 1, name
        assert torch.equal(value != 0, masks[name])
        assert not torch.signbit(value[value == 0]).any(), (
            "zeros are +0.0: -0.0 would be another value in a file"
        )


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("kind", LAYERS)
def test_pruned_weights_stay_zero(kind, optimizer):
    model, x = make(kind)
    before = model(x).detach()
    masks = prune(model)
    assert not torch.equal(model(x), before), "the mask must reach the forward pass"
    weights = {name: place.value.detach().clone() for name, place in weights_of(model).items()}
    train(model, x, optimizer)
    assert_pruned(model, masks)
    assert all(not torch.equal(place.value, weights[name]) for name, place in weights_of(model).items())


@pytest.mark.parametrize("kind", LAYERS)
def test_pruned_weights_stay_zero_with_accumulation_in_bfloat16(kind):
    model, x = make(kind)
    masks = prune(model)
    attach(model, learning=True)  # as a training does: not every processor has all layers in bfloat16
    train(model, x, "adamw", accumulate=2, dtype=torch.bfloat16)
    assert_pruned(model, masks)


@pytest.mark.parametrize("kind", LAYERS)
def test_averaged_weights_are_zero_where_the_live_ones_are(kind):
    model, x = make(kind)
    masks = prune(model)
    averaged = Averaged(model, 0.8)
    optimizer = make_optimizer(model, "adam")
    for _ in range(3):
        train(model, x, optimizer, steps=1)
        averaged.update(1000)
    live = [place.value.detach().clone() for place in weights_of(model).values()]
    averaged.swap()
    assert_pruned(model, masks)
    assert all(
        not torch.equal(place.value, was) for place, was in zip(weights_of(model).values(), live, strict=True)
    )


@pytest.mark.parametrize("kind", LAYERS)
def test_a_resumed_training_ends_at_the_same_bits(kind):
    model, x = make(kind)
    masks = prune(model)
    optimizer = make_optimizer(model, "adam")
    train(model, x, optimizer, steps=2)
    kept = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    kept_optimizer = copy.deepcopy(optimizer.state_dict())
    train(model, x, optimizer, steps=2)
    resumed, _ = make(kind)
    restore(resumed, kept)
    optimizer = make_optimizer(resumed, "adam")
    optimizer.load_state_dict(kept_optimizer)
    train(resumed, x, optimizer, steps=2)
    assert_pruned(resumed, masks)
    assert all(
        torch.equal(a, b)
        for a, b in zip(model.state_dict().values(), resumed.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize("kind", LAYERS)
def test_movement_scores_add_up_over_all_positions(kind):
    """Against the gradient that a plain copy of the pruned network has, also where it is pruned."""
    model, x = make(kind)
    masks = prune(model, 0.5)
    places = weights_of(model)
    watch_gradients(places.values(), movement)
    expected = {name: torch.zeros_like(mask, dtype=torch.float32) for name, mask in masks.items()}
    optimizer = make_optimizer(model, "sgd")
    for _ in range(3):
        plain, _ = make(kind)
        plain.load_state_dict(dense_state(model))
        (plain(x) - 1).square().mean().backward()
        for name, place in weights_of(plain).items():
            module, attribute = places[name].holders[0]
            original = module.parametrizations[attribute].original.detach()
            expected[name] -= original * getattr(*place.holders[0]).grad
        train(model, x, optimizer, steps=1)
    for name, place in places.items():
        score = place.parametrization.score
        torch.testing.assert_close(score, expected[name], rtol=1e-4, atol=1e-6)
        assert (score[~masks[name]] != 0).any(), "pruned weights are scored too"
    fresh, _ = make(kind)
    restore(fresh, {key: tensor.clone() for key, tensor in model.state_dict().items()})
    assert all(
        torch.equal(place.parametrization.score, places[name].parametrization.score)
        for name, place in weights_of(fresh).items()
    )
    unwatch_gradients(places.values())
    assert not any("score" in key for key in model.state_dict())
    train(model, x, optimizer, steps=1)
    assert_pruned(model, masks, 0.5)


def test_evaluation_adds_nothing_to_movement_scores():
    model, x = make("linear")
    watch_gradients(weights_of(model).values(), movement)
    with torch.no_grad():
        model(x)
    assert all(not place.parametrization.score.any() for place in weights_of(model).values())


@pytest.mark.parametrize("kind", LAYERS)
def test_rewinding_takes_back_all_but_the_masks(kind):
    model, x = make(kind)
    began = {key: tensor.clone() for key, tensor in dense_state(model).items()}
    train(model, x, "adam")
    masks = prune(model)
    train(model, x, "adam")
    rewind_weights(model, began)
    assert_pruned(model, masks)
    plain, _ = make(kind)
    plain.load_state_dict(began)
    for name, place in weights_of(plain).items():
        set_mask(place, masks[name])
    expected = dense_state(plain)
    assert all(torch.equal(tensor, expected[key]) for key, tensor in dense_state(model).items())


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("kind", LAYERS)
def test_shared_weights_stay_tied(kind, optimizer):
    model, x = make(kind)
    masks = prune(model, 0.5)
    before = {}
    for name, place in weights_of(model).items():
        codes, centroids = cluster(place, 4)
        set_codebook(place, codes, centroids)
        before[name] = place.value.detach().clone()
    train(model, x, optimizer)
    for name, place in weights_of(model).items():
        value = place.value.detach()
        assert len(value.unique()) <= 5
        assert torch.equal(value == 0, ~masks[name])
        assert not torch.equal(value, before[name]), "the shared values are trained"


@pytest.mark.parametrize("kind", LAYERS)
def test_state_dict_round_trip_and_bake(kind):
    model, x = make(kind)
    prune(model)
    last = list(weights_of(model).values())[-1]
    set_codebook(last, *cluster(last, 3))
    model.eval()
    expected = model(x)
    fresh, _ = make(kind)
    restore(fresh, {k: v.clone() for k, v in model.state_dict().items()})
    assert torch.equal(fresh.eval()(x), expected)
    assert [n for n, p in fresh.named_parameters()] == [n for n, p in model.named_parameters()]
    plain, _ = make(kind)
    state = dense_state(model)
    plain.load_state_dict(state)
    assert torch.equal(plain.eval()(x), expected)
    bake(model)
    assert set(model.state_dict()) == set(plain.state_dict())
    assert torch.equal(model.eval()(x), expected)


def test_a_tied_weight_is_one_weight_and_stays_tied():
    model, x = make("tied")
    assert list(weights_of(model)) == ["embed"]
    prune(model, 0.5)
    train(model, x, "adam")
    assert torch.equal(model.embed.weight, model.out.weight)
    place = weights_of(model)["embed"]
    set_codebook(place, *cluster(place, 4))
    train(model, x, "adam")
    assert torch.equal(model.embed.weight, model.out.weight)
    bake(model)
    assert model.embed.weight is model.out.weight


def test_gradient_of_a_centroid_is_the_sum_over_its_weights():
    layer = nn.Linear(6, 5)
    model = nn.Sequential(layer)
    place = weights_of(model)["0"]
    codes, centroids = cluster(place, 3)
    set_codebook(place, codes, centroids)
    x = torch.randn(4, 6)
    model(x).square().sum().backward()
    plain = nn.Linear(6, 5)
    plain.load_state_dict({"weight": layer.weight.detach(), "bias": layer.bias.detach()})
    plain(x).square().sum().backward()
    expected = torch.stack([plain.weight.grad[codes == c + 1].sum() for c in range(3)])
    torch.testing.assert_close(layer.parametrizations.weight.original.grad, expected)


def test_std_masks_by_hand():
    layer = nn.Linear(10, 10)
    place = weights_of(nn.Sequential(layer))["0"]
    weight = layer.weight.detach().numpy().copy()
    mask, (threshold,) = ask(std, place, sensitivity=1.2)
    assert threshold == pytest.approx(1.2 * weight.astype(np.float64).std(), rel=1e-6)
    assert np.array_equal(mask.numpy(), np.abs(weight) > threshold)
    set_mask(place, mask)
    again, (second,) = ask(std, place, sensitivity=1.2)
    assert second == pytest.approx(1.2 * weight[mask.numpy()].astype(np.float64).std(), rel=1e-6)
    assert not (again & ~mask).any(), "what is pruned stays pruned"


def test_power_by_hand():
    torch.manual_seed(0)
    layer = nn.Linear(6, 4)
    place = weights_of(nn.Sequential(layer))["0"]
    mask = torch.rand(4, 6) > 0.3
    set_mask(place, mask)
    began = place.value.detach().clone()
    set_power([place], 3)
    assert torch.allclose(place.value, began, rtol=1e-5, atol=0) and torch.equal(place.value != 0, mask)
    t = place.parameter.detach().clone()
    assert torch.allclose(t[mask].abs() ** 3, began[mask].abs(), rtol=1e-5)
    slopes = torch.randn(4, 6)
    (place.value * slopes).sum().backward()
    assert torch.allclose(place.parameter.grad, torch.where(mask, slopes * 3 * t**2, 0.0), rtol=1e-5)
    with torch.no_grad():
        place.parameter.sub_(0.1 * place.parameter.grad)
    assert torch.allclose(place.value, torch.where(mask, (t - 0.3 * slopes * t**2) ** 3, 0.0), rtol=1e-4)
    ended = place.value.detach().clone()
    set_power([place], 1)
    assert torch.equal(place.value, ended) and torch.equal(place.parameter, ended)


@pytest.mark.parametrize(("kind", "parts"), [("lstm", 4), ("gru", 3), ("attention", 3), ("fused_qkv", 3)])
def test_gates_have_thresholds_of_their_own(kind, parts):
    model, _ = make(kind)
    places = weights_of(model)
    name, place = next((n, p) for n, p in places.items() if p.parts > 1)
    with torch.no_grad():
        place.value.chunk(parts)[0].mul_(10)
    mask, thresholds = ask(std, place, sensitivity=1.0)
    assert len(thresholds) == parts
    assert thresholds[0] > 5 * max(thresholds[1:])
    for block, threshold, kept in zip(place.value.chunk(parts), thresholds, mask.chunk(parts), strict=True):
        assert torch.equal(kept, block.abs() > threshold)


def test_a_qkv_without_equal_thirds_is_one_matrix():
    """Fewer keys and values than queries: nothing in the weight says where they begin."""
    model = nn.ModuleDict({"qkv": nn.Linear(8, 16), "other": nn.Linear(8, 24)})
    assert [place.parts for place in weights_of(model).values()] == [1, 1]
    masks = prune(model)
    assert_pruned(model, masks)


@pytest.mark.parametrize("kind", LAYERS)
def test_masks_reach_a_network_that_only_answers(kind):
    """In evaluation mode and without gradients torch takes other, fused ways through attention and recurrent layers."""
    model, x = make(kind)
    prune(model)
    plain, _ = make(kind)
    plain.load_state_dict(dense_state(model))
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), plain.eval()(x))


def test_global_ranking_takes_exactly_the_lowest():
    scores = {"a": torch.tensor([[0.1, 0.9], [0.5, 0.3]]), "b": torch.tensor([[0.2, 0.8]])}
    masks = score_masks(scores, {"a": None, "b": None}, {"a": 0.5, "b": 0.5}, together=True)
    assert masks["a"][0].tolist() == [[False, True], [True, False]]
    assert masks["b"][0].tolist() == [[False, True]]


def test_ties_do_not_change_the_count():
    masks = score_masks({"a": torch.ones(10, 10)}, {"a": None}, {"a": 0.37}, together=False)
    assert int((~masks["a"][0]).sum()) == 37


def test_parts_of_a_layer_are_ranked_for_themselves():
    score = torch.arange(12.0).reshape(6, 2)
    [mask] = [m for m, _ in score_masks({"a": score}, {"a": None}, {"a": 0.6}, False, {"a": 3}).values()]
    assert [int((~part).sum()) for part in mask.chunk(3)] == [2, 3, 2]  # round(0.6 x 12) = 7 in all
    assert mask.tolist() == [
        [False, False],
        [True, True],
        [False, False],
        [False, True],
        [False, False],
        [True, True],
    ]


def test_what_is_pruned_stays_pruned_also_when_less_is_asked_for():
    score, alive = torch.arange(10.0), torch.arange(10) != 9
    masks = score_masks({"a": score}, {"a": alive}, {"a": 0.3}, together=False)
    assert masks["a"][0].tolist() == [False, False, *[True] * 7, False]
    assert masks["a"][1] == [2.0]
    none = score_masks({"a": score}, {"a": alive}, {"a": 0.0}, together=True)
    assert torch.equal(none["a"][0], alive)


def test_masks_against_a_sort():
    generator = torch.Generator().manual_seed(0)
    for sparsity in (0.0, 0.01, 0.5, 0.937, 0.999):
        score = torch.randint(0, 40, (1000,), generator=generator).float()  # many ties
        mask, _ = score_masks({"a": score}, {"a": None}, {"a": sparsity}, together=False)["a"]
        zeros = round(sparsity * 1000)
        expected = torch.ones(1000, dtype=torch.bool)
        expected[sorted(range(1000), key=lambda i: (score[i].item(), i))[:zeros]] = False
        assert torch.equal(mask, expected)


def test_cubic_schedule():
    assert cubic(0.9, 0.0) == 0
    assert cubic(0.9, 0.5) == pytest.approx(0.9 * 0.875)
    assert cubic(0.9, 1.0) == 0.9
    assert cubic(0.9, 0.0, initial=0.5) == 0.5
    assert cubic(0.9, 0.5, initial=0.5) == pytest.approx(0.5 + 0.4 * 0.875)


def test_geometric_schedule_prunes_the_same_share_of_what_is_left():
    left = [1 - geometric(0.9, i / 3, initial=0.2) for i in range(4)]
    assert left[0] == pytest.approx(0.8)
    assert geometric(0.9, 1.0, initial=0.2) == 0.9
    assert [b / a for a, b in zip(left, left[1:], strict=False)] == pytest.approx([0.5] * 3)


@pytest.mark.parametrize(
    ("kind", "axis"),
    [
        ("linear", 1),
        ("conv2d", 1),
        ("transposed1d", 0),
        ("transposed2d", 0),
        ("transposed3d", 0),
        ("embedding", 1),
        ("lstm", 1),
    ],
)
def test_axis_of_the_inputs(kind, axis):
    model, _ = make(kind)
    assert {place.input_axis for place in weights_of(model).values()} == {axis}


def test_groups_have_codebooks_of_their_own():
    torch.manual_seed(0)
    layer = nn.Linear(40, 8)
    with torch.no_grad():
        layer.weight[4:] += 5
    place = weights_of(nn.Sequential(layer))["0"]
    codes, centroids = cluster(place, 4, groups=2)
    assert centroids.shape == (2, 4)
    assert set(codes[:4].unique().tolist()) == {1, 2, 3, 4}
    assert set(codes[4:].unique().tolist()) == {5, 6, 7, 8}
    before = layer.weight.detach().clone()
    set_codebook(place, codes, centroids)
    assert (layer.weight - before).abs().max() < 0.2
    with pytest.raises(ValueError, match="do not split into 3"):
        cluster(place, 4, groups=3)


class TestBadInput:
    def test_unknown_layer_gets_the_nearest_name(self):
        model = nn.ModuleDict({"conv1": nn.Conv2d(1, 2, 3), "fc": nn.Linear(2, 2)})
        with pytest.raises(ValueError, match="no layer 'conv3'.*did you mean 'conv1'"):
            choose(weights_of(model), ["conv3"])

    def test_nothing_left(self):
        place = weights_of(nn.Sequential(nn.Linear(4, 4)))
        with pytest.raises(ValueError, match="prunes every weight"):
            ask(std, place["0"], sensitivity=50.0)
        with torch.no_grad():
            place["0"].value.zero_()
        set_mask(place["0"], torch.zeros(4, 4))
        with pytest.raises(ValueError, match="no weights are left to prune"):
            ask(std, place["0"], sensitivity=1.0)
        with pytest.raises(ValueError, match="no weights left to share"):
            cluster(place["0"], 4)

    def test_a_layer_of_zeros_or_of_one_value_has_no_threshold(self):
        layer = nn.Linear(4, 4)
        place = weights_of(nn.Sequential(layer))
        nn.init.zeros_(layer.weight)
        with pytest.raises(ValueError, match="layer '0': no weights are left to prune: all are zero"):
            ask(std, place["0"], sensitivity=1.0)
        nn.init.constant_(layer.weight, 0.1)
        with pytest.raises(
            ValueError, match="'0': all weights left are 0.1, so .* name the layer in exclude"
        ):
            ask(std, place["0"], sensitivity=1.0)
        [(mask, _)] = score_masks({"0": layer.weight}, {"0": None}, {"0": 0.5}, together=False).values()
        assert int(mask.sum()) == 8, "by rank the count is exact all the same"

    def test_weights_that_are_not_finite(self):
        model = nn.Sequential(nn.Linear(4, 4))
        with torch.no_grad():
            model[0].weight[0, 0] = float("nan")
        with pytest.raises(ValueError, match="'0'.*not finite"):
            choose(weights_of(model))

    def test_a_frozen_layer_must_be_kept(self):
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        model[0].weight.requires_grad_(False)
        with pytest.raises(ValueError, match="'0' is frozen"):
            choose(weights_of(model))
        assert list(choose(weights_of(model), ["first"])) == ["1"]

    def test_pruning_after_sharing(self):
        place = weights_of(nn.Sequential(nn.Linear(4, 4)))["0"]
        set_codebook(place, *cluster(place, 2))
        with pytest.raises(ValueError, match="prune before sharing"):
            set_mask(place, torch.ones(4, 4))

    def test_a_setting_must_name_every_layer(self):
        places = weights_of(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
        with pytest.raises(ValueError, match="nothing is given for 1"):
            per_layer(places, {"0": 2.0}, "sensitivity")

    def test_fewer_survivors_than_values_are_kept_exactly(self):
        layer = nn.Linear(4, 4)
        place = weights_of(nn.Sequential(layer))["0"]
        before = layer.weight.detach().clone()
        set_codebook(place, *cluster(place, 32))
        assert torch.equal(layer.weight, before)

    def test_a_constant_layer(self):
        layer = nn.Linear(4, 4)
        nn.init.constant_(layer.weight, 0.25)
        place = weights_of(nn.Sequential(layer))["0"]
        set_codebook(place, *cluster(place, 8))
        assert torch.equal(layer.weight, torch.full((4, 4), 0.25))

    def test_too_large_for_float16(self):
        with pytest.raises(ValueError, match="too large for float16"):
            round_to(torch.tensor([1e6]), "float16")
