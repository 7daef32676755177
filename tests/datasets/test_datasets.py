import hashlib
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError, validate_call

from tests.datasets.files import ELPV, assert_is_a_source, idx, save, small_elpv, small_emoji, tar
from trainer.data.batches import make_data
from trainer.data.images import InMemory
from trainer.datasets.cifar10 import cifar10
from trainer.datasets.cifar100 import cifar100
from trainer.datasets.digits import digits
from trainer.datasets.elpv import elpv
from trainer.datasets.emoji import emoji
from trainer.datasets.fashion_mnist import fashion_mnist
from trainer.datasets.image_folder import image_folder
from trainer.datasets.mnist import mnist
from trainer.recipe import shelves
from trainer.recipe.keys import DataKeys

DIGITS_TEST = "3716b274d4273dd46113fc881babc4d72e53bcf7d1ba69a929d73082fb949436"


# digits


def test_digits():
    source = digits()
    assert_is_a_source(source, 1437, 360)
    assert source.shape == (1, 8, 8)
    assert torch.bincount(source.test.labels).tolist() == [36] * 10
    values = source.train.images.double() / 255
    assert source.mean == pytest.approx((values.mean().item(),))
    assert source.std == pytest.approx((values.std(correction=0).item(),))


def test_digits_are_all_there_once_and_scaled_to_bytes():
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    source = digits()
    got = torch.cat([source.train.images, source.test.images]).flatten(1).numpy()
    got = np.column_stack([got, torch.cat([source.train.labels, source.test.labels]).numpy()])
    expected = np.column_stack([np.round(pixels * 255 / 16), labels])
    np.testing.assert_array_equal(got[np.lexsort(got.T)], expected[np.lexsort(expected.T)])


def test_the_split_of_digits_never_changes():
    # Reported accuracies are of these 360 images: never adapt the test, only the code.
    images = digits().test.images
    assert hashlib.sha256(images.numpy().tobytes()).hexdigest() == DIGITS_TEST
    torch.manual_seed(1)
    np.random.seed(1)
    assert torch.equal(digits().test.images, images)


@pytest.mark.parametrize("size", [16, 28])
def test_digits_can_be_resized(size):
    small, large = digits(), digits(size=size)
    assert_is_a_source(large, 1437, 360)
    assert large.shape == (1, size, size)
    assert torch.equal(large.test.labels, small.test.labels)
    expected = np.asarray(
        Image.fromarray(small.train.images[5, 0].numpy()).resize((size, size), Image.Resampling.BILINEAR)
    )
    assert np.abs(large.train.images[5, 0].numpy().astype(int) - expected).max() <= 1


def test_digits_smaller_than_they_are_are_refused():
    with pytest.raises(ValidationError, match="greater than or equal to 8"):
        validate_call(digits)(size=7)


# the fetched sets, from raw files written here


@pytest.mark.parametrize("dataset", [mnist, fashion_mnist])
def test_mnist_and_fashion_mnist(cache, dataset):
    generator = np.random.default_rng(0)
    images = {part: generator.integers(0, 256, (12, 28, 28), np.uint8) for part in ("train", "t10k")}
    labels = {part: np.arange(12, dtype=np.uint8) % 10 for part in ("train", "t10k")}
    files = {f"{part}-images-idx3-ubyte": idx(images[part]) for part in images}
    files |= {f"{part}-labels-idx1-ubyte": idx(labels[part]) for part in labels}
    cache(dataset.__name__, files)
    source = dataset()
    assert_is_a_source(source, 12, 12)
    assert source.shape == (1, 28, 28) and len(source.classes) == 10
    np.testing.assert_array_equal(source.train.images[:, 0], images["train"])
    np.testing.assert_array_equal(source.test.images[:, 0], images["t10k"])
    np.testing.assert_array_equal(source.train.labels, labels["train"])


