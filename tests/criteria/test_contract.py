"""What every criterion promises, over every file of the shelf."""

import inspect

import pytest
import torch
from pydantic import TypeAdapter
from torch import nn

from trainer.compression.masks import ask, score_masks, set_mask
from trainer.compression.weights import weights_of
from trainer.mistakes import Mistake
from trainer.recipe import shelves
from trainer.recipe.keys import Stage
from trainer.stages.prune import SCHEDULES, method_keys

NAMES = shelves.names("method")
WORDS = {"weight", "alive", "parts", "input_axis", "cost", "gradient", "student", "images", "exclude"}
AMOUNTS = {"pattern": "1:2"}  # of keys that are no number


def network():
    torch.manual_seed(3)
    return nn.Sequential(nn.Conv2d(2, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 36, 10), nn.LSTM(10, 4))


def amount_of(criterion):
    return shelves.beside(criterion, "AMOUNT")


def keys_of(criterion):
    amount = amount_of(criterion)
    return {} if amount is None else {amount: AMOUNTS.get(amount, 1.0)}


@pytest.mark.parametrize("name", NAMES)
def test_a_criterion_says_what_goes_first_and_whose_idea_it_is(name):
    criterion = shelves.find("method", name)
    text = inspect.cleandoc(criterion.__doc__)
    assert text.splitlines()[0].rstrip(".:").endswith(text.splitlines()[0].rstrip(".:")) and " " in text
    assert any(str(year) in text for year in range(1990, 2030)), "the source paper is missing"
    assert set(shelves.fed(criterion)) <= WORDS
    assert set(shelves.beside(criterion, "SCHEDULES") or SCHEDULES) <= set(SCHEDULES)


@pytest.mark.parametrize("name", NAMES)
def test_its_keys_are_checked_by_the_recipe(name):
    criterion = shelves.find("method", name)
    keys = method_keys(criterion)
    required = {key: {"sparsity": 0.5, **AMOUNTS}.get(key, 1.0) for key, (_, d) in keys.items() if d is ...}
    schedule = (shelves.beside(criterion, "SCHEDULES") or SCHEDULES)[0]
    given = {"stage": "prune", "method": name, "schedule": schedule, "training": {"epochs": 1}, **required}
    settings = TypeAdapter(Stage).validate_python(given)
    assert {key: getattr(settings, key) for key in required} == required
    others = {key for other in NAMES if other != name for key in method_keys(shelves.find("method", other))}
    for key in others - set(keys):
        with pytest.raises(ValueError, match=f"{key}\n  is no key with method '{name}'"):
            TypeAdapter(Stage).validate_python({**given, key: 0.5})


@pytest.mark.parametrize(
    "name", [name for name in NAMES if "student" not in shelves.fed(shelves.find("method", name))]
)
def test_it_is_a_pure_function_and_what_is_pruned_stays_pruned(name):
    criterion = shelves.find("method", name)
    words = shelves.fed(criterion)
    for layer in weights_of(network()).values():
        dead = torch.rand(layer.value.shape, generator=torch.Generator().manual_seed(1)) < 0.3
        set_mask(layer, ~dead)
        kept = layer.value.detach().clone()
        if "gradient" in words:
            given = {"weight": kept, "gradient": torch.ones_like(kept)}
            first, second = (criterion(*(given[word] for word in words)) for _ in range(2))
        else:
            first, second = (ask(criterion, layer, **keys_of(criterion)) for _ in range(2))
        assert torch.equal(layer.value, kept)
        if amount_of(criterion) is not None:
            (mask, thresholds), (again, _) = first, second
            assert mask.dtype == torch.bool and mask.shape == kept.shape and torch.equal(mask, again)
            assert isinstance(thresholds, list) and not (mask & dead).any() and mask.any()
            continue
        assert first.shape == kept.shape and torch.isfinite(first).all() and torch.equal(first, second)
        for sparsity in (0.4, 0.75, 0.97):
            [(mask, _)] = score_masks({"x": first}, {"x": ~dead}, {"x": sparsity}, False).values()
            assert int((~mask).sum()) == max(round(sparsity * mask.numel()), int(dead.sum())), (
                "not exactly so many"
            )
            assert not (mask & dead).any()


def test_a_word_that_nobody_knows_names_the_nearest():
    def odd(weigth):
        return weigth

    [layer, *_] = weights_of(network()).values()
    with pytest.raises(Mistake, match=r"method 'odd' asks for 'weigth' \(did you mean 'weight'\?\)"):
        ask(odd, layer)
