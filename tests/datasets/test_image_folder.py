"""What image_folder takes besides train and test folders: splits, groups, tables, several folders, sizes, more images."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.datasets.files import assert_is_a_source, save
from trainer.data import kept_listing
from trainer.data.batches import make_data
from trainer.data.image_file import read_image
from trainer.data.listing import list_images
from trainer.data.reading import Reading, reading_of
from trainer.datasets.image_folder import image_folder
from trainer.mistakes import Mistake
from trainer.recipe import shelves
from trainer.recipe.keys import DataKeys
from trainer.recipe.recipe import read


def data_of(**settings):
    keys = shelves.checker(image_folder, DataKeys)(dataset="image_folder", size=4, workers=0, **settings)
    return make_data(keys, torch.device("cpu"))


@pytest.fixture
def specimens(tmp_path):
    """Two classes of 12 and 6 specimens, each photographed three times; the red value tells the specimen."""
    number = 0
    for name, count in (("beetle", 12), ("wasp", 6)):
        for specimen in range(count):
            number += 1
            for shot in range(3):
                save(
                    tmp_path / "photos" / name / f"s{specimen}" / f"{name}{specimen}_{shot}.png",
                    (10 * number, shot, 0),
                )
    return tmp_path / "photos"


def reds(part):
    images = (
        part.__getitems__(torch.arange(len(part)))[0]
        if hasattr(part, "ids")
        else part.__getitems__(list(range(len(part))))[0]
    )
    return [int(image[0, 0, 0]) // 10 for image in images]


@pytest.mark.parametrize("group", ["parent", r"^[a-z]+/s\d+/", r"([a-z]+\d+)_"])
def test_images_of_a_group_are_on_one_side(specimens, group):
    data = data_of(folder=specimens, test=0.25, validation=0.2, group=group)
    seen = [set(reds(part)) for part in (data.train, data.validation, data.test)]
    assert [len(one) for one in seen] == [11, 3, 4] and len(set.union(*seen)) == 18
    assert Counter(data.test.labels.tolist()) == {0: 9, 1: 3}
    assert Counter(data.validation.labels.tolist()) == {0: 6, 1: 3}


def test_without_groups_a_specimen_is_on_both_sides(specimens):
    data = data_of(folder=specimens, test=0.25)
    assert set(reds(data.train)) & set(reds(data.test))


def test_groups_that_cannot_be(specimens):
    for group, words in (
        ("(", "no regular expression"),
        ("nothing", "matches none of the paths, such as 'beetle/s0/"),
    ):
        with pytest.raises(Mistake, match=words):
            image_folder(folder=specimens, test=0.2, group=group)
    with pytest.raises(Mistake, match="leaves no training image of class '.*', which has 36 in 1 groups"):
        image_folder(folder=specimens, test=0.2, group="^beetle")


def test_validation_has_its_share_of_a_rare_class(tmp_path):
    for name, count in (("common", 200), ("rare", 8)):
        for number in range(count):
            save(tmp_path / name / f"{number}.png", (number, 0, 0), size=(4, 4))
    for seed in range(4):
        data = data_of(folder=tmp_path, test=0.25, validation=0.1, seed=seed)
        assert Counter(data.validation.labels.tolist()) == {0: 15, 1: 1}
        assert Counter(data.test.labels.tolist()) == {0: 50, 1: 2}


@pytest.mark.parametrize(
    ("sizes", "test", "each"),
    [
        ([20, 20, 20], 7, {2, 3}),
        ([20, 20, 20], 10, {3, 4}),
        ([20, 20, 20], 57, {19}),
        ([6] * 10, 4, {0, 1}),
        ([6] * 10, 17, {1, 2}),
        ([40, 2, 2], 4, {1, 2}),
    ],
)
def test_a_number_of_test_images_is_split_off_exactly(tmp_path, sizes, test, each):
    for label, count in enumerate(sizes):
        for number in range(count):
            save(tmp_path / f"c{label}" / f"{number}.png", (number, label, 0))
    source = image_folder(folder=tmp_path, test=test, size=4)
    assert (len(source.test), len(source.train)) == (test, sum(sizes) - test)
    assert set(torch.bincount(source.test.labels, minlength=len(sizes)).tolist()) == each


@pytest.mark.parametrize(
    ("test", "told"),
    [
        (40, "test: 40 of 40 images leaves none to train on"),
        (39, "test: 39 leaves no training image of class '.*', which has"),
        (3, "test: 3 leaves no training image of class '.*', which has 1$"),
    ],
)
def test_a_number_of_test_images_leaves_each_class_one(tmp_path, test, told):
    for name, count in (("a", 37), ("b", 2), ("c", 1)):
        for number in range(count):
            save(tmp_path / name / f"{number}.png", (number, ord(name), 0))
    with pytest.raises(Mistake, match=told):
        image_folder(folder=tmp_path, test=test, size=4)


def test_a_number_of_validation_images_leaves_each_class_one(tmp_path):
    for name, count in (("a", 9), ("b", 5)):
        for number in range(count):
            save(tmp_path / "train" / name / f"{number}.png", (number, 0, 0))
            save(tmp_path / "test" / name / f"{number}.png", (number, 1, 0))
    data = data_of(folder=tmp_path, validation=12)
    assert len(data.validation) == 12 and Counter(data.train.labels.tolist()) == {0: 1, 1: 1}
    for number in (13, 14, 1000):
        told = (
            f"image_folder has 14 training images; validation {number} does not fit in it: 12 can be held out"
        )
        with pytest.raises(Mistake, match=told):
            data_of(folder=tmp_path, validation=number)


def test_a_number_of_validation_images_leaves_each_class_one_group(specimens):
    folders = {"folder": specimens, "test": 0.25, "group": "parent"}
    assert len(data_of(**folders, validation=30).validation) == 30
    with pytest.raises(Mistake, match="42 training images; validation 37 does not fit in it: 36 can be held"):
        data_of(**folders, validation=37)


def test_a_table_of_paths_and_labels(specimens, tmp_path):
    files = list_images(specimens)
    rows = [f"{name},{file}" for file, name in zip(files.inside, files.classes, strict=True)]
    table = specimens / "labels.csv"
    table.write_text("\n".join(["label,path", *reversed(rows)]))
    source, folder = (
        image_folder(folder=table, test=0.25, size=4),
        image_folder(folder=specimens, test=0.25, size=4),
    )
    assert_is_a_source(source, len(folder.train), len(folder.test))
    assert source.classes == folder.classes
    of_class = lambda one: {
        file.replace("//", "/"): label for file, label in zip(one.files, one.labels.tolist())
    }
    assert {**of_class(source.train), **of_class(source.test)} == {
        **of_class(folder.train),
        **of_class(folder.test),
    }


def test_a_table_without_a_head_may_leave_labels_out_and_names_test_images(specimens):
    (specimens / "some.csv").write_text("beetle/s0/beetle0_0.png,b\n\nwasp/s0/wasp0_0.png,w\n")
    (specimens / "none.csv").write_text("beetle/s1/beetle1_0.png,\n")
    source = image_folder(folder=specimens / "none.csv", test=specimens / "some.csv", size=4)
    assert source.classes == ["b", "w"] and source.train.labels.tolist() == [-1]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("beetle/s0/beetle0_0.png\n", r"t.csv:1: got .*; a path and a label are needed"),
        ("path,label\n,beetle\n", r"t.csv:2: got"),
        ("path,label\nno.png,beetle\n", r"t.csv:2: there is no file .*no.png"),
        ("wasp/s0/wasp0_0.png,a\nwasp/s0/wasp0_0.png,b\n", r"t.csv:2: .* stands in line 1 too"),
        ('"open,a\n', r"t.csv: is no CSV file"),
        ("", "there are no training images"),
    ],
)
def test_faulty_tables(specimens, text, words):
    (specimens / "t.csv").write_text(text)
    with pytest.raises(Mistake, match=words):
        image_folder(folder=specimens / "t.csv", test=0.2)


def test_several_folders_are_one(tmp_path):
    for place in ("a", "b"):
        for name in ("cat", place):
            for number in range(4):
                save(tmp_path / place / name / f"{number}.png", (number, 0, 0))
    source = image_folder(folder=[tmp_path / "a", tmp_path / "b"], test=0.25, size=4)
    assert source.classes == ["a", "b", "cat"] and len(source.train) + len(source.test) == 16
    assert Counter(source.test.labels.tolist()) == {0: 1, 1: 1, 2: 2}
    with pytest.raises(Mistake, match="one lies in the other"):
        image_folder(folder=[tmp_path / "a", tmp_path / "a" / "cat"], test=0.25)


def test_several_folders_in_a_recipe(tmp_path, monkeypatch):
    monkeypatch.setenv("PLACE", str(tmp_path))
    (tmp_path / "r.yaml").write_text(
        "name: r\ndata: {dataset: image_folder, folder: [$PLACE/a, $PLACE/b], test: 0.2, size: [6, 8], channels: 1}\n"
        "student: {model: lenet5}\nstages: [{stage: train, training: {epochs: 1}}]\n"
    )
    recipe, _ = read(tmp_path / "r.yaml")
    assert recipe.data.folder == [tmp_path / "a", tmp_path / "b"] and recipe.data.size == (6, 8)


def test_folders_with_train_and_test_of_their_own(tmp_path):
    for place in ("a", "b"):
        for part in ("train", "val", "test"):
            for name in ("cat", "dog"):
                save(tmp_path / place / part / name / "x.png", (1, 2, 3))
    source = image_folder(folder=[tmp_path / "a", tmp_path / "b"], size=4)
    assert [len(part) for part in (source.train, source.validation, source.test)] == [4, 4, 4]


def test_unlabelled_images_beside_labelled_ones(specimens, tmp_path):
    for number in range(5):
        save(tmp_path / "more" / "anything" / f"{number}.png", (250, 0, 0))
    data = data_of(
        folder=specimens, test=0.25, validation=0.2, unlabelled_folder=tmp_path / "more", group="parent"
    )
    assert (data.train.labels == -1).sum() == 5 and (data.validation.labels >= 0).all()
    assert len(data.classes) == 2 and "5 without labels" in data.notes[0]
    with pytest.raises(Mistake, match="one lies in the other"):
        image_folder(folder=specimens, test=0.25, unlabelled_folder=specimens / "wasp")


def test_unlabelled_images_of_a_group_that_is_held_out_are_no_test_images(tmp_path):
    for number in range(12):
        save(tmp_path / "labelled" / "ab"[number % 2] / f"thing{number // 2}_{number}.png", (250, 0, 0))
        save(tmp_path / "more" / f"thing{number // 2}_x{number}.png", (0, 250, 0))
    source = image_folder(
        folder=tmp_path / "labelled", test=0.3, unlabelled_folder=tmp_path / "more", group=r"thing\d", size=4
    )
    assert (source.test.labels >= 0).all() and 0 < len(source.test) < 12
    held_out = {Path(file).name.split("_")[0] for file in source.test.files}
    learnt = {Path(file).name.split("_")[0] for file in source.train.files}
    assert not held_out & learnt and (source.train.labels < 0).any()


def test_pictures_of_a_table_without_a_label_are_unlabelled(tmp_path):
    for number in range(12):
        save(tmp_path / f"{number}.png", (250, 0, 0))
    rows = [f"{number}.png,{'ab'[number % 2] if number < 8 else ''}" for number in range(12)]
    (tmp_path / "all.csv").write_text("\n".join(["path,label", *rows]) + "\n")
    source = image_folder(folder=tmp_path / "all.csv", test=0.25, size=4)
    assert (source.test.labels >= 0).all() and sorted(source.train.labels.tolist()) == [-1] * 4 + [0] * 3 + [
        1
    ] * 3
    (tmp_path / "some.csv").write_text("\n".join(["path,label", *rows[:6]]) + "\n")
    (tmp_path / "rest.csv").write_text("\n".join(["path,label", *rows[6:]]) + "\n")
    with pytest.raises(Mistake, match="its line has no label; test images need a class each"):
        image_folder(folder=tmp_path / "some.csv", test=tmp_path / "rest.csv", size=4)


def test_a_picture_that_stands_in_two_lists_is_refused(tmp_path):
    for number in range(8):
        save(tmp_path / "ab"[number % 2] / f"{number}.png", (250, 0, 0))
    rows = [f"{'ab'[number % 2]}/{number}.png,{'ab'[number % 2]}" for number in range(8)]

    def table(name, some):
        (tmp_path / name).write_text("\n".join(["path,label", *some]) + "\n")
        return tmp_path / name

    train, test = table("train.csv", rows[:6]), table("test.csv", rows[6:])
    assert len(image_folder(folder=train, test=test, size=4).train) == 6
    common = table("common.csv", rows[4:])
    with pytest.raises(
        Mistake, match=r"4.png \(training and test images\) stands in the lists twice \(and 1 more\)"
    ):
        image_folder(folder=train, test=common, size=4)
    again = table("again.csv", [*rows[:6], "a/../b/1.png,b"])
    with pytest.raises(
        Mistake, match=r"1.png \(training and training images\) stands in the lists twice: a picture"
    ):
        image_folder(folder=again, test=test, size=4)


def test_grey_images_and_oblong_ones(tmp_path):
    for name in ("a", "b"):
        for number in range(4):
            save(tmp_path / name / f"{number}.png", (200, 100, 50), size=(40, 30))
    source = image_folder(folder=tmp_path, test=0.25, size=(96, 128), channels=1)
    assert source.shape == (1, 96, 128) and len(source.mean) == len(source.std) == 1
    image, _ = source.train.__getitems__([0])
    assert image.shape == (1, 1, 96, 128) and image.unique().tolist() == [
        (200 * 299 + 100 * 587 + 50 * 114) // 1000
    ]
    data = data_of_size(tmp_path, (12, 16))
    larger = data.at_size(32)
    assert larger.shape == (1, 24, 32) and larger.zoom == 2
    assert larger.train.__getitems__([0])[0].shape == (1, 1, 24, 32) and data.at_size(16) is data


def data_of_size(folder, size):
    keys = shelves.checker(image_folder, DataKeys)(
        dataset="image_folder", folder=folder, test=0.25, size=size, channels=1, validation=2
    )
    return make_data(keys, torch.device("cpu"))


def test_what_becomes_of_another_aspect_ratio(tmp_path):
    """A picture of three columns, red, green and blue: crop sees green, squash all, pad all between background."""
    pixels = np.zeros((20, 60, 3), np.uint8)
    for column in range(3):
        pixels[:, 20 * column : 20 * (column + 1), column] = 255
    picture = Image.fromarray(pixels)
    seen = {
        fit: read_image(picture, Reading((3, 30, 30), fit=fit, background=(7, 8, 9)))
        for fit in ("crop", "pad", "squash")
    }
    assert seen["crop"][:, 15, 2].tolist() == seen["crop"][:, 15, 27].tolist() == [0, 255, 0]
    for fit in ("pad", "squash"):
        assert [seen[fit][:, 15, x].argmax().item() for x in (4, 15, 26)] == [0, 1, 2]
    assert (seen["pad"][:, :10] == torch.tensor([7, 8, 9])[:, None, None]).all() and (
        seen["pad"][:, 20:, 3] == torch.tensor([7, 8, 9])[:, None]
    ).all()
    assert (seen["squash"].float().sum(0) > 200).all()
    assert read_image(picture.rotate(90, expand=True), Reading((1, 30, 30), fit="pad"))[
        0, 15, :9
    ].unique().tolist() == [255]
    assert read_image(Image.new("RGB", (5000, 1)), Reading((3, 8, 8), fit="pad")).shape == (3, 8, 8)


def test_how_images_fit_is_kept_in_a_packed_file():
    for fit in ("pad", "squash"):
        settings = json.loads(json.dumps(Reading((3, 4, 4), fit=fit).settings()))
        assert settings == {"fit": fit} and reading_of((3, 4, 4), settings).fit == fit
    for wrong in ({"fit": "stretch"}, {"fit": "pad", "crop": 0.5}, {"fit": ["pad"]}):
        with pytest.raises(Mistake):
            reading_of((3, 4, 4), wrong)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"resize_mode": "pad", "crop": 0.5}, "crop has no effect with resize_mode 'pad'"),
        ({"group": "parent", "test": "t", "validation_folder": "v"}, "group has no effect"),
        ({"size": [8, 0]}, "size"),
        ({"channels": 2}, "channels"),
        ({"folder": []}, "folder"),
    ],
)
def test_settings_that_do_not_go_together(tmp_path, keys, words):
    recipe = {
        "name": "r",
        "data": {"dataset": "image_folder", "folder": "x"} | keys,
        "student": {"model": "lenet5"},
    }
    recipe["stages"] = [{"stage": "train", "training": {"epochs": 1}}]
    (tmp_path / "r.yaml").write_text(json.dumps(recipe))
    with pytest.raises(ValueError, match=words):
        read(tmp_path / "r.yaml")


def test_class_names_from_a_file(tmp_path):
    for name in ("n01", "n02", "n10"):
        for number in range(3):
            save(tmp_path / "photos" / name / f"{number}.png", (number, 0, 0))
    names = tmp_path / "names.txt"
    names.write_text("n02 crane\nn01 tench, Tinca tinca\nn10\tcrane\nn99 other\n")
    source = image_folder(folder=tmp_path / "photos", test=0.3, size=4, class_names=names)
    assert source.classes == ["tench, Tinca tinca", "crane (n02)", "crane (n10)"]
    names.write_text("n01 tench\n")
    with pytest.raises(Mistake, match="no line for 2 classes, such as 'n02'"):
        image_folder(folder=tmp_path / "photos", test=0.3, size=4, class_names=names)


def test_a_large_folder_is_listed_once_until_it_changes(animals, monkeypatch, tmp_path):
    monkeypatch.setattr(kept_listing, "MANY", 3)
    listed = []
    monkeypatch.setattr(
        kept_listing, "list_images", lambda folder: listed.append(folder) or list_images(folder)
    )
    folder, recently = animals / "train", kept_listing.SETTLED_SECONDS
    first = kept_listing.kept_listing(folder)
    kept_listing.kept_listing(folder)
    assert len(listed) == 2  # the folders have just been made
    monkeypatch.setattr(kept_listing, "SETTLED_SECONDS", -recently)
    kept_listing.kept_listing(folder)
    assert kept_listing.kept_listing(folder) == first and len(listed) == 3
    save(folder / "cat" / "new.png", (1, 1, 1))
    assert len(kept_listing.kept_listing(folder).files) == 5 and len(listed) == 4
    assert len(kept_listing.kept_listing(folder).files) == 5 and len(listed) == 4
    [record] = kept_listing.cache_folder().glob("listings/*.json")
    record.write_bytes(record.read_bytes().replace(b"cat/1.png", b"cat/2.png"))
    assert len(kept_listing.kept_listing(folder).files) == 5 and len(listed) == 5


def test_a_kept_listing_serves_from_another_place_too(animals, monkeypatch):
    monkeypatch.setattr(kept_listing, "MANY", 3)
    monkeypatch.setattr(kept_listing, "SETTLED_SECONDS", -kept_listing.SETTLED_SECONDS)
    monkeypatch.chdir(animals)
    first = kept_listing.kept_listing(Path("train"))
    assert first.files[0] == "train/cat/0.png"
    monkeypatch.setattr(kept_listing, "list_images", None)  # the kept one is read
    monkeypatch.chdir("test")
    assert kept_listing.kept_listing(animals / "train").files == list_images(animals / "train").files
    monkeypatch.chdir(animals)
    assert kept_listing.kept_listing(Path("train")) == first


def test_large_sets_hold_out_ten_thousand_at_most(monkeypatch):
    from trainer.data import batches
    from trainer.data.images import InMemory, Source

    monkeypatch.setattr(batches, "MOST_VALIDATION", 6)
    images = InMemory(torch.zeros(100, 1, 2, 2, dtype=torch.uint8), torch.arange(100) % 2)
    for groups in (None, torch.arange(100)):
        source = Source(images, images, ["a", "b"], (0.5,), (0.5,), (1, 2, 2), groups=groups)
        monkeypatch.setattr(batches, "_source", lambda keys, source=source: source)
        sizes = [
            len(make_data(DataKeys(dataset="digits", **more), torch.device("cpu")).validation)
            for more in ({}, {"validation": 0.1}, {"validation": 20})
        ]
        assert sizes == [6, 10, 20]
