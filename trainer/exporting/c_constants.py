"""The constants of a program in C, and what else its lines ask for by name."""

import numpy as np

from trainer.exporting.c_memory import Memory
from trainer.exporting.c_weights import floats, vector, weight
from trainer.exporting.graph import Graph


class Constants:
    """Names for what the lines of a program use. Each line asks, and what was asked for is written before the lines.

    Attributes:
        weight_bytes: What the weights take.
        scratch: Numbers that the operator with the largest need has beside its maps.
        texts: The lines of each constant, by name in C.
        maps: {expression of v: name of the function that puts it on each number}.
    """

    def __init__(self, graph: Graph, memory: Memory) -> None:
        self.graph, self.memory, self.weight_bytes, self.scratch = graph, memory, 0, 0
        self.texts: dict[str, str] = {}
        self.maps: dict[str, str] = {}

    def place(self, name: str) -> str:
        """Returns the expression of C where a value or constant begins."""
        if name in self.memory.places:
            where = self.memory.places[name]
            return where if isinstance(where, str) else f"memory + {where}" if where else "memory"
        return self.floats(self.graph.weights[name])

    def _name(self, kind: str) -> str:
        return f"{kind}_{len(self.texts)}"

    def floats(self, values: np.ndarray) -> str:
        """Returns the name of an array of plain numbers."""
        name = self._name("numbers")
        self.texts[name] = floats(name, values)
        self.weight_bytes += 4 * np.size(values)
        return name

    def packed(self, kind: str, values: np.ndarray) -> str:
        """Returns the name of a 'weight' or a 'vector'."""
        name = self._name(kind)
        self.texts[name], size = (weight if kind == "weight" else vector)(name, values)
        self.weight_bytes += size
        return name

    def integers(self, values: list[int]) -> str:
        """Returns the name of an array of integers."""
        name = self._name("shape")
        self.texts[name] = f"static const int32_t {name}[] = {{{', '.join(map(str, values))}}};\n"
        return name

    def window(self, values: list[int]) -> str:
        """Returns the name of a 'window'."""
        name = self._name("window")
        sizes, pairs = (
            values[:6],
            [f"{{{a}, {b}}}" for a, b in zip(values[6:16:2], values[7:16:2], strict=True)],
        )
        self.texts[name] = (
            f"static const window {name} = {{{', '.join([*map(str, sizes), *pairs, str(values[16])])}}};\n"
        )
        return name

    def map(self, body: str) -> str:
        """Returns the name of a function that puts an expression of v on each number."""
        return self.maps.setdefault(body, f"map_{len(self.maps)}")
