"""The split, the order of an epoch, batches, views and mixed images."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from trainer.data.augment import apply, draw
from trainer.data.batches import batches, epoch_order, make_data, mix, num_batches, seed_of
from trainer.data.images import InMemory, Part, Source
from trainer.data.views import Views
from trainer.mistakes import Mistake
from trainer.recipe import shelves
from trainer.recipe.keys import Augment, DataKeys

CPU = torch.device("cpu")


def data_of(**keys):
    kind = shelves.checker(shelves.find("dataset", keys.setdefault("dataset", "digits")), DataKeys)
    return make_data(kind.model_validate(keys), CPU)


@pytest.mark.parametrize(("labelled", "each"), [(0.1, 12), (100, 10)])
def test_a_part_of_each_class_keeps_its_labels(labelled, each):
    whole, some = (data_of(subset=1200, validation=100, labelled=value) for value in (None, labelled))
    assert torch.equal(whole.train.ids, some.train.ids) and whole.fingerprint != some.fingerprint
    kept = some.train.labels >= 0
    assert torch.equal(some.train.labels[kept], whole.train.labels[kept])
    counts = torch.bincount(some.train.labels[kept], minlength=10)
    assert abs(int(kept.sum()) - 10 * each) <= 5 and int((counts - each).abs().max()) <= 2
    images, labels, _ = some.train.read(torch.arange(len(some.train)))
    assert torch.equal(labels, some.train.labels) and len(some.labelled_alone().train) == int(kept.sum())
    assert torch.equal(some.validation.labels, whole.validation.labels)
    again = data_of(subset=1200, validation=100, labelled=labelled, seed=0)
    assert torch.equal(again.train.labels, some.train.labels)
    assert not torch.equal(
        data_of(subset=1200, validation=100, labelled=labelled, seed=1).train.labels >= 0, kept
    )


@pytest.mark.parametrize("labelled", [1, 10, 1195, 1199, 1200])
def test_as_many_labels_are_kept_as_are_asked_for(labelled):
    some = data_of(subset=1200, validation=100, labelled=labelled)
    assert int((some.train.labels >= 0).sum()) == labelled


@pytest.mark.parametrize(
    ("labelled", "kept"), [(28, [25, 2, 1]), (27, [24, 2, 1]), (0.99, [25, 2, 1]), (0.3, [8, 1, 1])]
)
def test_a_class_of_one_image_keeps_its_label(tmp_path, labelled, kept):
    for name, count in (("a", 25), ("b", 2), ("c", 1)):
        for number in range(count):
            for part in ("train", "test", "val"):
                place = tmp_path / part / name / f"{number}.png"
                place.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (8, 8), (number, ord(name), 0)).save(place)
    labels = data_of(dataset="image_folder", folder=tmp_path, size=8, labelled=labelled).train.labels
    assert torch.bincount(labels[labels >= 0], minlength=3).tolist() == kept


def test_labels_that_are_not_there_cannot_be_kept(tmp_path):
    with pytest.raises(Mistake, match="labelled 2000: 1200 of the training images of digits have a label"):
        data_of(subset=1200, validation=100, labelled=2000)
    for place in ("train/0.png", "train/1.png", "train/2.png", "test/a/3.png", "test/b/4.png"):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (int(place[-5]), 0, 0)).save(tmp_path / place)
    with pytest.raises(Mistake, match="labelled 0.5: the training images of image_folder have no labels"):
        data_of(dataset="image_folder", folder=tmp_path, size=8, labelled=0.5, validation=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Twelve training images of two classes, each of one colour that tells which it is, and two test images."""
    top = tmp_path_factory.mktemp("images")
    for number in range(12):
        place = top / "train" / "ab"[number % 2] / f"{number:02d}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (10, 8), (number * 20, number, 7)).save(place)
    for name in "ab":
        (top / "test" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8), (1, 2, 3)).save(top / "test" / name / "x.png")
    return top


class OnDisk:
    """Images that are read when they are asked for."""

    def __init__(self, num_images: int) -> None:
        self.labels = torch.zeros(num_images, dtype=torch.int64)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, positions):
        return torch.zeros(len(positions), 1, 4, 4, dtype=torch.uint8), self.labels[positions]


def partly(*, kept: list[str]) -> Source:
    """A data set whose parts are in memory where `kept` names them, else on disk."""

    def part(name, num_images):
        images = torch.zeros(num_images, 1, 4, 4, dtype=torch.uint8)
        return InMemory(images, images[:, 0, 0, 0]) if name in kept else OnDisk(num_images)

    return Source(
        part("train", 20),
        part("test", 6),
        ["a", "b"],
        (0.5,),
        (1.0,),
        (1, 4, 4),
        validation=part("validation", 5),
    )


