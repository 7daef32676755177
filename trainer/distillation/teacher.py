"""The teacher, one network or several, and a student that starts from its layers."""

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.data.images import normalize
from trainer.distillation import cpu
from trainer.networks import features
from trainer.networks.build import spec
from trainer.networks.features import Seen
from trainer.recipe.keys import TeacherKeys
from trainer.storage.weights_file import digest


class Member(NamedTuple):
    """One network of a teacher: what rebuilds it, how it wants its images, and its weight among several.

    mean, std: of its normalisation, None for the data's. size: of its images in pixels, None for as they are.
    """

    spec: dict[str, Any]
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    size: int | None
    weight: float


class Teacher:
    """The network (or networks) that the student learns from. Not an `nn.Module`: nothing of it is trained, wrapped or saved.

    Of several, the maps and embeddings are the first one's.

    Args:
        networks: The networks; they are set to evaluation mode and frozen.
        keys: Of each network, what the recipe says of it.
        mean, std: The data's normalisation, for networks that name none of their own.
        combine: How several answer as one: `logits` (mean of logits), `probabilities` (log of the mean of their
            probabilities), `confidence` (probabilities weighted per sample by each teacher's highest one); the first
            two are weighted by each one's weight.
    """

    def __init__(
        self,
        networks: Sequence[nn.Module],
        keys: Sequence[TeacherKeys],
        mean: Sequence[float],
        std: Sequence[float],
        combine: str = "logits",
    ) -> None:
        self.networks = list(networks)
        self.members = [Member(spec(k), k.mean, k.std, k.resize, k.weight) for k in keys]
        self.combine = combine
        self.mean, self.std = tuple(mean), tuple(std)
        self.version = 0  # counts its own trainings: answers of an earlier version are not this one's
        self._ready: list[nn.Module] = []  # what is asked in place of the networks
        self._ready_for: list = []  # and the state of the networks that it was made of
        for network in self.networks:
            network.eval().requires_grad_(False)

    @property
    def network(self) -> nn.Module:
        """The first teacher: the one whose layers can be looked at."""
        return self.networks[0]

    @property
    def num_bytes(self) -> int:
        """Bytes of all weights and statistics of the teacher (of all teachers together), dense."""
        return sum(t.numel() * t.element_size() for n in self.networks for t in n.state_dict().values())

    def to(self, device: torch.device) -> "Teacher":
        for network in self.networks:
            network.to(device)
        self._ready = []
        return self

    def make_ready(self) -> None:
        """Prepares the networks to answer on a CPU (`cpu.make_ready`), anew where their weights have changed.

        `see` does so, not the constructor: a network that is still to be taught learns as its training says.
        """
        if not self._ready or self._state() != self._ready_for:
            self._ready = [cpu.make_ready(network) for network in self.networks]
            self._ready_for = self._state()

    def _state(self) -> list:
        """What changes when another copy is needed of the networks that are not asked themselves."""
        copied = [
            network for network, ready in zip(self.networks, self._ready, strict=True) if ready is not network
        ]
        tensors = [tensor for network in copied for tensor in (*network.parameters(), *network.buffers())]
        return [self.version, *((tensor.data_ptr(), tensor._version) for tensor in tensors)]

    def fingerprint(self) -> str:
        """A hash of all that its answers depend on, but for the code of its networks."""
        facts = [
            (digest(network.state_dict()), member.size, member.mean, member.std, member.weight)
            for network, member in zip(self.networks, self.members, strict=True)
        ]
        return hashlib.sha256(repr((facts, self.combine, self.mean, self.std)).encode()).hexdigest()

    def prepare(self, images: Tensor, number: int = 0) -> Tensor:
        """Images [N, C, H, W] in [0, 1] as teacher `number` wants them: its own size and normalisation."""
        member = self.members[number]
        if member.size:
            images = F.interpolate(images, size=(member.size, member.size), mode="bilinear", antialias=True)
        return normalize(images, member.mean or self.mean, member.std or self.std)

    @torch.no_grad()
    def see(self, images: Tensor, layers: Sequence[str] = (), embedding: bool = False) -> Seen:
        """What the teacher sees in images [N, C, H, W] in [0, 1]."""
        if not torch.compiler.is_compiling():
            self.make_ready()
        # A layer that is not a block may be missing in the copy without BatchNorm, or return something else there.
        asked = self._ready[0] if set(layers) <= set(features.block_names(self.network)) else self.network
        first = features.see(asked, self.prepare(images), layers, embedding)
        if len(self.networks) == 1:
            return first
        rest = [n(self.prepare(images, i)) for i, n in enumerate(self._ready[1:], start=1)]
        return Seen(self._agree([first.logits, *rest]), first.embedding, first.maps)

    def _agree(self, logits: list[Tensor]) -> Tensor:
        weights = torch.tensor([member.weight for member in self.members], device=logits[0].device)
        weights = (weights / weights.sum())[:, None, None]
        stacked = torch.stack(logits).float()
        if self.combine == "logits":
            return (stacked * weights).sum(0)
        if self.combine == "confidence":
            confidence = stacked.softmax(-1).amax(-1, keepdim=True)
            weights = confidence / confidence.sum(0)
        return torch.logsumexp(stacked.log_softmax(-1) + weights.log(), dim=0)


def copy_layers(student: nn.Module, teacher: nn.Module) -> int:
    """Starts the student from the teacher: evenly spaced layers, leading channels. Returns how many tensors were copied.

    Layers are grouped by kind (type and number of dimensions of the weight) and matched by their fraction of the
    depth; of each matched tensor the leading block that both have is copied.
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
    """Copies the leading block that both layers have of each tensor; returns how many tensors were copied."""
    num_copied = 0
    known = source.state_dict()
    for name, tensor in layer.state_dict().items():
        if name in known and known[name].dim() == tensor.dim():
            block = tuple(slice(0, min(a, b)) for a, b in zip(tensor.shape, known[name].shape, strict=True))
            tensor[block] = known[name][block].to(tensor)
            num_copied += 1
    return num_copied


def _by_kind(model: nn.Module) -> dict[tuple, list[nn.Module]]:
    kinds: dict[tuple, list[nn.Module]] = {}
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if not list(module.children()) and isinstance(weight, Tensor):
            kinds.setdefault((type(module), weight.dim(), weight.shape[2:]), []).append(module)
    return kinds
