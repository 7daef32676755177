import math

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch.nn import functional

from trainer.data.augment import apply, draw, num_parameters
from trainer.recipe import shelves
from trainer.recipe.augment import NAMED, Augment
from trainer.recipe.keys import DataKeys

ALL_ON = Augment(
    flip=True, shift=2, rotate=20, scale=0.2, shear=15, elastic=1.5, brightness=0.3, contrast=0.4, erase=0.5
)
COLOURS = {"saturation": 0.5, "hue": 0.2, "grayscale": 0.4, "blur": 1.5}
POLICIES = [{"rand_augment": {"ops": 3, "magnitude": 20}}, {"trivial_augment": True}]
ONE_AT_A_TIME = [
    *(Augment(**{name: getattr(ALL_ON, name)}) for name in sorted(ALL_ON.model_fields_set)),
    *(Augment(**{name: amount}) for name, amount in COLOURS.items()),
    *(Augment(**policy) for policy in POLICIES),
]
ALL_AND_COLOURS = Augment(**ALL_ON.model_dump(exclude_unset=True), **COLOURS, **POLICIES[1])
PINNED = [[16104273, 14275369, 6046522, 12844502], [9641908, 4587659, 3373045, 16619294]]


def some_images(number=6, channels=3, height=12, width=10):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (number, channels, height, width), dtype=torch.uint8, generator=generator)


def signed(number, limit):
    return (2 * number - 1) * limit


def test_with_everything_off_the_images_are_the_stored_ones_exactly():
    images = some_images()
    parameters = draw(Augment(), seed=0, view=3, num_samples=6)
    assert parameters.shape == (6, 0)
    seen = apply(Augment(), images, parameters)
    assert seen.dtype == torch.float32
    assert torch.equal(seen, images.float() / 255)


def test_draw_is_pinned():
    # Kept teacher logits are worthless if these numbers change: never adapt the test, only the code.
    assert (draw(Augment(rotate=5), 0, 0, 4) * 2**24).flatten().tolist() == PINNED[0]
    assert (draw(Augment(shift=1), 7, 3, 2) * 2**24).flatten().tolist() == PINNED[1]


def test_draw_depends_on_seed_and_view_and_nothing_else():
    drawn = draw(ALL_ON, 1, 2, 50)
    assert drawn.shape == (50, num_parameters(ALL_ON)) == (50, 45)
    assert torch.equal(drawn, draw(ALL_ON, 1, 2, 50))
    assert torch.equal(drawn[:20], draw(ALL_ON, 1, 2, 20))
    for seed, view in [(2, 1), (1, 1), (0, 2), (2**32 + 1, 2), (1, 2**32 + 2)]:
        assert not (drawn == draw(ALL_ON, seed, view, 50)).any(dim=0).all()


def test_draw_is_uniform():
    drawn = draw(Augment(shift=1, rotate=1), 0, 0, 20_000).double()
    assert drawn.min() >= 0 and drawn.max() < 1
    counts = torch.histc(drawn, 10, 0, 1)
    assert (counts / len(drawn) / 3 - 0.1).abs().max() < 0.005
    assert torch.corrcoef(drawn.T).triu(1).abs().max() < 0.03


def test_shift_is_exact_and_takes_every_offset():
    augment = Augment(shift=2)
    image = some_images(1, 2, 6, 7)
    parameters = draw(augment, 0, 0, 300)
    seen = apply(augment, image.expand(300, -1, -1, -1), parameters)
    offsets = set()
    for view, numbers in zip(seen, parameters.double(), strict=True):
        right, down = (int(math.floor(number * 5)) - 2 for number in numbers)
        offsets.add((right, down))
        expected = torch.zeros(2, 6, 7)
        for row in range(6):
            for column in range(7):
                if 0 <= row - down < 6 and 0 <= column - right < 7:
                    expected[:, row, column] = image[0, :, row - down, column - right].float() / 255
        assert torch.equal(view, expected)
    assert len(offsets) == 25


def test_the_greatest_number_stays_within_the_shift():
    augment = Augment(shift=2)
    image = some_images(1)
    seen = apply(augment, image, torch.full((1, 2), 1 - 2**-24))
    assert torch.equal(seen[0, :, 2:, 2:], image[0, :, :-2, :-2].float() / 255)


