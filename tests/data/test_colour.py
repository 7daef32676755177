import colorsys
import math

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps

from trainer.data.augment import apply, draw
from trainer.data.policies import _OPERATIONS, rand_augment, trivial_augment
from trainer.recipe.augment import Augment, RandAugment


def some_images(number=4, channels=3, height=11, width=9):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (number, channels, height, width), dtype=torch.uint8, generator=generator)


def seen(augment, images=None):
    images = some_images() if images is None else images
    numbers = draw(augment, 0, 0, len(images))
    return images.double() / 255, numbers.double(), apply(augment, images, numbers).double()


def grey(image):
    return 0.299 * image[0] + 0.587 * image[1] + 0.114 * image[2]


def test_saturation_equals_a_naive_reference():
    for image, (number,), view in zip(*seen(Augment(saturation=0.5)), strict=True):
        expected = grey(image) + (image - grey(image)) * (1 + (2 * number - 1) * 0.5)
        torch.testing.assert_close(view, expected.clamp(0, 1), atol=1e-6, rtol=0)


def test_hue_equals_pythons_own_colours():
    for image, (number,), view in zip(*seen(Augment(hue=0.3)), strict=True):
        for row, column in [(0, 0), (5, 3), (10, 8)]:
            h, s, v = colorsys.rgb_to_hsv(*image[:, row, column].tolist())
            expected = colorsys.hsv_to_rgb((h + (2 * float(number) - 1) * 0.3) % 1, s, v)
            np.testing.assert_allclose(view[:, row, column], expected, atol=1e-5)


def test_its_share_of_the_images_loses_its_colour():
    images, numbers, views = seen(Augment(grayscale=0.3), some_images(200))
    chosen = numbers[:, 0] < np.float32(0.3)
    assert 40 < chosen.sum() < 80
    assert torch.equal(views[~chosen].float(), images[~chosen].float())
    for image, view in zip(images[chosen], views[chosen], strict=True):
        torch.testing.assert_close(view, grey(image).expand(3, -1, -1), atol=1e-6, rtol=0)


@pytest.mark.parametrize("zoom", [1.0, 2.0])
def test_blur_equals_a_naive_reference(zoom):
    images = some_images(height=30, width=26)
    numbers = draw(Augment(blur=1.2), 0, 0, len(images))
    views = apply(Augment(blur=1.2), images, numbers, zoom)
    reach = math.ceil(3 * 1.2 * zoom)
    for image, (number,), view in zip(images.double() / 255, numbers.double(), views, strict=True):
        weights = torch.exp(
            -(torch.arange(-reach, reach + 1).double() ** 2) / (2 * (number * 1.2 * zoom) ** 2)
        )
        weights /= weights.sum()
        padded = np.pad(image.numpy(), ((0, 0), (reach, reach), (reach, reach)), "reflect")
        expected = np.zeros(image.shape)
        for i in range(2 * reach + 1):
            for j in range(2 * reach + 1):
                expected += weights[i].item() * weights[j].item() * padded[:, i : i + 30, j : j + 26]
        np.testing.assert_allclose(view, expected, atol=1e-5)


def test_a_blur_wider_than_the_image_is_none_the_less_one():
    images, _, views = seen(Augment(blur=9), some_images(6, 1, 5, 7))
    assert (
        views.amax((1, 2, 3)) - views.amin((1, 2, 3)) <= images.amax((1, 2, 3)) - images.amin((1, 2, 3))
    ).all()


def pillow(image):
    return Image.fromarray(image.permute(1, 2, 0).numpy())


def operated(image, number, strength, sign=0.9):
    """One operation of TrivialAugment's list, alone."""
    numbers = torch.tensor([[(number + 0.5) / len(_OPERATIONS), (strength + 0.5) / 31, sign]])
    [out] = trivial_augment(image[None], numbers)
    return out


ENHANCERS = {7: ImageEnhance.Brightness, 8: ImageEnhance.Color, 9: ImageEnhance.Contrast}


@pytest.mark.parametrize("strength", [0, 7, 30])
@pytest.mark.parametrize("sign", [0.1, 0.9])
def test_operations_equal_pillow_s(strength, sign):
    [image] = some_images(1, 3, 16, 14)
    assert torch.equal(operated(image, 0, strength, sign), image)
    for number, enhance in ENHANCERS.items():
        change = strength / 30 * 0.99 * (1 if sign >= 0.5 else -1)
        expected = np.asarray(enhance(pillow(image)).enhance(1 + change)).astype(int)
        found = operated(image, number - 1, strength, sign).permute(1, 2, 0).numpy()
        assert np.abs(found - expected).max() <= 2  # they round at other places
    exact = {
        10: ImageOps.posterize(pillow(image), 8 - round(strength / 30 * 6)),
        12: ImageOps.autocontrast(pillow(image)),
        13: ImageOps.equalize(pillow(image)),
    }
    for number, expected in exact.items():
        found = operated(image, number, strength, sign).permute(1, 2, 0).numpy()
        assert np.abs(found - np.asarray(expected).astype(int)).max() <= 1
    limit = round(255 * (1 - strength / 30))
    expected = torch.where(image >= limit, 255 - image, image)
    assert torch.equal(operated(image, 11, strength, sign), expected)


def test_operations_that_move_pixels():
    [image] = some_images(1, 3, 28, 28)
    moved = operated(image, 3, 30)  # a seventh of the side
    assert torch.equal(moved[:, :, 4:], image[:, :, :-4]) and not moved[:, :, :4].any()
    moved = operated(image, 4, 30, sign=0.1)
    assert torch.equal(moved[:, :-4], image[:, 4:]) and not moved[:, -4:].any()
    y, x = torch.meshgrid(torch.linspace(20, 220, 28), torch.linspace(60, 140, 28), indexing="ij")
    smooth = torch.stack([y, x, (x + y) / 2]).byte()
    numbers = torch.tensor([[5.5 / 14, 0.9] * 3])  # three times 30 degrees
    [turned] = rand_augment(smooth[None], numbers, RandAugment(ops=3, magnitude=30))
    apart = (turned.int() - smooth.rot90(-1, (1, 2)).int())[:, 9:19, 9:19].abs()
    assert apart.max() <= 3


def test_every_operation_is_drawn_equally_often_and_strengths_are_uniform():
    numbers = draw(Augment(trivial_augment=True), 0, 0, 14_000)
    counts = torch.bincount((numbers[:, 0] * 14).long(), minlength=14)
    assert len(counts) == len(_OPERATIONS) == 14 and counts.min() > 880 and counts.max() < 1120
    assert ((numbers[:, 1] * 31).long().bincount(minlength=31) > 350).all()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    "augment", [Augment(trivial_augment=True), Augment(rand_augment={"ops": 4, "magnitude": 30})]
)
def test_every_operation_takes_grey_and_colour(channels, augment):
    images = some_images(1, channels, 8, 12).expand(300, -1, -1, -1)
    views = apply(augment, images, draw(augment, 0, 0, 300))
    assert views.shape == images.shape and views.min() >= 0 and views.max() <= 1
    assert len({view.numpy().tobytes() for view in views}) > 100
