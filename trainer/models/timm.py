"""Any architecture of timm (Wightman, PyTorch Image Models): `model: timm/resnet18`, or `hf-hub:NAME` from the hub."""

from typing import Any

from pydantic import NonNegativeFloat, PositiveInt
from torch import nn

from trainer.mistakes import Mistake


def timm(
    input_shape: tuple[int, int, int],
    num_classes: int,
    name: str,
    /,  # the model's name alone says it: a file's settings must not name code
    *,
    pretrained: bool = False,
    img_size: PositiveInt | None = None,
    drop_rate: NonNegativeFloat = 0.0,
    drop_path_rate: NonNegativeFloat | None = None,
    options: dict[str, Any] = {},
) -> nn.Module:
    """Builds the timm network `name` for `num_classes` classes and images of `input_shape`'s channels.

    Args:
        pretrained: Whether to load weights from the hub (needs internet access).
        img_size: Side of the images in pixels, for architectures that must know it (ViT).
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth, where the architecture has it.
        options: Further arguments of `timm.create_model`.

    Raises:
        Mistake: For an unknown name, and for options that repeat the recipe's own keys.
        RuntimeError: If the weights cannot be fetched.
    """
    from timm import (  # imported here: it takes seconds, and most runs have no timm network
        create_model,
        is_model,
    )

    if not name.startswith("hf-hub:") and not is_model(name.split(".")[0]):
        raise Mistake(f"timm has no model {name!r}")
    own = {
        "in_chans",
        "num_classes",
        "pretrained",
        "pretrained_cfg",
        "pretrained_cfg_overlay",
        "checkpoint_path",
        "cache_dir",
    }
    if own & set(options):
        raise Mistake(
            f"timm: options holds {', '.join(sorted(own & set(options)))}; the recipe's own keys say that"
        )
    settings = dict(options, in_chans=input_shape[0], num_classes=num_classes, drop_rate=drop_rate)
    if img_size is not None:
        settings["img_size"] = img_size
    if drop_path_rate is not None:
        settings["drop_path_rate"] = drop_path_rate
    return create_model(name, pretrained=pretrained, **settings)