@pytest.mark.parametrize("kept", [["train"], ["test"], ["validation"], ["train", "test", "validation"]])
def test_what_is_in_memory_goes_to_the_device_part_by_part(kept, monkeypatch):
    monkeypatch.setitem(sys.modules, "own", sys.modules[__name__])
    kind = shelves.checker(partly, DataKeys)
    data = make_data(
        kind.model_validate({"dataset": "python:own:partly", "kept": kept}), torch.device("meta")
    )
    for name in ("train", "test", "validation"):
        part = getattr(data, name)
        assert part.ids.device.type == ("meta" if name in kept else "cpu")
        assert not isinstance(part.images, InMemory) or part.images.images.device.type == "meta"


# what a dataset function of one's own may not return


def unfit(*, fault: str) -> Source:
    """Twenty images of two classes, with one fault."""
    images, test = torch.zeros(20, 1, 4, 4, dtype=torch.uint8), torch.zeros(6, 1, 4, 4, dtype=torch.uint8)
    labels, test_labels = torch.arange(20) % 2, torch.arange(6) % 2
    given = {"classes": ["a", "b"], "mean": (0.5,), "std": (0.25,), "shape": (1, 4, 4)}
    if fault == "no source":
        return None  # type: ignore[return-value]
    if fault == "label":
        labels[3] = 2
    if fault == "test label":
        test_labels[3] = -2
    if fault == "floats":
        images = images / 255
    if fault == "array":
        images = images.numpy()
    if fault == "labels":
        labels = labels[1:]
    if fault == "test shape":
        test = torch.zeros(6, 1, 5, 4, dtype=torch.uint8)
    if fault == "no test":
        test, test_labels = test[:0], test_labels[:0]
    given |= {
        "names": {"classes": [0, 1]},
        "twice": {"classes": ["a", "a"]},
        "std": {"std": (0.0,)},
        "mean": {"mean": (float("nan"),)},
        "groups": {"groups": torch.arange(5)},
        "one group": {"groups": torch.zeros(20, dtype=torch.int64)},
    }.get(fault, {})
    return Source(InMemory(images, labels), InMemory(test, test_labels), **given)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("no source", "python:own:unfit: returned NoneType; a Source is allowed"),
        ("label", "train: got the label 2; 0 to 1, or -1 for none, is allowed"),
        ("test label", "test: got the label -2; 0 to 1"),
        ("floats", r"images: got torch.float32 \[20, 1, 4, 4\]; uint8 \[N, C, H, W\] is allowed"),
        ("array", "images: got ndarray; a tensor is allowed"),
        ("labels", r"labels: got \[19\]; one for each of the 20 images"),
        ("test shape", r"test: got images of \(1, 5, 4\); its shape says \(1, 4, 4\)"),
        ("no test", "there are no test images"),
        ("names", "classes: got 0; a text for each class"),
        ("twice", "classes: got 'a'; a text for each class, each once"),
        ("std", r"got mean \[0.5\] and std \[0.0\]; numbers, and above 0 for std"),
        ("mean", r"got mean \[nan\]"),
        ("groups", r"groups: got \[5\]; a number for each of the 20 training images"),
        ("one group", "20 training images; validation 0.1 holds out none of them"),
    ],
)
def test_what_a_dataset_function_must_not_return_is_told_in_one_line(monkeypatch, fault, told):
    monkeypatch.setitem(sys.modules, "own", sys.modules[__name__])
    keys = shelves.checker(unfit, DataKeys).model_validate({"dataset": "python:own:unfit", "fault": fault})
    with pytest.raises(Mistake, match=told):
        make_data(keys, CPU)


# the split


@pytest.mark.parametrize(
    ("keys", "sizes"),
    [
        ({}, (1293, 144)),
        ({"validation": 0.25}, (1078, 359)),
        ({"validation": 1}, (1436, 1)),
        ({"validation": 200, "subset": 64}, (64, 200)),
        ({"validation": 437, "subset": 1000}, (1000, 437)),
    ],
)
def test_split_has_the_sizes_asked_for_and_its_parts_are_disjoint(keys, sizes):
    data = data_of(**keys)
    assert (len(data.train), len(data.validation)) == sizes
    assert len(data.test) == 360 and data.num_samples == 1437
    train, validation = set(data.train.ids.tolist()), set(data.validation.ids.tolist())
    assert (len(train), len(validation)) == sizes
    assert not train & validation
    assert max(train | validation) < data.num_samples
    assert torch.equal(data.test.ids, torch.arange(360))
    assert data.train.images is not data.test.images


