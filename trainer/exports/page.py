"""One HTML file with the student alive inside."""

from pathlib import Path
from typing import Any

from pydantic import NonNegativeInt

from trainer.exporting.graph import Graph, check_sequences
from trainer.exporting.player import TIMED, answers, player, script_in, timed
from trainer.exporting.script import LINES, script_of
from trainer.exporting.subject import Exported, Subject

OPS = frozenset(LINES)


def check_graph(settings: Any, graph: Graph) -> None:
    """Raises Mistake for a layer that cannot be written."""
    check_sequences(graph, "page")


def page(subject: Subject, folder: Path, *, images: NonNegativeInt = 10) -> Exported:
    """Writes student.html: open it anywhere, without a network; the student answers what is drawn or dropped.

    images: how many test images stand in it, beside the teacher's answers; none without a recipe.
    The weights are compressed inside, and a script of plain JavaScript with the network's operators alone runs them. The page
    checks itself when it is opened.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    templates = Environment(loader=PackageLoader("trainer.exporting"), undefined=StrictUndefined)
    template = templates.get_template("page.html")
    script = script_of(subject)
    bare, whole = (player(subject, script, number) for number in (0, images))
    file = folder / "student.html"
    size = len(template.render(player=bare, num_bytes=0, title="").encode())
    title = f"A student of {size:,} bytes, script and weights"
    file.write_text(template.render(player=whole, num_bytes=f"{size:,}", title=title), encoding="utf-8")
    written = script_in(file)
    shows = bool(images) and subject.data is not None
    with_images = f"; {file.stat().st_size:,} with the test images" if shows else ""
    return Exported(
        [file],
        lambda pixels: answers(written, pixels),
        num_bytes=size,
        takes="uint8",
        batch=1000,
        shows_images=shows,
        numbers=timed(written, subject.test_vector()[0]),
        notes=[
            f"{size:,} bytes, of which {len(script.encode()):,} are the student and its script{with_images}",
            TIMED,
        ],
    )
