"""Stores pruned and shared constants of an ONNX file compressed: standard operators make them dense when a session loads.

The constants with zeros lie one after the other in one flat tensor of codes, where code 0 is zero and code c is the constant's c-th
value. Only its non-zero codes are written, with their places; constants without zeros are codes alone. The coder that makes
the file smaller writes them: `onnx_huffman` or `onnx_rice`.

onnxruntime computes operators of constants alone when a session loads, so the graph that then runs is that of the dense file.
It does so neither for NonZero and Compress nor for anything with a subgraph.
"""

from collections.abc import Callable, Mapping

import numpy as np

from trainer.exporting.onnx_builder import FLOAT, INT32, Builder
from trainer.exporting.onnx_huffman import read_huffman
from trainer.exporting.onnx_rice import read_rice
from trainer.exporting.shared_values import SharedValues, shared_values
from trainer.exporting.sparse_content import Content, Found

FEW_ZEROS = 0.5  # of a constant's numbers: with more that are not zero, zero is a value like others
LEAST = 64  # numbers of a constant that is worth its nodes
Coder = Callable[[Builder, Content], Found]
CODERS: tuple[Coder, ...] = (read_huffman, read_rice)


def compress(made: Builder) -> int:
    """Replaces constants by nodes that compute them, bit for bit and before all others; returns how many."""
    chosen = {}
    for name, array in made.constants.items():
        shared = _shared(array)
        if shared is not None:
            chosen[name] = shared
    if chosen:
        trials = [made.fork(without=chosen) for _ in CODERS]
        for trial, coder in zip(trials, CODERS, strict=True):
            _write(trial, chosen, coder)
        made.adopt(min(trials, key=Builder.num_bytes))
    return len(chosen)


def _shared(array: np.ndarray) -> SharedValues | None:
    """Returns a constant as shared values where they are smaller than itself."""
    if array.dtype != np.float32 or array.size < LEAST:
        return None
    found = shared_values(array, zero_is_a_value=bool(np.count_nonzero(array) > FEW_ZEROS * array.size))
    if found is None or 1.5 * len(found.codes) + 4 * len(found.values) + LEAST > 4 * array.size:
        return None
    return found


def _write(made: Builder, chosen: Mapping[str, SharedValues], coder: Coder) -> None:
    """Adds the nodes that compute all constants in `chosen`."""
    codes, books = {}, {}
    for name, shared in chosen.items():
        counts = np.bincount(shared.codes, minlength=len(shared.values))
        order = np.argsort(-counts, kind="stable")  # codes of all constants have much the same counts then
        rank = np.empty(len(order), np.int64)
        rank[order] = np.arange(len(order))
        codes[name] = rank[shared.codes]
        books[name] = np.concatenate([np.zeros(1, np.float32), shared.values[order]])
    sparse = {name: shared.positions for name, shared in chosen.items() if shared.positions is not None}
    dense = [name for name in chosen if name not in sparse]
    numels = [int(np.prod(chosen[name].shape)) for name in sparse]
    bases = np.cumsum([0, *numels])
    none = [np.zeros(0, np.int64)]
    content = Content(
        np.concatenate([codes[name] for name in sparse] or none),
        np.concatenate([base + places for base, places in zip(bases, sparse.values(), strict=False)] or none),
        [codes[name] for name in dense],
    )
    found = coder(made, content)
    pieces = dict(zip(dense, found.dense, strict=True))
    if sparse:
        kind = found.kind if found.codes else np.int32  # without codes all are zero
        zero: np.ndarray = np.zeros(1, kind)  # of few bytes, while loading
        flat = made.add("ConstantOfShape", made.constant([1 + sum(numels)], np.int64), value=zero)
        if found.codes:
            flat = made.add("ScatterElements", flat, found.places, found.codes)
        if kind is not np.int32:
            flat = made.add("Cast", flat, to=INT32)
        pieces |= dict(zip(sparse, made.split(flat, [1, *numels])[1:], strict=True))  # places count from 1
    tables = _books(made, [books[name] for name in chosen])
    for name, table in zip(chosen, tables, strict=True):
        shape, piece = chosen[name].shape, pieces[name]
        if len(shape) != 1:
            piece = made.add("Reshape", piece, made.constant(shape, np.int64))
        made.add("Gather", table, piece, outputs=name)


def _books(made: Builder, books: list[np.ndarray]) -> list[str]:
    """Returns the names of the constants' values, which are written together, as float16 where that holds them."""
    whole = np.concatenate(books)
    with np.errstate(over="ignore"):
        half = whole.astype(np.float16)
    if np.array_equal(half.astype(np.float32).view(np.uint32), whole.view(np.uint32)):
        stored = made.add("Cast", made.constant(half), to=FLOAT)
    else:
        stored = made.constant(whole)
    return made.split(stored, [len(book) for book in books])
