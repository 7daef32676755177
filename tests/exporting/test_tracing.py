"""The plain graph of a network: its operators, shapes and weights, and what it says of networks that it cannot be read from."""

import collections

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import trainer
from trainer.exporting.graph import OPS, Value
from trainer.exporting.tracing import trace
from trainer.mistakes import Mistake


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(2, 4, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU6()
        )
        self.gru = nn.GRU(8, 5, batch_first=True)
        self.fc = nn.Linear(5, 3)

    def forward(self, x):
        x = self.body(x)
        steps, _ = self.gru(x.flatten(1, 2).flatten(1).unflatten(1, (8, 8)))
        return self.fc(F.dropout(steps[:, -1], 0.5, self.training))


def test_operators_shapes_and_weights():
    net = Net().eval()
    trainer.prune(net, sparsity=0.5)
    graph = trace(net, (2, 8, 8))
    ops = [node.op for node in graph.nodes]
    assert [op for op in ops if op != "reshape"] == ["conv", "batch_norm", "clamp", "gru", "slice", "linear"]
    assert set(ops) <= OPS
    conv, norm, clamp = graph.nodes[:3]
    assert conv.attributes == {"stride": (2, 2), "padding": ((1, 1), (1, 1)), "dilation": (1, 1), "groups": 1}
    assert conv.weights == {"weight": "body.0.weight"} and conv.layer == "body.0"
    assert set(norm.weights) == {"weight", "bias", "mean", "var"} and norm.attributes["eps"] == 1e-5
    assert clamp.attributes == {"least": 0.0, "most": 6.0}
    assert graph.values[conv.outputs[0]] == Value((1, 4, 4, 4), 0)
    [gru] = [node for node in graph.nodes if node.op == "gru"]
    assert gru.attributes == {"hidden": 5, "layers": 1, "bidirectional": False, "batch_first": True}
    assert set(gru.weights) == {"weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"}
    assert np.array_equal(graph.weights["fc.weight"], net.fc.weight.detach().numpy())
    assert (graph.weights["body.0.weight"] == 0).mean() == pytest.approx(0.5, abs=0.02)
    assert graph.shape(graph.output) == (1, 3) and graph.last_use()[graph.output] == len(graph.nodes)
    assert net.body[0].parametrizations  # the network itself keeps its masks


class Sorted(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.ModuleDict({"odd": _Sort()})
        self.fc = nn.Linear(4, 2)

    def forward(self, x):
        return self.fc(self.inner["odd"](x.flatten(1)))


class _Sort(nn.Module):
    def forward(self, x):
        return x.sort(1).values


class Tiled(nn.Module):
    def forward(self, x):
        return x.flatten(1).repeat(1, 2)


class Pairs(nn.Module):
    def forward(self, x):
        return x.flatten(1)[: x.shape[0] // 2]


class Twice(nn.Module):
    def forward(self, x):
        return x.flatten(1), x


class Rows(nn.Module):
    """Its first choice of a row is the second operator, and there are more choices than that."""

    def forward(self, x):
        x = torch.relu(x)
        return x[:, 0, 0] + 2 * x[:, 0, 1] * x[:, 0, 2]


class Called(nn.Module):
    """Its weights are called as operators and as the image."""

    def __init__(self):
        super().__init__()
        self.mean = nn.Parameter(torch.randn(1, 2))
        self.add = nn.Parameter(torch.randn(1, 2, 1, 1))
        self.register_buffer("x", torch.randn(1, 2))

    def forward(self, x):
        return (x + self.add).mean((2, 3)) * self.mean + self.x


class Enlarged(nn.Module):
    """The sizes of the products that enlarge the map are 2 and 3, as is the number of operators before."""

    def forward(self, x):
        x = torch.sigmoid(torch.relu(x))
        return F.interpolate(x, size=(6, 5), mode="bilinear").mean((2, 3))


def names_of(graph):
    return [graph.input, *graph.weights, *(name for node in graph.nodes for name in node.outputs)]


@pytest.mark.parametrize(("net", "number"), [(Called, 3 + 5), (Enlarged, 2 + 6)])
def test_weights_and_values_have_different_names(net, number):
    names = names_of(trace(net(), (2, 3, 4)))
    assert len(set(names)) == len(names) == number


def test_a_weight_called_as_an_operator_is_exported(tmp_path):
    torch.manual_seed(0)
    [row] = trainer.export(Called().eval(), tmp_path, "onnx", shape=(2, 3, 4))
    assert row["agreement_student"] == 100 and row["max_difference"] < 1e-5


def test_every_value_has_a_name_of_its_own():
    graph = trace(Rows(), (1, 3, 4))
    names = names_of(graph)
    assert len(set(names)) == len(names) > 10
    assert [graph.shape(node.outputs[0]) for node in graph.nodes if node.op == "reshape"] == [
        (1, 3, 4), (1, 4), (1, 3, 4), (1, 4), (1, 3, 4), (1, 4)
    ]  # fmt: skip


def test_what_cannot_be_exported_is_named_with_its_layer():
    with pytest.raises(Mistake, match=r"layer 'inner.odd': operator sort cannot be exported"):
        trace(Sorted(), (1, 2, 2))
    with pytest.raises(Mistake, match="layer '1': a transposed convolution cannot be exported"):
        trace(nn.Sequential(nn.ReLU(), nn.ConvTranspose2d(1, 2, 2), nn.Flatten()), (1, 2, 2))
    with pytest.raises(Mistake, match="a repetition of more than one row cannot be exported"):
        trace(Tiled(), (1, 2, 2))
    with pytest.raises(Mistake, match=r"cannot read the network for images \(1, 2, 2\): .*batch"):
        trace(Pairs(), (1, 2, 2))
    with pytest.raises(Mistake, match=r"returns 2 values; logits \[N, K\] alone"):
        trace(Twice(), (1, 2, 2))
    with pytest.raises(Mistake, match=r"returns \('N', 1, 2, 2\); logits"):
        trace(nn.ReLU(), (1, 2, 2))
    with pytest.raises(Mistake, match="torch.export cannot read the network for images"):
        trace(nn.Linear(5, 2), (1, 2, 2))
    with pytest.raises(Mistake, match="float16; float32 is exported"):
        trace(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)).half(), (1, 2, 2))


