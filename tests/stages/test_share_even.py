"""`share` with spacing 'even': values that are a trained step times integers."""

import functools

import pytest
import torch
from torch import nn

from tests import making
from trainer.compression.codebooks import close_codebook, code_entropy, open_even_codebook, set_codebook
from trainer.compression.masks import set_mask
from trainer.compression.rounding import round_codebook
from trainer.compression.states import dense_state
from trainer.compression.weights import weights_of
from trainer.mistakes import Mistake
from trainer.packing import network as packed
from trainer.recipe.training import Training
from trainer.stages.share import share
from trainer.training import fit


@pytest.fixture
def make_run(tmp_path):
    made = []

    def make(folder=None):
        made.append(folder)
        folder = folder or tmp_path / str(len(made) - 1)
        return making.make_run(folder, SPEC, stage_name="share", subset=200, validation=200)

    return make


SPEC = {"model": "lenet300", "hidden": [12, 8]}


def training(**settings):
    return Training(**({"epochs": 3, "batch_size": 20, "lr": 3e-3} | settings))


def opened(num_values=4, kind="float32"):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 6))
    place = weights_of(model)["0"]
    set_mask(place, torch.rand(6, 10) < 0.7)
    open_even_codebook(place, num_values, functools.partial(round_codebook, kind=kind))
    return model, weights_of(model)["0"]


def test_a_weight_is_the_nearest_multiple_of_the_rounded_step():
    model, place = opened(kind=2)
    found, latent = place.parametrization, place.parameter.detach()
    step = found.step.item()
    assert step * 2 ** (2 - torch.tensor(step).log2().floor()) % 1 == 0, "two bits of a fraction"
    sizes = latent[found.alive].abs()
    first = min(2 * sizes.mean().item() / 2**0.5, sizes.max().item() / 2)
    assert step == pytest.approx(first, rel=2**-3)
    expected = torch.where(found.alive, (latent / step).round().clamp(-2, 2), 0.0) * step
    assert torch.equal(place.value, expected)
    assert (place.value[found.alive] == 0).any(), "zero is one of the values"
    set_codebook(place, *close_codebook(place))
    assert torch.equal(weights_of(model)["0"].value, expected)


@pytest.mark.parametrize("num_values", [2, 4, 30, 200])
def test_the_first_values_reach_no_further_than_the_weights(num_values):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 30))
    nn.init.normal_(model[0].weight)
    before = model[0].weight.detach().clone()
    place = weights_of(model)["0"]
    open_even_codebook(place, num_values, lambda step: step)
    place = weights_of(model)["0"]
    centroids = place.parametrization.centroids.detach()
    assert centroids.max() <= before.abs().max() * 1.0001
    assert (place.value - before).square().mean() < 0.25 * before.square().mean()
    if num_values > 20:
        assert centroids.max() >= before.abs().max() * 0.9999, "all values are of use"


def test_the_gradients_are_those_of_learned_step_sizes():
    model, place = opened()
    found = place.parametrization
    with torch.no_grad():
        place.parameter[found.alive] *= 3  # some beyond the range
    gradient = torch.randn(6, 10)
    (place.value * gradient).sum().backward()
    step = found.step.item()
    scaled = place.parameter.detach() / step
    inside = scaled.abs() <= 2
    assert not inside[found.alive].all()
    torch.testing.assert_close(place.parameter.grad, torch.where(found.alive & inside, gradient, 0.0))
    slope = torch.where(inside, scaled.round() - scaled, 2.0 * scaled.sign())[found.alive]
    expected = (slope * gradient[found.alive]).sum() * step  # of the logarithm
    torch.testing.assert_close(found.log_step.grad, expected.reshape(1))
    assert not hasattr(found, "nothing")


def test_soft_entropy_counts_zeros():
    _, place = opened()
    found = place.parametrization
    scaled = place.parameter.detach()[found.alive] / found.step.detach()
    shares = (-((scaled[:, None] - torch.arange(-2.0, 3.0)) ** 2) / (2 * 0.5**2)).softmax(1).mean(0)
    value = code_entropy([place])
    torch.testing.assert_close(value.detach(), -(shares * shares.log2()).sum())
    value.backward()
    assert place.parameter.grad[found.alive].any() and found.log_step.grad is None


def test_the_stage_packs_a_step_for_each_layer_and_keeps_what_it_trained(make_run):
    sizes = {}
    for spacing in ("free", "even"):
        run = make_run()
        share(
            run,
            values=6,
            assign="trained",
            spacing=spacing,
            codebook=4,
            biases=5,
            entropy=0.05,
            training=training(),
        )
        arrays = {name: tensor.numpy() for name, tensor in dense_state(run.student).items()}
        if spacing == "even":
            assert set(packed.grid_steps(arrays)) == set(arrays)
            assert all((place.value == 0).any() for place in weights_of(run.student).values())
            assert not [name for name, _ in run.student.named_parameters() if "bias.original" in name]
            assert [row["stage"] for row in run.rows] == ["clustered", "shared"]
            assert run.layers["fc1"]["clusters"] == 6 and run.rows[-1]["spacing"] == "even"
        rows = packed.account(packed.encode(run.student, run.student_spec, packed.facts_of(run.data)))[0]
        sizes[spacing] = sum(
            row["bytes"] for row in rows if row["part"] == "codebook" and "weight" in row["tensor"]
        )
    assert sizes["even"] < 0.6 * sizes["free"]


def test_an_interrupted_training_goes_on_bit_for_bit(make_run, tmp_path, monkeypatch):
    settings = {"bits": 2, "assign": "trained", "spacing": "even", "entropy": 0.1, "biases": 4}
    settings["training"] = training(optimizer="adamw", weight_decay=0.01, ema=0.9)
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


def test_a_step_too_small_for_its_type_is_refused_before_and_after_the_training(make_run, monkeypatch):
    settings = {"values": 6, "spacing": "even", "assign": "trained", "codebook": "float16"}
    training = Training(epochs=1, batch_size=20)
    run = make_run()
    for layer in weights_of(run.student).values():
        layer.parameter.data *= 1e-8
    with pytest.raises(Mistake, match="too small for float16"):
        share(run, **settings, training=training)
    run = make_run()

    def shrink(run, objective, training):
        weights_of(run.student)["fc1"].parametrization.log_step.data -= 20.0
        return {"train_seconds": 0.0}

    monkeypatch.setattr("trainer.stages.share.fit", shrink)
    with pytest.raises(Mistake, match="too small for float16"):
        share(run, **settings, training=training)
