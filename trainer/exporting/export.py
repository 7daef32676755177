"""Exports a network to several targets: checks all first, writes each aside, proves it, and only then puts it in place."""

import copy
import shutil
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from trainer.compression.states import bake
from trainer.data.batches import make_data
from trainer.exporting.graph import OPS, Graph
from trainer.exporting.proof import prove
from trainer.exporting.subject import NO_DATA, NotInstalled, Subject
from trainer.exporting.tracing import trace
from trainer.mistakes import Mistake
from trainer.recipe.recipe import read, targets_of
from trainer.recipe.shelves import beside, find, own_settings
from trainer.recipe.targets import ExportKeys
from trainer.storage.files import PARTIAL


def subject_of(network: nn.Module, shape: Sequence[int], **facts: Any) -> Subject:
    """Returns a network as the subject of exports; the network is unchanged. facts: further arguments of `Subject`.

    Raises Mistake for images of no known size, and for an operator that cannot be exported, with its layer's name.
    """
    if len(shape) != 3:
        raise Mistake(
            f"shape: got {tuple(shape)}; an export needs the images' (channels, height, width), and the file has none"
        )
    try:
        copied = copy.deepcopy(network)
    except RuntimeError as error:  # torch copies no tensor that an operation has made with gradients
        raise Mistake(
            f"the network keeps a tensor of an earlier call: call it inside torch.no_grad() before ({error})"
        ) from None
    plain = bake(copied).cpu().eval().requires_grad_(False)
    channels, height, width = shape
    return Subject(plain, trace(plain, shape), (channels, height, width), **facts)


def check(targets: Iterable[ExportKeys], graph: Graph, has_data: bool) -> None:
    """Raises Mistake for the first target that cannot write the graph, or that needs data where there is none.

    And for weights that are not finite; a constant may be infinite, as a mask is.
    """
    for node in graph.nodes:
        for role, name in node.weights.items():
            if not np.isfinite(graph.weights[name]).all():
                raise Mistake(f"layer {node.layer!r}: its {role} has numbers that are infinite or NaN")
    for target in targets:
        function = find("to", target.to)
        able = beside(function, "OPS") or OPS
        for node in graph.nodes:
            if node.op not in able:
                raise Mistake(
                    f"to {target.to}: layer {node.layer!r}: operator {node.op} cannot be written for this target"
                )
        if beside(function, "NEEDS_DATA") and not has_data:
            raise Mistake(f"to {target.to}: {NO_DATA}")
        own = beside(function, "check_graph")
        if own is not None:
            own(target, graph)


def export_all(
    subject: Subject, targets: Sequence[ExportKeys], folder: Path, force: bool = False
) -> tuple[list[dict[str, Any]], list[str]]:
    """Exports a subject to all targets, each into its own folder below `folder`.

    Args:
        subject: The network.
        targets: Entries of the exports shelf.
        folder: Where the folders of the targets are made.
        force: Whether earlier exports of these names are replaced; each is kept until the new one is proven.

    Returns:
        The row of each target, as `prove` returns it, with "stage" and "target" (names), "file_bytes", "files", "notes",
        "shows_images", "seconds"; and a sentence for each target whose program or package is not installed.

    Raises:
        Mistake: For what no target may do: nothing is then written.
        RuntimeError: For an export whose answers are not the student's. Its files are removed.
    """
    check(targets, subject.graph, subject.data is not None)
    for target in targets:
        own = beside(find("to", target.to), "check_subject")
        if own is not None:
            own(target, subject)
        here = folder / target.label
        if here.exists() and not force:
            raise Mistake(f"{here}: is there already; --force (in Python force=True) replaces it")
    rows, missing = [], []
    for target in targets:
        started = time.monotonic()
        try:
            row = _export(subject, target, folder)
        except NotInstalled as error:
            missing.append(f"to {target.label}: {error}")
            continue
        rows.append(row | {"seconds": time.monotonic() - started})
    return rows, missing


def _export(subject: Subject, target: ExportKeys, folder: Path) -> dict[str, Any]:
    name = target.label
    folder.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f"{PARTIAL}{name}-", dir=folder))
    try:
        exported = find("to", target.to)(subject, aside, **own_settings(target, ExportKeys))
        try:
            found = prove(subject, exported)
        except RuntimeError as error:
            raise RuntimeError(f"export to {name}: {error}; its files are removed") from error
        notes = exported.notes + ([] if exported.verdict is None else [exported.verdict(found)])
        files = [str(file.relative_to(aside)) for file in exported.files]
        _put_in_place(aside, folder / name)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return {
        "stage": name,
        "target": target.to,
        "file_bytes": exported.num_bytes,
        "files": files,
        "notes": notes,
        "shows_images": exported.shows_images,
        **found,
        **exported.numbers,
    }


def _put_in_place(made: Path, where: Path) -> None:
    """Renames a folder, and removes the one that has the name so far."""
    old = where.with_name(f"{PARTIAL}old-{where.name}")
    shutil.rmtree(old, ignore_errors=True)
    if where.exists():
        where.rename(old)
    made.chmod(0o755)  # mkdtemp makes it private
    made.rename(where)
    shutil.rmtree(old, ignore_errors=True)


def export(
    network: nn.Module,
    folder: str | Path,
    to: str | Sequence[Any] = "onnx",
    *,
    shape: Sequence[int],
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
    classes: Sequence[str] = (),
    recipe: str | Path | None = None,
    force: bool = False,
    allow_python: bool = False,
) -> list[dict[str, Any]]:
    """Exports any network to where it must run; returns a row of numbers for each target.

    Args:
        network: The network; masks and codebooks are welcome. It is unchanged.
        folder: A folder of each target's name is made in it.
        to: A name of the exports shelf, or several; {"to": name, settings} gives settings.
        shape: (C, H, W) of the images.
        mean: Of the images' normalisation, for each channel; () if the network takes images in [0, 1].
        std: Likewise.
        classes: Names of the classes.
        recipe: A recipe, on whose test images the exports are proven; without it 256 random images are taken.
        force: Whether earlier exports are replaced.
        allow_python: Whether targets and the recipe may name `python:module:name`.

    Raises:
        Mistake: For what cannot be exported, and, at the end, for targets whose program or package is not installed.
        RuntimeError: For an export that does not answer as the network does.
    """
    targets = targets_of(to, allow_python)
    data = None
    if recipe is not None:
        keys = read(recipe, None, allow_python)[0].data
        data = make_data(keys.model_copy(update={"keep_views": False}), torch.device("cpu"))
        if tuple(data.shape) != tuple(shape):
            raise Mistake(f"{recipe}: its images are {tuple(data.shape)}, and shape is {tuple(shape)}")
        mean, std, classes = mean or data.mean, std or data.std, classes or data.classes
    subject = subject_of(network, shape, mean=mean, std=std, classes=classes, data=data)
    rows, missing = export_all(subject, targets, Path(folder), force)
    if missing:
        raise NotInstalled("\n".join(missing))
    return rows