class Does(nn.Module):
    """Does something to the flattened image."""

    def __init__(self, what):
        super().__init__()
        self.what = what

    def forward(self, x):
        return self.what(x.flatten(1))


@pytest.mark.parametrize(
    ("what", "words"),
    [
        (lambda x: (x * 4).int().float(), "a cast to int32"),
        (lambda x: x.to(torch.uint8).float(), "a cast to uint8"),
        (lambda x: x.bool().float(), "a cast to bool"),
        (lambda x: x.half().float(), "a cast to float16"),
        (lambda x: x.bfloat16().float(), "a cast to bfloat16"),
        (lambda x: torch.softmax(x, 1, dtype=torch.float16).float(), "(a cast to|numbers of type) float16"),
    ],
)
def test_a_cast_that_changes_numbers_is_refused(what, words):
    with pytest.raises(Mistake, match=f"the network: {words} cannot be exported"):
        trace(Does(what), (1, 2, 2))


def test_a_cast_that_changes_no_number_is_left_out():
    graph = trace(Does(lambda x: torch.relu(x.double().float()).to(torch.float32)), (1, 2, 2))
    assert [node.op for node in graph.nodes] == ["reshape", "relu"]


def test_arguments_that_are_not_the_usual_ones():
    def last(what):
        return trace(Does(what), (1, 2, 2)).nodes[-1].attributes

    whole = last(lambda x: x * torch.full((x.shape[0], 1), 2.7, dtype=torch.int64))
    assert whole["scalar"] == 2
    assert last(lambda x: F.softplus(x, beta=0.5)) == {"beta": 0.5}
    with pytest.raises(Mistake, match="a softplus with the threshold 1 cannot be exported"):
        last(lambda x: F.softplus(x, 1, 1))
    graph = trace(
        Does(lambda x: F.scaled_dot_product_attention(*[x[:, None]] * 3, scale=0.0)[:, 0]), (1, 2, 2)
    )
    assert [node.attributes["scale"] for node in graph.nodes if node.op == "attention"] == [0]


def test_parts_that_do_not_depend_on_the_image_are_constants():
    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.randn(3, 4))
            self.fc = nn.Linear(4, 2)

        def forward(self, x):
            return self.fc(x.flatten(1) + self.table[torch.arange(3)].sum(0) * 2)

    graph = trace(Positions(), (1, 2, 2))
    assert [node.op for node in graph.nodes] == ["reshape", "add", "linear"]
    assert graph.weights[graph.nodes[1].inputs[1]].shape == (4,)


