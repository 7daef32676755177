"""What a run's page shows of the test images, against figures counted one by one."""

import base64
import io
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from tests.making import make_run
from trainer.data.image_file import read_image
from trainer.data.reading import Reading
from trainer.distillation.teacher import Teacher
from trainer.exporting.player import answers, script_in
from trainer.networks.build import build
from trainer.packing import network as packed
from trainer.recipe.keys import TeacherKeys
from trainer.runs import evidence
from trainer.runs.evidence import _small, gather, picture
from trainer.runs.showing import some_views
from trainer.training.evaluate import normalized

pytestmark = pytest.mark.usefixtures("plots")


def test_confusion_and_disagreements_counted_one_by_one(tmp_path):
    torch.manual_seed(1)  # some teachers of no training agree with the student everywhere
    teacher = Teacher(
        [build({"model": "lenet5", "width": 2}, (1, 8, 8), 10)], [TeacherKeys(model="lenet5")], [0.5], [0.5]
    )
    run = make_run(tmp_path, {"model": "lenet5", "width": 3}, teacher=teacher, subset=60, validation=20)
    found = gather(run)
    part = run.data.test
    images, labels, _ = part.__getitems__(torch.arange(len(part)))
    with torch.no_grad():
        answers = normalized(run.student.eval(), run.data)(images.float() / 255).argmax(1)
        taught = teacher.see(images.float() / 255).logits.argmax(1)
    counts = [[0] * 10 for _ in range(10)]
    for label, answer in zip(labels.tolist(), answers.tolist()):
        counts[label][answer] += 1
    assert found["confusion"] == counts
    assert [row["right"] for row in found["per_class"]] == [counts[k][k] for k in range(10)]
    assert [row["images"] for row in found["per_class"]] == [sum(line) for line in counts]
    assert [row["answered"] for row in found["per_class"]] == [sum(column) for column in zip(*counts)]
    worst = max((counts[a][b], -a, -b) for a in range(10) for b in range(10) if a != b)
    assert found["confused"][0]["images"] == worst[0]
    apart = (answers != taught).nonzero().flatten().tolist()
    assert found["num_apart"] == len(apart) and len(found["disagreements"]) == min(12, len(apart)) > 0
    first = found["disagreements"][0]
    assert first["picture"] == picture(images[apart[0]])
    assert first["student"] == str(answers[apart[0]].item()) and first["teacher"] == str(
        taught[apart[0]].item()
    )
    assert len(found["maps"]["pictures"]) == 4 and found["account"] == []
    shown = some_views(run.data, teacher)
    assert [(one["label"], one["teacher"], one["share"]) for one in found["views"]] == [
        one[1:] for one in shown
    ]
    assert found["views"][0]["picture"] == picture(shown[0].picture) and len(shown) == 12
    assert {k for k, v in gather(run, pictures=False).items() if "data:image" in str(v)} == set()
    assert "data:image" not in str(evidence.without_pictures(found))


def test_a_view_of_many_pixels_is_shown_smaller():
    assert _small(torch.full((3, 256, 64), 9, dtype=torch.uint8)).shape == (3, 128, 32)
    small = torch.randint(256, (1, 128, 30), dtype=torch.uint8)
    assert torch.equal(_small(small), small)


def test_a_picture_is_the_images_pixels():
    for channels in (1, 3):
        image = torch.randint(256, (channels, 5, 7), dtype=torch.uint8)
        data = base64.b64decode(picture(image).removeprefix("data:image/png;base64,"))
        back = np.asarray(Image.open(io.BytesIO(data)))
        assert (back.reshape(5, 7, channels) == image.permute(1, 2, 0).numpy()).all()


class _Flat(nn.Module):
    """A network without a map."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(64, 10)

    def forward(self, images):
        return self.fc(images.flatten(1))


def test_without_maps_or_teacher(tmp_path):
    run = make_run(tmp_path, student=_Flat, subset=60, validation=20)
    found = gather(run)
    assert found["maps"] is None and found["disagreements"] == [] and len(found["confusion"]) == 10


def test_the_student_answers_in_the_page_or_it_is_said_why_not(tmp_path):
    run = make_run(tmp_path, {"model": "lenet5", "width": 2}, subset=60, validation=20)
    assert gather(run)["no_player"] == "the recipe packs no file"
    run.rows.append({"stage": "decoded", "file": "student.tiny"})
    (tmp_path / "student.tiny").write_bytes(
        packed.encode(run.student, run.student_spec, packed.facts_of(run.data))
    )
    found = gather(run)
    assert found["no_player"] is None and found["player"].count('"pixels"') == 12
    assert gather(run, pictures=False)["player"].count('"pixels"') == 0
    (tmp_path / "x.html").write_text(found["player"], encoding="utf-8")
    images = run.data.test.images.images[:20]
    with torch.no_grad():
        expected = normalized(run.student, run.data)(images.float() / 255)
    if shutil.which("node"):
        torch.testing.assert_close(
            torch.tensor(answers(script_in(tmp_path / "x.html"), images.numpy())), expected, atol=1e-5, rtol=0
        )


class _Sorted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(64, 10)

    def forward(self, images):
        return self.fc(images.flatten(1).sort(1).values)


def test_what_cannot_stand_in_a_page_is_said(tmp_path):
    run = make_run(tmp_path, student=_Sorted, subset=60, validation=20)
    run.rows.append({"stage": "decoded", "file": "student.tiny"})
    assert "sort" in evidence._players(run, None, False)[2]


def test_pictures_can_be_left_out_afterwards(tmp_path):
    """Of a page that is sent, and the student in it still answers; it holds nothing of the images."""
    run = make_run(tmp_path, {"model": "lenet5", "width": 2}, subset=60, validation=20)
    (tmp_path / "s.tiny").write_bytes(packed.encode(run.student, run.student_spec, packed.facts_of(run.data)))
    run.rows.append({"stage": "packed", "file": "s.tiny"})
    found = gather(run)
    kept = evidence.without_pictures(found)
    pixels = base64.b64encode(run.data.test.__getitems__([0])[0][0].numpy().tobytes()).decode()
    assert pixels in found["player"] and pixels not in kept["player"]
    assert "data:image" in str(found) and "data:image" not in str(kept)
    assert kept["confusion"] == found["confusion"]
    same = gather(run, pictures=False)
    assert same["player"] == kept["player"] and "data:image" not in str(same)


def test_nothing_of_a_files_exif_is_in_a_picture(tmp_path):
    exif = Image.Exif()
    exif[0x010E] = "47.3769 N, 8.5417 E"
    Image.new("RGB", (9, 9), "red").save(tmp_path / "x.jpg", exif=exif, comment=b"47.3769 N")
    assert b"47.3769" in (tmp_path / "x.jpg").read_bytes()
    shown = base64.b64decode(picture(read_image(tmp_path / "x.jpg", Reading((3, 9, 9)))).partition(",")[2])
    assert shown.startswith(b"\x89PNG") and b"47.3769" not in shown and b"eXIf" not in shown