def test_split_is_a_function_of_the_datas_seed():
    one, again, other = data_of(seed=3), data_of(seed=3), data_of(seed=4)
    assert torch.equal(one.train.ids, again.train.ids) and torch.equal(
        one.validation.ids, again.validation.ids
    )
    assert one.fingerprint == again.fingerprint
    assert not torch.equal(one.validation.ids, other.validation.ids)


def test_a_subset_leaves_the_validation_part_as_it_is_and_is_part_of_a_larger_one():
    whole, small, smaller = data_of(), data_of(subset=200), data_of(subset=100)
    assert torch.equal(whole.validation.ids, small.validation.ids)
    assert set(smaller.train.ids.tolist()) < set(small.train.ids.tolist()) < set(whole.train.ids.tolist())


def test_fingerprint_tells_other_images():
    assert data_of(size=8).fingerprint != data_of(size=9).fingerprint


@pytest.mark.parametrize(
    "keys",
    [{"validation": 1437}, {"validation": 0.0001}, {"subset": 1437}, {"validation": 438, "subset": 1000}],
)
def test_a_split_that_does_not_fit_is_refused(keys):
    with pytest.raises(ValueError, match="digits has 1437 training images"):
        data_of(**keys)


def test_normalisation_can_be_given_and_must_fit_the_channels():
    data = data_of(mean=[0.0], std=[1.0])
    assert (data.mean, data.std) == ((0.0,), (1.0,))
    with pytest.raises(ValueError, match="mean and std have 3 and 1 values; the images have 1 channels"):
        data_of(mean=[0.0, 0.0, 0.0])


# the order of an epoch


@pytest.mark.parametrize(
    ("num_images", "batch_size", "num_processes"), [(23, 6, 2), (24, 6, 3), (7, 8, 4), (1, 8, 4), (10, 4, 1)]
)
def test_the_processes_share_each_batch_of_one_order_exactly(num_images, batch_size, num_processes):
    alone = epoch_order(num_images, batch_size, 5, 2, 0, 1)
    assert torch.cat(alone).sort().values.tolist() == list(range(num_images))
    shares = [epoch_order(num_images, batch_size, 5, 2, rank, num_processes) for rank in range(num_processes)]
    for number, batch in enumerate(alone):
        parts = [share[number] for share in shares]
        assert len({len(part) for part in parts}) == 1  # all processes do equally much
        joined = torch.stack(parts, dim=1).flatten()  # they take turns
        assert torch.equal(joined[: len(batch)], batch)
        missing = len(joined) - len(batch)
        assert missing < num_processes and (missing == 0 or number == len(alone) - 1)


@pytest.mark.parametrize(
    ("num_images", "batch_size", "num_processes", "sizes"),
    [
        (129, 64, 1, [64, 65]),
        (130, 64, 1, [64, 64, 2]),
        (128, 64, 1, [64, 64]),
        (1, 64, 1, [1]),
        (65, 64, 2, [33]),
        (66, 64, 2, [33]),
        (67, 64, 2, [32, 2]),
        (2, 64, 2, [1]),
    ],
)
def test_no_last_batch_of_one_image(num_images, batch_size, num_processes, sizes):
    for rank in range(num_processes):
        order = epoch_order(num_images, batch_size, 0, 0, rank, num_processes)
        assert [len(positions) for positions in order] == sizes
    assert num_batches(num_images, batch_size, num_processes) == len(sizes)
    seen = torch.cat(
        [torch.cat(epoch_order(num_images, batch_size, 0, 0, r, num_processes)) for r in range(num_processes)]
    )
    assert set(seen.tolist()) == set(range(num_images))


def test_the_order_is_a_function_of_seed_and_epoch():
    def order(seed, epoch):
        return torch.cat(epoch_order(50, 8, seed, epoch, 0, 1)).tolist()

    assert order(1, 0) == order(1, 0)
    assert len({tuple(order(seed, epoch)) for seed in (1, 2) for epoch in (0, 1)}) == 4


def test_seeds_differ_where_numbers_do():
    numbers = [(0,), (1,), (0, 0), (0, 1), (1, 0), (10, 1), (1, 101), (11, 0, 1), (1, 10, 1)]
    assert len({seed_of(*n) for n in numbers}) == len(numbers)
    assert seed_of(1, 2) == seed_of(1, 2)
    torch.Generator().manual_seed(seed_of(2**63, 10**30))  # any of them will do


