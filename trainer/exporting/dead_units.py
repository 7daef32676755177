"""Leaves out units of a quantized network that nothing reads, or that are always zero."""

from dataclasses import replace

import numpy as np

from trainer.exporting.graph import Graph, Node, Value
from trainer.exporting.integer_steps import Step, steps_of

LAYERS = ("conv", "linear")


def without_dead(graph: Graph) -> Graph:
    """Returns a graph with the same logits, bit for bit, without the dead units of layers that feed only other layers.

    Dead is a unit without outgoing weights, and one without incoming weights and bias.
    """
    while True:
        steps = steps_of(graph)
        for step in steps:
            readers = _readers(step, steps)
            alive = _alive(graph, step, readers) if readers else None
            if alive is not None and 0 < alive.sum() < len(alive):
                graph = _cut(graph, step, readers, alive)
                break
        else:
            return graph


def _readers(step: Step, steps: list[Step]) -> list[Step]:
    """Returns the layers that read a layer's map; [] if something else reads it too."""
    if not _is_plain(step) or step.y is None or step.added is not None:
        return []
    reads = [other for other in steps if other.x.name == step.y.name]
    added = any(other.added is not None and other.added.name == step.y.name for other in steps)
    return [] if added or not all(map(_is_plain, reads)) else reads


def _is_plain(step: Step) -> bool:
    return step.node.op in LAYERS and step.node.attributes.get("groups", 1) == 1


def _alive(graph: Graph, step: Step, readers: list[Step]) -> np.ndarray:
    weight = graph.weights[step.node.weights["weight"]]
    count = len(weight)
    comes_in = weight.reshape(count, -1).any(1)
    if "bias" in step.node.weights:
        comes_in |= graph.weights[step.node.weights["bias"]] != 0
    goes_on = np.zeros(count, bool)
    for reader in readers:
        read = graph.weights[reader.node.weights["weight"]]
        goes_on |= read.reshape(len(read), count, -1).any((0, 2))
    return comes_in & goes_on


def _cut(graph: Graph, step: Step, readers: list[Step], alive: np.ndarray) -> Graph:
    """Returns a graph without some units of a layer."""
    weights, values = dict(graph.weights), dict(graph.values)
    nodes = {id(node): node for node in graph.nodes}

    def put(node: Node, role: str, array: np.ndarray) -> None:
        name = f"{node.outputs[0]}.{role}"  # a weight may be read by other layers too
        weights[name] = array
        known = nodes[id(node)]
        nodes[id(node)] = replace(known, weights={**known.weights, role: name})

    for role, name in step.node.weights.items():
        put(step.node, role, graph.weights[name][alive])
    for reader in readers:
        read = graph.weights[reader.node.weights["weight"]]
        kept = read.reshape(len(read), len(alive), -1)[:, alive]
        put(reader.node, "weight", kept.reshape(len(read), -1, *read.shape[2:]))
    ends = {id(reader.node) for reader in readers}
    changed = {step.node.outputs[0]}
    for node in graph.nodes:
        if node.inputs[0] in changed and id(node) not in ends:
            changed |= set(node.outputs)
    for name in changed:
        first, channels, *rest = values[name].shape
        values[name] = Value(
            (first, channels // len(alive) * int(alive.sum()), *rest), values[name].batch_axis
        )
    return Graph(graph.input, graph.output, [nodes[id(node)] for node in graph.nodes], values, weights)
