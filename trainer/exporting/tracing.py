"""Reads a network's graph from torch.export's core ATen graph, with LSTM, GRU and a few others kept whole."""

import contextlib
import copy
import operator
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from trainer.compression.states import bake
from trainer.exporting.graph import Graph, Node, Value
from trainer.exporting.operators import ALIASES, CONVERTERS, TYPES, UPSAMPLING, Unsupported
from trainer.mistakes import Mistake
from trainer.networks.quantizers import Quantizer, quantizers

# Operators that stay whole, although torch can express them by smaller ones.
WHOLE = (
    """linear conv1d conv2d layer_norm group_norm lstm.input gru.input hardswish silu mish softplus softmax.int
scaled_dot_product_attention max_pool1d max_pool2d avg_pool1d adaptive_avg_pool1d adaptive_avg_pool2d matmul
prelu""".split()
    + UPSAMPLING
)


@torch.library.custom_op("tiny_student::quantize", mutates_args=())
def _quantize(x: Tensor, exponent: int, zero: int, mean: list[float], std: list[float]) -> Tensor:
    """A quantizer as one operator, which a graph keeps whole."""
    return Quantizer(exponent, zero, mean, std)(x)


@_quantize.register_fake
def _(x: Tensor, exponent: int, zero: int, mean: list[float], std: list[float]) -> Tensor:
    return torch.empty_like(x)


def trace(network: nn.Module, shape: Sequence[int]) -> Graph:
    """Returns the graph of a network in evaluation mode, for images of `shape` (C, H, W). The network is unchanged.

    Raises Mistake, with the layer's name, for an operator that has no counterpart in `graph`, for a shape that depends on
    anything but the number of images, and for an output that is not [N, K].
    """
    plain = bake(copy.deepcopy(network)).cpu().eval()
    for tensor in [*plain.parameters(), *plain.buffers()]:
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            raise Mistake(f"the network's tensors are {tensor.dtype}; float32 is exported")
    plain.requires_grad_(False)
    for quantizer in quantizers(plain).values():
        quantizer.operator = _quantize
    program = program_of(plain, tuple(shape))
    table = torch.export.default_decompositions()
    for name in WHOLE:
        packet, _, overload = name.partition(".")
        table.pop(getattr(getattr(torch.ops.aten, packet), overload or "default"), None)
    with _quiet():
        return _Reader(program.run_decompositions(table)).graph()


def program_of(network: nn.Module, shape: tuple[int, ...], most: int = 1 << 16) -> Any:
    """Returns a network as a program of torch.export for 1 to `most` images of `shape`; for 1 alone if `most` is 1.

    Raises Mistake for a network that torch.export cannot read.
    """
    images = torch.zeros(min(most, 2), *shape)
    sizes = ({0: torch.export.Dim("batch", min=1, max=most)},) if most > 1 else None
    try:
        with _quiet(), torch.no_grad():
            return torch.export.export(network, (images,), dynamic_shapes=sizes, strict=False)
    except Exception as error:  # whatever the network's own code or the exporter raises
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        raise Mistake(
            f"torch.export cannot read the network for images {tuple(shape)}: {type(error).__name__}: {reason[:160]}"
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences what torch.export remarks of an LSTM, which sets its list of weights anew; nothing is lost."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*were assigned during export.*")
        yield


