"""A picture is brought to the network in one way, whoever asks: training, measuring, predicting, the Python door."""

import json
import os
import unicodedata

import numpy as np
import pytest
import torch
from PIL import Image, JpegImagePlugin, PngImagePlugin
from torch import nn

import trainer
from trainer.cli import main
from trainer.data.image_file import brightest, open_image, read_image
from trainer.data.images import normalize
from trainer.data.listing import in_order, list_images
from trainer.data.reading import Reading, reading_of
from trainer.datasets.image_folder import image_folder
from trainer.mistakes import Mistake
from trainer.packing import container
from trainer.packing import network as packed


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("TRAINER_DATA", str(tmp_path_factory.mktemp("cache")))


def odd_photos(folder, count):
    """Photos of all modes, sizes, formats and orientations, in two classes."""
    rng = np.random.default_rng(0)
    modes = ("RGB", "L", "RGBA", "LA", "P", "1", "CMYK", "I;16")
    for i in range(count):
        mode = modes[i % len(modes)]
        height, width = rng.integers(3, 90, 2)
        path = folder / "ab"[i % 2] / f"{i:03d}"
        path.parent.mkdir(parents=True, exist_ok=True)
        if mode == "I;16":
            Image.fromarray(rng.integers(0, 2**16, (height, width), dtype=np.uint16)).save(
                path.with_suffix(".png")
            )
            continue
        image = Image.fromarray(rng.integers(0, 256, (height, width, 4), dtype=np.uint8), "RGBA")
        image = (
            image
            if mode == "RGBA"
            else image.convert("RGB").convert(mode)
            if mode != "LA"
            else image.convert("LA")
        )
        exif = Image.Exif()
        exif[0x0112] = int(rng.integers(1, 9))
        if mode == "CMYK":
            image.save(path.with_suffix(".jpg"), exif=exif)
        elif mode in ("RGB", "L") and i % 3:
            image.save(path.with_suffix((".jpg", ".webp", ".tiff")[i % 3]), exif=exif)
        else:
            image.save(path.with_suffix(".png"), exif=exif)


def test_a_picture_in_lab_is_read_in_colour_and_in_grey(tmp_path):
    Image.new("LAB", (4, 3), (120, 200, 90)).save(tmp_path / "x.tif")
    colour = open_image(tmp_path / "x.tif", "RGB")
    assert open_image(tmp_path / "x.tif", "L").tobytes() == colour.convert("L").tobytes()


@pytest.mark.parametrize(
    "how", [{}, {"crop": 0.6}, {"resize_mode": "pad", "background": (9, 99, 0)}, {"resize_mode": "squash"}]
)
def test_everybody_sees_the_same_500_odd_photos(tmp_path, how):
    odd_photos(tmp_path / "photos" / "test", 500)
    odd_photos(tmp_path / "photos" / "train", 16)
    source = image_folder(folder=tmp_path / "photos", size=20, **how)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 20 * 20, 2)).eval()
    facts = {
        "shape": [3, 20, 20], "mean": list(source.mean), "std": list(source.std), "classes": source.classes,
        "reading": source.reading.settings(),
    }  # fmt: skip
    (tmp_path / "net.tiny").write_bytes(packed.encode(net, None, facts))
    loaded = trainer.load(tmp_path / "net.tiny", into=nn.Sequential(nn.Flatten(), nn.Linear(3 * 20 * 20, 2)))
    images, _ = source.test.__getitems__(list(range(500)))
    measured = normalize(images.float() / 255, source.mean, source.std)
    assert torch.equal(loaded.preprocess(source.test.files), measured)
    assert torch.equal(loaded.preprocess(images), measured)
    with torch.inference_mode():
        answers = [source.classes[i] for i in net(measured).argmax(1).tolist()]
    assert len(set(answers)) == 2
    assert loaded.classes == ["a", "b"] and loaded.predict(source.test.files) == answers