# batches


def test_batches_in_memory():
    data = data_of(subset=100)
    order = epoch_order(100, 32, 0, 0, 0, 1)
    got = list(batches(data.train, order, 2, CPU))
    assert [len(images) for images, _, _ in got] == [32, 32, 32, 4]
    index = torch.cat([index for _, _, index in got])
    assert torch.equal(index, data.train.ids[torch.cat(order)])
    assert torch.equal(torch.cat([images for images, _, _ in got]), data.train.images.images[index])
    assert torch.equal(torch.cat([labels for _, labels, _ in got]), data.train.images.labels[index])
    assert got[0][0].dtype == torch.uint8


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_from_disk_come_in_order_whatever_the_workers(folder, workers):
    data = data_of(dataset="image_folder", folder=folder, size=8, validation=2, workers=workers)
    order = epoch_order(10, 4, 0, 0, 0, 1)
    got = list(batches(data.train, order, data.train.workers, CPU))
    assert [tuple(images.shape) for images, _, _ in got] == [(4, 3, 8, 8), (4, 3, 8, 8), (2, 3, 8, 8)]
    index = torch.cat([index for _, _, index in got])
    assert torch.equal(index, data.train.ids[torch.cat(order)])
    images = torch.cat([images for images, _, _ in got])
    # files are listed class by class: a has the even numbers, b the odd ones
    number = torch.tensor([*range(0, 12, 2), *range(1, 12, 2)])[index]
    assert torch.equal(images[:, 0, 0, 0].long(), number * 20)
    assert torch.equal(torch.cat([labels for _, labels, _ in got]), number % 2)


def test_no_batches():
    data = data_of(subset=10)
    assert list(batches(data.train, [], 0, CPU)) == []


# views


def test_views_are_numbered():
    plain, endless = data_of(), data_of(augment={"shift": 1})
    few = data_of(augment={"shift": 1}, views=3)
    assert {Views(plain).number(epoch, stage) for epoch in range(5) for stage in range(3)} == {0}
    assert [Views(few).number(epoch, 2) for epoch in range(5)] == [0, 1, 2, 0, 1]
    numbers = [Views(endless).number(epoch, stage) for epoch in range(50) for stage in range(4)]
    assert len(set(numbers)) == len(numbers)


def test_views_are_what_seed_view_and_index_say():
    data = data_of(augment={"shift": 2, "rotate": 10}, seed=6)
    images, _, index = data.train.__getitems__([5, 1, 7])
    views = Views(data)
    for view in (0, 4, 0):
        expected = apply(data.augment, images, draw(data.augment, 6, view, 1437)[index])
        assert torch.equal(views.augmented(images, index, view), expected)
    assert not torch.equal(views.augmented(images, index, 0), views.augmented(images, index, 1))


def test_kept_views_are_made_once_and_are_the_same(monkeypatch):
    keys = {"augment": {"shift": 2, "rotate": 10, "erase": 0.5}, "views": 2, "subset": 40}
    plain, keeping = data_of(**keys), data_of(**keys, keep_views=True)
    made = []
    monkeypatch.setattr(
        "trainer.data.views.apply",
        lambda a, images, *rest: made.append(len(images)) or apply(a, images, *rest),
    )
    for view in (0, 1, 0, 1):
        for positions in ([5, 1, 7], [1, 8, 5, 5], list(range(40))):
            images, _, index = plain.train.__getitems__(positions)
            found = Views(keeping).augmented(images, index, view)
            expected = apply(plain.augment, images, draw(plain.augment, plain.seed, view, 1437)[index])
            assert torch.equal(found, expected)
            found.zero_()  # what is done to a batch is not done to what is kept
    assert made == [3, 1, 36] * 2


def test_kept_views_of_a_subset_take_memory_for_it_alone():
    data = data_of(augment={"shift": 1}, views=10**5, keep_views=True, subset=3)  # 77 MB, and 37 GB for all
    images, _, index = data.train.__getitems__([2, 0])
    views = Views(data)
    assert torch.equal(views.augmented(images, index, 99_999), views.augmented(images, index, 99_999))
    with pytest.raises(IndexError):
        views.augmented(*data.validation.__getitems__([0])[::2], 0)


