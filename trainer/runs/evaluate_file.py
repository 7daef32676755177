"""Measures a packed file on the data of a recipe."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from trainer.data.batches import make_data
from trainer.data.images import Data
from trainer.mistakes import Mistake
from trainer.networks.build import build, spec
from trainer.packing import network as packed
from trainer.recipe.keys import Recipe
from trainer.recipe.recipe import read
from trainer.recipe.stages import largest_batch
from trainer.runs.opening import accelerator_of, set_kernels
from trainer.storage.files import read_bytes
from trainer.storage.weights_file import digest
from trainer.training.evaluate import normalized, percent_right, predict
from trainer.training.weights import by_author


def evaluate_file(
    file: Path, path: Path, changes: dict[str, Any] | None = None, allow_python: bool = False
) -> dict[str, Any]:
    """Decodes a packed file and measures it on the test split of a recipe's data.

    Args:
        file: The packed file.
        path: The recipe's file, or the bare name of a shipped one.
        changes: {'data.subset': 5000, ...}.
        allow_python: Whether the recipe may name `python:module:name`, whose code then runs.

    Returns:
        "top1" (percent; NaN without labels), "images" (their number), "digest" (of the weights), "file_bytes".

    Raises:
        RecipeError: For a faulty recipe.
        Mistake: For a file that cannot be read, or that was made for other images.
    """
    recipe, _ = read(path, changes, allow_python)
    content, model, header = opened(file, recipe)
    # The same arithmetic as in the run that measured the file.
    accelerator = accelerator_of(mixed_precision=recipe.precision)
    set_kernels(recipe)
    data = images_of(file, header, recipe, path, accelerator.device)
    model.to(accelerator.device)
    answers = predict(normalized(model, data), data.test, accelerator)
    return {
        "top1": percent_right(answers, data.test.labels),
        "images": len(data.test),
        "digest": digest(model.state_dict()),
        "file_bytes": len(content),
    }


def opened(file: Path, recipe: Recipe | None) -> tuple[bytes, nn.Module, dict[str, Any]]:
    """Returns a packed file's bytes, network and facts.

    recipe: builds a network of somebody else's code, which the file itself may not name. Raises Mistake for a file that cannot
    be read.
    """
    content = read_bytes(file)
    header = packed.header(content, str(file))
    into = None
    net = header.get("net")
    if (
        recipe is not None
        and net
        and not packed.rebuilds(header)
        and by_author(net) == by_author(spec(recipe.student))
    ):
        # The recipe, not the file, decides which code runs; what stages changed of the network is the file's.
        into = build(net, tuple(header["shape"]), len(header["classes"]))
    model, header = packed.decode(content, str(file), into)
    return content, model, header


def images_of(
    file: Path, header: dict[str, Any], recipe: Recipe, path: Path | None, device: torch.device
) -> Data:
    """Returns the images of a recipe for a packed file. Raises Mistake if the file was made for others.

    A student that the recipe loads has the normalisation that it was known to have when the run began. Mean and std of the
    images are sums, whose last bits depend on the number of threads: those of the file are taken.
    """
    keys = recipe.data.model_copy(update={"keep_views": False})  # the training images are not used here
    data = make_data(keys, device)
    data.measure_at_once(largest_batch(recipe.stages) or data.test.at_once)
    loaded = recipe.student.checkpoint is not None or getattr(recipe.student, "pretrained", False)
    own, kept = (*data.mean, *data.std), (*header["mean"], *header["std"])
    alike = len(own) == len(kept) and np.allclose(own, kept, rtol=1e-6, atol=0)
    if alike or (loaded and keys.mean is None and keys.std is None):
        data.mean, data.std = tuple(header["mean"]), tuple(header["std"])
    other = [key for key, fact in packed.facts_of(data).items() if header[key] != fact]
    if other:
        raise Mistake(
            f"{file}: was made for other images ({', '.join(other)} differ) than the data of {path}"
        )
    return data
