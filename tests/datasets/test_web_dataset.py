"""Pictures in shards: each found by its place, whatever else is in the .tar file."""

import pickle

import pytest
import torch

from tests.datasets.files import assert_is_a_source, png, shard, small_web_dataset
from trainer.data.batches import make_data
from trainer.datasets.web_dataset import web_dataset
from trainer.mistakes import Mistake
from trainer.recipe import shelves
from trainer.recipe.keys import DataKeys


def test_pictures_of_all_shards_in_order(tmp_path):
    source = web_dataset(**small_web_dataset(None, tmp_path))
    assert_is_a_source(source, 12, 6)
    assert source.classes == ["0", "1", "2"] and source.train.labels.tolist() == [0, 1, 2] * 4
    images, _ = pickle.loads(pickle.dumps(source.train)).__getitems__([11, 0, 7])
    assert images[:, :2, 4, 4].tolist() == [[200, 90], [0, 0], [40, 90]]


def test_labels_may_lie_anywhere_beside_and_be_missing(tmp_path):
    pictures = {f"a/{i}.left": (png((i, 0, 0)), None) for i in range(4)}
    shard(tmp_path / "x.tar", pictures | {"a/9": (png((9, 0, 0)), 1)})
    shard(tmp_path / "y.tar", {"b": (png((1, 1, 1)), 0), "c": (png((2, 2, 2)), 1)})
    (tmp_path / "names.txt").write_text("cat\ndog\n")
    keys = {"test": tmp_path / "y.tar", "class_names": tmp_path / "names.txt", "size": [6, 8], "channels": 1}
    shard(tmp_path / "z.tar", {"d": (png((1, 1, 1)), 0)})
    source = web_dataset(
        train=[tmp_path / "x.tar", tmp_path / "y.tar"], **keys | {"test": tmp_path / "z.tar"}
    )
    assert source.train.labels.tolist() == [-1] * 4 + [1, 0, 1] and source.shape == (1, 6, 8)
    assert source.classes == ["cat", "dog"]
    with pytest.raises(Mistake, match=r"test: .*x.tar/a/0.left.png has no .cls"):
        web_dataset(train=tmp_path / "y.tar", **keys | {"test": tmp_path / "x.tar"})


def test_a_folder_may_be_called_as_a_shard_is(tmp_path):
    (tmp_path / "all.tar").mkdir()
    shard(tmp_path / "all.tar" / "x.tar", {"b.tar/1#2": (png((1, 1, 1)), 0), "c": (png((2, 2, 2)), 1)})
    shard(tmp_path / "all.tar" / "y.tar", {"d": (png((3, 3, 3)), 1)})
    train = web_dataset(
        train=tmp_path / "all.tar" / "x*.tar", test=tmp_path / "all.tar" / "y.tar", size=8
    ).train
    assert train.__getitems__([0, 1])[0][:, 0, 0, 0].tolist() == [1, 2]
    assert train.paths() == [str(tmp_path / "all.tar" / "x.tar")]


@pytest.mark.parametrize("augment", [{}, {"random_resized_crop": {}}])
def test_a_run_reads_them_with_a_store_and_without(tmp_path, augment):
    settings = small_web_dataset(None, tmp_path) | {"augment": augment, "workers": 0, "validation": 3}
    seen = []
    for store in ("off", "auto"):
        keys = shelves.checker(web_dataset, DataKeys)(dataset="web_dataset", store=store, **settings)
        data = make_data(keys, torch.device("cpu"))
        assert len(data.train) == 9 and sorted(data.validation.labels.tolist()) == [0, 1, 2]
        seen.append([data.train.__getitems__(torch.arange(9))[0] for _ in range(2)])
    assert all(torch.equal(one, seen[0][0]) for pair in seen for one in pair)


def test_a_shard_stands_in_one_part_once(tmp_path):
    """What is learnt from is not measured on."""
    for name in ("train-0", "train-1", "test"):
        shard(tmp_path / f"{name}.tar", {"0": (png((0, 0, 0)), 0), "1": (png((9, 0, 0)), 1)})
    every, one, test = (tmp_path / f"{name}.tar" for name in ("train-*", "train-1", "test"))
    for keys, parts in (
        ({"train": [every, one], "test": test}, "train and train"),
        ({"train": every, "test": one}, "train and test"),
        ({"train": every, "test": test, "validation_folder": one}, "train and validation"),
    ):
        with pytest.raises(Mistake, match=rf"train-1.tar: is given twice \({parts} images\)"):
            web_dataset(**keys)


def test_what_cannot_be_read(tmp_path):
    good = {"0": (png((0, 0, 0)), 0), "1": (png((9, 0, 0)), 1)}
    shard(tmp_path / "good.tar", good)
    shard(tmp_path / "label.tar", good | {"2": (png((0, 0, 0)), "cat")})
    shard(tmp_path / "minus.tar", good | {"2": (png((0, 0, 0)), 2**32 - 1)})  # -1, written without its sign
    shard(tmp_path / "one.tar", {"0": (png((0, 0, 0)), 0)})
    (tmp_path / "no.tar").write_bytes(b"no archive at all")
    (tmp_path / "x.tar.gz").write_bytes(b"")
    for name, words in (
        ("none-*.tar", "there is no file"),
        ("label.tar", "label.tar/2.cls: got b'cat'; the number of a class"),
        (
            "minus.tar",
            "the .cls beside .*minus.tar/2.png: got 4294967295; the number of a class, below 65,536",
        ),
        ("no.tar", "is no .tar file that can be read"),
        ("x.tar.gz", "compressed shards"),
    ):
        with pytest.raises(Mistake, match=words):
            web_dataset(train=tmp_path / name, test=tmp_path / "good.tar")
    shard(tmp_path / "other.tar", {"0": (png((0, 0, 0)), 0)})
    with pytest.raises(Mistake, match="two classes or more are needed"):
        web_dataset(train=tmp_path / "one.tar", test=tmp_path / "other.tar")
    shard(tmp_path / "bad.tar", good | {"2": (b"no picture", 1), "3": (png((0, 0, 0))[:-20], 1)})
    train = web_dataset(train=tmp_path / "bad.tar", test=tmp_path / "good.tar", size=8).train
    for position in (2, 3):
        with pytest.raises(Mistake, match=rf"bad.tar/{position}.png: is no image that can be read"):
            train.__getitems__([position])