class Chosen(nn.Module):
    def __init__(self, positions, axis=1):
        super().__init__()
        self.axis = axis
        self.register_buffer("positions", torch.as_tensor(positions), persistent=False)

    def forward(self, x):
        x = x.flatten(1).roll(-3, 1)
        return x[:, self.positions] if self.axis == 1 else x[self.positions]


def test_a_choice_of_positions_is_parts_put_side_by_side():
    graph = trace(Chosen([5, 6, 7, 0, 1, -1]), (1, 2, 4))
    ops = [(node.op, node.attributes.get("start"), node.attributes.get("stop")) for node in graph.nodes]
    rolled = [("slice", 3, 8), ("slice", 0, 3), ("concat", None, None)]
    chosen = [("slice", 5, 8), ("slice", 0, 2), ("slice", 7, 8), ("concat", None, None)]
    assert ops == [("reshape", None, None), *rolled, *chosen]
    assert all(node.attributes.get("axis") == 1 for node in graph.nodes[1:])


def test_a_choice_of_positions_that_has_no_counterpart_is_refused():
    with pytest.raises(Mistake, match="a choice of 100 parts cannot be exported"):
        trace(Chosen(torch.arange(0, 200, 2)), (1, 2, 100))
    with pytest.raises(Mistake, match="a part of the images of a batch"):
        trace(Chosen([0, 0], axis=0), (1, 2, 4))
    with pytest.raises(Mistake, match="a choice of positions in 2 axes"):
        trace(Chosen([[0, 1], [2, 3]]), (1, 2, 4))


class Sums(nn.Module):
    def forward(self, x):
        return x.sum((2, 3)) + x.sum((1, 2, 3), keepdim=True).flatten(1)


def test_a_sum_is_a_mean_times_the_number():
    graph = trace(Sums(), (2, 3, 5))
    found = [(n.op, n.attributes.get("axes") or n.attributes.get("scalar")) for n in graph.nodes]
    assert found[:4] == [("mean", (2, 3)), ("mul", 15.0), ("mean", (1, 2, 3)), ("mul", 30.0)]


class Resized(nn.Module):
    def forward(self, x):
        twice = F.interpolate(x, scale_factor=2, mode="nearest")
        odd = F.interpolate(x, size=(7, 5), mode="bilinear") + F.interpolate(
            x, size=(7, 5), mode="bicubic", align_corners=True
        )
        line = F.interpolate(x.flatten(2), size=9)
        return torch.cat([one.flatten(1) for one in (twice, odd, F.adaptive_avg_pool2d(x, (2, 3)), line)], 1)


def moved(node, given, shape):
    """What a node of the graph above makes of its inputs."""
    if node.op == "concat":
        return np.concatenate(given, node.attributes["axis"])
    return {"matmul": np.matmul, "add": np.add, "reshape": lambda x: x.reshape(shape)}[node.op](*given)


def test_resized_maps_are_products_with_constants():
    net = Resized()
    graph = trace(net, (2, 3, 4))
    assert collections.Counter(node.op for node in graph.nodes)["matmul"] == 9  # one an axis
    x = torch.randn(1, 2, 3, 4)
    values = {graph.input: x.numpy(), **graph.weights}
    for node in graph.nodes:
        given = [values[name] for name in node.inputs]
        values[node.outputs[0]] = moved(node, given, graph.shape(node.outputs[0]))
    np.testing.assert_allclose(values[graph.output], net(x).numpy(), rtol=1e-5, atol=1e-6)


class Standardized(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3, 3, 3))

    def forward(self, x):
        even = F.batch_norm(self.weight.reshape(1, 4, -1), None, None, training=True).reshape_as(self.weight)
        return F.conv2d(x, even).mean((2, 3))


def test_a_standardized_weight_is_a_constant():
    net = Standardized()
    graph = trace(net, (3, 5, 5))
    assert [node.op for node in graph.nodes] == ["conv", "mean"]
    weight = graph.weights[graph.nodes[0].weights["weight"]].reshape(4, -1)
    plain = net.weight.detach().numpy().reshape(4, -1)
    expected = (plain - plain.mean(1, keepdims=True)) / np.sqrt(plain.var(1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(weight, expected, atol=1e-5)
