"""A student alive in a page: its script, a board to draw on or a place to drop images, and known images with the teacher's answers."""

import base64
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from trainer.data.reading import Reading
from trainer.exporting.script import bare, inside
from trainer.exporting.subject import NotInstalled, Subject

WARM_UP, CALLS = 20, 200
TIMED = "timed inside node, whose start is not counted"
DRAWN_SIDE, DRAWN_IMAGES = 64, 200  # images of more pixels are not drawn; as many are looked at
FAINT = 16  # of 255: darker pixels are background
ANSWER = """
const images = require("fs").readFileSync(0), size = student.shape.reduce((a, b) => a * b, 1);
const found = [];
for (let at = 0; at < images.length; at += size) found.push(...student(images.subarray(at, at + size)));
process.stdout.write(Buffer.from(Float32Array.from(found).buffer));
"""
TIMES = f"""
const image = require("fs").readFileSync(0), times = [];
for (let i = 0; i < {WARM_UP + CALLS}; i++) {{
  const before = performance.now();
  student(image);
  if (i >= {WARM_UP}) times.push(performance.now() - before);
}}
process.stdout.write(Buffer.from(Float64Array.from(times).buffer));
"""


def player(subject: Subject, script: str, num_images: int) -> str:
    """Returns the piece of HTML in which a student answers; a page holds it once.

    It uses the page's CSS variables --rule, --soft and --s0.

    Args:
        subject: The student.
        script: Its script, of `script_of`.
        num_images: How many test images stand in it, with their labels and the teacher's answers; none without data.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    templates = Environment(loader=PackageLoader("trainer.exporting"), undefined=StrictUndefined)
    reading = subject.reading or Reading(subject.shape)
    ink = _ink(subject)
    return templates.get_template("player.html").render(
        script=script,
        known=inside(_known(subject, num_images)),
        reading=inside(
            {key: getattr(reading, key) for key in ("crop", "filter", "background", "fit")} | {"ink": ink}
        ),
        player=bare(templates.get_template("player.js").render()),
        drawing=ink is not None,
    )


def _ink(subject: Subject) -> float | None:
    """Returns which part of an image's side a drawing takes up; None if the images are no light strokes on black.

    It is the median of the test images; without them 28 x 28 grey pixels are taken for MNIST's, whose digits fit 20 of 28.
    """
    channels, height, width = subject.shape
    if channels != 1 or height != width or height > DRAWN_SIDE:
        return None
    if subject.data is None:
        return 20 / 28 if height == 28 else None
    part = subject.data.test
    chosen = np.linspace(0, len(part) - 1, min(DRAWN_IMAGES, len(part))).astype(int).tolist()
    images = part.__getitems__(chosen)[0][:, 0].cpu().numpy()
    if np.median(images[:, :: height - 1, :: width - 1]) > FAINT or images.mean() > 127:
        return None
    sides = []
    for image in images:
        rows, columns = np.nonzero(image > FAINT)
        if len(rows):
            sides.append(max(np.ptp(rows), np.ptp(columns)) + 1)
    return float(np.median(sides)) / height if sides else None


def _known(subject: Subject, num_images: int) -> list[dict[str, Any]]:
    if subject.data is None or not num_images:
        return []
    part = subject.data.test
    chosen = np.linspace(0, len(part) - 1, min(num_images, len(part))).astype(int).tolist()
    found = []
    for position in chosen:
        images, labels, _ = part.__getitems__([position])
        label = int(labels[0])
        teacher = None if subject.teacher_classes is None else int(subject.teacher_classes[position])
        found.append(
            {
                "pixels": base64.b64encode(images[0].cpu().numpy().tobytes()).decode(),
                "label": subject.classes[label] if label >= 0 else None,
                "teacher": None if teacher is None else subject.classes[teacher],
            }
        )
    return found


def script_in(page: Path) -> str:
    """Returns the script of the student in a page."""
    text = page.read_text(encoding="utf-8")
    return text.partition('<script id="student-script">')[2].partition("</script>")[0]


def answers(script: str, images: np.ndarray) -> np.ndarray:
    """Returns the logits [N, K] that a script's `student` gives for uint8 images [N, C, H, W], by node.

    `student.shape` is that of an image. Raises NotInstalled without node.
    """
    return np.frombuffer(_by_node(script + ANSWER, images), "<f4").reshape(len(images), -1)


def timed(script: str, image: np.ndarray) -> dict[str, float]:
    """Returns how long a script's `student` takes for a uint8 image [C, H, W] in node, as the row of an export has it."""
    seconds = np.frombuffer(_by_node(script + TIMES, image), "<f8") / 1000
    return {
        "latency_seconds": float(np.median(seconds)),
        "latency_p95_seconds": float(np.quantile(seconds, 0.95)),
    }


def _by_node(program: str, images: np.ndarray) -> bytes:
    if shutil.which("node") is None:
        raise NotInstalled("needs node: apt-get install nodejs")
    given = np.ascontiguousarray(images).tobytes()
    with tempfile.TemporaryDirectory() as aside:  # an argument would be limited to 128 KB
        file = Path(aside) / "student.js"
        file.write_text(program, encoding="utf-8")
        done = subprocess.run(["node", str(file)], input=given, capture_output=True, check=False)
    if done.returncode:
        raise RuntimeError(
            f"node could not run the page's script: {done.stderr.decode(errors='replace')[-500:]}"
        )
    return done.stdout
