"""Builds a recipe's networks and loads checkpoints of any origin: finds the network's tensors in a file."""

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from typing_extensions import TypedDict

from trainer.compression.states import restore
from trainer.mistakes import Mistake
from trainer.networks import features
from trainer.networks.build import build, build_entry
from trainer.networks.build import spec as spec_of
from trainer.recipe.keys import ModelKeys
from trainer.recipe.wheels import WHEELS, wheel_name
from trainer.storage import records
from trainer.storage.files import read_bytes
from trainer.storage.weights_file import PICKLES, read_file
from trainer.training.wheels import fill_in_order, read_wheel

#: Suffixes of tensors that do not affect a network's output; other tools add some of them.
COUNTERS = ("num_batches_tracked", "total_ops", "total_params")
#: Settings that stages change: the network is rebuilt with those that our own checkpoint records.
CHANGED_BY_STAGES = ("resized", "batch_norm", "folded", "biased", "maps")
SHOWN = 5  # names that a message lists


class About(TypedDict, total=False):
    """What our own checkpoints record about a network and its images."""

    net: dict[str, Any] | None
    mean: list[float]
    std: list[float]
    classes: list[str]


class Made(NamedTuple):
    """A network and facts about it.

    Attributes:
        network: The network.
        spec: The settings that rebuild it.
        facts: What our own checkpoint records about its images ("mean", "std", "classes" ...), {} for other
            files.
        notes: Lines for the user about how it was loaded.
        new_head: Whether its classifier is new, and zero.
    """

    network: nn.Module
    spec: dict[str, Any]
    facts: dict[str, Any]
    notes: list[str]
    new_head: bool = False


class Fit(NamedTuple):
    """One way to fill a network from a file.

    label: the prefix in the file ("state_dict.student."). tensors: {the network's key: the file's tensor}.
    """

    label: str
    tensors: dict[str, Tensor]


def create(
    keys: ModelKeys,
    shape: tuple[int, int, int],
    num_classes: int,
    new_head: bool = False,
    where: str = "network",
) -> Made:
    """Builds the network of a recipe's entry and loads its checkpoint, if it has one.

    Args:
        keys: The recipe's entry.
        shape: (C, H, W) of the data's images; a teacher's `resize` overrides H and W.
        num_classes: The number of classes.
        new_head: Whether a checkpoint with other classes is allowed. The classifier is then zero, to be
            trained.
        where: The network's name in messages.

    Raises:
        Mistake: When it cannot be built, or the checkpoint does not fit it.
    """
    shape = input_shape(keys, shape)
    spec, network = spec_of(keys), build_entry(keys, shape, num_classes)
    if keys.checkpoint is None:
        return Made(network, spec, {}, [])
    made = load_weights(
        network, spec, shape, num_classes, keys.checkpoint, keys.prefix, keys.use_ema, new_head
    )
    return made._replace(notes=[f"{where}: {note}" for note in made.notes])


def input_shape(keys: ModelKeys, shape: tuple[int, int, int]) -> tuple[int, int, int]:
    """Returns (C, H, W) of the input of a recipe's network, for data of `shape`: a teacher's `resize` overrides H and W."""
    size = getattr(keys, "resize", None)
    return (shape[0], size, size) if size else shape


