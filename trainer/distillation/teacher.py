"""The teacher, of one network or several, and the copy of its layers into a student."""

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from trainer.compression.states import dense_state
from trainer.data.images import Data, in_size, normalize
from trainer.distillation import cpu, gpu
from trainer.networks import features
from trainer.networks.build import build, spec
from trainer.networks.features import Seen
from trainer.recipe.keys import TeacherKeys
from trainer.storage.weights_file import digest


class Member(NamedTuple):
    """One network of a teacher: its spec, its input, and its weight among several.

    mean, std: its normalisation, None for the data's. size: side of its images in pixels, None for the data's.
    classes: what its outputs were as the recipe says it, before they were put in the data's order.
    """

    spec: dict[str, Any]
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    size: int | None
    weight: float
    classes: list[str | int] | None = None


class Teacher:
    """The network (or networks) that the student learns from. Not an `nn.Module`, so it is not trained, wrapped or saved.

    Maps and embeddings are those of the first network.

    A library's order of summation depends on how many images it gets, and on a CPU not on which. With `at_once` images
    in every forward pass the answer to an image has the same bits in whatever batch it is asked for.

    Args:
        networks: The networks; they are set to evaluation mode and frozen.
        keys: The recipe's entry of each network.
        mean: Of the data's normalisation, for networks without their own.
        std: Of the data's normalisation, likewise.
        combine: How several networks give one answer: `logits` (weighted mean of logits), `probabilities` (log of the
            weighted mean of probabilities), `confidence` (as `probabilities`, but each sample weights a network by
            its highest probability).
        specs: Of each network, what rebuilds it, if that is not what its entry says (removed channels).
        shape: (C, H, W) of the data's images, which networks without `resize` see; None for images as they come.
        filter: With which pictures are resized to its `size`, None for the data's.

    Attributes:
        at_once: Images of each forward pass: larger batches are split, and what is short is filled up. None for batches as
            they come.
    """

    def __init__(
        self,
        networks: Sequence[nn.Module],
        keys: Sequence[TeacherKeys],
        mean: Sequence[float],
        std: Sequence[float],
        combine: str = "logits",
        specs: Sequence[dict[str, Any]] | None = None,
        shape: Sequence[int] | None = None,
        filter: str | None = None,
    ) -> None:
        self.networks = list(networks)
        specs = [spec(k) for k in keys] if specs is None else specs
        self.members = [
            Member(own, k.mean, k.std, k.resize, k.weight, k.classes)
            for own, k in zip(specs, keys, strict=True)
        ]
        self.classifies = all(k.head for k in keys)  # whether its answers are logits of the data's classes
        self.combine = combine
        self.mean, self.std = tuple(mean), tuple(std)
        self.shape = None if shape is None else tuple(shape)
        self.filter = filter
        self.at_once: int | None = None
        self.version = 0  # counts its trainings: answers of an earlier version are outdated
        self._shares: Tensor | None = None  # of the networks in the answer, on the device
        self._ready: list[nn.Module] = []  # the networks that are run: these, or faster copies
        self._ready_for: list = []  # the state of the networks that the copies were made from
        for network in self.networks:
            network.eval().requires_grad_(False)

    @property
    def network(self) -> nn.Module:
        """The first network, whose maps and embeddings losses compare."""
        return self.networks[0]

    @property
    def size(self) -> int | None:
        """The largest side of the images that its networks see, None if all see the data's."""
        return max((member.size for member in self.members if member.size), default=None)

    def images_of(self, data: Data) -> Data:
        """Returns the data as the teacher sees them: read from their pictures at its size, where there are pictures."""
        return data.at_size(self.size, self.filter)

    @property
    def num_bytes(self) -> int:
        """Bytes of all weights and statistics of all its networks, dense."""
        return sum(t.numel() * t.element_size() for n in self.networks for t in n.state_dict().values())

    def to(self, device: torch.device) -> "Teacher":
        """Moves all networks to a device; returns the teacher."""
        for network in self.networks:
            network.to(device)
        self._ready = []
        return self

    def make_ready(self) -> None:
        """Prepares the networks for inference (`cpu.make_ready`, `gpu.make_ready`), again whenever their weights have changed.

        `see` calls this, not the constructor, because a teacher may first be trained.
        """
        if not self._ready or self._state() != self._ready_for:
            half = self._half()
            self._ready = [
                cpu.make_ready(network) if cpu.is_on(network) else gpu.make_ready(network, half)
                for network in self.networks
            ]
            self._ready_for = self._state()

    def _state(self) -> list:
        """Returns a value that changes when the copied networks need new copies."""
        copied = [
            network for network, ready in zip(self.networks, self._ready, strict=True) if ready is not network
        ]
        tensors = [tensor for network in copied for tensor in (*network.parameters(), *network.buffers())]
        return [self.version, self._half(), *((tensor.data_ptr(), tensor._version) for tensor in tensors)]

    def _half(self) -> torch.dtype | None:
        """Returns the half-precision type that a GPU's autocast computes in at present, None outside of autocast."""
        device = next((tensor.device.type for tensor in self.network.parameters()), "cpu")
        if device == "cpu" or not torch.is_autocast_enabled(device):
            return None
        return torch.get_autocast_dtype(device)

    def fingerprint(self) -> str:
        """Returns a hash of everything that its answers depend on, except the code of its networks."""
        facts = [
            (digest(network.state_dict()), member.size, member.mean, member.std, member.weight)
            for network, member in zip(self.networks, self.members, strict=True)
        ]
        return hashlib.sha256(repr((facts, self.combine, self.mean, self.std)).encode()).hexdigest()

    def prepare(self, images: Tensor, number: int = 0) -> Tensor:
        """Returns images [N, C, H, W] in [0, 1] as the input of network `number`: in its size and normalisation.

        The images are the data's, or the same as read at the teacher's `size` (`images_of`).
        """
        member = self.members[number]
        size = (member.size, member.size) if member.size else self.shape and self.shape[1:]
        return normalize(in_size(images, size or None), member.mean or self.mean, member.std or self.std)

    @torch.no_grad()
    def see(self, images: Tensor, layers: Sequence[str] = (), embedding: bool = False) -> Seen:
        """Returns the teacher's logits for images [N, C, H, W] in [0, 1], the maps of `layers`, and the embedding if asked.

        The logits of one that does not classify (`head: false`) mean nothing.
        """
        if not torch.compiler.is_compiling():
            self.make_ready()
        if self.at_once is None or len(images) == self.at_once:
            return self._see(images, layers, embedding)
        parts = []
        for part in images.split(self.at_once):
            filling = part[:1].expand(self.at_once - len(part), *part.shape[1:])
            parts.append(_first(self._see(torch.cat([part, filling]), layers, embedding), len(part)))
        return _joined(parts)

    def _see(self, images: Tensor, layers: Sequence[str], embedding: bool) -> Seen:
        # A layer that is not a block may be missing in the copy without BatchNorm, or return something else there.
        asked = self._ready[0] if set(layers) <= set(features.block_names(self.network)) else self.network
        first = features.see(asked, self.prepare(images), layers, embedding, head=self.classifies)
        if len(self.networks) == 1:
            return first
        rest = [n(self.prepare(images, i)) for i, n in enumerate(self._ready[1:], start=1)]
        return Seen(self._agree([first.logits, *rest]), first.embedding, first.maps)

    def _agree(self, logits: list[Tensor]) -> Tensor:
        weights = self._shares
        if weights is None or weights.device != logits[0].device:
            weights = torch.tensor([member.weight for member in self.members], device=logits[0].device)
            weights = self._shares = (weights / weights.sum())[:, None, None]
        stacked = torch.stack(logits).float()
        if self.combine == "logits":
            return (stacked * weights).sum(0)
        if self.combine == "confidence":
            confidence = stacked.softmax(-1).amax(-1, keepdim=True)
            weights = confidence / confidence.sum(0)
        return torch.logsumexp(stacked.log_softmax(-1) + weights.log(), dim=0)


