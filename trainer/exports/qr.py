"""The packed file as a picture: one QR code."""

import copy
from pathlib import Path

import numpy as np
import torch

from trainer.exporting.installed import NotInstalled, needed
from trainer.exporting.subject import Exported, Subject
from trainer.mistakes import Mistake
from trainer.packing import network as packed

MOST_BYTES = 2953  # of the largest code, version 40, at its lowest level of error correction
PIXELS, MARGIN = 4, 4  # of a module in the .png; modules around the code, which the standard asks for


def check_subject(subject: Subject) -> None:
    """Raises Mistake for a file that is too large for any QR code."""
    size = len(_content(subject))
    if size > MOST_BYTES:
        raise Mistake(f"to qr: the packed file has {size:,} bytes; one QR code holds at most {MOST_BYTES:,}")


def qr(subject: Subject, folder: Path) -> Exported:
    """Writes student.svg and student.png, a QR code whose bytes are the file student.tiny; at most 2,953 bytes.

    A reader of QR codes that gives bytes, not text, gives back the file. The package zxing-cpp is one: with it the code is read
    from the picture here, the bytes must be the file's, and the network that they hold answers. Without it this is not
    tried, which is said. The error correction is the highest that needs no larger code.
    A network without a packed file is packed for this.
    """
    segno = needed("segno", "qr")
    content = _content(subject)
    code = segno.make_qr(content, error="l", mode="byte")
    files = [folder / "student.svg", folder / "student.png"]
    code.save(str(files[0]), border=MARGIN, light="#fff")
    code.save(str(files[1]), border=MARGIN, scale=PIXELS)
    side = code.symbol_size(border=0)[0]
    notes = [
        f"a code of {side} x {side} modules (version {code.designator}) with the {len(content):,} bytes of the file"
    ]
    try:
        read = bytes_of(files[1])
    except NotInstalled as error:
        notes.append(f"not read back from the picture, the answers are those of the file: {error}")
        read = content
    if read != content:
        raise RuntimeError(f"export to qr: the picture reads as {len(read):,} other bytes than the file's")
    header = packed.header(read)
    network, _ = packed.decode(
        read, "the QR code", None if packed.rebuilds(header) else copy.deepcopy(subject.network)
    )

    def run(images: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return network(torch.from_numpy(images)).numpy()

    return Exported(files, run, num_bytes=len(content), notes=notes)


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
