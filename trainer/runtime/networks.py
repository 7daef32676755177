"""The networks of `trainer/models/` once more, as plain functions of a network's layers (see `layers`).

A function NAME(net, x, num_classes, *, settings) is the network of `trainer/models/NAME.py`: the same layers under the same
names, in the order of its tensors. A test compares each with torch's logits.
"""

from collections.abc import Callable
from typing import Any

from trainer.mistakes import Mistake
from trainer.runtime.layers import Layers

_VGG = {8: (1, 1, 1, 1, 1), 11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3)}


def find(model: str) -> Callable[..., Any]:
    """Returns the function of a model. Raises Mistake for a network that is not on the models shelf."""
    found = globals().get(model) if not model.startswith("_") else None
    if getattr(found, "__module__", None) != __name__ or model == "find":
        raise Mistake(
            f"without torch only the networks of trainer/models/ can be opened; {model!r} is none: export it to onnx first "
            "(trainer export FILE --to onnx, where torch is installed)"
        )
    return found  # type: ignore[return-value]


def lenet300(net: Layers, x: Any, num_classes: int, *, hidden: tuple[int, ...] = (300, 100)) -> Any:
    x = net.flatten(x)
    for number, units in enumerate(hidden, 1):
        x = net.relu(net.linear(x, f"fc{number}", units))
    return net.linear(x, f"fc{len(hidden) + 1}", num_classes)


def lenet5(
    net: Layers, x: Any, num_classes: int, *, width: int = 6, batch_norm: bool = False, dropout: float = 0.0
) -> Any:
    padding = 0 if net.side(x) >= 16 else 2
    for number, (outputs, edge) in enumerate(((width, 2), (round(width * 8 / 3), padding)), 1):
        x = net.conv(x, f"conv{number}", outputs, 5, padding=edge, bias=not batch_norm)
        x = net.norm(x, f"norm{number}") if batch_norm else x
        x = net.relu(net.max_pool(x))
    x = net.flatten(x)
    x = net.relu(net.linear(x, "fc1", 20 * width))
    x = net.relu(net.linear(x, "fc2", 14 * width))
    return net.linear(x, "fc3", num_classes)


def lenet5_caffe(net: Layers, x: Any, num_classes: int) -> Any:
    x = net.relu(net.max_pool(net.conv(x, "conv1", 20, 5)))
    x = net.relu(net.max_pool(net.conv(x, "conv2", 50, 5)))
    x = net.relu(net.linear(net.flatten(x), "fc1", 500))
    return net.linear(x, "fc2", num_classes)


