"""Data sets of Hugging Face in local folders; the library is an extra, and so are these tests."""

import pickle

import pytest
import torch

from tests.datasets.files import assert_is_a_source, save
from trainer.data.batches import make_data
from trainer.datasets import hugging_face as shelf
from trainer.datasets.hugging_face import hugging_face
from trainer.mistakes import Mistake
from trainer.recipe import shelves
from trainer.recipe.keys import DataKeys

pytestmark = pytest.mark.filterwarnings("ignore")  # the library warns of what it does itself


@pytest.fixture(autouse=True)
def forgotten():
    shelf._opened.cache_clear()


@pytest.fixture
def beans(tmp_path):
    datasets = pytest.importorskip("datasets")
    for part, count in (("train", 3), ("validation", 2)):
        for number, name in enumerate(("good", "ill", "odd")):
            for i in range(count):
                save(tmp_path / "pictures" / part / name / f"{i}.png", (60 * number + 20 * i, 0, 7))
    datasets.load_dataset(str(tmp_path / "pictures")).save_to_disk(str(tmp_path / "beans"))
    return str(tmp_path / "beans")


def test_a_folder_that_was_saved(beans):
    source = hugging_face(name=beans, size=8)
    assert_is_a_source(source, 9, 6)
    assert source.classes == ["good", "ill", "odd"] and source.train.labels.tolist() == [
        0,
        0,
        0,
        1,
        1,
        1,
        2,
        2,
        2,
    ]
    images, _ = pickle.loads(pickle.dumps(source.train)).__getitems__([8, 2])
    assert images[:, 0, 4, 4].tolist() == [160, 40]


def test_a_run_reads_it_with_a_store(beans):
    keys = shelves.checker(hugging_face, DataKeys)(
        dataset="hugging_face", name=beans, size=8, workers=0, validation=3
    )
    data = make_data(keys, torch.device("cpu"))
    assert len(data.train) == 6 and sorted(data.validation.labels.tolist()) == [0, 1, 2]
    once, again = (data.train.__getitems__(torch.arange(6))[0] for _ in range(2))
    assert torch.equal(once, again)


def test_a_folder_of_class_folders(tmp_path):
    pytest.importorskip("datasets")
    for part in ("train", "test"):
        for name in ("cat", "dog"):
            save(tmp_path / "pets" / part / name / "0.png", (9, 9, 9))
    source = hugging_face(name=str(tmp_path / "pets"), size=[6, 8], channels=1)
    assert source.classes == ["cat", "dog"] and source.shape == (1, 6, 8) and len(source.test) == 2


def test_what_is_not_there(beans, tmp_path):
    for keys, words in (
        ({"name": str(tmp_path / "none")}, "cannot be opened"),
        ({"train": "trein"}, "no split 'trein'.*train"),
        ({"label": "lable"}, "no column 'lable'.*label"),
        ({"label": "image"}, "no names of two or more classes"),
    ):
        with pytest.raises(Mistake, match=words):
            hugging_face(**{"name": beans} | keys)


def test_without_the_package_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(Mistake, match=r"pip install \"tiny-student\[hugging_face\]\""):
        hugging_face(name="beans")
