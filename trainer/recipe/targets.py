"""The keys of an export's targets."""

from typing import TYPE_CHECKING, Annotated

from pydantic import AfterValidator, BeforeValidator, Field

from trainer.mistakes import Mistake
from trainer.recipe import shelves
from trainer.recipe.faults import Entry


class ExportKeys(Entry):
    """One target of an export.

    Attributes:
        to: A file of the exports shelf, or `python:module:function`.
        folder: Name of the folder that its files are in; the target's own name by default.

    Acted on by `exporting.export`.
    """

    to: str
    folder: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=100)] | None = None

    @property
    def label(self) -> str:
        """The name of the target's folder and row: of `python:module:name` the last part."""
        return self.folder or self.to.rpartition(":")[2]


if TYPE_CHECKING:
    Target = ExportKeys
else:
    Target = Annotated[
        shelves.from_shelf("to", ExportKeys),
        BeforeValidator(lambda given: {"to": given} if isinstance(given, str) else given),
    ]


def _told_apart(targets: list[ExportKeys]) -> list[ExportKeys]:
    labels = [target.label for target in targets]
    for label in labels:
        if labels.count(label) > 1:
            raise Mistake(f"{label!r} is given twice; a folder of its own tells one from the other")
    return targets


# What an export writes: names, or mappings with the key `to` and the target's settings.
Targets = Annotated[list[Target], Field(min_length=1), AfterValidator(_told_apart)]
