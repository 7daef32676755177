"""Building the networks of a recipe, and the teacher as the student's lessons see it."""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.data.images import normalize
from trainer.distillation import cpu
from trainer.networks import features
from trainer.networks.features import Seen
from trainer.recipe.keys import TeacherKeys
from trainer.storage.weights_file import digest


class Teacher:
    """The network (or networks) that guide the student. Not an `nn.Module`: nothing of it is trained, wrapped or saved.

    combine: how several teachers speak as one: `logits` (mean of logits), `probabilities` (log of the mean of their
    probabilities), `confidence` (probabilities weighted per sample by each teacher's highest one); the first two are
    weighted by each one's share. Maps and embeddings are the first teacher's.
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
        self.keys = list(keys)
        self.combine = combine
        self.mean, self.std = tuple(mean), tuple(std)
        self.cache = None
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
        """Makes the networks ready to answer on a CPU (`inference.make_ready`), anew where their weights have changed.

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
        facts = [
            (digest(n.state_dict()), k.resize, k.mean, k.std, k.weight)
            for n, k in zip(self.networks, self.keys, strict=True)
        ]
        return hashlib.sha256(repr((facts, self.combine, self.mean, self.std)).encode()).hexdigest()

    def prepare(self, images: Tensor, number: int = 0) -> Tensor:
        """Images [N, C, H, W] in [0, 1] as teacher `number` wants them: its own size and normalisation."""
        keys = self.keys[number]
        if keys.resize:
            images = F.interpolate(images, size=(keys.resize, keys.resize), mode="bilinear", antialias=True)
        return normalize(images, keys.mean or self.mean, keys.std or self.std)

    @torch.no_grad()
    def see(self, images: Tensor, layers: Sequence[str] = (), embedding: bool = False) -> Seen:
        """What the teacher sees in images [N, C, H, W] in [0, 1]."""
        if not torch.compiler.is_compiling():
            self.make_ready()
        # A layer that is no stage may be gone from the copy without BatchNorm, or give something else there.
        asked = self._ready[0] if set(layers) <= set(features.stage_names(self.network)) else self.network
        first = features.see(asked, self.prepare(images), layers, embedding)
        if len(self.networks) == 1:
            return first
        rest = [n(self.prepare(images, i)) for i, n in enumerate(self._ready[1:], start=1)]
        return Seen(self._agree([first.logits, *rest]), first.embedding, first.maps)

    def _agree(self, logits: list[Tensor]) -> Tensor:
        shares = torch.tensor([k.weight for k in self.keys], device=logits[0].device)
        shares = (shares / shares.sum())[:, None, None]
        stacked = torch.stack(logits).float()
        if self.combine == "logits":
            return (stacked * shares).sum(0)
        if self.combine == "confidence":
            confidence = stacked.softmax(-1).amax(-1, keepdim=True)
            shares = confidence / confidence.sum(0)
        return torch.logsumexp(stacked.log_softmax(-1) + shares.log(), dim=0)


def copy_layers(student: nn.Module, teacher: nn.Module) -> int:
    """Starts the student from the teacher: evenly spaced layers, leading channels. Returns how many tensors were copied.

    Layers are grouped by kind (type and number of dimensions of the weight) and matched by their fraction of the
    depth; of each matched tensor the leading block that both have is copied.
    """
    copied = 0
    mine, theirs = _by_kind(student), _by_kind(teacher)
    for kind, layers in mine.items():
        sources = theirs.get(kind, [])
        for number, layer in enumerate(layers):
            if not sources:
                break
            last = len(layers) - 1
            source = sources[round(number * (len(sources) - 1) / last) if last else len(sources) - 1]
            theirs_state = source.state_dict()
            for name, tensor in layer.state_dict().items():
                if name in theirs_state and theirs_state[name].dim() == tensor.dim():
                    block = tuple(
                        slice(0, min(a, b))
                        for a, b in zip(tensor.shape, theirs_state[name].shape, strict=True)
                    )
                    tensor[block] = theirs_state[name][block].to(tensor)
                    copied += 1
    return copied


def _by_kind(model: nn.Module) -> dict[tuple, list[nn.Module]]:
    kinds: dict[tuple, list[nn.Module]] = {}
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if not list(module.children()) and isinstance(weight, Tensor):
            kinds.setdefault((type(module), weight.dim(), weight.shape[2:]), []).append(module)
    return kinds
