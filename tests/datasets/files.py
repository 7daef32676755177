"""Files in the formats of the data sets, small and made up: `small_NAME` for each that does not come with a library.

It puts what NAME reads where NAME looks for it, and gives the keys to call it with.
"""

import io
import json
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from trainer.data.images import Source


def assert_is_a_source(source, num_train, num_test):
    """What every dataset file owes the program."""
    assert isinstance(source, Source)
    assert (len(source.train), len(source.test)) == (num_train, num_test)
    assert len(source.mean) == len(source.std) == source.shape[0]
    assert all(isinstance(value, float) for value in source.mean + source.std)
    assert len(set(source.classes)) == len(source.classes) > 1
    for part in (source.train, source.test):
        assert part.labels.dtype == torch.int64 and part.labels.shape == (len(part),)
        assert part.labels.min() >= -1 and part.labels.max() < len(source.classes)
        images, labels = part.__getitems__([len(part) - 1, 0])
        assert images.dtype == torch.uint8 and images.shape == (2, *source.shape)
        assert torch.equal(labels, part.labels[[len(part) - 1, 0]])


def idx(array):
    header = b"\0\0\x08" + bytes([array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    return header + array.tobytes()


def tar(members):
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        for name, data in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return packed.getvalue()


def save(path, colour, size=(20, 20)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def small_mnist(put, folder, name="mnist"):
    draw = np.random.default_rng(0)
    files = {}
    for part in ("train", "t10k"):
        files[f"{part}-images-idx3-ubyte"] = idx(draw.integers(0, 256, (12, 28, 28), np.uint8))
        files[f"{part}-labels-idx1-ubyte"] = idx(np.arange(12, dtype=np.uint8) % 10)
    put(name, files)
    return {}


def small_fashion_mnist(put, folder):
    return small_mnist(put, folder, "fashion_mnist")


def small_cifar10(put, folder):
    draw, inside = np.random.default_rng(0), "cifar-10-batches-bin"
    names = [f"data_batch_{part}.bin" for part in range(1, 6)] + ["test_batch.bin"]
    members = {f"{inside}/{name}": draw.integers(0, 10, (4, 3073), np.uint8).tobytes() for name in names}
    members[f"{inside}/batches.meta.txt"] = "\n".join([*"abcdefghij", ""]).encode()
    put("cifar10", {"cifar-10-binary.tar.gz": tar(members)})
    return {}


def small_cifar100(put, folder):
    draw, inside = np.random.default_rng(0), "cifar-100-binary"
    members = {
        f"{inside}/{name}.bin": draw.integers(0, 100, (6, 3074), np.uint8).tobytes()
        for name in ("train", "test")
    }
    members[f"{inside}/fine_label_names.txt"] = "\n".join(f"kind {number}" for number in range(100)).encode()
    put("cifar100", {"cifar-100-binary.tar.gz": tar(members)})
    return {}


def wheel(members):
    """A wheel, which is a zip archive, with these files in it."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return packed.getvalue()


ELPV = [(p, kind) for p in ("0.0", "1.0") for kind in ("mono", "poly") for _ in range(5)]
ELPV += [("0.3333333333333333", "mono"), ("0.6666666666666666", "poly")]


def small_elpv(put, folder):
    """Five cells of each class and kind, two doubtful ones; the grey value tells the cell."""
    members, lines = {}, []
    for number, (probability, kind) in enumerate(ELPV):
        picture = io.BytesIO()
        Image.new("L", (30, 30), 10 * number).save(picture, "PNG")
        members[f"elpv_dataset/data/images/cell{number:04d}.png"] = picture.getvalue()
        lines.append(f"images/cell{number:04d}.png  {probability:19} {kind}")
    members["elpv_dataset/data/labels.csv"] = "\n".join([*lines, ""]).encode()
    put("elpv", {"elpv_dataset-1.0.0.post1-py3-none-any.whl": wheel(members)})
    return {"size": 16}


def emoji_files():
    """A sheet of two drawings and the table: two categories of five and four emoji, a component, one skin variant each.

    The red value tells the cell, the green one the drawing; the lower half of each is transparent.
    """
    table, cells = [], []
    for number in range(10):
        category, kind = ("Food", "fruit") if number < 5 else ("Flags", "flag" if number < 8 else "pennant")
        category = "Component" if number == 9 else category
        entry = {"category": category, "subcategory": kind}
        for key in (entry, variant := {}):
            key |= {"sheet_x": len(cells) % 5, "sheet_y": len(cells) // 5}
            cells.append(len(cells))
        table.append(entry | ({"skin_variations": {"1F3FB": variant}} if number % 2 else {}))
    files = {"emoji.json": json.dumps(table).encode()}
    for green, drawing in ((100, "google"), (200, "twitter")):
        pixels = np.zeros((4 * 66, 5 * 66, 4), np.uint8)
        for cell in cells:
            top, left = cell // 5 * 66 + 1, cell % 5 * 66 + 1
            pixels[top : top + 32, left : left + 64] = (10 * cell, green, 0, 255)
        sheet = io.BytesIO()
        Image.fromarray(pixels).save(sheet, "PNG")
        files[f"{drawing}.png"] = sheet.getvalue()
    return files


def small_emoji(put, folder):
    put("emoji", emoji_files())
    return {"size": 16}


def shard(path, pictures):
    """A .tar file of {name: (picture's bytes, class or None)}."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, (data, label) in pictures.items():
            members = {f"{name}.png": data} | ({} if label is None else {f"{name}.cls": str(label).encode()})
            for member, content in members.items():
                entry = tarfile.TarInfo(member)
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))


def png(colour, size=(20, 20)):
    data = io.BytesIO()
    Image.new("RGB", size, colour).save(data, "PNG")
    return data.getvalue()


def small_web_dataset(put, folder):
    for part, shards in (("train", 2), ("test", 1)):
        for number in range(shards):
            pictures = {f"{i:03d}": (png((40 * i, 90 * number, 7)), i % 3) for i in range(6)}
            shard(folder / f"{part}-{number}.tar", pictures)
    return {"train": folder / "train-*.tar", "test": folder / "test-0.tar", "size": 8}


def small_hugging_face(put, folder):
    pytest.importorskip("datasets")
    return {"name": str(small_image_folder(put, folder)["folder"]), "size": 8}


def small_image_folder(put, folder):
    for part in ("train", "test"):
        for number, name in enumerate(("cat", "dog", "cow")):
            for file in range(2):
                save(folder / part / name / f"{file}.png", (40 * number, 9 * file, 100))
    return {"folder": folder, "size": 8}
