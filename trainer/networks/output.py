"""Networks that return several outputs, and which of these is the answer.

Some networks return a tuple, a dict or an object with named outputs (GoogLeNet while it trains, Hugging Face's models).
`output` in the network's entry of a recipe, a number or a name, says which is the answer. A forward hook takes it, so
training, evaluation and packed files all get it, and the network's weights keep their names.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from trainer.mistakes import Mistake


class TakesOutput:
    """A forward hook that replaces several outputs by one of them; a tensor alone stays as it is.

    output: the answer's number or name. taken: whether the network has returned several outputs since it was built.
    """

    def __init__(self, output: int | str) -> None:
        self.output, self.taken = output, False

    def __call__(self, _module: nn.Module, _inputs: Any, outputs: Any) -> Any:
        self.taken |= not isinstance(outputs, Tensor)
        return one_of(outputs, self.output)


def one_of(outputs: Any, output: int | str) -> Any:
    """Returns the output of that number or name among several; a tensor alone as it is. Raises Mistake if there is none."""
    if isinstance(outputs, Tensor):
        return outputs
    named = _named(outputs)
    if isinstance(output, int) and output < len(named):
        return list(named.values())[output]
    if output in named:
        return named[output]
    raise Mistake(f"output: there is no {output!r} in what the network returns: {described(outputs)}")


def take_output(model: nn.Module, output: int | str | None) -> None:
    """Makes a network return one of its outputs, in place; None changes nothing.

    timm's networks with a distillation token (DeiT, LeViT) then return one tensor for each of their two classifiers while
    they train, and the mean of both otherwise.
    """
    if output is not None and hook_of(model) is None:
        model.register_forward_hook(TakesOutput(output))
        answering: Any = model
        if hasattr(model, "set_distilled_training"):
            answering.set_distilled_training(True)


def hook_of(model: nn.Module) -> TakesOutput | None:
    """Returns the hook that takes one of a network's outputs, None without one."""
    return next((hook for hook in model._forward_hooks.values() if isinstance(hook, TakesOutput)), None)


def answer(model: nn.Module, outputs: Any) -> Any:
    """Returns the answer among outputs that were not computed by calling the network itself (timm's `forward_head`)."""
    hook = hook_of(model)
    return outputs if hook is None else hook(model, (), outputs)


def described(outputs: Any) -> str:
    """Returns the type of what a network returns, and the names and shapes of its outputs."""
    if isinstance(outputs, Tensor):
        return f"a tensor {_shape(outputs)}"
    named = _named(outputs)
    shown = ", ".join(f"{name}: {_shape(value)}" for name, value in list(named.items())[:5])
    return f"{type(outputs).__name__} ({shown})" if shown else type(outputs).__name__


def _named(outputs: Any) -> dict[int | str, Any]:
    """Returns several outputs by name; by number where they have none."""
    if isinstance(outputs, Mapping):
        return dict(outputs)
    if hasattr(outputs, "_fields"):
        return outputs._asdict()
    if dataclasses.is_dataclass(outputs):
        return {field.name: getattr(outputs, field.name) for field in dataclasses.fields(outputs)}
    if isinstance(outputs, tuple | list):
        return dict(enumerate(outputs))
    return {
        name: value for name, value in getattr(outputs, "__dict__", {}).items() if isinstance(value, Tensor)
    }


def needs_logits(who: str, outputs: Any, num_classes: int) -> str:
    """Returns the message for a network whose outputs are not logits [N, num_classes].

    who: the network and what it does, such as 'the student gives'.
    """
    cure = "" if isinstance(outputs, Tensor) else "; output: NUMBER or NAME in its entry says which they are"
    return f"{who} {described(outputs)}; logits [N, {num_classes}] are needed{cure}"


def _shape(value: Any) -> str:
    return "x".join(map(str, value.shape)) if isinstance(value, Tensor) else type(value).__name__