def load_weights(
    network: nn.Module,
    spec: Mapping[str, Any],
    shape: tuple[int, int, int],
    num_classes: int,
    path: Path,
    prefix: str | None = None,
    use_ema: bool = False,
    new_head: bool = False,
) -> Made:
    """Loads a checkpoint into the network, or into a rebuilt network if a stage had changed its sizes.

    The whole file is searched for weights, under any prefix. They are loaded if all keys and shapes are the
    network's. Counters may be missing or extra, and so may keys outside the prefix.

    Args:
        network: The network to fill.
        spec: The settings that rebuild it.
        shape: (C, H, W) of its input.
        num_classes: The number of classes.
        path: A safetensors file, a pickle of tensors and plain values, a packed file, or wheel:NAME.
        prefix: Selects one of several networks in the file.
        use_ema: Whether averaged weights (EMA) are loaded. Without it, only a prefix that names them does so.
        new_head: Whether the checkpoint may have other classes. The classifier is then zero.

    Raises:
        Mistake: With the file's name, when no network or more than one network in it fits.
    """
    wheel = wheel_name(path)
    if wheel is not None:
        content, about = read_wheel(wheel, spec["model"])
        classifier = set(head_keys(network))
        new = fill_in_order(network, content, path, classifier if new_head else set(), shape[0] == 1)
        if new:
            zero_head(network)
        return Made(network, dict(spec), about, [_on_new_head(path, classifier)] if new else [], bool(new))
    content, about = _content(path)
    recorded = about.get("net") or {}
    spec = dict(spec)
    if recorded != spec and by_author(recorded) == by_author(spec):
        spec = dict(recorded)
        network = build(spec, shape, num_classes)
    if any(key.endswith((".0.mask", ".0.codes")) for key in content if isinstance(key, str)):
        try:
            restore(network, content)  # our own compressed student: pruned weights stay pruned
        except Mistake as error:
            raise Mistake(f"{path}: {_short(str(error))}") from None
        return Made(network, spec, about, [])
    groups = dict(_groups(content))
    if not groups:
        found = ", ".join(f"{key!r} ({type(v).__name__})" for key, v in list(content.items())[:SHOWN])
        raise Mistake(f"{path}: no weights found; it holds {found or 'nothing'}")
    own = network.state_dict()
    notes: list[str] = []
    fits = _chosen(list(_fits(own, groups)), path, prefix, use_ema)
    if not fits and new_head:
        classifier = set(head_keys(network))
        kept = {key: tensor for key, tensor in own.items() if key not in classifier}
        fits = _chosen(list(_fits(kept, groups, classifier)), path, prefix, use_ema)
        if fits:
            zero_head(network)
            notes = [_on_new_head(path, classifier)]
    if not fits:
        raise Mistake(f"{path}: does not fit the network: {_misfit(network, own, groups, prefix)}")
    network.load_state_dict({**network.state_dict(), **fits[0].tensors})
    return Made(network, spec, about, notes, new_head=bool(notes))


def _on_new_head(path: Path, classifier: set[str]) -> str:
    return f"{path}: has another classifier; new, from zero: {', '.join(sorted(classifier))}"


def head_keys(network: nn.Module) -> list[str]:
    """Returns the keys of the classifier's weights."""
    own = {id(p) for classifier in features.classifiers(network) for p in classifier.parameters()}
    return [key for key, p in network.named_parameters(remove_duplicate=False) if id(p) in own]


@torch.no_grad()
def zero_head(network: nn.Module) -> None:
    """Sets the classifier to zero in place, so that first gradients do not reach the pretrained layers."""
    for classifier in features.classifiers(network):
        for module in classifier.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                for parameter in module.parameters():
                    parameter.zero_()


def _content(path: Path) -> tuple[Mapping[Any, Any], dict[str, Any]]:
    """Reads a file; returns its content, and the facts in our own files ("net", "mean", "std" ...)."""
    path = Path(path)
    if path.suffix == ".tiny":
        # Imported here, so that reading a recipe, which imports this module, does not import the packing.
        from trainer.packing import network as packed

        return packed.tensors(read_bytes(path), str(path))
    if path.suffix not in (".safetensors", *PICKLES):
        allowed = f".safetensors, .tiny, {', '.join(PICKLES)}"
        raise Mistake(f"{path}: got a file ending in {path.suffix!r}; allowed: {allowed}")
    content, metadata = read_file(path)
    if not isinstance(content, Mapping):
        raise Mistake(f"{path}: no weights found; it holds a {type(content).__name__}")
    about = records.parsed(metadata.get("facts", "{}"), f"{path}: what it records of itself", About)
    if len(about.get("mean") or ()) != len(about.get("std") or ()):
        raise Mistake(f"{path}: what it records of itself is damaged: mean and std differ in length")
    return content, about