def test_predict_of_the_command_line_sees_what_was_measured(tmp_path, monkeypatch, capsys):
    """Case: decoys near the border, `crop: 0.5`: right on 29 % where the report said 100 %."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for part, count in (("train", 30), ("test", 8)):
        for number, name in enumerate(("dark", "light")):
            (tmp_path / "photos" / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = np.full((32, 32, 3), 200 - 150 * number, np.uint8)  # the border says the other class
                pixels[8:24, 8:24] = 40 + 170 * number + rng.integers(0, 30, (16, 16, 3))
                Image.fromarray(pixels).save(tmp_path / "photos" / part / name / f"{i}.png")
    recipe = {
        "name": "serve",
        "data": {"dataset": "image_folder", "folder": "$PLACE/photos", "size": 16, "crop": 0.5, "workers": 0},
        "student": {"model": "lenet5", "width": 2},
        "stages": [
            {"stage": "train", "training": {"epochs": 8, "lr": 1e-2, "batch_size": 10}},
            {"stage": "pack"},
        ],
    }
    monkeypatch.setenv("PLACE", str(tmp_path))
    (tmp_path / "x.yaml").write_text(json.dumps(recipe))
    report = trainer.run("x.yaml", folder=tmp_path)
    assert report["rows"][-1]["top1"] == 100.0
    assert report["data"] == [
        f"{tmp_path}/photos: 2 classes, 60 training images (30 to 30 a class), 16 test images"
    ]
    capsys.readouterr()
    files = sorted(map(str, (tmp_path / "photos/test").rglob("*.png")))
    assert main(["predict", str(tmp_path / "serve/student.tiny"), *files]) == 0
    told = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[1].split()[0] for line in told] == ["dark"] * 8 + ["light"] * 8


def test_what_equals_the_default_takes_no_byte_and_old_files_keep_their_rule(monkeypatch):
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
    facts = {"shape": [1, 8, 8], "mean": [0.5], "std": [0.5], "classes": ["a", "b"]}
    usual = packed.encode(net, None, {**facts, "reading": Reading((1, 8, 8)).settings()})
    assert len(usual) == len(packed.encode(net, None, facts)) and usual[2] == 3
    cropped = packed.encode(net, None, {**facts, "reading": Reading((1, 8, 8), crop=0.5).settings()})
    assert packed.reading(cropped).crop == 0.5 and len(cropped) > len(usual)
    monkeypatch.setattr(container, "VERSION", 1)
    monkeypatch.setattr(container, "MEDIUM", 0)
    old = packed.encode(net, None, facts)
    assert packed.reading(old) == Reading((1, 8, 8), filter="bilinear", cut="whole pixels")
    pixels = np.random.default_rng(0).integers(0, 256, (40, 23), dtype=np.uint8)
    # As that version had it: the shorter side fitted, bilinear, then the middle cut out.
    image = Image.fromarray(pixels).resize((8, round(40 * 8 / 23)), Image.Resampling.BILINEAR)
    top = (image.height - 8) // 2
    assert np.array_equal(
        read_image(Image.fromarray(pixels), packed.reading(old))[0], np.asarray(image)[top : top + 8]
    )


@pytest.mark.parametrize(
    "odd", [{"crop": 2}, {"filter": "nearest"}, {"depth": 9}, {"what": 1}, {"background": [1]}, 7]
)
def test_a_file_that_says_something_odd_of_its_images_is_refused(odd):
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
    facts = {"shape": [1, 8, 8], "mean": [0.5], "std": [0.5], "classes": ["a", "b"], "reading": odd}
    with pytest.raises(Mistake, match="how its images are read is not known here"):
        packed.encode(net, None, facts)


@pytest.mark.parametrize("kind", ["jpg", "png", "webp", "tiff"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_upright(tmp_path, kind, orientation):
    upright = np.zeros((16, 24, 3), np.uint8)
    upright[:8, :12] = 255  # the bright corner is the upper left one
    # What a camera stores that was held so: the picture after the inverse of what viewers do.
    stored = {
        1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1], 5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1), 7: np.rot90(upright[:, ::-1], 1)[:, :], 8: np.rot90(upright, -1),
    }[orientation]  # fmt: skip
    if orientation == 7:
        stored = upright[::-1, ::-1].transpose(1, 0, 2)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"x.{kind}"
    Image.fromarray(np.ascontiguousarray(stored)).save(
        path, exif=exif, **({"lossless": True} if kind == "webp" else {})
    )
    found = np.asarray(open_image(path, "L")).astype(int)
    assert found.shape == (16, 24)
    assert found[:7, :11].min() > 200 and found[9:].max() < 60 and found[:, 13:].max() < 60


def test_transparent_pixels_lie_on_the_background(tmp_path):
    pixels = np.zeros((4, 4, 4), np.uint8)
    pixels[:2] = (200, 10, 20, 255)
    pixels[2:, :, 3] = 0
    Image.fromarray(pixels, "RGBA").save(tmp_path / "x.png")
    found = np.asarray(open_image(tmp_path / "x.png", "RGB"))
    assert (found[0, 0].tolist(), found[3, 3].tolist()) == ([200, 10, 20], [255, 255, 255])
    found = np.asarray(open_image(tmp_path / "x.png", "RGB", background=(1, 2, 3)))
    assert found[3, 3].tolist() == [1, 2, 3]
    # A palette with a transparent entry, and grey with alpha.
    palette = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
    palette.putpalette([9, 9, 9, 50, 60, 70])
    palette.save(tmp_path / "p.png", transparency=0)
    assert np.asarray(open_image(tmp_path / "p.png", "RGB"))[0].tolist() == [[255, 255, 255], [50, 60, 70]]
    Image.fromarray(np.array([[[100, 255], [100, 0]]], np.uint8), "LA").save(tmp_path / "la.png")
    assert np.asarray(open_image(tmp_path / "la.png", "L"))[0].tolist() == [100, 255]


def test_twelve_bits_in_sixteen_are_not_black(tmp_path):
    """The set's real range says what white is: 4095, not 65535."""
    for part in ("train", "test"):
        for number, name in enumerate("ab"):
            (tmp_path / "x" / part / name).mkdir(parents=True)
            pixels = np.linspace(0, 4095, 256).reshape(16, 16).astype(np.uint16)
            Image.fromarray(pixels[:: 1 - 2 * number].copy()).save(tmp_path / "x" / part / name / "1.png")
    source = image_folder(folder=tmp_path / "x", size=16)
    assert source.reading.depth == 12
    assert "4 pictures have 16 bits; their samples have 12, and are scaled by that" in source.notes
    image = source.train.__getitems__([0])[0][0, 0]
    assert len(image.unique()) == 256 and image.max() == 255
    assert packed.facts_of  # the depth goes into the packed file:
    assert source.reading.settings() == {"depth": 12, "draft": True}


