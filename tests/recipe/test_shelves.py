"""Shelf files by name, and signatures as checkers."""

import inspect
from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import BaseModel, Field, PositiveFloat, PositiveInt, ValidationError

import trainer
from trainer.mistakes import nearest
from trainer.recipe import shelves
from trainer.recipe.faults import Entry


class Common(Entry):
    loss: str
    weight: float = 1.0


def halves(
    student_logits,
    labels,
    *,
    size: PositiveInt,
    rate: PositiveFloat | dict[str, PositiveFloat] = 0.5,
    kind: Literal["a", "b"] = "a",
    sides: tuple[float, float] | None = None,
    sure: bool = False,
) -> float:
    return 0.0


class learned:
    def __init__(self, student_map, num_samples, *, width: PositiveInt = 3) -> None: ...

    def forward(self, student_map, labels): ...


def faults(kind: type[BaseModel], given) -> list[tuple]:
    with pytest.raises(ValidationError) as caught:
        kind.model_validate(given)
    return [(fault["loc"], fault["msg"]) for fault in caught.value.errors()]


def test_the_shelves():
    for key, folder in shelves.SHELVES.items():
        files = {
            p.stem
            for p in (Path(trainer.__file__).parent / folder).glob("*.py")
            if not p.stem.startswith("_")
        }
        assert set(shelves.names(key)) == files and shelves.names(key) == sorted(files)
        for name in files:
            assert shelves.find(key, name).__name__ == name, f"{folder}/{name}.py defines {name}"


@pytest.mark.parametrize("key", shelves.SHELVES)
def test_every_shelf_file_has_a_manual_and_typed_settings(key):
    for name in shelves.names(key):
        function = shelves.find(key, name)
        assert function.__doc__, f"{name} has no docstring"
        checked = shelves.checker(function, Common)
        parameters = inspect.signature(function).parameters.values()
        keyword_only = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}
        assert set(checked.model_fields) == set(Common.model_fields) | keyword_only


@pytest.mark.parametrize(
    ("value", "parts"),
    {
        "lenet5": ("lenet5", None),
        "timm/resnet18": ("timm", "resnet18"),
        "timm/vit.a_b": ("timm", "vit.a_b"),
        "hf-hub:a/b": ("timm", "hf-hub:a/b"),
        "python:a.b:c": ("python", "a.b:c"),
        "timm": ("timm", None),
        "timm/": ("timm/", None),
        "python/a": ("python/a", None),
        "": ("", None),
    }.items(),
)
def test_split(value, parts):
    assert shelves.split("model", value) == parts
    assert shelves.split("loss", value) == (value, None)


def test_find_names_the_nearest():
    assert shelves.find("loss", "kl").__name__ == "kl"
    assert shelves.find("model", "timm/resnet18").__name__ == "timm"
    with pytest.raises(ValueError, match=r"there is no loss 'hnit' \(did you mean 'hint'\?\)"):
        shelves.find("loss", "hnit")
    with pytest.raises(ValueError, match=r"there is no stage 'zzz'; there are: .*distill, .*train"):
        shelves.find("stage", "zzz")
    for odd in ("__init__", "../kl", "kl.py", "os", ""):
        with pytest.raises(ValueError, match="there is no loss"):
            shelves.find("loss", odd)


def test_a_file_that_does_not_define_its_name(monkeypatch, tmp_path):
    import trainer.losses

    (tmp_path / "stranger.py").write_text("def other(student_logits): ...\n")
    monkeypatch.setattr(trainer.losses, "__path__", [*trainer.losses.__path__, str(tmp_path)])
    with pytest.raises(ValueError, match=r"loss 'stranger': .*stranger.py defines no 'stranger'"):
        shelves.find("loss", "stranger")


def test_nearest():
    assert nearest("wieght", ["weight", "at"]) == " (did you mean 'weight'?)"
    assert nearest("x", ["weight", "at"]) == "; there are: weight, at"
    assert nearest("x", [str(i) for i in range(1000, 2000)]) == ""
    assert nearest("x", []) == ""


def test_fed_and_built_with():
    assert shelves.fed(halves) == ["student_logits", "labels"]
    assert shelves.fed(learned) == ["student_map", "labels"]
    assert shelves.built_with(learned) == ["student_map", "num_samples"]


