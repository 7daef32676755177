"""What a packed file says of its network and images. Nothing here needs torch."""

import math
from collections.abc import Mapping
from numbers import Real
from typing import Any

from trainer.data.reading import Reading, reading_of, reading_of_version_1
from trainer.mistakes import Mistake
from trainer.packing import container

MAX_CLASSES = (
    2**20
)  # of classes that are stored as their number; names need no limit, since they make the file larger
MAX_PIXELS = 2**26  # numbers of an input: 3 x 4,700 x 4,700
# Of float32, in which images are normalized. (An integer of JSON may be larger than any float.)
SMALLEST, LARGEST = 2.0**-126, 3.4e38
# Models that build what a name says, which stands in the model's own (timm/resnet18): by another key it could be any code.
NEED_A_NAME = {"python", "timm"}
MAX_SETTINGS = 2**20  # sum of the numbers in a network's settings: depths, widths, sides


def compact(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Replaces class names '0', '1', ... by their number, and leaves out the default reading."""
    classes = facts["classes"]
    found = {
        **facts,
        "classes": len(classes) if classes == [str(i) for i in range(len(classes))] else classes,
    }
    if not found.get("reading"):
        found.pop("reading", None)
    return found


def full(header: Mapping[str, Any]) -> dict[str, Any]:
    classes = header["classes"]
    names = [str(i) for i in range(classes)] if isinstance(classes, int) else classes
    return {**header, "classes": names, "reading": header.get("reading", {})}


def rebuilds(header: Mapping[str, Any]) -> bool:
    """Returns whether the program itself can build a file's network: from the models shelf or from timm.

    Opening a file must not run code that it names (`python:module:function`), nor download anything: the reader must
    bring such a network.
    """
    net = header.get("net")
    if net is None or net.get("pretrained") or net["model"] in NEED_A_NAME:
        return False
    # A colon anywhere: timm too has names that it downloads, such as timm/hf-hub:NAME.
    return ":" not in net["model"]


def check(header: Any) -> None:
    """Raises Mistake unless a header holds what `encode` writes: anyone may have made the file."""

    def numbers(key: str, kind: type) -> bool:
        values = header.get(key)
        return isinstance(values, list | tuple) and all(
            isinstance(v, kind) and not isinstance(v, bool) for v in values
        )

    if not isinstance(header, Mapping):
        raise Mistake("its header is not that of a packed network: it is no dict")
    wrong = []
    net, classes = header.get("net"), header.get("classes")
    if net is not None and not (isinstance(net, Mapping) and isinstance(net.get("model"), str)):
        wrong.append("net names no model")
    elif net is not None and not isinstance(net.get("output", 0), int | str):
        wrong.append("net's output is neither a number nor a name")
    if not numbers("shape", int) or len(header["shape"]) not in (0, 3) or min(header["shape"], default=1) < 1:
        wrong.append("shape is not channels, height and width")
    elif math.prod(header["shape"]) > MAX_PIXELS:
        wrong.append(f"shape is of more than {MAX_PIXELS:,} numbers")
    elif net is not None and not header["shape"]:
        wrong.append("shape is missing")
    if not (numbers("mean", Real) and numbers("std", Real)):
        wrong.append("mean and std are not numbers")
    elif not all(abs(v) <= LARGEST for v in header["mean"]) or not all(
        SMALLEST <= v <= LARGEST for v in header["std"]
    ):
        wrong.append("mean and std are not finite in float32, or a std is not above 0")
    elif not wrong and {len(header["mean"]), len(header["std"])} - {0} not in (set(), {*header["shape"][:1]}):
        wrong.append("mean and std have not one value for each channel")
    if isinstance(classes, list):
        if not all(isinstance(name, str) for name in classes):
            wrong.append("classes are not names")
    elif isinstance(classes, bool) or not isinstance(classes, int) or not 0 <= classes <= MAX_CLASSES:
        wrong.append(f"classes are neither names nor a number up to {MAX_CLASSES:,}")
    if not wrong and header.get("reading") is not None:
        try:
            reading_of(header["shape"], header["reading"])
        except Mistake as error:
            wrong.append(str(error))
    if wrong:
        raise Mistake(f"its header is not that of a packed network: {'; '.join(wrong)}")


def read_header(data: bytes, name: str) -> dict[str, Any]:
    header = container.read_header(data, name)
    try:
        check(header)
    except Mistake as error:
        raise Mistake(f"{name}: {error}") from None
    return header


def note(data: bytes, name: str = "file") -> str | None:
    """Returns what the user is to know of how a packed file's images are read, None for nothing."""
    if data[2] > 1:
        return None
    return f"{name}: of format version 1: images are resized bilinearly and then cut, as that version did"


def reading(data: bytes, name: str = "file") -> Reading:
    """Returns how images are brought to the input of a packed file's network. Raises Mistake if the file does not say."""
    found = header(data, name)
    if not found["shape"] or not found["mean"]:
        raise Mistake(
            f"{name}: was packed without shape, mean and std: what its images are like is not known"
        )
    if data[2] == 1:
        return reading_of_version_1(tuple(found["shape"]))
    return reading_of(tuple(found["shape"]), found["reading"])


def header(data: bytes, name: str = "file") -> dict[str, Any]:
    """Returns the facts of a packed file, and the spec of its network under "net".

    Raises Mistake, with the file's name, for damaged data.
    """
    return full(read_header(data, name))


def _sum_of_numbers(value: Any) -> float:
    """Returns the sum of the absolute values of all numbers in a value of JSON's types."""
    if isinstance(value, Mapping):
        return sum(_sum_of_numbers(item) for item in value.values())
    if isinstance(value, list | tuple):
        return sum(_sum_of_numbers(item) for item in value)
    # An integer of JSON may be too large for a float.
    return float(min(abs(value), 2**64)) if isinstance(value, int | float) else 0.0


def check_settings(header: Mapping[str, Any]) -> None:
    """Raises Mistake for settings of a network so large that building it would take for ever."""
    most = _sum_of_numbers({key: value for key, value in header["net"].items() if key != "resized"})
    if not most <= MAX_SETTINGS:
        raise Mistake(f"the network's settings add up to {most:.3g}; at most {MAX_SETTINGS:,} are allowed")
