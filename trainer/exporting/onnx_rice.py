"""Rice-coded gaps and codes of a fixed width in an ONNX file, read by standard operators when a session loads.

A gap is its lowest bits as they are, and the rest in unary: so many zeros and a one (Rice & Plaunt 1971). The ones are found by
TopK: the i-th of them has as many zeros before it as all gaps up to it have in their higher parts. Codes are numbers of as few bits as
the largest needs. Longer than Huffman's codes, with a tenth of their tables and nodes.
"""

import numpy as np

from trainer.exporting.onnx_builder import INT32, Builder
from trainer.exporting.sparse_content import Content, Found


def read_rice(made: Builder, content: Content) -> Found:
    """Adds the nodes that read a content from Rice codes."""
    if not len(content.codes) and not content.dense:
        return Found("", np.int32, "", [])  # all constants are zeros
    num, parts = len(content.codes), []
    if num:
        gaps = np.diff(content.places, prepend=-1) - 1
        lows = min(range(1, 16), key=lambda bits: num * bits + int((gaps >> bits).sum()))
        high = gaps >> lows
        unary = np.zeros(int(high.sum()) + num, np.uint8)
        unary[np.cumsum(high + 1) - 1] = 1
        parts += [
            unary,
            _planes(gaps & ((1 << lows) - 1), lows),
            _planes(content.codes, _width(content.codes)),
        ]
    parts += [_planes(codes, _width(codes)) for codes in content.dense]
    bits = iter(_bits(made, parts))

    def number(width: int, count: int) -> str:
        """Returns numbers that are written as `width` planes of bits."""
        planes = made.add("Reshape", next(bits), made.constant([width, count], np.int64))
        powers = made.constant([1 << place for place in range(width - 1, -1, -1)], np.int32)
        return made.add("MatMul", powers, planes)

    one = made.constant(1, np.int32)
    codes = places = ""
    if num:
        _, ones = made.add("TopK", next(bits), made.constant([num], np.int64), outputs=2)
        high_part = made.add("Mul", made.add("Cast", ones, to=INT32), made.constant(1 << lows, np.int32))
        # Less the ones among those bits, and counted from 1.
        step = 1 - (1 << lows)
        counted = made.add(
            "Range", one, made.constant(1 + num * step, np.int32), made.constant(step, np.int32)
        )
        low_part = made.add("CumSum", number(lows, num), made.constant(0, np.int32))
        places = made.add("Add", made.add("Add", high_part, counted), low_part)
        codes = made.add("Add", number(_width(content.codes), num), one)
    dense = [made.add("Add", number(_width(array), len(array)), one) for array in content.dense]
    return Found(codes, np.int32, places, dense)


def _width(codes: np.ndarray) -> int:
    return max(1, int(codes.max()).bit_length())


def _planes(numbers: np.ndarray, width: int) -> np.ndarray:
    """Returns the bits of numbers, the highest of all first."""
    return ((numbers[None] >> np.arange(width - 1, -1, -1)[:, None]) & 1).astype(np.uint8).reshape(-1)


def _bits(made: Builder, parts: list[np.ndarray]) -> list[str]:
    """Writes bits together; returns the names of the parts, int32."""
    packed = np.packbits(np.concatenate(parts))
    shifted = made.add(
        "Div",
        made.add("Cast", made.constant(packed.reshape(-1, 1)), to=INT32),
        made.constant([1 << place for place in range(7, -1, -1)], np.int32),
    )
    flat = made.add(
        "Reshape", made.add("BitwiseAnd", shifted, made.constant(1, np.int32)), made.constant([-1], np.int64)
    )
    sizes = [len(part) for part in parts]
    return made.split(flat, sizes + [rest] if (rest := 8 * len(packed) - sum(sizes)) else sizes)
