"""Huffman-coded gaps and codes in an ONNX file, read by standard operators when a session loads.

The codes are written in order, then the gaps: how far each non-zero number is from the one before. A gap above the largest symbol
is written as several, with code 0 between. Codes and gaps have a canonical Huffman code each. The stream is cut into rows of the same
number of symbols, each of which begins at a known bit. All rows are walked at once by pointer doubling: from the table of where the
symbol after the one at each bit begins, that of two, four, ... symbols further.
"""

from dataclasses import dataclass

import numpy as np

from trainer.exporting import huffman
from trainer.exporting.onnx_builder import FLOAT, INT32, Builder
from trainer.exporting.sparse_content import Content, Found

LONGEST = 12  # bits of a code: the decoding tables have 2 x 2^12 entries
LARGEST_GAPS = (15, 31, 63, 127, 255)  # that are tried as the largest symbol
LARGE = 1_000_000  # symbols: from there codes are of whole pairs of bits, for half the memory while loading
MOST_JUMPS = 40_000_000  # numbers in all jump tables, which are in memory together
LEVEL_BYTES = 70  # of a level's nodes in the file


def read_huffman(made: Builder, content: Content) -> Found:
    """Adds the nodes that read a content from Huffman codes."""
    if not len(content.codes) and not content.dense:
        return Found("", np.int32, "", [])  # all constants are zeros
    unit = 2 if 2 * len(content.codes) + sum(map(len, content.dense)) >= LARGE else 1
    codes, gaps, num_sparse = _alphabets(content, unit)
    parts = _read(made, codes, gaps, unit, [num_sparse, *map(len, content.dense)])
    dense = [made.add("Cast", part, to=INT32) for part in parts[1 : 1 + len(content.dense)]]
    if gaps is None:
        return Found("", np.int32, "", dense)
    places = made.add("CumSum", made.add("Cast", parts[-1], to=INT32), made.constant(0, np.int32))
    return Found(parts[0], _smallest(codes, gaps), places, dense)


