"""Where each map of a network lies in memory while it runs: one block, in which maps that are no longer read make room."""

from dataclasses import dataclass

import numpy as np

from trainer.exporting.graph import Graph, Node

# Operators that may write over their first input, number by number.
IN_PLACE = frozenset(
    """batch_norm layer_norm group_norm prelu elu softplus mish sqrt power relu hardswish hardsigmoid silu sigmoid tanh exp neg abs erf clamp gelu leaky_relu elu add sub mul div
    max_pool avg_pool""".split()
)


@dataclass
class Memory:
    """Where the values of a graph lie.

    Attributes:
        size: Numbers of the block.
        places: {value: offset in the block}; 'image' or 'logits' for what the caller holds.
    """

    size: int
    places: dict[str, int | str]


def plan(graph: Graph) -> Memory:
    """Returns where each value lies. The most that lives at once decides; largest maps are placed first.

    A reshape costs nothing; an operator on single numbers, and a pooling without padding, write over their input where nothing
    reads it later. The logits are written where the caller wants them.
    """
    last = graph.last_use()
    root = {graph.input: graph.input}
    ends: dict[str, int] = {}  # {block: the last node that reads it}
    sizes: dict[str, dict[int, int]] = {}  # {block: {node: numbers that are held while it runs}}
    for number, node in enumerate(graph.nodes):
        out = node.outputs[0]
        over = node.inputs[0] if node.inputs and _is_over(graph, node, root, ends, number) else out
        root[out] = key = root.get(over, out)
        end, size = last.get(out, number), int(np.prod(graph.shape(out)))
        ends[key] = max(ends.get(key, 0), end)
        held = sizes.setdefault(key, {})
        held |= {step: max(size, held.get(step, 0)) for step in range(number, end + 1)}
    fixed: dict[str, int | str] = {graph.input: "image"}
    end_key = root[graph.output]
    sizes.pop(graph.input, None)
    if end_key in sizes and max(sizes[end_key].values()) == int(np.prod(graph.shape(graph.output))):
        fixed[end_key] = "logits"
        del sizes[end_key]
    placed: dict[str, int] = {}
    for key in sorted(sizes, key=lambda key: (-max(sizes[key].values()), min(sizes[key]))):
        tops = {0} | {placed[other] + size for other in placed for size in sizes[other].values()}
        placed[key] = min(top for top in tops if _is_free(key, top, sizes, placed))
    block = max((placed[key] + max(sizes[key].values()) for key in placed), default=0)
    everywhere = fixed | placed
    return Memory(block, {name: everywhere[key] for name, key in root.items()})


def _is_free(key: str, offset: int, sizes: dict[str, dict[int, int]], placed: dict[str, int]) -> bool:
    """Whether a block at an offset touches no other while both are held."""
    return all(
        offset + size <= placed[other] or placed[other] + sizes[other].get(step, 0) <= offset
        for other in placed
        for step, size in sizes[key].items()
        if step in sizes[other]
    )


def _is_over(graph: Graph, node: Node, root: dict[str, str], ends: dict[str, int], number: int) -> bool:
    """Whether a node's output takes the place of its first input."""
    given = node.inputs[0]
    if node.op == "reshape":
        return given in root
    if node.op not in IN_PLACE or given not in root or root[given] == graph.input:
        return False
    if ends[root[given]] > number:
        return False
    if any(root.get(other) == root[given] and other != given for other in node.inputs[1:]):
        return False
    if node.op in ("max_pool", "avg_pool"):
        return not np.any(node.attributes["padding"])
    return graph.shape(given) == graph.shape(node.outputs[0])
