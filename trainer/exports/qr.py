"""The packed file, or a page in which the student answers, as a picture: one QR code."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trainer.exporting.graph import Graph
from trainer.exporting.installed import NotInstalled, needed
from trainer.exporting.player import TIMED, answers, timed
from trainer.exporting.qr_page import ADDRESS, MOST_BYTES, address_of, layers_of, page_of, script_of
from trainer.exporting.subject import Exported, Subject
from trainer.mistakes import Mistake
from trainer.packing import network as packed

PIXELS, MARGIN = 4, 4  # of a module in the .png; modules around the code, which the standard asks for


def check_graph(settings: Any, graph: Graph) -> None:
    """Raises Mistake for a layer that the page's small script does not have."""
    if settings.page:
        layers_of(graph)


def check_subject(settings: Any, subject: Subject) -> None:
    """Raises Mistake for what is too large for any QR code."""
    what = "the page" if settings.page else "the packed file"
    size = len(address_of(page_of(subject)) if settings.page else _content(subject))
    if size > MOST_BYTES:
        raise Mistake(f"to qr: {what} has {size:,} bytes; one QR code holds at most {MOST_BYTES:,}")


def qr(subject: Subject, folder: Path, *, page: bool = False) -> Exported:
    """Writes student.svg and student.png, a QR code whose bytes are the file student.tiny; at most 2,953 bytes.

    page: whether the code holds an address (data:text/html,...) that is the whole page instead: script, weights, and a canvas to
    draw on. Any reader of QR codes gives it back as text, a browser opens it, without a network. It is student.html too, and
    its answers are those of its script in node. The script has convolutions, linear layers, ReLU, pooling, the mean and sums,
    for images of one channel; a stage `fold` takes BatchNorm away, and evenly spaced or few values make the weights short.

    A reader of QR codes that gives bytes, not text, gives back the file. The package zxing-cpp is one: with it the code is read
    from the picture here, the bytes must be the file's, and what they hold answers. Without it this is not
    tried, which is said. The error correction is the highest that needs no larger code.
    A network without a packed file is packed for this.
    """
    segno = needed("segno", "qr")
    html = page_of(subject) if page else ""
    content = address_of(html) if page else _content(subject)
    code = segno.make_qr(content, error="l", mode="byte")
    files = [folder / "student.svg", folder / "student.png"]
    code.save(str(files[0]), border=MARGIN, light="#fff")
    code.save(str(files[1]), border=MARGIN, scale=PIXELS)
    side = code.symbol_size(border=0)[0]
    what = "the page, as an address for a browser" if page else "the file"
    notes = [
        f"a code of {side} x {side} modules (version {code.designator}) with the {len(content):,} bytes of {what}"
    ]
    try:
        read = bytes_of(files[1])
    except NotInstalled as error:
        notes.append(
            f"not read back from the picture, the answers are those of {what.partition(',')[0]}: {error}"
        )
        read = content
    if read != content:
        raise RuntimeError(
            f"export to qr: the picture reads as {len(read):,} other bytes than it was made of"
        )
    if page:
        files.append(folder / "student.html")
        files[-1].write_bytes(read.removeprefix(ADDRESS.encode()))
        script = script_of(read.decode(), subject.shape)
        return Exported(
            files,
            lambda pixels: answers(script, pixels),
            num_bytes=len(content),
            takes="uint8",
            batch=1000,
            numbers=timed(script, subject.test_vector()[0]),
            notes=[*notes, TIMED],
        )
    return Exported(files, _answering(read, subject), num_bytes=len(content), notes=notes)


def _answering(content: bytes, subject: Subject) -> Callable[[np.ndarray], np.ndarray]:
    """Returns how the network in a packed file answers."""
    header = packed.header(content)
    network, _ = packed.decode(
        content, "the QR code", None if packed.rebuilds(header) else copy.deepcopy(subject.network)
    )

    def run(images: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return network(torch.from_numpy(images)).numpy()

    return run


def bytes_of(picture: Path) -> bytes:
    """Returns the bytes of the QR code in a picture. Raises NotInstalled without zxing-cpp, RuntimeError without one code."""
    from PIL import Image

    zxingcpp = needed("zxingcpp", "qr", "zxing-cpp")
    with Image.open(picture) as image:
        found = zxingcpp.read_barcodes(image)
    if len(found) != 1:
        raise RuntimeError(f"{picture.name}: {len(found)} codes are read from it, where there is one")
    return found[0].bytes


def _content(subject: Subject) -> bytes:
    """Returns the packed file."""
    if subject.packed is not None:
        return subject.packed
    facts = {"shape": subject.shape, "mean": subject.mean, "std": subject.std, "classes": subject.classes}
    reading = {} if subject.reading is None else subject.reading.settings()
    return packed.encode(
        subject.network, None, {**{key: list(value) for key, value in facts.items()}, "reading": reading}
    )