def recorded(path: Path) -> dict[str, Any]:
    """Returns what a checkpoint of this program, or a known wheel, says of its images ("shape", "mean" ...); {} for others."""
    wheel = wheel_name(path)
    if wheel is not None:
        return dict(WHEELS[wheel].facts) if wheel in WHEELS else {}
    return _content(path)[1] if Path(path).suffix in (".safetensors", ".tiny") else {}


def by_author(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings that the user gives, without those that stages change."""
    return {key: value for key, value in spec.items() if key not in CHANGED_BY_STAGES}


def _groups(
    content: Mapping[Any, Any], path: str = "", above: tuple = ()
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yields (path in the file, tensors by name) of every mapping in a file that has named tensors."""
    tensors = {key: value.detach() for key, value in content.items() if isinstance(value, Tensor)}
    if tensors and all(isinstance(key, str) for key in tensors):
        yield path, tensors
    for key, value in content.items():
        # A dict of a pickle may contain itself.
        if (
            isinstance(value, Mapping)
            and isinstance(key, str)
            and all(value is not a for a in (content, *above))
        ):
            yield from _groups(value, f"{path}{key}.", (*above, content))


def _fits(
    own: Mapping[str, Tensor], groups: Mapping[str, Mapping[str, Tensor]], ignored: set[str] | None = None
) -> Iterator[Fit]:
    """Yields every way to fill the keys from a group of tensors. ignored: keys that it may also have."""
    for where, tensors in groups.items():
        prefixes = _prefixes(own, tensors)
        needed = [key for key in own if not key.endswith(COUNTERS)]
        common = set.intersection(*(prefixes[key] for key in needed)) if needed else set()
        for prefix in sorted(common):
            if not _extras(own, tensors, [prefix], ignored):
                yield Fit(where + prefix, _taken(own, tensors, dict.fromkeys(needed, prefix), prefix))
        if not common:
            yield from _in_two_parts(own, tensors, prefixes, needed, where, ignored)


def _in_two_parts(own, tensors, prefixes, needed, where, ignored) -> Iterator[Fit]:
    """Yields the way to fill a backbone and a head that have different prefixes in the file."""
    holders: dict[str, set[str]] = defaultdict(set)
    for key in needed:
        for prefix in prefixes[key]:
            holders[prefix].add(key)
    if not holders:
        return
    first = max(sorted(holders), key=lambda prefix: len(holders[prefix]))
    rest = [key for key in needed if key not in holders[first]]
    seconds = [prefix for prefix in holders if holders[prefix].issuperset(rest)]
    if not first or len(seconds) != 1 or _extras(own, tensors, [first, *seconds], ignored):
        return
    by_key = {key: first if key in holders[first] else seconds[0] for key in needed}
    yield Fit(f"{where}{first}", _taken(own, tensors, by_key, first))


def _prefixes(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> dict[str, set[str]]:
    """Returns the prefixes under which the file has each key, with the network's shape."""
    found: dict[str, set[str]] = {key: set() for key in own}
    for key, tensor in tensors.items():
        parts = key.split(".")
        for start in range(len(parts)):
            name = ".".join(parts[start:])
            if name in own and own[name].shape == tensor.shape:
                found[name].add("".join(f"{part}." for part in parts[:start]))
    return found


def _taken(own, tensors, by_key: dict[str, str], prefix: str) -> dict[str, Tensor]:
    """Returns the file's tensors by the network's keys, with the file's counters under `prefix`."""
    taken = {key: tensors[key_prefix + key] for key, key_prefix in by_key.items()}
    counters = [key for key in own if key not in taken and prefix + key in tensors]
    return taken | {key: tensors[prefix + key] for key in counters}


def _extras(
    own: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor],
    prefixes: list[str],
    ignored: set[str] | None = None,
) -> list[str]:
    """Returns the file's keys under the prefixes that the network does not have."""
    return [
        key
        for key in tensors
        if any(key.startswith(prefix) for prefix in prefixes)
        and not any(
            key[len(p) :] in own or key[len(p) :] in (ignored or ()) for p in prefixes if key.startswith(p)
        )
        and not key.endswith(COUNTERS)
    ]


def _chosen(fits: list[Fit], path: Path, prefix: str | None, use_ema: bool) -> list[Fit]:
    """Returns a list of the only suitable way, or an empty one. Raises Mistake if the recipe must choose."""
    if prefix is not None:
        prefix = prefix.rstrip(".") + "."
        fits = [fit for fit in fits if f".{fit.label}".endswith(f".{prefix}") or fit.label.startswith(prefix)]
    averaged = [fit for fit in fits if re.search(r"(^|[._])ema([._]|$)", fit.label, re.IGNORECASE)]
    plain = [fit for fit in fits if fit not in averaged]
    if use_ema and plain and not averaged:
        raise Mistake(f"{path}: use_ema: true, and the file has no averaged weights (EMA) of this network")
    if averaged and not plain and not use_ema and prefix is None:
        raise Mistake(
            f"{path}: has only averaged weights (EMA) of this network: say use_ema: true to take them"
        )
    fits = averaged if use_ema else plain or averaged
    if len(fits) > 1:
        labels = " and ".join(repr(fit.label or "''") for fit in fits[:SHOWN])
        raise Mistake(f"{path}: holds several networks that fit: {labels}; choose one with prefix: NAME")
    return fits


def _misfit(
    network: nn.Module, own: Mapping[str, Tensor], groups: Mapping[str, Mapping[str, Tensor]], prefix
) -> str:
    """Describes the first differing keys of the most similar group of tensors, and the likely cause."""
    best: Mapping[str, Tensor] = {}
    best_prefix, common = "", -1
    for tensors in groups.values():
        counts: dict[str, int] = defaultdict(int)
        for key in tensors:
            parts = key.split(".")
            for start in range(len(parts)):
                if ".".join(parts[start:]) in own:
                    counts["".join(f"{part}." for part in parts[:start])] += 1
        under = max(sorted(counts), key=counts.__getitem__, default="")
        if counts.get(under, 0) > common:
            best, best_prefix, common = tensors, under, counts.get(under, 0)
    in_file = {key.removeprefix(best_prefix): t for key, t in best.items() if key.startswith(best_prefix)}
    missing = [key for key in own if key not in in_file and not key.endswith(COUNTERS)]
    extra = [key for key in in_file if key not in own and not key.endswith(COUNTERS)]
    other = [key for key in own if key in in_file and own[key].shape != in_file[key].shape]
    messages = []
    if other:
        shapes = [
            f"{key} {'x'.join(map(str, in_file[key].shape))} for {'x'.join(map(str, own[key].shape))}"
            for key in other
        ]
        messages.append(f"other shapes in the file: {_few(shapes)}")
    if missing:
        messages.append(f"not in the file: {_few(missing)}")
    if extra:
        messages.append(f"only in the file: {_few(extra)}")
    return f"{'; '.join(messages)}. {_cause(network, own, missing, extra, other, prefix)}"


def _cause(network, own, missing, extra, other, prefix) -> str:
    """Returns the likely cause of a misfit.

    missing, extra, other: keys that are not in the file, only in the file, or have other shapes.
    """
    try:
        classifier = set(head_keys(network))
    except Mistake:
        classifier = set()
    if other and not missing and not extra and set(other) <= classifier:
        return "Likely cause: it was taught other classes; with a stage train for this network its head starts new"
    if len(missing) > len(own) / 2:
        return "Likely cause: it is another network's file, or prefix names another part of it"
    if other and not missing and not extra:
        return "Likely cause: another width, or another size of images"
    return "Likely cause: another variant of this network, or other settings"


def _few(names: list[str]) -> str:
    """Joins the first names and the number of the others."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _short(text: str) -> str:
    """Cuts a text to at most 240 characters."""
    return text if len(text) <= 240 else text[:237] + "..."
