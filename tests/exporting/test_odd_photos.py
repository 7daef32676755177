"""500 odd photos (all modes, sizes, formats, orientations): each export is given the same pixels, and says the same class."""

import pytest
import torch
from torch import nn

import trainer
from tests.data.test_image_file import odd_photos
from trainer.datasets.image_folder import image_folder
from trainer.exporting.export import subject_of
from trainer.exporting.subject import NotInstalled
from trainer.packing import network as packed
from trainer.recipe import shelves
from trainer.runs.answering import open_student
from trainer.runs.predicting import answers

EXACT = [name for name in shelves.names("to") if not shelves.beside(shelves.find("to", name), "NEEDS_DATA")]


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 5, stride=3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 2)).eval()


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """The folder, the photos' source (turned, cut, resized), and the classes that the packed network says."""
    folder = tmp_path_factory.mktemp("odd")
    odd_photos(folder / "photos" / "test", 500)
    odd_photos(folder / "photos" / "train", 16)
    source = image_folder(folder=folder / "photos", size=20, crop=0.8)
    facts = {
        "shape": [3, 20, 20], "mean": list(source.mean), "std": list(source.std), "classes": source.classes,
        "reading": source.reading.settings(),
    }  # fmt: skip
    (folder / "net.tiny").write_bytes(packed.encode(network(), None, facts))
    said = trainer.load(folder / "net.tiny", into=network()).predict(source.test.files)
    assert 50 < said.count("a") < 450
    return folder, source, said


@pytest.mark.parametrize("name", EXACT)
def test_every_export_says_the_class_of_the_packed_file(name, photos, tmp_path):
    _, source, said = photos
    subject = subject_of(
        network(),
        (3, 20, 20),
        mean=source.mean,
        std=source.std,
        classes=source.classes,
        reading=source.reading,
    )
    try:
        made = shelves.find("to", name)(subject, tmp_path)
    except NotInstalled as error:
        pytest.skip(str(error))
    images, _ = source.test.__getitems__(list(range(500)))
    images = images.numpy()
    given = images if made.takes == "uint8" else subject.normalized(images)
    got = [
        source.classes[k]
        for start in range(0, 500, made.batch)
        for k in made.run(given[start : start + made.batch]).argmax(1)
    ]
    assert got == said
    if name == "onnx":  # which `predict` opens by itself, from the metadata alone
        found = answers(open_student(tmp_path / made.files[0].name), source.test.files, 1, 2)
        assert [one.classes[0][0] for one in found] == said