def _first(seen: Seen, count: int) -> Seen:
    """Returns the results for the first `count` images."""
    embedding = None if seen.embedding is None else seen.embedding[:count]
    return Seen(seen.logits[:count], embedding, {name: map_[:count] for name, map_ in seen.maps.items()})


def _joined(parts: list[Seen]) -> Seen:
    """Returns the results of several forward passes as those of one."""
    if len(parts) == 1:
        return parts[0]
    embeddings = [part.embedding for part in parts if part.embedding is not None]
    maps = {name: torch.cat([part.maps[name] for part in parts]) for name in parts[0].maps}
    return Seen(
        torch.cat([part.logits for part in parts]), torch.cat(embeddings) if embeddings else None, maps
    )


def promoted(student: nn.Module, spec: dict[str, Any], data: Data) -> Teacher:
    """Returns a teacher that is a dense copy of the student, whose spec this is."""
    network = dense_copy(student, spec, data.shape, len(data.classes))
    keys = TeacherKeys(model=spec["model"])
    return Teacher([network], [keys], data.mean, data.std, specs=[dict(spec)], shape=data.shape)


def dense_copy(
    student: nn.Module, spec: dict[str, Any], shape: tuple[int, int, int], num_classes: int
) -> nn.Module:
    """Returns a copy of the student, whose spec this is, with plain weights: without masks and codebooks."""
    network = build(spec, shape, num_classes)
    network.load_state_dict(dense_state(student))
    return network.to(next(student.parameters()).device)


def copy_layers(student: nn.Module, teacher: nn.Module) -> int:
    """Initialises the student from the teacher: evenly spaced layers, leading channels. Returns the number of copied tensors.

    Layers are grouped by kind (type, number of dimensions and kernel size of the weight) and matched by their fraction
    of the depth. The leading part that both tensors have is copied. The teacher's weights must be plain (`dense_copy`).
    """
    num_copied = 0
    by_kind = _by_kind(teacher)
    for kind, layers in _by_kind(student).items():
        sources = by_kind.get(kind, [])
        if not sources:
            continue
        last = len(layers) - 1
        for number, layer in enumerate(layers):
            source = sources[round(number * (len(sources) - 1) / last) if last else len(sources) - 1]
            num_copied += _copy(layer, source)
    return num_copied


def _copy(layer: nn.Module, source: nn.Module) -> int:
    """Copies the leading part that both layers have of each tensor; returns the number of copied tensors."""
    num_copied = 0
    known = source.state_dict()
    for name, tensor in layer.state_dict().items():
        if name in known and known[name].dim() == tensor.dim():
            part = tuple(slice(0, min(a, b)) for a, b in zip(tensor.shape, known[name].shape, strict=True))
            tensor[part] = known[name][part].to(tensor)
            num_copied += 1
    return num_copied


def _by_kind(model: nn.Module) -> dict[tuple, list[nn.Module]]:
    kinds: dict[tuple, list[nn.Module]] = {}
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if not list(module.children()) and isinstance(weight, Tensor):
            kinds.setdefault((type(module), weight.dim(), weight.shape[2:]), []).append(module)
    return kinds