def test_flip_is_exact_and_takes_half():
    augment = Augment(flip=True)
    images = some_images(1).expand(400, -1, -1, -1)
    seen = apply(augment, images, draw(augment, 0, 0, 400))
    plain, mirrored = (images[0].float() / 255), (images[0].flip(2).float() / 255)
    is_mirrored = torch.tensor([torch.equal(view, mirrored) for view in seen])
    assert all(torch.equal(view, plain) for view in seen[~is_mirrored])
    assert 160 < int(is_mirrored.sum()) < 240


def naive_geometry(augment, image, numbers):
    """Pixel by pixel in float64: each output pixel looks up its place of origin, weighing four neighbours."""
    channels, height, width = image.shape
    values = image.double().numpy() / 255
    if numbers["flip"] < 0.5:
        values = values[:, :, ::-1]
    right, down = (
        math.floor(number * (2 * augment.shift + 1)) - augment.shift for number in numbers["shift"]
    )
    turn, slant = (math.radians(signed(numbers[n], getattr(augment, n))) for n in ("rotate", "shear"))
    matrix = np.array([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]])
    matrix = matrix @ np.array([[1, math.tan(slant)], [0, 1]]) / (1 + signed(numbers["scale"], augment.scale))
    control = torch.tensor(signed(numbers["elastic"], augment.elastic)).view(1, 2, 4, 4)
    warp = functional.interpolate(control, size=(height, width), mode="bicubic", align_corners=True)[0]
    warp = warp.numpy()
    out = np.zeros_like(values)
    for row in range(height):
        for column in range(width):
            x, y = matrix @ [column - (width - 1) / 2 - right, row - (height - 1) / 2 - down]
            x += warp[0, row, column] + (width - 1) / 2
            y += warp[1, row, column] + (height - 1) / 2
            for i in (math.floor(y), math.floor(y) + 1):
                for j in (math.floor(x), math.floor(x) + 1):
                    if 0 <= i < height and 0 <= j < width:
                        out[:, row, column] += values[:, i, j] * (1 - abs(y - i)) * (1 - abs(x - j))
    return out


def test_geometry_equals_a_naive_reference():
    augment = Augment(flip=True, shift=2, rotate=20, scale=0.2, shear=15, elastic=1.5)
    images = some_images()
    parameters = draw(augment, 3, 1, len(images))
    seen = apply(augment, images, parameters)
    for image, row, view in zip(images, parameters.double().numpy(), seen, strict=True):
        numbers = dict(zip(("flip", "rotate", "scale", "shear"), row[[0, 3, 4, 5]], strict=True))
        numbers |= {"shift": row[1:3], "elastic": row[6:]}
        np.testing.assert_allclose(view.numpy(), naive_geometry(augment, image, numbers), atol=1e-5)


def test_shift_means_the_same_with_and_without_other_geometry():
    images = some_images()
    numbers = draw(Augment(shift=3), 0, 0, len(images))
    alone = apply(Augment(shift=3), images, numbers)
    turned = apply(Augment(shift=3, rotate=1e-6), images, torch.cat([numbers, torch.rand(len(images), 1)], 1))
    torch.testing.assert_close(alone, turned, atol=1e-4, rtol=0)


def test_brightness_and_contrast_equal_a_naive_reference():
    augment = Augment(brightness=0.5, contrast=0.5)
    images = some_images()
    parameters = draw(augment, 0, 0, len(images))
    seen = apply(augment, images, parameters)
    for image, (bright, contrast), view in zip(images, parameters, seen, strict=True):
        values = image.double() / 255
        expected = values * (1 + signed(bright, 0.5)) - values.mean()
        expected = (values.mean() + expected * (1 + signed(contrast, 0.5))).clamp(0, 1)
        torch.testing.assert_close(view.double(), expected, atol=1e-6, rtol=0)


