"""Random parts of whole pictures, cut by the reader."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from trainer.data.batches import batches, make_data
from trainer.data.crops import box, cut
from trainer.data.views import Views
from trainer.mistakes import Mistake
from trainer.recipe import shelves
from trainer.recipe.augment import Augment, RandomResizedCrop
from trainer.recipe.keys import DataKeys

SIZE = 16
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two classes of smooth pictures of several shapes, whose red says the column and whose green says the row."""
    root = tmp_path_factory.mktemp("pictures")
    for part, count in (("train", 8), ("test", 2)):
        for number in range(count):
            for name in ("a", "b"):
                width, height = [(64, 40), (40, 64), (50, 50), (200, 20)][number % 4]
                y, x = np.mgrid[0:height, 0:width]
                picture = np.stack([255 * x / width, 255 * y / height, np.full_like(x, 20 * number)], 2)
                (root / part / name).mkdir(parents=True, exist_ok=True)
                Image.fromarray(picture.astype(np.uint8)).save(root / part / name / f"{number}.png")
    return root


def data_of(folder, crop={}, **more):
    keys = shelves.checker(shelves.find("dataset", "image_folder"), DataKeys)
    settings = {"dataset": "image_folder", "folder": folder, "size": SIZE, "workers": 0, "validation": 4}
    settings["store"] = {"short_side": 256}  # as large as these pictures
    settings["augment"] = {"random_resized_crop": crop}
    return make_data(keys.model_validate(settings | more), CPU)


def numbers_of(count, seed=0):
    return np.random.default_rng(seed).random((count, 4)).tolist()


@pytest.mark.parametrize("aspect", [1.0, 4 / 3])
def test_a_part_has_the_area_and_ratio_that_were_drawn(aspect):
    settings = RandomResizedCrop(scale=(0.1, 0.3), ratio=(0.8, 1.5))
    areas, ratios = [], []
    for numbers in numbers_of(500):
        left, top, width, height = box(numbers, 1200, 1000, aspect, settings)
        assert 0 <= left <= 1200 - width and 0 <= top <= 1000 - height
        areas.append(width * height / 1.2e6)
        ratios.append(width / height / aspect)
        assert areas[-1] == pytest.approx(0.1 + numbers[0] * 0.2, rel=0.01)
        assert math.log(ratios[-1]) == pytest.approx(
            math.log(0.8) + numbers[1] * math.log(1.5 / 0.8), abs=0.01
        )
    assert min(areas) < 0.105 and max(areas) > 0.295 and min(ratios) < 0.82 and max(ratios) > 1.47


@pytest.mark.parametrize("shape", [(1, 1), (1, 100_000), (3000, 2), (333, 500)])
def test_a_part_lies_in_its_picture_and_keeps_its_ratio(shape):
    width, height = shape
    places = []
    for numbers in [*numbers_of(300), [0.0] * 4, [1 - 2**-24] * 4]:
        left, top, across, along = box(numbers, width, height, 1.0, RandomResizedCrop())
        assert left >= 0 and left + across <= width and top >= 0 and top + along <= height
        assert across >= 1 and along >= 1
        if min(across, along) > 20:
            assert 0.74 < across / along < 1.35
        places.append(((left, left + across), (top, top + along)))
    for axis, side in enumerate(shape):  # both ends of the picture are reached: it is not its middle square
        assert min(p[axis][0] for p in places) == 0 and max(p[axis][1] for p in places) == side


def test_the_numbers_name_the_same_part_of_a_smaller_copy():
    for numbers in numbers_of(100):
        large = box(numbers, 4000, 3000, 1.0, RandomResizedCrop())
        small = box(numbers, 400, 300, 1.0, RandomResizedCrop())
        assert np.abs(np.array(large) / 10 - small).max() <= 1


@pytest.mark.parametrize("filter", ["bicubic", "bilinear"])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_part_is_what_pillow_makes_of_it(filter, channels):
    pixels = np.random.default_rng(0).integers(0, 256, (90, 120, channels), np.uint8)
    picture = Image.fromarray(pixels if channels == 3 else pixels[:, :, 0])
    for numbers in numbers_of(20):
        left, top, width, height = box(numbers, 120, 90, 20 / 24, RandomResizedCrop())
        part = picture.crop((left, top, left + width, top + height))
        kind = Image.Resampling.BICUBIC if filter == "bicubic" else Image.Resampling.BILINEAR
        expected = np.asarray(part.resize((20, 24), kind)).reshape(24, 20, channels)
        ways = [picture, pixels, torch.from_numpy(pixels).permute(2, 0, 1)]
        found = [cut(way, numbers, RandomResizedCrop(), 24, 20, filter) for way in ways]
        assert found[0].shape == (channels, 24, 20) and found[0].dtype == torch.uint8
        assert all(torch.equal(found[0], other) for other in found[1:])
        assert np.abs(found[0].permute(1, 2, 0).numpy().astype(int) - expected).max() <= 2