class _Reader:
    """Turns the nodes of an exported program into those of a `Graph`."""

    def __init__(self, program: Any) -> None:
        self.program = program
        signature = program.graph_signature
        state: dict[str, Tensor] = {**program.state_dict, **program.constants}
        targets = {
            **signature.inputs_to_parameters,
            **signature.inputs_to_buffers,
            **getattr(signature, "inputs_to_lifted_tensor_constants", {}),
        }
        taken = {
            node.name for node in program.graph.nodes
        }  # a weight may be called as an operator: self.mean
        self.constants = {
            name: (f"{target}:" if target in taken else target, state[target])
            for name, target in targets.items()
        }
        self.user_inputs = set(signature.user_inputs)
        self.user_outputs = list(signature.user_outputs)
        self.several: dict[str, Any] = {}  # {node: its several results, all of them constants}
        self.same: dict[str, str] = {}  # a node that changes nothing: what it is the same as
        self.parts: dict[tuple[str, int], str] = {}  # (node with several outputs, number): value
        self.further: dict[str, str] = {}  # results of such a node that have no value: what they are
        self.filled: dict[str, float] = {}  # values that are one number everywhere, not computed yet
        self.weights: dict[str, np.ndarray] = {}
        self.values: dict[str, Value] = {}
        self.nodes: list[Node] = []
        self.input = ""

    def graph(self) -> Graph:
        for node in self.program.graph.nodes:
            if node.op == "placeholder" and node.name in self.user_inputs:
                self.input = node.name
                self.values[node.name] = self.value(node)
            elif node.op == "call_function":
                self._call(node)
        if (
            len(self.user_outputs) != 1
            or self.same.get(self.user_outputs[0], self.user_outputs[0]) not in self.values
        ):
            raise Mistake(
                f"the network returns {len(self.user_outputs)} values; logits [N, K] alone are exported"
            )
        output = self.same.get(self.user_outputs[0], self.user_outputs[0])
        found = self.values[output]
        if len(found.shape) != 2 or found.batch_axis != 0 or found.shape[0] != 1:
            raise Mistake(f"the network returns {('N', *found.shape[1:])}; logits [N, K] are exported")
        return self._needed(output)

    def _needed(self, output: str) -> Graph:
        """Returns the graph without nodes and weights that nothing reads."""
        assert not self.values.keys() & self.weights.keys()
        wanted, nodes = {output}, []
        for node in reversed(self.nodes):
            if wanted & set(node.outputs):
                nodes.append(node)
                wanted |= {*node.inputs, *node.weights.values()}
        return Graph(
            self.input,
            output,
            nodes[::-1],
            {name: value for name, value in self.values.items() if name in wanted or name == self.input},
            {name: array for name, array in self.weights.items() if name in wanted},
        )

    def _call(self, node: fx.Node) -> None:
        target: Any = node.target
        if target is operator.getitem:
            source, number = node.args
            assert isinstance(source, fx.Node) and isinstance(number, int)
            if source.name in self.several:
                self.constants[node.name] = (node.name, self.several[source.name][number])
                return
            name = self.parts.get((source.name, number))
            if name is not None:
                self.same[node.name] = name
            else:
                self.further[node.name] = f"result {number} of operator {short_name(source.target)}"
            return
        if not isinstance(node.meta.get("val"), Tensor | tuple | list):
            return  # arithmetic of sizes: shapes are read from the values themselves
        arguments = self._named(node)
        name = short_name(target)
        try:
            if self._is_constant(node):
                return
            if name in ALIASES:
                _refuse_other_types(node.meta["val"], "a cast to")
                self.same[node.name] = self.name(next(iter(arguments.values())))
            elif name in CONVERTERS:
                CONVERTERS[name](self, node, arguments)
            else:
                raise Unsupported(f"operator {name}")
        except Unsupported as error:
            layer = layer_of(node)
            where = f"layer {layer!r}" if layer else "the network"
            raise Mistake(f"{where}: {error} cannot be exported: there is no counterpart for it") from None

    def _named(self, node: fx.Node) -> dict[str, Any]:
        """Returns all arguments of a call by the names of the operator's schema, defaults included."""
        schema = node.target._schema  # type: ignore[union-attr]  # every call is an ATen operator
        found = {a.name: (a.default_value if a.has_default_value() else None) for a in schema.arguments}
        found |= dict(zip(found, node.args, strict=False))
        return found | node.kwargs

    def _is_constant(self, node: fx.Node) -> bool:
        """Computes a node that reads constants only, and keeps its result, or its several ones, as constants."""
        inputs, found = node.all_input_nodes, node.meta["val"]
        if not all(i.name in self.constants for i in inputs):
            return False
        results = [found] if isinstance(found, Tensor) else found
        if any(isinstance(size, torch.SymInt) for result in results for size in result.shape):
            return False
        if not inputs and sum(result.numel() for result in results) > 1 << 24:
            return False

        def tensor_of(value: Any) -> Any:
            return self.constants[value.name][1] if isinstance(value, fx.Node) else value

        args, kwargs = fx.map_arg(node.args, tensor_of), fx.map_arg(node.kwargs, tensor_of)
        target: Any = node.target
        computed = target(*args, **kwargs)
        if isinstance(found, Tensor):
            self.constants[node.name] = (node.name, computed)
        else:
            self.several[node.name] = computed
        return True

    # What the converters use.

    def value(self, node: fx.Node, number: int | None = None) -> Value:
        """Returns the shape of a node's result.

        Raises Unsupported for a shape that depends on more than the images' number, and for numbers that are no float32.
        """
        tensor = node.meta["val"] if number is None else node.meta["val"][number]
        _refuse_other_types(tensor, "numbers of type")
        shape, axis = [], None
        for place, size in enumerate(tensor.shape):
            if isinstance(size, int):
                shape.append(size)
                continue
            expression = size.node.expr
            one, two = (int(expression.subs(dict.fromkeys(expression.free_symbols, n))) for n in (1, 2))
            if two != 2 * one or axis is not None:
                raise Unsupported(f"a dynamic shape ({', '.join(map(str, tensor.shape))})")
            axis = place
            shape.append(one)
        return Value(tuple(shape), axis)

    def name(self, node: Any) -> str:
        """Returns the name of the value or constant that a node stands for (of a name: itself)."""
        if isinstance(node, str):
            return node
        assert isinstance(node, fx.Node)
        if node.name in self.constants:
            return self.weight(node)
        if node.name in self.filled:
            raise Unsupported("a tensor filled with one number for each image")
        found = self.same.get(node.name, node.name)
        if found not in self.values:
            raise Unsupported(self.further[found])
        return found

    def weight(self, node: Any) -> str:
        """Returns the name of a constant, which the graph then holds. Raises Unsupported for a computed tensor."""
        if not isinstance(node, fx.Node) or node.name not in self.constants:
            raise Unsupported("a weight that is computed from the image")
        name, tensor = self.constants[node.name]
        if not tensor.is_floating_point():
            raise Unsupported(f"a constant of type {tensor.dtype}")
        return self.constant(name, tensor)

    def constant(self, name: str, tensor: Tensor) -> str:
        """Returns the name of a constant that the graph then holds."""
        self.weights[name] = np.ascontiguousarray(tensor.detach().float().numpy())
        return name

    def part_name(self, node: fx.Node) -> str:
        """Returns a new name for a value or constant that is a part of what a node of torch's graph stands for."""
        return f"{node.name}:{len(self.values) + len(self.weights)}"

    def add(
        self,
        node: fx.Node,
        op: str,
        inputs: Sequence[Any],
        weights: dict[str, Any] | None = None,
        parts: int = 0,
        **attributes: Any,
    ) -> None:
        """Adds a node. inputs, weights: nodes of torch's graph (a weight of None is left out).

        parts: how many of the results of an operator with several are given names.
        """
        if parts:
            outputs = []
            for number in range(parts):
                outputs.append(self.part_name(node))
                self.parts[node.name, number] = outputs[-1]
                self.values[outputs[-1]] = self.value(node, number)
        else:
            outputs = [node.name]
            self.values[node.name] = self.value(node)
        held = {role: self.weight(w) for role, w in (weights or {}).items() if w is not None}
        names = tuple(self.name(one) for one in inputs)
        self.nodes.append(Node(op, names, tuple(outputs), held, attributes, layer_of(node)))

    def cut(self, node: fx.Node, source: Any, axis: int, start: int, stop: int) -> str:
        """Adds a slice of `source` as a part of what a node of torch's graph stands for; returns its name."""
        read = self.name(source)
        was = self.values[read] if read in self.values else Value(self.weights[read].shape, None)
        if axis == was.batch_axis:
            raise Unsupported("a part of the images of a batch")
        value = Value((*was.shape[:axis], stop - start, *was.shape[axis + 1 :]), was.batch_axis)
        return self.step(node, "slice", [read], value, axis=axis, start=start, stop=stop, step=1)

    def step(self, node: fx.Node, op: str, inputs: Sequence[str], value: Value, **attributes: Any) -> str:
        """Adds a node as a part of what a node of torch's graph stands for; returns its output's name."""
        name = self.part_name(node)
        self.values[name] = value
        self.nodes.append(Node(op, tuple(inputs), (name,), {}, attributes, layer_of(node)))
        return name


def _refuse_other_types(tensor: Tensor, words: str) -> None:
    if tensor.dtype not in TYPES:
        raise Unsupported(f"{words} {str(tensor.dtype).removeprefix('torch.')}")


def short_name(target: Any) -> str:
    """Returns an operator's name without its namespace and its usual overload: 'lstm.input', 'relu'."""
    return str(target).removesuffix(".default").removeprefix("aten.")


def layer_of(node: fx.Node) -> str:
    """Returns the dotted name of the module that a node of torch's graph comes from; '' for the network itself."""
    stack = node.meta.get("nn_module_stack") or {}
    return list(stack.values())[-1][0] if stack else ""
