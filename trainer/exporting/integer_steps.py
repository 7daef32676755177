"""Reads a quantized network as steps that integers compute: bytes in, sums of 32 bits, bytes out."""

from dataclasses import dataclass, field

from trainer.exporting.graph import Graph, Node
from trainer.mistakes import Mistake

IMAGE = "image"  # the bytes that a caller gives
MONOTONE = frozenset("relu clamp max_pool reshape".split())  # they come before or after rounding alike


@dataclass
class Map:
    """Bytes in memory: the number of each is (byte - zero) x 2^exponent."""

    name: str
    exponent: int
    zero: int


@dataclass
class Step:
    """What is computed from one map.

    Attributes:
        node: A conv or linear, whose sums are rounded to bytes; a mean or avg_pool likewise; or a max_pool of bytes.
        x: What it reads.
        relu: Whether sums below zero become zero, before anything is added.
        added: A map of the output's shape that is then added; None for none.
        relu_after: Whether sums below zero become zero after that.
        pools: Max-poolings of the sums, which are the same as those of the bytes.
        y: The bytes; None for logits, which stay sums.
        out: The name of the value in the graph.
    """

    node: Node
    x: Map
    relu: bool = False
    added: Map | None = None
    relu_after: bool = False
    pools: list[Node] = field(default_factory=list)
    y: Map | None = None
    out: str = ""


def is_quantized(graph: Graph) -> bool:
    """Returns whether the network's maps are rounded."""
    return any(node.op == "quantize" for node in graph.nodes)


def steps_of(graph: Graph) -> list[Step]:
    """Returns what integers compute, in order. Raises Mistake, with the layer, for what they cannot."""
    maps: dict[str, Map] = {}  # of values that are bytes
    sums: dict[str, Step] = {}  # of values that are not rounded yet
    images = {graph.input}
    steps: list[Step] = []
    for node in graph.nodes:
        x, out = node.inputs[0], node.outputs[0]
        if node.op == "quantize":
            made = Map(out, node.attributes["exponent"], node.attributes["zero"])
            if x in images and node.attributes["mean"]:
                maps[out] = Map(IMAGE, made.exponent, made.zero)
            elif x in sums and sums[x].y is None:
                maps[out] = sums[x].y = made
                sums[x].out = out
            else:
                raise _refused(node, "a map that is rounded twice")
        elif node.op in ("conv", "linear", "mean", "avg_pool"):
            if x not in maps:
                raise _refused(node, f"operator {node.op} of a map that is not rounded")
            sums[out] = Step(node, maps[x], out=out)
            steps.append(sums[out])
        elif node.op == "add" and len(node.inputs) == 2:
            sums[out] = _added(node, graph, maps, sums)
        elif node.op == "max_pool" and x in maps:
            maps[out] = Map(out, maps[x].exponent, maps[x].zero)
            steps.append(Step(node, maps[x], y=maps[out], out=out))
        elif node.op in MONOTONE and x in sums:
            sums[out] = _followed(node, sums[x])
        elif node.op == "reshape" and (x in maps or x in images):
            if x in images:
                images.add(out)
            else:
                maps[out] = maps[x]
        else:
            raise _refused(node, f"operator {node.op}")
    last = sums.get(graph.output)
    if last is None or last.y is not None or last.pools or last.node.op not in ("conv", "linear"):
        raise Mistake("the network does not end in a linear layer or convolution, whose sums are the logits")
    return steps


def _refused(node: Node, what: str) -> Mistake:
    # What the network's own forward does is of no layer.
    layer = f"layer {node.layer!r}: " if node.layer else ""
    return Mistake(f"{layer}{what} cannot be computed in integers")


def _followed(node: Node, step: Step) -> Step:
    """Adds an operator that may as well come after rounding."""
    if step.y is not None:
        raise _refused(node, f"operator {node.op} of a map that is read before it too")
    if node.op == "clamp" and (node.attributes["least"] != 0 or node.attributes["most"] is not None):
        raise _refused(node, "clamp with other bounds than 0 and none")
    if node.op == "max_pool":
        step.pools.append(node)
    elif node.op != "reshape" and step.added is None:
        step.relu = True
    elif node.op != "reshape":
        step.relu_after = True
    return step


def _added(node: Node, graph: Graph, maps: dict[str, Map], sums: dict[str, Step]) -> Step:
    """Adds a map to the sums of a layer."""
    first, second = node.inputs
    if first in maps:
        first, second = second, first
    same = first in sums and second in maps and graph.shape(first) == graph.shape(second)
    if not same or sums[first].y is not None or sums[first].added is not None or sums[first].pools:
        raise _refused(node, "a sum of two maps of which not exactly one is rounded")
    sums[first].added = maps[second]
    return sums[first]


def redundant(graph: Graph) -> list[str]:
    """Returns the layers whose quantizers round what others have rounded already, through operators that keep the grid."""
    made_by = {out: node for node in graph.nodes for out in node.outputs}
    found = []
    for node in graph.nodes:
        if node.op != "quantize":
            continue
        source = made_by.get(node.inputs[0])
        while source is not None and source.op in MONOTONE:
            source = made_by.get(source.inputs[0])
        if source is not None and source.op == "quantize":
            found.append(node.layer)
    return found


def images_read(graph: Graph) -> list[str]:
    """Returns the layers of the quantizers that are given the image itself."""
    images, found = {graph.input}, []
    for node in graph.nodes:
        if node.inputs[0] in images and node.op == "reshape":
            images |= set(node.outputs)
        elif node.inputs[0] in images and node.op == "quantize":
            found.append(node.layer)
    return found


def exponents_read(graph: Graph) -> dict[str, int]:
    """Returns {layer: exponent of the step of the map that it reads}, of linear layers and convolutions."""
    return {
        step.node.layer: step.x.exponent for step in steps_of(graph) if step.node.op in ("conv", "linear")
    }