def test_cifar10(cache):
    generator = np.random.default_rng(0)
    batches = generator.integers(0, 10, (6, 4, 3073), np.uint8)
    names = [f"data_batch_{part}.bin" for part in range(1, 6)] + ["test_batch.bin"]
    members = {
        f"cifar-10-batches-bin/{name}": batch.tobytes() for name, batch in zip(names, batches, strict=True)
    }
    members["cifar-10-batches-bin/batches.meta.txt"] = "\n".join([*"abcdefghij", ""]).encode()
    cache("cifar10", {"cifar-10-binary.tar.gz": tar(members)})
    source = cifar10()
    assert_is_a_source(source, 20, 4)
    assert source.shape == (3, 32, 32) and source.classes == [*"abcdefghij"]
    np.testing.assert_array_equal(source.train.images.flatten(1), batches[:5].reshape(20, -1)[:, 1:])
    np.testing.assert_array_equal(source.test.labels, batches[5, :, 0])


def test_cifar100_takes_the_fine_labels(cache):
    generator = np.random.default_rng(0)
    parts = generator.integers(0, 100, (2, 6, 3074), np.uint8)
    inside = "cifar-100-binary"
    members = {
        f"{inside}/{name}.bin": part.tobytes() for name, part in zip(("train", "test"), parts, strict=True)
    }
    members[f"{inside}/fine_label_names.txt"] = "\n".join(f"kind {number}" for number in range(100)).encode()
    cache("cifar100", {"cifar-100-binary.tar.gz": tar(members)})
    source = cifar100()
    assert_is_a_source(source, 6, 6)
    assert source.classes[99] == "kind 99" and len(source.classes) == 100
    np.testing.assert_array_equal(source.train.labels, parts[0, :, 1])
    np.testing.assert_array_equal(source.test.images.flatten(1), parts[1, :, 2:])


@pytest.mark.slow
@pytest.mark.parametrize("dataset", [mnist, fashion_mnist])
def test_mean_and_deviation_written_down_are_those_of_the_real_training_images(dataset):
    source = dataset()
    values = source.train.images.double() / 255
    assert source.mean == pytest.approx((values.mean().item(),), abs=1e-6)
    assert source.std == pytest.approx((values.std(correction=0).item(),), abs=1e-6)


# emoji


