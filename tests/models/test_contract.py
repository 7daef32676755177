"""What every model promises, over every file of the shelf: shapes, pairs, prune, pack, load."""

import copy
import inspect
import io

import pytest
import torch
from pydantic import TypeAdapter
from safetensors.torch import load, save
from torch import nn

import trainer
from tests.losses.feeding import required
from trainer.compression.weights import weights_of
from trainer.distillation.pairing import pair
from trainer.models.lenet5 import lenet5
from trainer.networks.blocks import Blocks
from trainer.networks.build import build
from trainer.networks.features import block_names, head, look, see
from trainer.recipe import shelves

NAMES = shelves.names("model")
# These open anybody's network by a further name.
DOORS = {"timm": "timm/test_resnet", "python": f"python:{__name__}:somebodys"}
OURS = [name for name in NAMES if name not in DOORS]
DIGITS, CIFAR = ((1, 28, 28), 10), ((3, 32, 32), 100)

# Settings that change the structure, so the contract holds for them too.
VARIANTS = {
    "lenet300": [{"hidden": (20,)}, {"hidden": (30, 20, 10)}],
    "lenet5": [{"width": 3, "batch_norm": True, "dropout": 0.5}],
    "lstm": [{"hidden": 8, "num_layers": 2, "bidirectional": True}],
    "gru": [{"hidden": 8, "num_layers": 2, "bidirectional": True}],
    "separable": [
        {"batch_norm": False},
        {"widths": (4, 4, 6), "strides": (2, 1, 2), "kernel": 3, "residual": True},
        {"widths": (4, 4, 6), "strides": (2, 1, 2), "residual": True, "repeat": 2},
    ],
    "airbench": [{"first": 4, "widths": (6, 8, 12)}],
    "cifar_resnet": [{"depth": 8, "channels": (8, 16, 16, 24)}],
    "wide_resnet": [{"depth": 10, "widen": 1}],
}
CASES = [
    pytest.param(name, sizes, settings, id=f"{name}-{sizes[0][0]}x{sizes[0][1]}-{number}")
    for name in OURS
    for number, settings in enumerate([{}, *VARIANTS.get(name, [])])
    for sizes in (DIGITS, CIFAR)
]


def somebodys(input_shape, num_classes):
    channels = input_shape[0]
    return nn.Sequential(
        nn.Conv2d(channels, 6, 3, 2),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(24, num_classes),
    )


def spec_of(name, settings):
    return {"model": DOORS.get(name, name), **required(shelves.find("model", name)), **settings}


def made(name: str, sizes, settings) -> nn.Module:
    torch.manual_seed(0)
    return build(spec_of(name, settings), *sizes)


@pytest.mark.parametrize("name", OURS)
def test_signature_is_the_schema(name):
    function = shelves.find("model", name)
    first, second, *settings = inspect.signature(function).parameters.values()
    assert (first.name, second.name) == ("input_shape", "num_classes")
    for setting in settings:
        assert setting.kind is inspect.Parameter.KEYWORD_ONLY
        TypeAdapter(setting.annotation).validate_python(setting.default)
        assert f"{setting.name}:" in function.__doc__, f"{setting.name} is not explained"