def test_a_dark_colour_picture_of_sixteen_bits_is_refused_in_words(tmp_path):
    """Pillow gives the upper 8 bits of each channel: of 12 bits 16 levels are left."""
    import struct
    import zlib

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b"".join(b"\0" + np.full((4, 3), 4000, ">u2").tobytes() for _ in range(4))
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 4, 4, 16, 2, 0, 0, 0))
    png += chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    for part in ("train", "test"):
        for name in "ab":
            (tmp_path / "x" / part / name).mkdir(parents=True)
            Image.new("RGB", (4, 4)).save(tmp_path / "x" / part / name / "1.png")
    (tmp_path / "x/train/a/deep.png").write_bytes(png)
    with pytest.raises(Mistake, match=r"deep.png: has 16 bits a channel, of which samples use the lowest 12"):
        image_folder(folder=tmp_path / "x", size=4)


def test_a_long_thin_picture_is_read_at_once(tmp_path):
    Image.fromarray(np.zeros((1, 100_000), np.uint8)).save(tmp_path / "long.png")
    for cut in ("box", "whole pixels"):
        assert read_image(tmp_path / "long.png", Reading((3, 32, 32), cut=cut)).shape == (3, 32, 32)


# what is found


def picture(path, value=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4), (value, 0, 0)).save(path, format="PNG")
    return path


def test_every_readable_picture_is_found_and_the_others_are_counted(tmp_path):
    """Case: one class came as .jfif, most of another as .heic, and one is still empty."""
    for part in ("train", "test"):
        for i in range(3):
            picture(tmp_path / part / "disc" / f"{i}.png", i)
            picture(tmp_path / part / "ring" / f"{i}.JFIF", i)
            picture(tmp_path / part / "avif" / f"{i}.jpe", i)
        (tmp_path / part / "disc" / "x.heic").write_bytes(b"not for Pillow")
        (tmp_path / part / "disc" / "notes").write_text("")
    source = image_folder(folder=tmp_path, size=8)
    assert source.classes == ["avif", "disc", "ring"] and len(source.train) == 9
    assert source.notes == [
        f"{tmp_path}: 3 classes, 9 training images (3 to 3 a class), 9 test images; "
        "passed over: 4 files by their ending (2 .heic, 2 without ending)"
    ]
    (tmp_path / "train" / "wedge").mkdir()
    with pytest.raises(
        Mistake, match="has class folders without a picture that can be read: wedge; passed over: 2 files"
    ):
        image_folder(folder=tmp_path, size=8)