def separable(
    net: Layers,
    x: Any,
    num_classes: int,
    *,
    widths: tuple[int, ...] = (8, 12, 16, 16, 16),
    strides: tuple[int, ...] = (2, 1, 2, 1, 1),
    first_kernel: int = 5,
    kernel: int = 3,
    batch_norm: bool = True,
    residual: bool = False,
    repeat: int = 1,
) -> Any:
    x = net.conv(x, "conv1", widths[0], first_kernel, strides[0], first_kernel // 2, bias=not batch_norm)
    x = net.relu(net.norm(x, "norm1") if batch_norm else x)
    steps = zip(widths[:-1], widths[1:], strides[1:], strict=True)
    for number, (inputs, outputs, stride) in enumerate(steps, 2):
        name, same = f"block{number}", stride == 1 and inputs == outputs
        times = repeat if same else 1
        norm = batch_norm and times == 1
        for _ in range(times):
            inner = net.conv(
                x, f"{name}.depthwise", inputs, kernel, stride, kernel // 2, bias=False, depthwise=True
            )
            inner = net.conv(inner, f"{name}.pointwise", outputs, 1, bias=not norm)
            inner = net.relu(net.norm(inner, f"{name}.norm") if norm else inner)
            x = net.add(x, inner) if residual and same else inner
    return net.linear(net.mean(x), "fc", num_classes)


def cifar_resnet(
    net: Layers,
    x: Any,
    num_classes: int,
    *,
    depth: int = 20,
    channels: tuple[int, int, int, int] = (16, 16, 32, 64),
) -> Any:
    inputs = channels[0]
    x = net.relu(net.norm(net.conv(x, "conv1", inputs, 3, padding=1, bias=False), "bn1"))
    for layer, outputs in enumerate(channels[1:], 1):
        for block in range((depth - 2) // 6):
            name, stride = f"layer{layer}.{block}", 2 if layer > 1 and block == 0 else 1
            inner = net.conv(x, f"{name}.conv1", outputs, 3, stride, 1, bias=False)
            inner = net.relu(net.norm(inner, f"{name}.bn1"))
            inner = net.norm(
                net.conv(inner, f"{name}.conv2", outputs, 3, padding=1, bias=False), f"{name}.bn2"
            )
            if stride != 1 or inputs != outputs:
                x = net.conv(x, f"{name}.shortcut.0", outputs, 1, stride, bias=False)
                x = net.norm(x, f"{name}.shortcut.1")
            x, inputs = net.relu(net.add(inner, x)), outputs
    return net.linear(net.mean(x), "fc", num_classes)


def cifar_vgg(net: Layers, x: Any, num_classes: int, *, depth: int = 8) -> Any:
    for layer, (outputs, times) in enumerate(zip((64, 128, 256, 512, 512), _VGG[depth], strict=True), 1):
        x = net.max_pool(x) if layer in (2, 3, 4) else x
        for number in range(times):
            x = net.conv(x, f"layer{layer}.{3 * number}", outputs, 3, padding=1)
            x = net.relu(net.norm(x, f"layer{layer}.{3 * number + 1}"))
    return net.linear(net.mean(x), "fc", num_classes)


def wide_resnet(net: Layers, x: Any, num_classes: int, *, depth: int = 16, widen: int = 2) -> Any:
    x, inputs = net.conv(x, "conv1", 16, 3, padding=1, bias=False), 16
    for layer, outputs in enumerate((16 * widen, 32 * widen, 64 * widen), 1):
        for block in range((depth - 4) // 6):
            name, stride = f"layer{layer}.{block}", 2 if layer > 1 and block == 0 else 1
            active = net.relu(net.norm(x, f"{name}.bn1"))
            inner = net.conv(active, f"{name}.conv1", outputs, 3, stride, 1, bias=False)
            inner = net.relu(net.norm(inner, f"{name}.bn2"))
            inner = net.conv(inner, f"{name}.conv2", outputs, 3, padding=1, bias=False)
            if inputs != outputs:
                x = net.conv(active, f"{name}.shortcut", outputs, 1, stride, bias=False)
            x, inputs = net.add(inner, x), outputs
    return net.linear(net.mean(net.relu(net.norm(x, "bn1"))), "fc", num_classes)


def airbench(
    net: Layers, x: Any, num_classes: int, *, first: int = 24, widths: tuple[int, int, int] = (32, 96, 128)
) -> Any:
    x = net.gelu(net.conv(x, "first", first, 2))
    for number, outputs in enumerate(widths, 1):
        name = f"group{number}"
        x = net.max_pool(net.conv(x, f"{name}.conv1", outputs, 3, padding=1, bias=False))
        x = net.gelu(net.norm(x, f"{name}.norm1"))
        x = net.conv(x, f"{name}.conv2", outputs, 3, padding=1, bias=False)
        x = net.gelu(net.norm(x, f"{name}.norm2"))
    return net.linear(net.scale(net.amax(x), 1 / 9), "fc", num_classes, bias=False)


def lstm(
    net: Layers,
    x: Any,
    num_classes: int,
    *,
    hidden: int = 128,
    num_layers: int = 1,
    bidirectional: bool = False,
) -> Any:
    return net.linear(net.recurrent(x, "lstm", "lstm", hidden, num_layers, bidirectional), "fc", num_classes)


def gru(
    net: Layers,
    x: Any,
    num_classes: int,
    *,
    hidden: int = 128,
    num_layers: int = 1,
    bidirectional: bool = False,
) -> Any:
    return net.linear(net.recurrent(x, "gru", "gru", hidden, num_layers, bidirectional), "fc", num_classes)
