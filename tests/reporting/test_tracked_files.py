"""What of a finished run is sent beside its log: never an image of the data unasked."""

import json

import pytest

from tests.reporting.test_report import a_report, row
from trainer.reporting.report import TRACKED
from trainer.reporting.tracked_files import media, send_artifacts, tags

pytestmark = pytest.mark.usefixtures("plots")


class Wandb:
    """A stand-in that keeps what it is given."""

    Image = staticmethod(lambda path: ("image", path.rpartition("/")[2]))
    Html = staticmethod(lambda text, inject: ("page", text))

    class Artifact:
        def __init__(self, name, type):
            self.name, self.type, self.files = name, type, []

        def add_file(self, path, name):
            self.files.append(name)

    def __init__(self):
        self.sent = []

    def log_artifact(self, artifact):
        self.sent.append(artifact)


@pytest.fixture
def folder(tmp_path):
    exports = [
        {"target": "onnx", "folder": "export", "files": ["student.onnx"], "shows_images": False},
        {"target": "page", "folder": "export", "files": ["student.html"], "shows_images": True},
        {"target": "c", "folder": "export", "files": ["student.c", "student.h"]},  # of an older report
    ]
    rows = [row("decoded", 97.0, 900, file="student.tiny")]
    rows += [row(entry["target"], 97.0, 900, **entry) for entry in exports]
    (tmp_path / "report.json").write_text(json.dumps(a_report(rows=rows)))
    names = ["student.tiny", "report.md", "report.html", TRACKED, "weights.png", "recipe.yaml"]
    names += [
        "export/onnx/student.onnx",
        "export/page/student.html",
        "export/c/student.c",
        "export/c/student.h",
    ]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    return tmp_path


def sent(folder, **config):
    wandb = Wandb()
    unsent = send_artifacts(wandb, wandb, folder, {"name": "n", **config})
    student, report = wandb.sent
    assert (student.name, student.type, report.name) == ("n-student", "model", "n-report")
    return student.files, report.files, unsent


def test_no_image_of_the_data_is_sent_unasked(folder):
    student, report, unsent = sent(folder)
    assert student == ["student.tiny", "export/onnx/student.onnx"]
    assert report == ["recipe.yaml", "report.json", "report.md", "weights.png", TRACKED]
    assert [line.partition(" is not sent")[0] for line in unsent] == [
        str(folder / "export/page"),
        str(folder / "export/c"),
    ]
    shown = media(Wandb(), folder, {})
    assert shown == {"plots/weights": ("image", "weights.png"), "page": ("page", TRACKED)}


def test_all_is_sent_when_it_may(folder):
    student, report, unsent = sent(folder, track_images=True)
    assert len(student) == 5 and report[-1] == "report.html" and unsent == []
    assert media(Wandb(), folder, {"track_images": True})["page"] == ("page", "report.html")


def test_a_page_with_images_alone_is_not_sent_and_one_without_is(folder):
    (folder / TRACKED).unlink()
    student, report, unsent = sent(folder)
    assert "report.html" not in report and unsent[0].startswith(f"{folder / 'report.html'} is not sent")
    assert "track_images: true" in unsent[0] and "page" not in media(Wandb(), folder, {})
    assert sent(folder, report_images=False)[1][-1] == "report.html"


def test_tags():
    recipe = {
        "data": {"dataset": "digits"},
        "teachers": [{"model": "timm/" + "x" * 80}, {"model": "lenet5"}],
        "student": {"model": "lenet5"},
        "stages": [{"stage": "distill"}, {"stage": "prune"}, {"stage": "distill"}],
    }
    assert tags(recipe) == ["digits", "lenet5", "timm/" + "x" * 59, "distill", "prune"]
    assert tags({}) == []