@pytest.mark.parametrize("name, sizes, settings", CASES)
def test_contract(name, sizes, settings):
    shape, num_classes = sizes
    model = made(name, sizes, settings)
    assert isinstance(model, Blocks) and model.training
    images = torch.randn(5, *shape)

    # Backward reaches every parameter; no weight is left out of the forward pass.
    logits = model(images)
    assert logits.shape == (5, num_classes) and logits.dtype == torch.float32
    nn.functional.cross_entropy(logits, torch.arange(5)).backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), key
        if parameter.dim() > 1:
            assert parameter.grad.abs().sum() > 0, key

    # Evaluation is deterministic and treats every image by itself.
    model.eval()
    with torch.no_grad():
        logits = model(images)
        assert torch.equal(logits, model(images))
        torch.testing.assert_close(model(images[:1]), logits[:1], rtol=1e-4, atol=1e-5)

    # timm's two calls, and what the features see, are the forward pass itself.
    with torch.no_grad():
        assert torch.equal(model.forward_head(model.forward_features(images)), logits)
        layers = [layer.name for layer in look(model, images)]
        assert layers == block_names(model) and len(set(layers)) == len(layers)
        seen = see(model, images, layers, embedding=True)
        assert torch.equal(seen.logits, logits)
        assert torch.equal(head(model)(seen.embedding), logits)
        assert seen.embedding.dim() == 2 and all(m.dim() == 4 for m in seen.maps.values())
        final, maps = model.forward_intermediates(images)
        assert torch.equal(final, model.forward_features(images))
        for layer, map_ in zip(layers, maps, strict=True):
            assert torch.equal(map_, seen.maps[layer])

    # A copy and a reloaded state are the same network.
    twin = copy.deepcopy(model)
    assert torch.equal(twin(images), logits)
    with torch.no_grad():
        next(twin.parameters()).add_(1.0)
    assert torch.equal(model(images), logits)
    fresh = made(name, sizes, settings).eval()
    fresh.load_state_dict(load(save(model.state_dict())))
    assert torch.equal(fresh(images), logits)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    fresh.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(fresh(images), logits)


@pytest.mark.parametrize("name, sizes, settings", CASES)
def test_state_belongs_to_known_layers(name, sizes, settings):
    model = made(name, sizes, settings)
    layers = (nn.Conv2d, nn.Linear, nn.BatchNorm2d, nn.LSTM, nn.GRU)
    expected = {
        f"{path}.{key}"
        for path, module in model.named_modules()
        if isinstance(module, layers)
        for key in module.state_dict()
    }
    assert set(model.state_dict()) == expected


@pytest.mark.parametrize("name", NAMES)
def test_shapes_and_an_embedding_before_the_head(name):
    shape, num_classes = DIGITS
    model = made(name, DIGITS, {}).eval()
    images = torch.randn(3, *shape)
    with torch.no_grad():
        seen = see(model, images, embedding=True)
        assert seen.logits.shape == (3, num_classes) and seen.embedding.dim() == 2
        torch.testing.assert_close(head(model)(seen.embedding), seen.logits)


@pytest.mark.parametrize("name", NAMES)
def test_its_layers_pair_with_a_teachers_and_a_students(name):
    shape, num_classes = DIGITS
    images = torch.randn(2, *shape)
    model, other = made(name, DIGITS, {}).eval(), lenet5(shape, num_classes, width=2).eval()
    own, others = look(model, images), look(other, images)
    for student, teacher in ((own, others), (others, own), (own, own)):
        pairs = pair(student, teacher, shape[1])
        assert pairs and len({one.name for one, _ in pairs}) == len(pairs)
        places = [teacher.index(layer) for _, layer in pairs]
        assert places == sorted(places), "the teacher's layers go backwards"


@pytest.mark.parametrize("name", NAMES)
def test_pruned_and_shared_and_packed_it_loads_as_the_same_network(name, tmp_path):
    shape, num_classes = DIGITS
    settings = VARIANTS.get(name, [{}])[-1]
    model = made(name, DIGITS, settings).eval()
    dense = sum(4 * parameter.numel() for parameter in model.parameters())
    # The large ones more, so that large networks are quick.
    wished = {name: 0.97 if layer.value.numel() > 1000 else 0.5 for name, layer in weights_of(model).items()}
    zeros = trainer.prune(model, sparsity=wished)
    assert zeros == pytest.approx(wished, abs=0.05)
    trainer.share(model, bits=3)
    images = torch.randn(4, *shape)
    with torch.no_grad():
        wanted = model(images)
    spec = None if name == "python" else spec_of(name, settings)
    num_bytes = trainer.pack(
        model, tmp_path / "x.tiny", shape, classes=[str(n) for n in range(num_classes)], spec=spec
    )
    assert num_bytes == (tmp_path / "x.tiny").stat().st_size < dense
    loaded = trainer.load(
        tmp_path / "x.tiny", **({"into": made(name, DIGITS, settings)} if spec is None else {})
    )
    with torch.no_grad():
        assert torch.equal(loaded(images), wanted)