def test_a_damaged_image_found_by_a_worker_is_one_line(folder):
    part = make_data(
        shelves.checker(shelves.find("dataset", "image_folder"), DataKeys).model_validate(
            {
                "dataset": "image_folder",
                "folder": folder,
                "size": 8,
                "workers": 1,
                "validation": 2,
                "store": "off",
            }
        ),
        CPU,
    ).train
    bad = Path(sorted(part.images.files)[0])
    content = bad.read_bytes()
    try:
        bad.write_bytes(b"no image")
        with pytest.raises(ValueError, match=r"^\S+png: is no image that can be read: [^\n]+$"):
            list(batches(Part(part.images, torch.arange(12)), [torch.arange(6), torch.arange(6, 12)], 1, CPU))
    finally:
        bad.write_bytes(content)


def test_views_that_memory_cannot_hold_are_refused():
    with pytest.raises(
        ValueError,
        match=r"keep_views: 1000000000 views of 1,293 images take [\d,.]+ GiB of memory and [\d,.]+ GiB are free",
    ):
        data_of(augment={"shift": 1}, views=10**9, keep_views=True)


def test_images_as_they_are():
    data = data_of()
    images, _, index = data.train.__getitems__([5, 1, 7])
    assert torch.equal(Views(data).augmented(images, index, 0), images.float() / 255)
    assert data.augment == Augment()


# mixed images


def flat_images(num_images=6, side=8):
    """Image i is i + 1 throughout and of class i: pixels tell what they come from."""
    images = torch.arange(1.0, num_images + 1)[:, None, None, None].expand(-1, 2, side, side).clone()
    return images, torch.arange(num_images)


@pytest.mark.parametrize("seed", range(8))
def test_mixup_mixes_labels_as_it_mixes_pixels(seed):
    images, labels = flat_images()
    torch.manual_seed(seed)
    mixed, shares = mix(images, labels, 7, mixup=0.8, cutmix=0)
    assert shares.shape == (6, 7) and torch.allclose(shares.sum(1), torch.ones(6))
    expected = shares @ torch.arange(1.0, 8.0)
    assert torch.allclose(mixed, expected[:, None, None, None].expand_as(mixed), atol=1e-5)


@pytest.mark.parametrize("seed", range(8))
def test_cutmix_labels_are_the_shares_of_the_pixels(seed):
    images, labels = flat_images()
    torch.manual_seed(seed)
    mixed, shares = mix(images, labels, 6, mixup=0, cutmix=1.0)
    counted = torch.stack([(mixed[:, 0] == number + 1).float().mean((1, 2)) for number in range(6)], dim=1)
    assert torch.allclose(shares, counted, atol=1e-6)
    # what was pasted is one rectangle, the same in every image and channel
    pasted = mixed != images
    assert torch.equal(pasted[0], pasted[3]) and torch.equal(pasted[:, 0], pasted[:, 1])
    rows, columns = pasted[0, 0].any(1), pasted[0, 0].any(0)
    assert torch.equal(pasted[0, 0], rows[:, None] & columns)


def test_mixing_draws_evenly_from_both_and_its_shares_from_the_beta_distribution():
    images, labels = flat_images(2)
    torch.manual_seed(0)
    kinds, lots = [], []
    for _ in range(400):
        mixed, _ = mix(images, labels, 2, mixup=0.4, cutmix=0.4)
        kinds.append(set(mixed[0].unique().tolist()) <= {1.0, 2.0})
        lots.append(mix(images, labels, 2, mixup=0.4, cutmix=0)[1][0, 0].item())
    assert 0.4 < np.mean(kinds) < 0.6
    assert np.mean(lots) == pytest.approx(0.5, abs=0.06)
    assert np.var(lots) == pytest.approx(1 / (4 * (2 * 0.4 + 1)), abs=0.02)  # of Beta(0.4, 0.4)


def test_mixing_is_a_function_of_torchs_seed():
    images, labels = torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 2, 0])
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(mix(images, labels, 3, mixup=0.5, cutmix=0.5))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
    assert not torch.equal(results[0][0], results[2][0])


def test_unlabelled_images_have_no_class_when_mixed():
    images, _ = flat_images(2)
    _, shares = mix(images, torch.tensor([1, -1]), 3, mixup=1.0, cutmix=0)
    assert shares[:, [0, 2]].eq(0).all() and shares[:, 1].sum() == pytest.approx(1)


def test_parts_count_what_is_theirs():
    images = InMemory(torch.zeros(5, 1, 8, 8, dtype=torch.uint8), torch.arange(5))
    part = Part(images, torch.tensor([4, 2]))
    assert len(part) == 2 and part.labels.tolist() == [4, 2]
    assert part.__getitems__([1])[2].tolist() == [2]
