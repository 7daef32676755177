"""Masks and codebooks on anybody's layers: pruning and weight sharing as parametrizations.

A pruned weight is `where(mask, weight, 0)`, a shared one `centroids[codes]` whose trainable tensor is the centroids, so
autograd itself sums each cluster's gradient (Han et al. 2016, Deep Compression). Zeros and ties hold by construction
under any optimizer, and the state is plain tensors in the `state_dict`. Works for Linear, Conv, Embedding, LSTM, GRU
and attention weights. Sources: Han et al. 2015 (std x sensitivity), Zhu & Gupta 2017 (cubic schedule).
"""

import math
from collections.abc import Callable, Iterable, Mapping

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from trainer import scores
from trainer.mistakes import Mistake, nearest

LARGEST_TABLE = 1 << 22  # distances of weights to centroids that are in hand at a time
SOFTNESS = 0.5  # how softly weights are shared out among centroids, in mean distances of these


class Mask(nn.Module):
    """Holds pruned weights at zero: `where(mask, weight, 0)`; the mask is a buffer of booleans.

    score: None, or a buffer in which every backward pass adds up the movement scores of all weights, the pruned ones
    included: the gradient of the masked weight reaches those too (see `watch_movement`).
    """

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask.to(torch.bool, copy=True))
        self.register_buffer("score", None)

    def forward(self, weight: Tensor) -> Tensor:
        # Not a product: that would give -0.0 for a negative weight and NaN for an infinite one.
        masked = torch.where(self.mask, weight, 0.0)
        if self.score is not None and masked.requires_grad:
            masked.register_hook(lambda gradient: self._feed(weight, gradient))
        return masked

    @torch.no_grad()
    def _feed(self, weight: Tensor, gradient: Tensor) -> None:
        self.score.add_(scores.movement(weight, gradient))


class _Lookup(torch.autograd.Function):
    """table[codes]; the gradient of an entry is the sum over its codes, added up in float64 where the device can."""

    @staticmethod
    def forward(ctx, table: Tensor, codes: Tensor) -> Tensor:
        ctx.save_for_backward(codes)
        ctx.length = len(table)
        ctx.dtype = table.dtype
        return table[codes]

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        (codes,) = ctx.saved_tensors
        return _sum_by_code(gradient, codes, ctx.length).to(ctx.dtype), None


class _StraightThrough(torch.autograd.Function):
    """table[codes]; the gradient of a surviving weight goes to its latent weight too, as if it were that weight."""

    @staticmethod
    def forward(ctx, latent: Tensor, table: Tensor, codes: Tensor) -> Tensor:
        ctx.save_for_backward(codes)
        ctx.length = len(table)
        ctx.dtype = table.dtype
        return table[codes]

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        (codes,) = ctx.saved_tensors
        return torch.where(codes != 0, gradient, 0.0), _sum_by_code(gradient, codes, ctx.length).to(ctx.dtype), None


def _sum_by_code(gradient: Tensor, codes: Tensor, length: int) -> Tensor:
    weights = gradient.reshape(-1) if gradient.device.type == "mps" else gradient.reshape(-1).double()
    return torch.bincount(codes.reshape(-1), weights, minlength=length)


class Codebook(nn.Module):
    """Weights that share few values: code 0 is zero and stays zero, code c >= 1 is centroids.flatten()[c - 1].

    codes: integers of the weight's shape. centroids: [k], or [groups, k] when each group of rows has its own.
    """

    def __init__(self, codes: Tensor, centroids: Tensor) -> None:
        super().__init__()
        self.register_buffer("codes", codes.to(torch.int32, copy=True))
        self._centroids = centroids

    def right_inverse(self, _weight: Tensor) -> Tensor:
        # Called once, on registration: what becomes the trainable tensor.
        return self._centroids.detach().clone()

    def forward(self, centroids: Tensor) -> Tensor:
        table = torch.cat([centroids.new_zeros(1), centroids.reshape(-1)])
        return _Lookup.apply(table, self.codes)


