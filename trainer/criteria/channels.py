from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field, PositiveInt
from torch import Tensor, nn

from trainer.compression.channels import INSTALL, installed, refuse_unknown, remove
from trainer.compression.masks import set_mask
from trainer.compression.states import bake
from trainer.compression.weights import choose, per_layer, weights_of
from trainer.mistakes import Mistake
from trainer.recipe.keys import PER_LAYER

SCHEDULES = ("once",)

Sparsity = Annotated[float, Field(gt=0, lt=1)]


def check(_settings) -> None:
    if not installed():
        raise Mistake(INSTALL)


def check_student(_settings, student: nn.Module) -> None:
    refuse_unknown(student)


def channels(
    student: nn.Module,
    images: Tensor,
    exclude: Sequence[str],
    *,
    sparsity: Annotated[Sparsity | dict[str, Sparsity], PER_LAYER],
    scope: Literal["layer", "global"] = "layer",
    multiple: PositiveInt = 1,
) -> dict[str, list[int]]:
    """Removes whole channels, those of the least L2 norm: layers really become smaller. Needs the package torch-pruning.

    The classifier's outputs and the masks of earlier stages stay. Returns {layer: new size} of the changed layers.
    Fang et al. 2023, "DepGraph: Towards Any Structural Pruning".

    sparsity: fraction of the channels that are removed. scope: whether channels are ranked within each group of
    coupled layers (`layer`) or over the whole network (`global`). multiple: the channels that stay are a multiple of this,
    about as many as asked; runtimes compute 8 or 16 at a time, and can be slower with fewer channels that are no multiple.
    Raises Mistake for layers that it cannot make smaller.
    """
    layers = weights_of(student)
    masked = [name for name, weight in layers.items() if weight.mask is not None]
    classifier = list(layers)[-1]
    smaller = {name: weight for name, weight in choose(layers, exclude).items() if name != classifier}
    if not smaller:
        raise Mistake("exclude leaves no layer whose channels can be removed (the classifier's stay)")
    if isinstance(sparsity, dict):
        asked = per_layer(choose(layers, exclude), sparsity, "sparsity")
        sparsity = {name: asked[name] for name in smaller}
    bake(student)
    found = remove(
        student,
        images,
        sparsity,
        [name for name in layers if name not in smaller],
        together=scope == "global",
        multiple=multiple,
    )
    for name, weight in weights_of(student).items():
        if name in masked:
            set_mask(weight, weight.value != 0)
    return found