def test_a_real_file_counts_once_however_links_and_loops_lead_to_it(tmp_path):
    """Case: a class folder with a link to its parent gave 2,160 of 3,854 images a wrong label."""
    for name in "ab":
        for i in range(3):
            picture(tmp_path / "train" / name / f"{i}.png", i)
    os.symlink(tmp_path / "train", tmp_path / "train" / "a" / "loop")
    os.symlink(tmp_path / "train" / "b" / "0.png", tmp_path / "train" / "a" / "link.png")
    os.symlink(tmp_path / "train" / "nowhere", tmp_path / "train" / "a" / "dangling.png")
    elsewhere = picture(tmp_path / "elsewhere" / "far.png")
    os.symlink(elsewhere.parent, tmp_path / "train" / "c")
    os.symlink(elsewhere, tmp_path / "train" / "b" / "far.png")
    found = list_images(tmp_path / "train")
    assert sorted(zip(found.classes, [os.path.basename(file) for file in found.files], strict=True)) == [
        ("a", "0.png"), ("a", "1.png"), ("a", "2.png"), ("b", "0.png"), ("b", "1.png"), ("b", "2.png"), ("b", "far.png"),
    ]  # fmt: skip
    assert found.num_links == 3
    assert found.num_special == 1  # the link to nothing


def test_a_pipe_among_the_photos_is_passed_over_and_said(tmp_path):
    if not hasattr(os, "mkfifo"):
        pytest.skip("this system has no named pipes")
    picture(tmp_path / "a" / "1.png")
    os.mkfifo(tmp_path / "a" / "2.png")
    found = list_images(tmp_path)
    assert [os.path.basename(file) for file in found.files] == ["1.png"]
    assert found.described() == "; passed over: 1 that are no files (broken links, pipes, devices)"


def test_the_order_of_classes_is_a_function_of_their_names_alone():
    names = ["10", "2", "02", "1", "b", "B", "a10", "a9", "é", "Z"]
    assert in_order(set(names)) == ["1", "02", "2", "10", "a9", "a10", "B", "b", "Z", "é"]


def test_one_word_in_two_unicode_forms_is_one_class_and_case_makes_two(tmp_path):
    for part, form in (("train", "NFC"), ("test", "NFD")):
        for name in ("café", "box", "Box"):
            picture(tmp_path / part / unicodedata.normalize(form, name) / "1.png")
    source = image_folder(folder=tmp_path, size=8)
    assert source.classes == ["Box", "box", "café"] and source.test.labels.tolist() == [0, 1, 2]
    assert [note for note in source.notes if "case only" in note] == [
        "class 'Box' differs from another one by upper and lower case only: taken as its own",
        "class 'box' differs from another one by upper and lower case only: taken as its own",
    ]


def test_a_name_that_is_not_utf8_is_an_error_when_the_data_is_opened(tmp_path):
    for part in ("train", "test"):
        for name in ("disc", "box"):
            picture(tmp_path / part / name / "1.png")
        os.rename(os.fsencode(tmp_path / part / "disc"), os.fsencode(tmp_path / part) + b"/caf\xe9")
    with pytest.raises(Mistake, match=r"caf\\xe9.* is not UTF-8"):
        image_folder(folder=tmp_path, size=8)


def test_a_validation_folder_is_used_and_a_plain_folder_is_split_class_by_class(tmp_path):
    for part, count in (("train", 6), ("test", 2), ("val", 3)):
        for name in "ab":
            for i in range(count):
                picture(tmp_path / "whole" / part / name / f"{i}.png", i)
    source = image_folder(folder=tmp_path / "whole", size=8)
    assert (len(source.train), len(source.test), len(source.validation)) == (12, 4, 6)
    for name, count in (("a", 10), ("b", 40)):
        for i in range(count):
            picture(tmp_path / "plain" / name / f"{i:02d}.png", i)
    source = image_folder(folder=tmp_path / "plain", test=0.2, size=8)
    assert torch.bincount(source.test.labels).tolist() == [2, 8]
    assert not set(source.test.files) & set(source.train.files) and len(source.train) == 40
    again = image_folder(folder=tmp_path / "plain", test=0.2, size=8)
    assert list(again.test.files) == list(source.test.files)
    other = image_folder(folder=tmp_path / "plain", test=0.2, test_seed=1, size=8)
    assert other.test.files != source.test.files