def test_a_squashed_part_is_stretched_as_the_whole_picture_is():
    settings = RandomResizedCrop(scale=(0.2, 0.6), ratio=(0.8, 1.25))
    for numbers in numbers_of(100):
        left, top, width, height = box(numbers, 1200, 300, 2.0, settings, "squash")
        assert 0 <= left <= 1200 - width and 0 <= top <= 300 - height
        # In the picture that was stretched to a square, it is the part that a square picture would have.
        square = box(numbers, 1200, 1200, 1.0, settings)
        assert np.abs(np.array([left, top * 4, width, height * 4]) - square).max() <= 4


@pytest.mark.parametrize(("shape", "aspect"), [((400, 100), 1.0), ((90, 300), 1.5), ((200, 100), 2.0)])
def test_a_padded_part_is_as_large_as_of_the_padded_picture_and_shows_all_it_can(shape, aspect):
    width, height = shape
    full = max(width, round(height * aspect)), max(height, round(width / aspect))
    for numbers in [*numbers_of(200), [0.0] * 4, [1 - 2**-24] * 4]:
        left, top, across, along = box(numbers, width, height, aspect, RandomResizedCrop(), "pad")
        wide = box(numbers, *full, aspect, RandomResizedCrop())
        assert (across, along) == wide[2:]
        for start, side, picture, whole in ((left, across, width, full[0]), (top, along, height, full[1])):
            assert -(whole - picture) // 2 <= start and start + side <= (whole + picture + 1) // 2
            shown = min(start + side, picture) - max(start, 0)
            assert shown == min(side, picture)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_padded_part_lies_on_the_background(channels):
    """A picture of 40 x 10 in a square of 40: its lower half of 20 x 20 shows 10 rows of it, enlarged twice."""
    settings = RandomResizedCrop(scale=(0.25, 0.25), ratio=(1, 1))
    pixels = np.full((10, 40, channels), 200, np.uint8)
    grey = [30, 60, 90] if channels == 3 else [round(0.299 * 30 + 0.587 * 60 + 0.114 * 90)]
    for last, rows in ((0.0, range(20, 40)), (1 - 2**-24, range(20))):
        assert box([0.5, 0.5, 0.5, last], 40, 10, 1.0, settings, "pad") == (
            10,
            -10 if not last else 0,
            20,
            20,
        )
        for way in (pixels, Image.fromarray(pixels.squeeze())):
            found = cut(way, [0.5, 0.5, 0.5, last], settings, 40, 40, "bicubic", "pad", (30, 60, 90))
            expected = torch.tensor(grey, dtype=torch.uint8)[:, None, None].repeat(1, 40, 40)
            expected[:, list(rows)] = 200
            assert torch.equal(found, expected)


@pytest.mark.parametrize("shape", [(100_000, 1), (1, 3000)])
def test_a_padded_part_of_a_line_needs_no_square_of_it(shape):
    pixels = np.zeros((shape[1], shape[0], 3), np.uint8)
    found = cut(pixels, [0.5] * 4, RandomResizedCrop(), 16, 16, "bicubic", "pad")
    assert found.shape == (3, 16, 16) and 16 <= (found[0] == 0).sum() <= 32 and found.max() == 255


def test_views_are_cut_as_the_resize_mode_says(folder):
    """The red of a picture says the column: how much of it a part shows, and whether the background is seen."""
    whole = {"scale": [1, 1], "ratio": [1, 1]}
    found = {}
    for mode in ("crop", "pad", "squash"):
        for store in ({"short_side": 256}, "off"):
            data = data_of(folder, whole, resize_mode=mode, background=[9, 9, 255], store=store)
            found[mode, store == "off"] = Views(data).of(data.train.ids, 0)
            plain = data.train.read(torch.arange(len(data.train)))[0].float() / 255
            # All of the picture is what is measured; of `crop` it is the middle part, from the view's numbers.
            if mode != "crop":
                assert (found[mode, store == "off"] - plain).abs().max() < 0.1
        assert torch.equal(found[mode, True], found[mode, False])  # smaller than the store's pictures
    assert not torch.equal(found["pad", True], found["squash", True])