def test_checker():
    checked = shelves.checker(halves, Common)
    assert shelves.checker(halves, Common) is checked
    made = checked.model_validate({"loss": "halves", "size": 3, "rate": {"fc1": 0.1}, "sides": [1, 2]})
    assert shelves.own_settings(made, Common) == {
        "size": 3,
        "rate": {"fc1": 0.1},
        "kind": "a",
        "sides": (1.0, 2.0),
        "sure": False,
    }
    assert (made.loss, made.weight) == ("halves", 1.0)
    assert checked.model_validate(made) is made


def test_all_faults_of_a_mapping_at_once():
    checked = shelves.checker(halves, Common)
    assert sorted(
        faults(
            checked, {"weight": "x", "size": 0, "rate": {"fc1": -1}, "kind": "c", "sides": [1], "sur": True}
        ),
        key=str,
    ) == sorted(
        [
            (("loss",), "Field required"),
            (("weight",), "Input should be a valid number, unable to parse string as a number"),
            (("size",), "Input should be greater than 0"),
            (("rate", "constrained-float"), "Input should be a valid number"),
            (("rate", "dict[str,constrained-float]", "fc1"), "Input should be greater than 0"),
            (("kind",), "Input should be 'a' or 'b'"),
            (("sides", 1), "Field required"),
            (("sur",), "is no key here (did you mean 'sure'?)"),
        ],
        key=str,
    )


def test_a_misspelt_key_is_not_missing_too():
    assert faults(shelves.checker(halves, Common), {"loss": "halves", "sise": 3}) == [
        (("sise",), "is no key here (did you mean 'size'?)")
    ]


def test_true_is_no_number():
    checked = shelves.checker(halves, Common)
    assert faults(checked, {"loss": "halves", "size": True, "weight": False, "sure": True}) == [
        (("weight",), "it should be a valid number"),
        (("size",), "it should be a valid number"),
    ]
    assert faults(checked, {"loss": "halves", "size": 1, "rate": {"a": 0.5, "b": True}}) == [
        (("rate", "b"), "it should be a valid number")
    ]
    assert checked.model_validate({"loss": "halves", "size": 1, "sure": True}).sure


def test_no_infinite_numbers():
    checked = shelves.checker(halves, Common)
    for bad in (float("inf"), float("nan"), "inf"):
        assert faults(checked, {"loss": "halves", "size": 1, "weight": bad}) == [
            (("weight",), "Input should be a finite number")
        ]


def test_settings_that_do_not_go_together(monkeypatch):
    def check(settings):
        if settings.kind == "b":
            raise ValueError("kind b is not to be")

    monkeypatch.setitem(globals(), "check", check)

    def strange(student_logits, *, kind: Literal["a", "b"] = "a") -> float: ...

    assert faults(shelves.checker(strange, Common), {"loss": "strange", "kind": "b"}) == [
        ((), "Value error, kind b is not to be")
    ]


class Holder(Entry):
    one: shelves.from_shelf("loss", Common)
    many: Annotated[list[shelves.from_shelf("loss", Common)], Field(min_length=1)] = []


def test_from_shelf():
    held = Holder.model_validate(
        {
            "one": {"loss": "kl", "temperature": "2"},
            "many": [{"loss": "hint"}, {"loss": "attention", "power": 3}],
        }
    )
    assert shelves.own_settings(held.one, Common) == {"temperature": 2.0}
    assert shelves.own_settings(held.many[1], Common) == {"power": 3.0}
    assert Holder.model_validate({"one": held.one}).one is held.one


def test_faults_from_the_shelf_have_their_places():
    assert faults(
        Holder,
        {
            "one": {"loss": "klu", "weight": "x", "other": 3},
            "many": [{"loss": "kl", "temperature": 0}, {"weight": 1}, {"los": "kl"}, {"loss": 3}, "kl", None],
        },
    ) == [
        (("one", "loss"), "there is no loss 'klu' (did you mean 'kl'?)"),
        (("one", "weight"), "Input should be a valid number, unable to parse string as a number"),
        (("many", 0, "temperature"), "Input should be greater than 0"),
        (("many", 1, "loss"), "Field required"),
        (("many", 2, "los"), "is no key here (did you mean 'loss'?)"),
        (("many", 3, "loss"), "it should be the name of a loss"),
        (("many", 4), "it should be a mapping with the key 'loss'"),
        (("many", 5), "it should be a mapping with the key 'loss'"),
    ]