def test_a_png_that_says_it_is_a_bomb_is_refused(tmp_path):
    info = PngImagePlugin.PngInfo()
    Image.new("1", (20_000, 20_000)).save(tmp_path / "bomb.png", pnginfo=info)
    with pytest.raises(Mistake, match="is no image that can be read"):
        open_image(tmp_path / "bomb.png", "RGB")


def test_every_size_of_image_can_be_read_at_every_size():
    """49 / 28 x 28 is more than 49: a box that rounding takes beyond the image is cut at its edge."""
    refused = [
        (width, height, size)
        for size in (24, 28, 32, 49, 96, 128, 224)
        for width in range(1, 130)
        for height in (1, 47, width, 130)
        if read_image(np.zeros((height, width), np.uint8), Reading((1, size, size))).shape != (1, size, size)
    ]
    assert refused == []


def test_a_large_jpeg_is_decoded_at_a_fraction_of_its_size(tmp_path, monkeypatch):
    y, x = np.mgrid[0:1200, 0:1600]
    waves = np.stack([np.sin(x / 30) + np.sin(y / 50), np.cos(x / 70), np.sin((x + y) / 40)], 2)
    Image.fromarray((waves * 50 + 120).clip(0, 255).astype(np.uint8)).save(tmp_path / "x.jpg", quality=95)
    sizes = []
    real = JpegImagePlugin.JpegImageFile.load

    def watched(self):
        sizes.append(self.size)
        return real(self)

    for size, crop, decoded in [
        (64, 1.0, 150),
        (112, 1.0, 300),
        (64, 0.5, 300),
        (400, 1.0, 600),
        (500, 1, 1200),
    ]:
        whole, quick = (Reading((3, size, size), crop=crop, draft=draft) for draft in (False, True))
        expected = read_image(tmp_path / "x.jpg", whole).int()
        with monkeypatch.context() as patch:
            patch.setattr(JpegImagePlugin.JpegImageFile, "load", watched)
            sizes.clear()
            found = read_image(tmp_path / "x.jpg", quick).int()
        assert sizes[0][1] == decoded
        assert (found - expected).abs().max() <= 4
    assert Reading((3, 8, 8), draft=True).settings() == {"draft": True}
    assert reading_of((3, 8, 8), {"draft": True}) == Reading((3, 8, 8), draft=True)


def test_a_cut_jpeg_is_found_although_it_is_not_decoded_at_its_size(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (300, 400, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "whole.jpg", quality=90)
    content = (tmp_path / "whole.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(content[: int(len(content) * 0.98)])
    assert brightest(tmp_path / "whole.jpg") is None
    with pytest.raises(Mistake, match=r"cut\.jpg: is no image that can be read: .*truncated"):
        brightest(tmp_path / "cut.jpg")


@pytest.mark.parametrize("name", ["bilinear", "bicubic"])
def test_rows_are_resized_across_and_then_down_in_every_version_of_pillow(name):
    """The reference makes each pass alone over the whole image; Pillow's own order would differ by up to 60 levels here."""
    random = np.random.default_rng(3)
    filter = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}[name]
    for _ in range(200):
        height, width, to_height, to_width = (int(side) for side in random.integers(1, 70, 4))
        image = Image.fromarray((random.integers(0, 2, (height, width)) * 255).astype(np.uint8))
        crop = float(random.choice([1.0, 0.8, 0.3]))
        scale = min(width / to_width, height / to_height) * crop
        left, top = max(0.0, (width - scale * to_width) / 2), max(0.0, (height - scale * to_height) / 2)
        right, bottom = min(left + scale * to_width, width), min(top + scale * to_height, height)
        across = image.resize((to_width, height), filter, box=(left, 0, right, height))
        expected = np.asarray(across.resize((to_width, to_height), filter, box=(0, top, to_width, bottom)))
        got = np.asarray(read_image(image, Reading((1, to_height, to_width), filter=name, crop=crop))[0])
        assert abs(got.astype(int) - expected).max() <= 1  # the box's place is rounded to float32