@dataclass
class _Alphabet:
    """The symbols of a kind, in the order of the lengths of their codes.

    Attributes:
        symbols: int64 [n], what is to be written.
        names: int64 [k], the different symbols.
        sizes: int64 [k], the length of each one's code, ascending.
    """

    symbols: np.ndarray
    names: np.ndarray
    sizes: np.ndarray

    def __init__(self, symbols: np.ndarray, unit: int) -> None:
        names, counts = np.unique(symbols, return_counts=True)
        # A complete code, so that every window of bits begins with a symbol: some have a second code, never written.
        more = max(2 - len(names), 0)
        more += -(len(names) + more - 1) % ((1 << unit) - 1)
        names = np.concatenate([names, np.repeat(names[:1], more)])
        counts = np.concatenate([counts, np.zeros(more, np.int64)])
        sizes = huffman.lengths(counts, LONGEST, unit)
        order = np.argsort(sizes, kind="stable")
        self.symbols, self.names, self.sizes = symbols, names[order], sizes[order]

    def bits(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns the symbols as bits, uint8, and the number of bits of each."""
        where = np.zeros(self.names.max() + 1, np.int64)
        where[self.names[::-1]] = np.arange(len(self.names))[::-1]  # the shorter of two codes
        places = where[self.symbols]
        sizes = self.sizes[places]
        return huffman.bits(huffman.codes(self.sizes, LONGEST)[places], sizes, LONGEST), sizes

    def num_bytes(self) -> float:
        """Returns the bytes of the stream and of the table of symbols."""
        return len(self.bits()[0]) / 8 + 2 * len(self.names)


def _alphabets(content: Content, unit: int) -> tuple[_Alphabet, _Alphabet | None, int]:
    """Returns codes, gaps (None without zeros) and the number of codes that have a gap; with the best largest gap."""
    rest = [1 + codes for codes in content.dense]
    if not len(content.codes):
        return _Alphabet(np.concatenate(rest), unit), None, 0
    codes = 1 + content.codes
    gaps = np.diff(content.places, prepend=-1)  # from 1
    best: tuple[_Alphabet, _Alphabet, int] | None = None
    for largest in LARGEST_GAPS:
        full = (gaps - 1) // largest  # gaps that the largest symbol is written for
        where = np.repeat(np.arange(len(gaps)), full)
        all_codes = np.insert(codes, where, 0)
        all_gaps = np.insert(gaps - full * largest, where, largest)
        found = (
            _Alphabet(np.concatenate([all_codes, *rest]), unit),
            _Alphabet(all_gaps, unit),
            len(all_gaps),
        )
        if best is None or _bytes(found) < _bytes(best):
            best = found
    assert best is not None
    return best


def _smallest(codes: _Alphabet, gaps: _Alphabet | None) -> type:
    """Returns the type that holds every symbol."""
    return _holds(max(kind.names.max() for kind in (codes, gaps) if kind is not None))


def _holds(most: int) -> type:
    """Returns the smallest type that holds numbers from 0 to `most`."""
    return np.uint8 if most < 1 << 8 else np.uint16 if most < 1 << 16 else np.int32


def _bytes(found: tuple[_Alphabet, _Alphabet, int]) -> float:
    return found[0].num_bytes() + found[1].num_bytes()


def _rows(sizes: list[np.ndarray], unit: int) -> tuple[int, np.ndarray]:
    """Returns the number of symbols in a row, a power of two, and the bits of each row, for the fewest bytes."""
    num_places = sum(int(s.sum()) for s in sizes) // unit
    best: tuple[float, int, np.ndarray] | None = None
    for level in range(3, 31):
        length = 1 << level
        if best is not None and level * num_places > MOST_JUMPS:
            break
        rows = np.concatenate([np.add.reduceat(s, np.arange(0, len(s), length)) for s in sizes]) // unit
        spread = int(rows[:-1].max(initial=0) - rows[:-1].min(initial=0))
        cost = LEVEL_BYTES * level + len(rows) * np.dtype(_holds(spread)).itemsize
        if best is None or cost < best[0]:
            best = cost, length, rows
        if length >= max(map(len, sizes)):
            break
    assert best is not None
    return best[1:]


def _read(made: Builder, codes: _Alphabet, gaps: _Alphabet | None, unit: int, counts: list[int]) -> list[str]:
    """Adds the nodes that read the stream; returns the names of the codes, in parts of `counts`, and of the gaps."""
    kinds = [codes] if gaps is None else [codes, gaps]
    streams = [kind.bits() for kind in kinds]
    length, rows = _rows([sizes for _, sizes in streams], unit)
    packed = np.packbits(np.concatenate([bits for bits, _ in streams]))
    num_places = 8 // unit * len(packed)
    integer = lambda value: made.constant(value, np.int32)

    # The LONGEST bits from each bit on: of three bytes at a time, which float32 holds exactly.
    data = np.append(packed, [0, 0]).astype(np.uint8).reshape(1, 1, -1, 1)
    triples = made.add("Conv", made.add("Cast", made.constant(data), to=FLOAT), made.constant(
        np.array([65536, 256, 1], np.float32).reshape(1, 1, 3, 1)))  # fmt: skip
    shifted = made.add(
        "Div",
        made.add("Cast", triples, to=INT32),
        integer([1 << (24 - LONGEST - i) for i in range(0, 8, unit)]),
    )
    window = made.add("BitwiseAnd", shifted, integer((1 << LONGEST) - 1))
    window = made.add("Reshape", window, made.constant([-1], np.int64))
    place = made.add("Range", integer(0), integer(num_places), integer(1))
    if gaps is not None:  # the gaps have the second half of the tables
        is_code = made.add("Less", place, integer(len(streams[0][0]) // unit))
        window = made.add("Where", is_code, window, made.add("Add", window, integer(1 << LONGEST)))

    # The table of all windows: which symbol begins with it, in the order of the codes.
    sizes = np.concatenate([kind.sizes for kind in kinds])
    size = made.add("Cast", made.constant(sizes // unit, np.uint8), to=INT32)
    widths = made.add("Gather", integer([1 << (LONGEST - i) for i in range(0, LONGEST + 1, unit)]), size)
    ends = made.add("CumSum", widths, integer(0))
    every = made.add("Range", integer(0), integer(len(kinds) << LONGEST), integer(1))
    every = made.add("Unsqueeze", every, made.constant([1], np.int64))
    above = made.add("Cast", made.add("GreaterOrEqual", every, ends), to=INT32)
    symbol = made.add("ReduceSum", above, made.constant([1], np.int64), keepdims=0)

    # Where the next symbol begins, from each bit on; then the beginnings of all symbols, row by row.
    steps = made.add("Gather", made.add("Gather", size, symbol), window)
    jump = made.add("Min", made.add("Add", place, steps), integer(num_places - 1))
    least = int(rows[:-1].min(initial=0)) if len(rows) > 1 else 0
    over = rows - least
    over[-1] = 0  # nothing begins after the last row
    small = made.constant(over.reshape(-1, 1), _holds(int(over.max())))
    lengths = made.add("Add", made.add("Cast", small, to=INT32), integer(least))
    starts = made.add("CumSum", lengths, integer(0), exclusive=1)
    for level in range(length.bit_length() - 1):
        if level:
            jump = made.add("Gather", jump, jump)
        starts = made.add("Concat", starts, made.add("Gather", jump, starts), axis=1)

    names = np.concatenate([kind.names for kind in kinds])
    meaning = made.add("Gather", made.constant(names, _smallest(codes, gaps)), symbol)
    read = made.add("Gather", meaning, made.add("Gather", window, starts))
    read = made.add("Reshape", read, made.constant([-1], np.int64))
    wanted = list(counts) if gaps is not None else counts[1:]
    filling = [-len(kind.symbols) % length for kind in kinds]
    layout = wanted + [filling[0]] * bool(filling[0])
    if gaps is not None:
        layout += [len(gaps.symbols)] + [filling[1]] * bool(filling[1])
    found = made.split(read, layout)
    first = found[: len(wanted)] if gaps is not None else ["", *found[: len(wanted)]]
    return first if gaps is None else [*first, found[len(wanted) + bool(filling[0])]]