def test_kept_answers_of_other_cuts_are_not_taken(folder):
    prints = {
        data_of(folder, **more).fingerprint
        for more in (
            {},
            {"resize_mode": "pad"},
            {"resize_mode": "squash"},
            {"store": "off"},
            {"store": {"short_side": 64}},
        )
    }
    assert len(prints) == 5


def test_views_show_every_corner_of_the_pictures(folder):
    data = data_of(folder, {"scale": [0.05, 0.2]})
    views = Views(data)
    seen = torch.cat([views.of(data.train.ids, view) for view in range(40)])
    red, green = seen[:, 0], seen[:, 1]
    assert red.min() < 0.03 and red.max() > 0.95 and green.min() < 0.03 and green.max() > 0.95


def test_a_view_is_the_part_that_its_numbers_name(folder):
    data = data_of(folder)
    views = Views(data)
    index = data.train.ids
    for position, view in zip(index.tolist(), views.of(index, 3), strict=True):
        picture = Image.open(data.train.images.files[position]).convert("RGB")
        numbers = views.cuts(3).numbers[position].tolist()
        left, top, width, height = box(numbers, *picture.size, 1.0, RandomResizedCrop())
        expected = picture.crop((left, top, left + width, top + height)).resize(
            (SIZE, SIZE), Image.Resampling.BICUBIC
        )
        assert np.abs(view.permute(1, 2, 0).numpy() * 255 - np.asarray(expected)).max() <= 2


@pytest.mark.parametrize("workers", [0, 2])
def test_a_view_is_the_same_in_any_batch_and_process(folder, workers):
    data = data_of(folder, augment="strong")
    whole = Views(data).of(data.train.ids, 5)
    views = Views(data)
    order = [torch.tensor([3, 0]), torch.tensor([7]), torch.tensor([5, 1, 2, 4, 6])]
    for positions, (images, labels, index) in zip(
        order, batches(data.train, order, workers, CPU, views.cuts(5)), strict=True
    ):
        assert torch.equal(labels, data.train.labels[positions])
        assert torch.equal(views.augmented(images, index, 5), whole[positions])


def test_validation_and_test_images_are_not_cut(folder):
    cut_data, plain = data_of(folder), data_of(folder, augment={})
    for part in ("validation", "test"):
        one, other = (getattr(d, part) for d in (cut_data, plain))
        assert torch.equal(one.read(torch.arange(len(one)))[0], other.read(torch.arange(len(other)))[0])


def test_images_in_memory_are_cut_too():
    keys = shelves.checker(shelves.find("dataset", "digits"), DataKeys)
    augment = {"random_resized_crop": {"scale": [0.5, 0.9]}}
    data = make_data(keys.model_validate({"dataset": "digits", "augment": augment}), CPU)
    index = data.train.ids[:20]
    views = Views(data)
    seen = views.of(index, 0)
    for sample, view in zip(index.tolist(), seen, strict=True):
        numbers = views.cuts(0).numbers[sample].tolist()
        image = data.train.images.images[sample]
        assert torch.equal(
            view, cut(image, numbers, data.augment.random_resized_crop, 8, 8, "bilinear").float() / 255
        )
    assert torch.equal(seen[4:7], Views(data).of(index[4:7], 0))


def test_kept_views_are_not_cut_again(monkeypatch):
    keys = shelves.checker(shelves.find("dataset", "digits"), DataKeys)
    settings = {"dataset": "digits", "augment": "light", "views": 2, "keep_views": True, "subset": 50}
    data = make_data(keys.model_validate(settings), CPU)
    views = Views(data)
    first = views.of(data.train.ids, 1)
    assert views.cuts(0) is not None and views.cuts(1) is None
    assert torch.equal(views.of(data.train.ids, 1), first)


@pytest.mark.parametrize(
    ("augment", "words"),
    [
        ({"hue": 0.1, "grayscale": 0.2}, "has images of 1 channels; hue, grayscale: 3 are needed"),
        (
            {"random_resized_crop": {}},
            "has images that cannot be cut out of their pictures: leave out random_resized_crop",
        ),
    ],
)
def test_what_these_images_cannot_have_is_refused(monkeypatch, augment, words):
    keys = shelves.checker(shelves.find("dataset", "digits"), DataKeys)
    if "random_resized_crop" in augment:
        from trainer.data.images import InMemory

        monkeypatch.delattr(InMemory, "cut")
    with pytest.raises(Mistake, match=f"data: augment: dataset 'digits' {words}"):
        make_data(keys.model_validate({"dataset": "digits", "augment": augment}), CPU)


def test_a_crop_changes_the_facts_of_kept_answers():
    assert Augment(random_resized_crop={}).facts() != Augment(random_resized_crop={"scale": [0.5, 1]}).facts()