class TrainedCodebook(nn.Module):
    """A codebook that is still open: at every step each surviving weight takes the shared value that is cheapest for it.

    Trained are a latent weight for each position (the tensor that is parametrized) and the centroids [groups, k]. A
    weight is the centroid of the least (latent - centroid)^2 + cost x bits of its code; its gradient goes straight
    through to the latent one (Bengio et al. 2013) and, summed over each code, to the centroids. Pruned weights stay
    zero. A centroid of exactly 0 is an unused place in the codebook. Codes are a function of parameters and buffers;
    the bits of the codes, log2(survivors / times used) with half a use added to each, are counted anew at every
    forward in training mode. See `close_codebook`.

    alive: booleans of the weight's shape. cost: [groups, 1], what a bit is worth in squared error; 0: bits are free.
    """

    def __init__(self, alive: Tensor, centroids: Tensor, cost: Tensor) -> None:
        super().__init__()
        self.register_buffer("alive", alive.bool())
        self.register_buffer("cost", cost)
        self.register_buffer("bits", torch.zeros_like(centroids))
        positions = self.alive.reshape(-1).nonzero().reshape(-1)
        self.register_buffer("positions", positions, persistent=False)
        self.register_buffer("group", positions // (alive.numel() // len(centroids)), persistent=False)
        self.centroids = nn.Parameter(centroids.detach().clone())
        self.counts_bits = bool(cost.any())

    def forward(self, latent: Tensor) -> Tensor:
        codes = self.codes(latent)
        if self.counts_bits and self.training:
            self.count_bits(codes)
        table = torch.cat([self.centroids.new_zeros(1), self.centroids.reshape(-1)])
        return _StraightThrough.apply(latent, table, codes)

    @torch.no_grad()
    def codes(self, latent: Tensor) -> Tensor:
        """The codes of the weights, as a `Codebook` has them: 0 for zero, others 1 + place in centroids.flatten()."""
        k = self.centroids.shape[1]
        extra = torch.where(self.centroids == 0, torch.inf, self.cost * self.bits)
        flat = latent.reshape(-1)
        codes = torch.zeros(flat.shape, dtype=torch.int32, device=flat.device)
        most = max(1, LARGEST_TABLE // k)
        for where, group in zip(self.positions.split(most), self.group.split(most), strict=True):
            error = (flat[where, None] - self._of(group, self.centroids)).square() + self._of(group, extra)
            codes[where] = (error.argmin(1) + group * k + 1).int()
        return codes.reshape(latent.shape)

    @staticmethod
    def _of(group: Tensor, table: Tensor) -> Tensor:
        """The row of a table [groups, ...] for each weight; one row for all where there is but one."""
        return table[group] if len(table) > 1 else table

    @torch.no_grad()
    def count_bits(self, codes: Tensor) -> None:
        used = torch.bincount(codes.reshape(-1), minlength=self.centroids.numel() + 1)[1:].reshape(self.bits.shape) + 0.5
        self.bits.copy_(torch.log2(used.sum(1, keepdim=True) / used))

    def entropy(self, latent: Tensor) -> Tensor:
        """Bits of all codes together, by their entropy, were each weight shared out softly among the centroids.

        Its share of a centroid falls with the squared distance, as a normal distribution's density whose deviation is
        `SOFTNESS` times the mean distance of neighbouring centroids. The gradient goes to the latent weights alone: codes are to
        move, not values.
        """
        centroids = self.centroids.detach()
        used = centroids != 0
        least, most = torch.where(used, centroids, torch.inf).amin(1), torch.where(used, centroids, -torch.inf).amax(1)
        width = (SOFTNESS * (most - least) / (used.sum(1) - 1).clamp_min(1)).clamp_min(1e-8)
        scale = (-0.5 / width.square())[:, None]
        closed = torch.where(used, 0.0, -torch.inf)
        distance = (latent.reshape(-1)[self.positions, None] - self._of(self.group, centroids)).square()
        shares = (distance * self._of(self.group, scale) + self._of(self.group, closed)).softmax(1)
        many = len(centroids) > 1
        sums = torch.zeros_like(centroids).index_add(0, self.group, shares) if many else shares.sum(0, keepdim=True)
        return (sums * (sums.sum(1, keepdim=True).clamp_min(1e-12).log2() - sums.clamp_min(1e-12).log2())).sum()


_OURS = Mask | Codebook | TrainedCodebook


class Place:
    """A weight of a network: its name, and the (module, attribute) places that hold it (several when it is tied)."""

    def __init__(self, name: str, module: nn.Module, attribute: str) -> None:
        self.name = name
        self.places = [(module, attribute)]

    @property
    def value(self) -> Tensor:
        """The weight as the network uses it, masked or shared."""
        module, attribute = self.places[0]
        return getattr(module, attribute)

    @property
    def parametrization(self) -> nn.Module | None:
        module, attribute = self.places[0]
        if parametrize.is_parametrized(module, attribute):
            return module.parametrizations[attribute][0]
        return None

    @property
    def mask(self) -> Tensor | None:
        """Which weights are alive, boolean; None for a weight that is neither pruned nor shared."""
        found = self.parametrization
        if isinstance(found, Mask):
            return found.mask
        if isinstance(found, Codebook):
            return found.codes != 0
        if isinstance(found, TrainedCodebook):
            return found.alive
        return None

    @property
    def parameter(self) -> nn.Parameter:
        """What is trained: the weight itself, what a mask lets through of it, or the centroids."""
        module, attribute = self.places[0]
        if parametrize.is_parametrized(module, attribute):
            return module.parametrizations[attribute].original
        return getattr(module, attribute)

    @property
    def trainable(self) -> bool:
        return self.parameter.requires_grad

    @property
    def parts(self) -> int:
        """How many stacked matrices the weight is (along its first axis): gates of a LSTM or GRU; query, key, value."""
        module, attribute = self.places[0]
        if isinstance(module, nn.LSTM | nn.LSTMCell) and attribute.startswith("weight_") and "hr" not in attribute:
            return 4
        if isinstance(module, nn.GRU | nn.GRUCell) and attribute.startswith("weight_"):
            return 3
        if attribute == "in_proj_weight" or self.name.split(".")[-1] == "qkv":
            return 3 if len(self.value) % 3 == 0 else 1  # a qkv of fewer keys than queries has no equal thirds
        return 1

    @property
    def input_axis(self) -> int:
        """The axis of the weight that its inputs lie along (in a convolution: its input channels)."""
        transposed = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
        return 0 if isinstance(self.places[0][0], transposed) else 1


def weights(model: nn.Module) -> dict[str, Place]:
    """The weights that can be pruned and shared, by layer name, in the order of the network.

    These are all parameters whose name holds 'weight', of two dimensions or more (no biases, no norms). `fc1.weight`
    is called 'fc1'; others keep their own name ('lstm.weight_ih_l0'). A tied weight appears once, under its first name.
    Raises Mistake for a weight that something else parametrizes (`weight_norm`).
    """
    found: dict[int, Place] = {}
    others: list[tuple[int, nn.Module, str]] = []
    for path, module in model.named_modules():
        if isinstance(module, parametrize.ParametrizationList | nn.LayerNorm | nn.RMSNorm):
            continue
        inner = getattr(module, "parametrizations", {})
        own = {name: p for name, p in module.named_parameters(recurse=False) if p is not None}
        own |= {name: getattr(inner[name], "original", inner[name]) for name in inner}
        for attribute in sorted(own):  # a parametrized weight has left its place in the module: keep one order
            key = id(own[attribute])
            if "weight" not in attribute:
                others.append((key, module, attribute))
                continue
            if getattr(module, attribute).dim() < 2:
                continue
            name = path if attribute == "weight" and path else f"{path}.{attribute}".lstrip(".")
            if attribute in inner and not (len(inner[attribute]) == 1 and isinstance(inner[attribute][0], _OURS)):
                raise Mistake(
                    f"layer {name!r} is parametrized by {type(inner[attribute][0]).__name__.lstrip('_')} already: make it plain first, "
                    "by torch.nn.utils.parametrize.remove_parametrizations"
                )
            if key in found:
                found[key].places.append((module, attribute))
            else:
                found[key] = Place(name, module, attribute)
    for key, module, attribute in others:  # a weight that is tied to something of another name
        if key in found:
            found[key].places.append((module, attribute))
    return {place.name: place for place in found.values()}


def choose(places: Mapping[str, Place], keep: Iterable[str] = ()) -> dict[str, Place]:
    """The weights without those in `keep`: 'first', 'last', a layer's name or a module's (all weights below it).

    Raises Mistake for a name that no layer has, and for a frozen weight that is not in `keep`.
    """
    left = dict(places)
    order = list(places)
    if isinstance(keep, str):
        raise Mistake(f"keep: got {keep!r}; a list of names is allowed, such as [{keep!r}]")
    ends = {"first": order[:1], "last": order[-1:]}
    for word in keep:
        for name in ends[word] if word in ends else matching(places, word):
            left.pop(name, None)
    for name, place in left.items():
        if not place.trainable:
            raise Mistake(f"layer {name!r} is frozen (requires_grad is False): name it in keep to leave it alone")
        if not torch.isfinite(place.value).all():
            raise Mistake(f"layer {name!r} has weights that are not finite")
    return left


def matching(places: Mapping[str, Place], word: str) -> list[str]:
    """Names of the weights that `word` means. Raises Mistake, with the nearest name, when there are none."""
    found = [name for name in places if name == word or name.startswith(word + ".")]
    if not found:
        raise Mistake(f"there is no layer {word!r}{nearest(word, places)}")
    return found


def per_layer(places: Mapping[str, Place], setting, what: str) -> dict:
    """A setting given once for all or as {layer: value} as one value a layer; every layer must then be named."""
    if not isinstance(setting, Mapping):
        return dict.fromkeys(places, setting)
    values = {}
    for word, value in setting.items():
        for name in matching(places, word):
            values[name] = value
    missing = [name for name in places if name not in values]
    if missing:
        raise Mistake(f"{what}: nothing is given for {', '.join(missing)} (name them here or in keep)")
    return {name: values[name] for name in places}


def std_masks(places: Mapping[str, Place], sensitivity: Mapping[str, float]) -> dict[str, tuple[Tensor, list[float]]]:
    """Masks by threshold = sensitivity x standard deviation of the layer's surviving weights (Han et al. 2015).

    Returns {layer: (mask, thresholds)}; the gates of a recurrent layer and query, key and value of attention have a
    threshold each. Weights of magnitude above the threshold stay. The deviation is the population's (numpy's `std`).
    """
    masks = {}
    for name, place in places.items():
        alive = place.mask
        parts, thresholds = [], []
        value = place.value.detach()
        alive = torch.ones_like(value, dtype=torch.bool) if alive is None else alive
        for part, alive_part in zip(value.chunk(place.parts), alive.chunk(place.parts), strict=True):
            survivors = part[alive_part]
            if survivors.numel() == 0 or not survivors.any():
                raise Mistake(f"layer {name!r} has no weights left to prune: all are zero")
            if survivors.numel() > 1 and survivors.min() == survivors.max():
                raise Mistake(
                    f"layer {name!r}: all weights left are {survivors[0].item():.3g}, so their standard deviation parts none "
                    "from the others: name the layer in keep"
                )
            threshold = sensitivity[name] * survivors.double().std(correction=0).item()
            thresholds.append(threshold)
            parts.append(alive_part & (part.abs() > threshold))
        mask = torch.cat(parts)
        if not mask.any():
            raise Mistake(
                f"layer {name!r}: sensitivity {sensitivity[name]} prunes every weight "
                f"(threshold {max(thresholds):.3g}, largest weight {value.abs().max().item():.3g})"
            )
        masks[name] = (mask, thresholds)
    return masks


def score_masks(
    scores: Mapping[str, Tensor],
    alive: Mapping[str, Tensor | None],
    sparsity: Mapping[str, float],
    together: bool,
    parts: Mapping[str, int] | None = None,
) -> dict[str, tuple[Tensor, list[float]]]:
    """Masks that zero exactly round(sparsity x n) weights, the lowest scores first; a dead weight stays dead.

    together: one ranking over all layers (then all sparsities are the same number); otherwise one a layer, or of each
    of the `parts` stacked in it (gates; query, key, value), whose counts then add up to the layer's. Of equal scores
    the first in the weight's order go, so that the count is exact. Where more are dead already than are asked for,
    those are all the zeros. Returns {layer: (mask, [the lowest score kept, of each ranking])}.
    """
    flat = {}
    for name, score in scores.items():
        score = score.detach().double().reshape(-1)
        if alive[name] is not None:
            score = torch.where(alive[name].reshape(-1), score, -torch.inf)
        flat[name] = score
    if together:
        joined = torch.cat(list(flat.values()))
        mask, threshold = _keep_highest(joined, round(next(iter(sparsity.values())) * len(joined)))
        masks = mask.split([len(score) for score in flat.values()])
        return {n: (m.reshape(scores[n].shape), [threshold]) for n, m in zip(flat, masks, strict=True)}
    result = {}
    for name, score in flat.items():
        num_parts = parts[name] if parts else 1
        zeros = [round(sparsity[name] * len(score) * i / num_parts) for i in range(num_parts + 1)]
        found = [_keep_highest(part, zeros[i + 1] - zeros[i]) for i, part in enumerate(score.chunk(num_parts))]
        mask = torch.cat([part_mask for part_mask, _ in found])
        result[name] = (mask.reshape(scores[name].shape), [threshold for _, threshold in found])
    return result


def _keep_highest(score: Tensor, zeros: int) -> tuple[Tensor, float]:
    """All but the `zeros` lowest of flat scores (-inf: dead, never kept), and the lowest of those kept."""
    mask = score > -torch.inf
    if zeros:
        highest_out = score.kthvalue(zeros).values
        mask &= score > highest_out
        ties = (score == highest_out).nonzero().reshape(-1)
        stay = len(score) - zeros - int(mask.sum())
        if stay and highest_out > -torch.inf:
            mask[ties[len(ties) - stay :]] = True
    return mask, score[mask].min().item() if mask.any() else torch.inf


def cubic(final: float, progress: float, initial: float = 0.0) -> float:
    """The sparsity at `progress` (0 to 1) of a gradual pruning (Zhu & Gupta 2017, To Prune, or Not to Prune).

    final + (initial - final) x (1 - progress)^3: fast while there is much to choose from, slow towards the end.
    """
    return final + (initial - final) * (1 - min(1.0, max(0.0, progress))) ** 3


def geometric(final: float, progress: float, initial: float = 0.0) -> float:
    """The sparsity at `progress` (0 to 1) of rounds that each prune the same share of the weights then left.

    As the rounds of Frankle & Carbin 2019 (The Lottery Ticket Hypothesis): 1 - (1 - initial) x rest^progress.
    """
    if progress >= 1:
        return final  # without the rounding of a power
    return 1 - (1 - initial) * ((1 - final) / (1 - initial)) ** max(0.0, progress)


def refuse_shared(place: Place) -> None:
    """Raises Mistake for a weight that shares its values: it can be pruned no more."""
    if isinstance(place.parametrization, Codebook | TrainedCodebook):
        raise Mistake(f"layer {place.name!r} shares its weights already: prune before sharing, or name it in keep")


def set_mask(place: Place, mask: Tensor) -> None:
    """Prunes a weight, in place; a mask that is there already is replaced."""
    found = place.parametrization
    if isinstance(found, Mask):
        found.mask.copy_(mask)
        return
    refuse_shared(place)
    _parametrize(place, Mask(mask))


def watch_movement(places: Iterable[Place]) -> None:
    """From now on every backward pass adds to the movement scores of these weights; unpruned ones get a mask of ones."""
    for place in places:
        if place.mask is None:
            set_mask(place, torch.ones_like(place.value, dtype=torch.bool))
        place.parametrization.score = torch.zeros_like(place.value.detach())


def forget_movement(places: Iterable[Place]) -> None:
    """Drops the movement scores; the masks stay."""
    for place in places:
        place.parametrization.score = None


def rewind(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Puts parameters and statistics back to an earlier `dense_state` (its own copy), in place; the masks stay as they are.

    Frankle & Carbin 2019 (The Lottery Ticket Hypothesis); Renda et al. 2020 (Comparing Rewinding and Fine-tuning).
    """
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            plain = plain_key(key)
            if plain in state:
                tensor.copy_(state[plain])


def set_codebook(place: Place, codes: Tensor, centroids: Tensor) -> None:
    """Makes a weight share values, in place; a mask that was there becomes the code 0."""
    value = place.value.detach()
    if place.parametrization is not None:
        bake_place(place)
    _parametrize(place, Codebook(codes.to(value.device), centroids.to(value.device, value.dtype)))


def open_codebook(place: Place, codes: Tensor, centroids: Tensor, code_cost: float = 0.0) -> None:
    """Makes a weight share values, in place, its codes decided anew at every step of a training (`TrainedCodebook`).

    codes, centroids: those it starts with, as `cluster` gives them; the latent weights start from the weight as it is.
    code_cost: what a bit is worth, in mean squares of the surviving weights of its group.
    """
    value = place.value.detach().clone()
    if place.parametrization is not None:
        bake_place(place)
    centroids = torch.atleast_2d(centroids.to(value.device, value.dtype))
    codes = codes.to(value.device)
    blocks = [block[block != 0] for block in value.chunk(len(centroids))]
    mean_square = torch.stack([b.square().mean() if len(b) else b.new_zeros(()) for b in blocks])[:, None]
    trained = TrainedCodebook(codes != 0, centroids, code_cost * mean_square)
    trained.count_bits(codes)
    _parametrize(place, trained)


def close_codebook(place: Place) -> tuple[Tensor, Tensor]:
    """codes and centroids of a weight's open codebook as they are now, for `set_codebook`."""
    (module, attribute), *_ = place.places
    trained = place.parametrization
    centroids = trained.centroids.detach().clone()
    codes = trained.codes(module.parametrizations[attribute].original)
    return codes, centroids if len(centroids) > 1 else centroids[0]


def entropy(places: Iterable[Place]) -> Tensor:
    """Mean bits of a surviving weight's code over all open codebooks, by their soft entropy, with a gradient."""
    bits, number = 0.0, 0
    for place in places:
        (module, attribute), *_ = place.places
        trained = module.parametrizations[attribute]
        bits = bits + trained[0].entropy(trained.original)
        number += len(trained[0].positions)
    return bits / number


def _own_class(place: Place) -> None:
    """Gives each parametrized module of a weight a class of its own.

    torch hangs a parametrized weight on the module's class, which a copy.deepcopy of the module shares: what is done to the
    one would be done to the other.
    """
    for module, _ in place.places:
        if parametrize.is_parametrized(module):
            shared = type(module)
            body = {name: value for name, value in vars(shared).items() if name not in ("__dict__", "__weakref__")}
            module.__class__ = type(shared.__name__, shared.__bases__, body)


def _parametrize(place: Place, parametrization: nn.Module) -> None:
    _own_class(place)
    (module, attribute), *tied = place.places
    trainable = getattr(module, attribute).requires_grad
    for other, name in tied:
        # Registration changes the tensor in place, under the twin's feet: until it is tied again it gets its own.
        setattr(other, name, nn.Parameter(getattr(module, attribute).detach().clone()))
    parametrize.register_parametrization(module, attribute, parametrization)
    module.parametrizations[attribute].original.requires_grad_(trainable)
    for other, name in tied:
        # Registering a second time would make a second trainable tensor: the tie is to one and the same list.
        parametrize.register_parametrization(other, name, parametrization)
        other.parametrizations[name] = module.parametrizations[attribute]


def bake_place(place: Place) -> None:
    """Turns a masked or shared weight into a plain parameter of the same values, in place."""
    _own_class(place)
    plain = None
    for module, attribute in place.places:
        if not parametrize.is_parametrized(module, attribute):
            continue
        if plain is None:
            trainable = module.parametrizations[attribute].original.requires_grad
            plain = nn.Parameter(getattr(module, attribute).detach().clone(), requires_grad=trainable)
        parametrize.remove_parametrizations(module, attribute, leave_parametrized=False)
        setattr(module, attribute, plain)


def bake(model: nn.Module) -> nn.Module:
    """Turns all masks and codebooks of a model into plain weights of the same values, in place."""
    for place in weights(model).values():
        if place.parametrization is not None:
            bake_place(place)
    return model


def dense_state(model: nn.Module) -> dict[str, Tensor]:
    """The state_dict the model would have without masks, codebooks and all else that parametrizes its weights.

    These are as the network uses them.
    """
    state = {}
    for key, tensor in model.state_dict().items():
        head, found, tail = key.partition("parametrizations.")
        attribute, _, part = tail.partition(".")
        if not found:
            state[key] = tensor
        elif part.startswith("original"):  # of which weight_norm has two
            module = model.get_submodule(head.rstrip("."))
            state[head + attribute] = getattr(module, attribute).detach()
    return state


def plain_key(key: str) -> str:
    """The key that a tensor of a masked or shared network has in `dense_state`."""
    return key.replace("parametrizations.", "").removesuffix(".original")


def restore(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Loads a state_dict of a masked or shared model into a model, making the masks and codebooks it tells of.

    Raises Mistake when keys or shapes do not fit.
    """
    bake(model)
    places = weights(model)
    by_key = {_key(model, *where): place for place in places.values() for where in place.places[:1]}
    for key, tensor in state.items():
        for ending in (".0.mask", ".0.codes"):
            if not key.endswith(ending):
                continue
            weight_key = key.removesuffix(ending).replace("parametrizations.", "")
            if weight_key not in by_key:
                continue  # a tied twin, or a layer that is not there: load_state_dict below says so
            place = by_key[weight_key]
            if ending == ".0.mask":
                set_mask(place, tensor.to(place.value.device))
                if key.removesuffix("mask") + "score" in state:
                    watch_movement([place])
            else:
                original = state[key.removesuffix(".0.codes") + ".original"]
                set_codebook(place, tensor, original)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise Mistake(f"the weights do not fit this network: {error}") from None


def _key(model: nn.Module, module: nn.Module, attribute: str) -> str:
    path = next(path for path, candidate in model.named_modules() if candidate is module)
    return f"{path}.{attribute}".lstrip(".")


def cluster(
    place: Place,
    num_values: int,
    method: Callable[..., np.ndarray] | None = None,
    groups: int = 1,
    importance: Tensor | None = None,
    code_cost: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """codes and centroids of one weight by k-means over its surviving values: code 0 is zero, others 1 + cluster.

    method: of `kmeans`, the exact one when not given. groups: the rows (first axis) are split into so many equal blocks with a codebook each. importance: what the
    squared error of each value counts (squared gradients, say: Choi et al. 2017, Towards the Limit of Network
    Quantization). code_cost: what a bit of a code's ideal length counts, in mean squares of the survivors (about 0.05
    at 3 bits takes as much off the entropy as it adds to the error); fewer values may then be best. A group with fewer
    distinct survivors than `num_values` keeps them exactly; unused entries of its codebook are zero. Returns codes
    int32 of the weight's shape, centroids [k] or [groups, k].
    Raises Mistake for a weight whose values are all zero or not finite, and one without any importance.
    """
    from trainer import kmeans  # here: a recipe is read without it

    value = place.value.detach().cpu().float()
    if len(value) % groups:
        raise Mistake(f"layer {place.name!r}: {len(value)} rows do not split into {groups} equal groups")
    if not torch.isfinite(value).all():
        raise Mistake(f"layer {place.name!r} has weights that are not finite")
    if not value.any():
        raise Mistake(f"layer {place.name!r} has no weights left to share: all are zero")
    codes = torch.zeros(value.shape, dtype=torch.int32)
    centroids = torch.zeros(groups, num_values)
    blocks = zip(value.chunk(groups), codes.chunk(groups), strict=True)
    importances = _damped(place, importance).chunk(groups) if importance is not None else [None] * groups
    for number, ((block, block_codes), weight) in enumerate(zip(blocks, importances, strict=True)):
        alive = block != 0
        survivors = block[alive].numpy()
        if survivors.size == 0:
            continue
        settings = {} if weight is None else {"weights": weight[alive].numpy()}
        cost = code_cost * float(np.mean(survivors.astype(np.float64) ** 2 * settings.get("weights", 1.0)))
        found = (method or kmeans.kmeans_optimal)(survivors, num_values, **settings, **({"code_cost": cost} if code_cost else {}))
        chosen = kmeans.assign(survivors, found)
        for _ in range(10 if code_cost else 0):
            before, bits = chosen, kmeans.code_lengths(chosen, len(found))
            chosen = _cheapest(survivors, found, bits * cost, settings.get("weights"))
            if np.array_equal(before, chosen):
                break
        centroids[number, : len(found)] = torch.from_numpy(np.asarray(found, dtype=np.float32))
        block_codes[alive] = torch.from_numpy(chosen.astype(np.int32)) + 1 + number * num_values
    return codes, centroids if groups > 1 else centroids[0]


def _damped(place: Place, importance: Tensor) -> Tensor:
    """Importance with a thousandth of its mean added: a weight that a few batches did not need is not worth nothing."""
    importance = importance.detach().cpu().double()
    if not importance.any():
        raise Mistake(f"layer {place.name!r}: no gradient reaches its weights, so none is more important than others")
    return importance + 1e-3 * importance.mean()


def _cheapest(values: np.ndarray, centroids: np.ndarray, prices: np.ndarray, weights: np.ndarray | None) -> np.ndarray:
    """The code of the least weight x squared distance + price, for each value."""
    from trainer import kmeans

    if weights is None:
        return kmeans.assign(values, centroids, code_bits=prices, code_cost=1.0)
    least, chosen = np.full(values.shape, np.inf), np.zeros(values.shape, np.int32)
    for code, (centroid, price) in enumerate(zip(centroids.astype(np.float64), prices, strict=True)):
        total = weights * (values - centroid) ** 2 + price
        chosen[total < least] = code
        least = np.minimum(least, total)
    return chosen


def centroid_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The trainable tensors of all shared weights, centroids and latent weights: they take no weight decay."""
    found = {}
    for module in model.modules():
        if isinstance(module, parametrize.ParametrizationList) and isinstance(module[0], Codebook | TrainedCodebook):
            for parameter in module.parameters():
                found[id(parameter)] = parameter
    return list(found.values())


def round_to(values: Tensor, kind: str | int) -> Tensor:
    """Values rounded to what 'float16' can hold, to so many bits of their fraction, or for 'float32' not at all.

    Raises Mistake where one is then infinite. A zero has no sign.
    """
    if kind == "float32":
        return values
    if kind == "float16":
        rounded = values.half().to(values.dtype)
    else:
        fraction, exponent = torch.frexp(values)
        rounded = torch.ldexp((fraction * 2 ** (kind + 1)).round(), exponent - (kind + 1))
    if not torch.isfinite(rounded).all():
        raise Mistake("a value is too large for float16: ask for float32")
    return rounded + 0.0


def round_codebook(centroids: Tensor, kind: str | int) -> Tensor:
    """Centroids by `round_to`. Raises Mistake also where they are so small that float16 has few values for them."""
    rounded = round_to(centroids, kind)
    if kind == "float16" and (rounded - centroids).abs().max() > 2**-8 * centroids.abs().max():
        raise Mistake(
            f"the largest shared value is {centroids.abs().max().item():.3g}, too small for float16: ask for float32"
        )
    return rounded


def to_grid(values: Tensor, bits: int) -> Tensor:
    """Values rounded to multiples of the smallest power of two of which none of them is more than 2^(bits-1) - 1.

    A step that is a power of two can be read off the values, and costs no more for the same error: see `packed`.
    Raises Mistake where one is then infinite.
    """
    largest = values.abs().max().item()
    if largest == 0:
        return values
    step = 2.0 ** math.ceil(math.log2(largest / (2 ** (bits - 1) - 1)))
    rounded = (torch.round(values.double() / step) * step).to(values.dtype)
    if not torch.isfinite(rounded).all():
        raise Mistake(f"a value of {largest:.3g} is too large for {bits} bits")
    return rounded + 0.0


@torch.no_grad()
def round_unshared(model: nn.Module, biases: int | None = None, rest: str = "float32") -> None:
    """Rounds what is not shared, in place: biases `to_grid` of so many bits, all other parameters and statistics `rest`.

    Biases are the parameters of one dimension with 'bias' in their name, those of norms and recurrent layers included.
    Without `biases` they are among the rest. Raises Mistake, naming the tensor, where one is not finite then.
    """
    shared = {id(parameter) for parameter in centroid_parameters(model)}
    tensors = [*model.named_parameters(), *((n, b) for n, b in model.named_buffers() if b.is_floating_point())]
    for name, tensor in tensors:
        if id(tensor) in shared or not tensor.numel():
            continue
        if not torch.isfinite(tensor).all():
            raise Mistake(f"{name} has values that are not finite")
        is_bias = tensor.dim() == 1 and "bias" in name.rpartition(".")[2]
        try:
            tensor.copy_(to_grid(tensor, biases) if biases is not None and is_bias else round_to(tensor, rest))
        except Mistake as error:
            raise Mistake(f"{name}: {error}") from None
