"""Collects the nodes and constants of an ONNX graph."""

import copy
from collections import Counter
from collections.abc import Collection, Iterator
from itertools import count, product
from typing import Any

import numpy as np

FLOAT, INT32 = 1, 6  # ONNX's numbers for types
IMAGE, LOGITS = "image", "logits"
LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"


class Builder:
    """Collects ONNX nodes and constants.

    Attributes:
        nodes: (operator, inputs, outputs, attributes), in order of computation.
        constants: {name: array}; equal ones are kept once.
    """

    def __init__(self) -> None:
        self.nodes: list[tuple[str, list[str], list[str], dict[str, Any]]] = []
        self.constants: dict[str, np.ndarray] = {}
        self._known: dict[tuple, str] = {}
        self._numbers = count()

    def constant(self, array: Any, dtype: Any = None) -> str:
        """Returns the name of a constant."""
        array = np.ascontiguousarray(array, dtype).reshape(np.shape(array))
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._known:
            self._known[key] = self.new()
            self.constants[self._known[key]] = array
        return self._known[key]

    def new(self) -> str:
        """Returns a name that nothing has."""
        return f"_{next(self._numbers)}"

    def add(self, op: str, *inputs: str, outputs: int | str = 1, **attributes: Any) -> Any:
        """Adds a node; returns its output's name, or a list of them. outputs: their number, or the one's name."""
        names = [outputs] if isinstance(outputs, str) else [self.new() for _ in range(outputs)]
        self.nodes.append((op, list(inputs), names, attributes))
        return names if isinstance(outputs, int) and outputs > 1 else names[0]

    def split(self, name: str, sizes: list[int]) -> list[str]:
        """Adds a node that cuts a vector into parts; returns their names. No node for one part."""
        if len(sizes) == 1:
            return [name]
        return self.add("Split", name, self.constant(sizes, np.int64), outputs=len(sizes))

    def fork(self, without: Collection[str]) -> "Builder":
        """Returns a builder without nodes that goes on from this one's constants, less some."""
        other = copy.copy(self)
        other.nodes, other._known = [], dict(self._known)
        other.constants = {name: array for name, array in self.constants.items() if name not in without}
        return other

    def adopt(self, fork: "Builder") -> None:
        """Puts the nodes of a fork before its own, and takes its constants."""
        self.nodes[:0] = fork.nodes
        self.constants, self._known = fork.constants, fork._known

    def num_bytes(self) -> int:
        """Returns about how many bytes its nodes and constants take in a file."""
        constants = sum(array.nbytes + 2 * array.ndim + 10 for array in self.constants.values())
        return constants + sum(
            4 + len(op) + 3 * (len(inputs) + len(outputs)) + 13 * len(attributes)
            for op, inputs, outputs, attributes in self.nodes
        )

    def rename(self) -> dict[str, str]:
        """Returns a short name for each name, the shortest for the most frequent; input and output keep theirs."""
        uses = Counter(name for _, inputs, outputs, _ in self.nodes for name in (*inputs, *outputs))
        uses.update(list(self.constants))
        for name in ("", IMAGE, LOGITS):
            uses.pop(name, None)
        short = dict(zip([name for name, _ in uses.most_common()], _short_names(), strict=False))
        return {"": "", IMAGE: IMAGE, LOGITS: LOGITS, **short}


def _short_names() -> Iterator[str]:
    for length in count(1):
        yield from ("".join(letters) for letters in product(LETTERS, repeat=length))