def numbers_of(images):
    """The cell and the drawing of each emoji, from its upper half."""
    return [(int(image[0, 3, 8]) // 10, "google" if image[1, 3, 8] < 150 else "twitter") for image in images]


def test_emoji_are_split_by_emoji_and_lie_on_white(cache):
    small_emoji(cache, None)
    source = emoji(size=16, test=0.4)
    assert_is_a_source(source, 10, 8)
    assert source.classes == ["Flags", "Food"] and source.shape == (3, 16, 16)
    everything = torch.cat([source.train.images, source.test.images])
    assert (everything[:, :, 12] == 255).all()
    train, test = numbers_of(source.train.images), numbers_of(source.test.images)
    assert sorted(train + test) == sorted(
        (2 * n, drawing) for n in range(9) for drawing in ("google", "twitter")
    )
    assert not {number for number, _ in train} & {number for number, _ in test}
    for images, part in ((train, source.train), (test, source.test)):
        assert part.labels.tolist() == [int(number < 10) for number, _ in images]
    assert [number for number, _ in train] == [2 * group for group in source.groups.tolist()]
    values = source.train.images.double() / 255
    assert source.mean == pytest.approx(values.mean((0, 2, 3)).tolist(), abs=1e-12)
    assert source.std == pytest.approx(values.std((0, 2, 3), correction=0).tolist(), abs=1e-12)
    assert any("licensed" in note for note in source.notes)


def test_variants_of_training_emoji_alone_are_unlabelled_training_images(cache):
    small_emoji(cache, None)
    plain, more = emoji(size=16), emoji(size=16, variants=True)
    assert torch.equal(more.train.images[: len(plain.train)], plain.train.images)
    extra = numbers_of(more.train.images[len(plain.train) :])
    trained = {number for number, _ in numbers_of(plain.train.images)}
    assert {number for number, _ in extra} == {number + 1 for number in trained if number // 2 % 2}
    assert (more.train.labels[len(plain.train) :] == -1).all() and "without a label" in more.notes[0]


def test_a_subcategory_of_one_emoji_has_no_test_image(cache):
    small_emoji(cache, None)
    source = emoji(classes="subcategory")
    assert source.classes == ["flag", "fruit", "pennant"]
    assert 2 in source.train.labels and 2 not in source.test.labels


@pytest.mark.parametrize("variants", [False, True])
def test_validation_of_emoji_is_split_by_emoji_too(cache, variants):
    small_emoji(cache, None)
    keys = shelves.checker(emoji, DataKeys)(dataset="emoji", validation=0.3, size=16, variants=variants)
    data = make_data(keys, torch.device("cpu"))
    assert (data.validation.labels >= 0).all() and len(data.validation)
    of = [
        {number // 2 for number, _ in numbers_of(part.__getitems__(torch.arange(len(part)))[0])}
        for part in (data.train, data.validation)
    ]
    assert not of[0] & of[1]


@pytest.mark.slow
def test_the_real_emoji():
    source = emoji(classes="subcategory", variants=True)
    assert len(source.classes) == 98 and source.train.labels.ge(0).sum() + len(source.test) == 2 * 1906
    assert len(emoji().classes) == 9


# image_folder


def test_image_folder(animals):
    source = image_folder(folder=animals, size=8)
    assert_is_a_source(source, 4, 2)
    assert source.classes == ["cat", "dog"] and source.shape == (3, 8, 8)
    assert source.train.labels.tolist() == [0, 0, 0, 1] and source.test.labels.tolist() == [0, 1]
    assert source.mean == (0.485, 0.456, 0.406) and source.std == (0.229, 0.224, 0.225)
    images, labels = source.train.__getitems__([3, 1])
    assert labels.tolist() == [1, 0]
    assert images[:, :, 4, 4].tolist() == [[0, 100, 200], [11, 0, 0]]  # channels are red, green, blue


def test_image_folder_can_be_sent_to_worker_processes(animals):
    train = image_folder(folder=animals, size=8).train
    images, labels = pickle.loads(pickle.dumps(train)).__getitems__([3, 0])
    assert torch.equal(images, train.__getitems__([3, 0])[0]) and labels.tolist() == [1, 0]


def test_image_folder_cuts_the_middle_out(tmp_path):
    pixels = np.zeros((20, 40, 3), np.uint8)
    pixels[:, 10:30] = 255  # the middle square
    pixels[5:15, 15:25, 1] = 77  # and half of that
    for part in ("train", "test"):
        for name in ("a", "b"):
            (tmp_path / part / name).mkdir(parents=True)
            Image.fromarray(pixels).save(tmp_path / part / name / "x.png")
    whole, _ = image_folder(folder=tmp_path, size=20).train.__getitems__([0])
    assert torch.equal(whole[0], torch.from_numpy(pixels[:, 10:30].copy()).permute(2, 0, 1))
    half, _ = image_folder(folder=tmp_path, size=10, crop=0.5).train.__getitems__([0])
    assert half[0, 1].unique().tolist() == [77] and half[0, 0].unique().tolist() == [255]


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "1", "CMYK"])
def test_image_folder_gives_rgb_whatever_the_file_holds(animals, mode):
    file = animals / "train" / "dog" / ("1.TIFF" if mode == "CMYK" else "1.png")
    Image.new("RGB", (9, 30), (255, 255, 255)).convert(mode).save(file)
    source = image_folder(folder=animals, size=8)
    images, _ = source.train.__getitems__([4])
    assert images.shape == (1, 3, 8, 8) and images.min() >= 250


def test_sixteen_bits_are_brought_to_eight(animals):
    file = animals / "train" / "dog" / "1.png"
    eight = np.arange(256, dtype=np.uint8).reshape(16, 16)
    for kind in (np.uint8, np.uint16, np.int32):
        file.unlink(missing_ok=True)
        file = file.with_suffix(".tiff" if kind is np.int32 else ".png")
        Image.fromarray(eight.astype(kind) * kind(1 if kind is np.uint8 else 257)).save(file)
        images, _ = image_folder(folder=animals, size=16).train.__getitems__([4])
        assert torch.equal(images[0], torch.from_numpy(eight).expand(3, 16, 16)), kind
    for pixels in (
        np.full((8, 8), 0.5, np.float32),
        np.full((8, 8), 2**16, np.int32),
        np.full((8, 8), -1, np.int32),
    ):
        Image.fromarray(pixels).save(file)
        with pytest.raises(ValueError, match="1.tiff: has pixels of .*; 8 and 16 bits are allowed"):
            image_folder(folder=animals, size=16)


def test_classes_are_the_folders_at_the_top_however_deep_images_lie(animals):
    for part in ("train", "test"):
        for name in ("cat", "dog"):
            (animals / part / name / "images").mkdir()
            for file in list((animals / part / name).glob("*.*")):
                file.rename(file.parent / "images" / file.name)
        save(animals / part / ".ipynb_checkpoints" / "x.png", (1, 1, 1))
        save(animals / part / "cat" / "images" / ".hidden.png", (1, 1, 1))
    source = image_folder(folder=animals, size=8)
    assert source.classes == ["cat", "dog"]
    assert sorted(source.train.labels.tolist()) == [0, 0, 0, 1] and source.test.labels.tolist() == [0, 1]


def test_one_class_is_refused(tmp_path):
    for part in ("train", "test"):
        save(tmp_path / part / "only" / "x.png", (1, 1, 1))
    with pytest.raises(ValueError, match="of one class, 'only'; two or more classes are needed"):
        image_folder(folder=tmp_path, size=8)


def test_image_folder_without_classes_is_unlabelled(animals, tmp_path):
    for number in range(3):
        save(tmp_path / "heap" / f"{number}.png", (number, 0, 0))
    source = image_folder(folder=tmp_path / "heap", test_folder=animals / "test", size=8)
    assert_is_a_source(source, 3, 2)
    assert source.train.labels.tolist() == [-1, -1, -1]
    assert source.classes == ["cat", "dog"] and source.test.labels.tolist() == [0, 1]


def test_image_folder_classes_are_in_natural_order_and_the_test_may_lack_some(tmp_path):
    for name in ("10", "2", "1"):
        save(tmp_path / "train" / name / "x.png", (1, 1, 1))
    save(tmp_path / "val" / "10" / "x.png", (1, 1, 1))
    source = image_folder(folder=tmp_path, size=8)
    assert source.classes == ["1", "2", "10"] and source.test.labels.tolist() == [2]


def test_damaged_images_are_found_at_the_start_all_in_one_list(animals):
    good = (animals / "train" / "cat" / "1.png").read_bytes()
    bad = [animals / "train" / "cat" / "1.png", animals / "test" / "dog" / "damaged.png"]
    for damage in (good[:-30], b"no image", b""):
        for file in bad:
            file.write_bytes(damage)
        with pytest.raises(ValueError, match=r"2 of \d+ pictures cannot be read") as caught:
            image_folder(folder=animals, size=8)
        assert all(f"{file}: is no image that can be read" in str(caught.value) for file in bad)


def test_damaged_images_may_be_skipped_up_to_one_in_a_hundred(animals):
    bad = animals / "train" / "cat" / "bad.png"
    bad.write_bytes(b"no image")
    source = image_folder(folder=animals, size=8, bad_images="skip")
    assert bad not in map(Path, source.train.files) and len(source.train) == 4
    assert any(note.startswith("1 of 7 pictures cannot be read and are skipped") for note in source.notes)
    (animals / "train" / "dog" / "bad.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="2 of 8 pictures cannot be read; at most 1 % are skipped"):
        image_folder(folder=animals, size=8, bad_images="skip")


def test_pictures_are_opened_once_and_again_when_they_change(animals, monkeypatch):
    from trainer.data import examined

    opened, check = [], examined._check
    monkeypatch.setattr(examined, "_check", lambda path: opened.append(path) or check(path))
    image_folder(folder=animals, size=8)
    assert len(opened) == 6
    image_folder(folder=animals, size=8)
    assert len(opened) == 6
    (animals / "train" / "cat" / "1.png").write_bytes(b"damaged since")
    with pytest.raises(ValueError, match="1 of 6 pictures cannot be read"):
        image_folder(folder=animals, size=8)
    assert len(opened) == 7


def test_wrong_folders_are_refused(animals, tmp_path):
    def refused(match, **settings):
        with pytest.raises(ValueError, match=match):
            image_folder(**settings)

    refused("there is no folder .*nowhere", folder=tmp_path / "nowhere")
    refused("there is no folder .*nowhere", folder=animals, test_folder=tmp_path / "nowhere")
    refused("no subfolder 'train': give test too", folder=animals / "test")
    refused("one lies in the other", folder=animals / "train", test_folder=animals / "train" / "cat")
    refused("one lies in the other", folder=animals / "train" / "cat", test_folder=animals / "train")
    (tmp_path / "empty").mkdir()
    refused("there are no test images", folder=animals, test_folder=tmp_path / "empty")
    (animals / "alone" / "train").mkdir(parents=True)
    refused("no subfolder 'test', 'val', 'valid' or 'validation'", folder=animals / "alone")
    save(animals / "more" / "cow" / "x.png", (1, 1, 1))
    refused(
        "cow/x.png: there are no training images of class 'cow'", folder=animals, test_folder=animals / "more"
    )
    save(animals / "test" / "loose.png", (1, 1, 1))
    refused("loose.png lies in no subfolder", folder=animals)
    save(animals / "train" / "loose.png", (1, 1, 1))
    refused("loose.png lies beside the classes' subfolders", folder=animals, test_folder=animals / "more")


@pytest.mark.parametrize("settings", [{"size": 0}, {"crop": 0}, {"crop": 1.5}])
def test_wrong_settings_of_image_folder_are_refused(animals, settings):
    with pytest.raises(ValidationError):
        validate_call(image_folder)(folder=animals, **settings)


def test_in_memory_images_are_fetched_by_the_batch():
    images = torch.arange(5, dtype=torch.uint8)[:, None, None, None].expand(5, 1, 2, 2)
    got, labels = InMemory(images, torch.arange(5)).__getitems__([4, 0, 4])
    assert got[:, 0, 0, 0].tolist() == labels.tolist() == [4, 0, 4]


# elpv


def test_elpv_leaves_doubtful_cells_out_and_splits_each_class_and_kind(cache, tmp_path):
    source = elpv(**small_elpv(cache, tmp_path), test=0.4)
    assert_is_a_source(source, 12, 8)
    assert source.classes == ["functional", "defective"] and source.shape == (1, 16, 16)
    grey = {
        part: set((getattr(source, part).images[:, 0, 0, 0] // 10).tolist()) for part in ("train", "test")
    }
    assert grey["train"] | grey["test"] == set(range(20)) and not grey["train"] & grey["test"]
    strata = [sum(ELPV[cell] == one for cell in grey["test"]) for one in dict.fromkeys(ELPV[:20])]
    assert strata == [2, 2, 2, 2]
    for part in (source.train, source.test):
        cells = (part.images[:, 0, 0, 0] // 10).tolist()
        assert part.labels.tolist() == [int(ELPV[cell][0] == "1.0") for cell in cells]
    values = source.train.images.double() / 255
    assert source.mean == pytest.approx((values.mean().item(),))
    assert "CC BY-NC-SA" in source.notes[1] and "one module" in source.notes[0]


def test_doubtful_cells_are_training_images_of_the_nearer_class(cache, tmp_path):
    keys = small_elpv(cache, tmp_path)
    sure, source = elpv(**keys), elpv(**keys, doubtful="nearest")
    assert len(source.train) == len(sure.train) + 2
    assert torch.bincount(source.train.labels).tolist() == [9, 9]
    assert not {200, 210} & set(source.test.images[:, 0, 0, 0].tolist())


def test_the_split_of_elpv_is_of_its_seed_alone(cache, tmp_path):
    keys = small_elpv(cache, tmp_path)
    cells = [elpv(**keys, test_seed=seed).test.images[:, 0, 0, 0].tolist() for seed in (0, 0, 1)]
    assert cells[0] == cells[1] != cells[2]