def test_erase_takes_a_rectangle_from_its_share_of_the_images():
    augment = Augment(erase=0.25)
    images = torch.full((2000, 1, 20, 16), 200, dtype=torch.uint8)
    gone = apply(augment, images, draw(augment, 0, 0, 2000))[:, 0] == 0
    erased = gone.flatten(1).any(1)
    assert 0.22 < erased.double().mean() < 0.28
    for mask in gone[erased]:
        rows, columns = mask.any(1), mask.any(0)
        assert torch.equal(mask, rows[:, None] & columns)
        for side in (rows, columns):  # no gap: it changes at most twice
            assert side.diff().sum() <= 2
    shares = gone[erased].flatten(1).double().mean(1)
    assert shares.min() < 0.05 and 0.3 < shares.max() <= 0.36
    assert gone.any(0).all()  # every place is reached


@pytest.mark.parametrize("augment", [*ONE_AT_A_TIME, ALL_ON, ALL_AND_COLOURS], ids=str)
def test_an_image_does_not_depend_on_the_batch_it_comes_in(augment):
    images = some_images(67, 3, 13, 11)
    parameters = draw(augment, 0, 5, 67)
    together = apply(augment, images, parameters)
    assert not torch.equal(together, images.float() / 255)
    assert together.min() >= 0 and together.max() <= 1
    alone = torch.cat([apply(augment, images[i : i + 1], parameters[i : i + 1]) for i in range(67)])
    assert torch.equal(together, alone)
    order = torch.randperm(67)[:41]
    assert torch.equal(together[order], apply(augment, images[order], parameters[order]))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("augment", [*ONE_AT_A_TIME, ALL_ON, ALL_AND_COLOURS], ids=str)
def test_the_gpu_sees_what_the_processor_sees(augment):
    images = some_images(64)
    parameters = draw(augment, 0, 0, 64)
    there = apply(augment, images.cuda(), parameters)
    assert there.is_cuda
    torch.testing.assert_close(there.cpu(), apply(augment, images, parameters), atol=1e-4, rtol=0)


def test_wrong_input_is_refused():
    images = some_images()
    with pytest.raises(ValueError, match=r"parameters: got \(6, 2\) where these settings need \(6, 1\)"):
        apply(Augment(rotate=3), images, torch.rand(6, 2))
    with pytest.raises(ValueError, match="uint8"):
        apply(Augment(), images.float(), torch.empty(6, 0))
    with pytest.raises(ValueError, match=r"shift: got 10 pixels; the images are \(12, 10\)"):
        apply(Augment(shift=10), images, torch.rand(6, 2))


@pytest.mark.parametrize(
    "settings",
    [
        {"rotation": 3},
        {"shift": -1},
        {"shift": 1.5},
        {"rotate": 181},
        {"scale": 1},
        {"erase": 1.1},
        {"elastic": math.inf},
        {"rotate": math.nan},
        {"hue": 0.6},
        {"rand_augment": {}, "trivial_augment": True},
        {"rand_augment": {"ops": 0}},
        {"rand_augment": True},
        {"random_resized_crop": {"scale": [0.5, 0.2]}},
        {"random_resized_crop": {"scale": [0, 1]}},
        {"random_resized_crop": {"ratio": [0.5]}},
    ],
    ids=str,
)
def test_wrong_settings_are_refused(settings):
    with pytest.raises(ValidationError):
        Augment(**settings)


def test_settings_that_came_later_leave_what_was_kept_before_them_valid():
    assert Augment(flip=True).facts() == {
        "flip": True,
        "shift": 0,
        "rotate": 0.0,
        "scale": 0.0,
        "shear": 0.0,
        "elastic": 0.0,
        "brightness": 0.0,
        "contrast": 0.0,
        "erase": 0.0,
    }
    assert Augment(hue=0.1).facts() != Augment().facts() != Augment(random_resized_crop={}).facts()


@pytest.mark.parametrize("name", ["light", "strong"])
def test_settings_have_names(name):
    keys = shelves.checker(shelves.find("dataset", "digits"), DataKeys)
    named = keys.model_validate({"dataset": "digits", "augment": name}).augment
    assert named == NAMED[name] and named.random_resized_crop is not None and named.flip
    with pytest.raises(
        ValidationError, match="got 'medium'; light, strong or a mapping of settings is allowed"
    ):
        keys.model_validate({"dataset": "digits", "augment": "medium"})
