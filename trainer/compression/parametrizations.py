"""Pruned and shared weights as PyTorch parametrizations.

A pruned weight is `where(mask, weight, 0)`. A shared weight is `centroids[codes]`, whose trainable tensor is the centroids,
so autograd sums each cluster's gradient (Han et al. 2016, Deep Compression). Zeros and shared values hold by construction
under any optimizer, and the state is plain tensors in the `state_dict`.
"""

from collections.abc import Callable
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

if TYPE_CHECKING:
    from trainer.compression.weights import Weight

MOST_COMPARED = 256  # centroids with which each weight is compared one by one
LARGEST_TABLE = 1 << 22  # distances of weights to centroids that are in memory at a time
_PARTS = 256  # into which a GPU divides a sum by codes
_BINCOUNT_ON = ("cpu",)
SOFTNESS = (
    0.5  # width of a weight's soft assignment to centroids, in mean distances of neighbouring centroids
)


def straight(function: Callable[[Tensor], Tensor] | None, tensor: Tensor) -> Tensor:
    """Returns function(tensor), through which the gradient goes straight; the tensor itself without a function."""
    if function is None:
        return tensor
    return function(tensor.detach()) + (tensor - tensor.detach())


class Mask(nn.Module):
    """Holds pruned weights at zero: `where(mask, weight, 0)`. The mask is a bool buffer of the weight's shape.

    Attributes:
        score: None, or a buffer to which every backward pass adds a criterion's scores (see `masks.watch_gradients`).
            They cover pruned weights too, because the gradient of the masked weight is known at every position.
        rounding: None, or a function that rounds the weights at every step; the gradient goes straight through.
        power: The weight is t |t|^(power - 1) of the trained tensor t (`masks.set_power`).
    """

    mask: Tensor
    score: Tensor | None
    rounding: Callable[[Tensor], Tensor] | None = None
    power: float = 1.0
    _criterion: Callable[[Tensor, Tensor], Tensor] | None = None

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask.to(torch.bool, copy=True))
        self.register_buffer("score", None)

    def forward(self, weight: Tensor) -> Tensor:
        if self.power != 1:
            some = torch.where(weight == 0, 1.0, weight)  # the power alone may have an infinite slope at 0
            weight = torch.where(weight == 0, 0.0, some * some.abs().pow(self.power - 1))
        masked = straight(self.rounding, torch.where(self.mask, weight, 0.0))  # no product: NaN for infinity
        if self._criterion is not None and masked.requires_grad:
            masked.register_hook(lambda gradient: self._feed(weight, gradient))
        return masked

    def watch(self, criterion: Callable[[Tensor, Tensor], Tensor] | None, score: Tensor | None) -> None:
        """Makes every later backward pass add criterion(weight, gradient) to `score`; None, None stops and drops it."""
        self._criterion, self.score = criterion, score

    @torch.no_grad()
    def _feed(self, weight: Tensor, gradient: Tensor) -> None:
        assert self.score is not None and self._criterion is not None  # while it is watched
        self.score.add_(self._criterion(weight, gradient))


class NoDecay(nn.Parameter):
    """A parameter without weight decay in any training: the optimizer looks for its mark, `no_decay`.

    The mark is a type because copy.deepcopy of a plain parameter drops its attributes. A parameter gets the type by its
    `__class__`, as torch's uninitialised parameters do, so that it stays the same object.
    """

    no_decay = True


class _Lookup(torch.autograd.Function):
    """Computes table[codes]. The gradient of an entry is the sum over its codes, in float64 where the device has it."""

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
    """Computes table[codes]. The gradient of a surviving weight also goes straight through to its latent weight."""

    @staticmethod
    def forward(ctx, latent: Tensor, table: Tensor, codes: Tensor) -> Tensor:
        ctx.save_for_backward(codes)
        ctx.length = len(table)
        ctx.dtype = table.dtype
        return table[codes]

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        (codes,) = ctx.saved_tensors
        return (
            torch.where(codes != 0, gradient, 0.0),
            _sum_by_code(gradient, codes, ctx.length).to(ctx.dtype),
            None,
        )


def _sum_by_code(weights: Tensor, codes: Tensor, length: int) -> Tensor:
    """Returns [length], for each code the sum of the weights that have it; in float64 where the device has that.

    On a GPU torch.bincount reads the greatest code back, which waits for the device. There parts of the weights are summed
    into bins of their own, so that few of them add to one number at a time.
    """
    weights, codes = weights.reshape(-1), codes.reshape(-1)
    if weights.device.type != "mps":
        weights = weights.double()
    if weights.device.type in _BINCOUNT_ON:
        return torch.bincount(codes, weights, minlength=length)
    parts = max(1, min(_PARTS, LARGEST_TABLE // length))
    missing = -len(codes) % parts
    weights = nn.functional.pad(weights, (0, missing)).view(parts, -1)
    codes = nn.functional.pad(codes.long(), (0, missing)).view(parts, -1)
    return weights.new_zeros(parts, length).scatter_add_(1, codes, weights).sum(0)


class Codebook(nn.Module):
    """Weights that share few values: code 0 is zero and stays zero, code c >= 1 is centroids.flatten()[c - 1].

    codes: integers of the weight's shape. centroids: [k], or [groups, k] if each group of rows has its own.
    rounding: None, or a function that rounds the centroids at every step; the gradient goes straight through.
    """

    codes: Tensor
    rounding: Callable[[Tensor], Tensor] | None = None

    def __init__(self, codes: Tensor, centroids: Tensor) -> None:
        super().__init__()
        self.register_buffer("codes", codes.to(torch.int32, copy=True))
        self._centroids = centroids

    def right_inverse(self, _weight: Tensor) -> Tensor:
        # Called once, on registration; the result becomes the trainable tensor.
        return self._centroids.detach().clone()

    def forward(self, centroids: Tensor) -> Tensor:
        table = torch.cat([centroids.new_zeros(1), straight(self.rounding, centroids).reshape(-1)])
        return _Lookup.apply(table, self.codes)


class TrainedCodebook(nn.Module):
    """An open codebook: at every step each surviving weight takes the shared value that is cheapest for it.

    The trainable tensors are a latent weight for each position (the parametrized tensor) and the centroids [groups, k].
    A weight is the centroid of the least (latent - centroid)^2 + cost x bits of its code. Its gradient goes straight
    through to the latent weight (Bengio et al. 2013) and, summed over each code, to the centroids. Pruned weights stay
    zero. A centroid of exactly 0 is an unused entry of the codebook. The codes are a function of parameters and buffers.
    The bits of a code are log2(survivors / times used), with half a use added to each code; every forward pass in
    training mode counts them anew. `codebooks.close_codebook` ends it.

    Args:
        alive: Bool of the weight's shape.
        centroids: [groups, k], the first ones.
        cost: [groups, 1], the cost of a bit in squared error; 0 for free bits.
    """

    alive: Tensor
    cost: Tensor
    bits: Tensor
    positions: Tensor
    group: Tensor

    def __init__(self, alive: Tensor, centroids: Tensor, cost: Tensor) -> None:
        super().__init__()
        self.register_buffer("alive", alive.bool())
        self.register_buffer("cost", cost)
        self.register_buffer("bits", torch.zeros_like(centroids))
        positions = self.alive.reshape(-1).nonzero().reshape(-1)
        self.register_buffer("positions", positions, persistent=False)
        self.register_buffer("group", positions // (alive.numel() // len(centroids)), persistent=False)
        self.sizes = torch.bincount(self.group, minlength=len(centroids)).tolist()  # survivors of each group
        self.centroids = NoDecay(centroids.detach().clone())
        self.counts_bits = bool(cost.any())

    def forward(self, latent: Tensor) -> Tensor:
        codes = self.codes(latent)
        if self.counts_bits and self.training:
            self.count_bits(codes)
        table = torch.cat([self.centroids.new_zeros(1), self.centroids.reshape(-1)])
        return _StraightThrough.apply(latent, table, codes)

    @torch.no_grad()
    def codes(self, latent: Tensor) -> Tensor:
        """Returns the codes of the weights, as in `Codebook`: 0 for zero, others 1 + index in centroids.flatten()."""
        k = self.centroids.shape[1]
        extra = torch.where(self.centroids == 0, torch.inf, self.cost * self.bits)
        flat = latent.reshape(-1)
        codes = torch.zeros(flat.shape, dtype=torch.int32, device=flat.device)
        if k > MOST_COMPARED:
            codes[self.positions] = self._codes_of_many(flat[self.positions], extra)
            return codes.reshape(latent.shape)
        most = max(1, LARGEST_TABLE // k)
        for where, group in zip(self.positions.split(most), self.group.split(most), strict=True):
            error = (flat[where, None] - self._of(group, self.centroids)).square() + self._of(group, extra)
            codes[where] = (error.argmin(1) + group * k + 1).int()
        return codes.reshape(latent.shape)

    def _codes_of_many(self, survivors: Tensor, extra: Tensor) -> Tensor:
        """Returns the codes of the surviving weights [N] as `codes` has them, in time that hardly grows with k."""
        from trainer.compression import kmeans  # here: few codebooks are so large

        k = self.centroids.shape[1]
        ends = accumulate(self.sizes)
        values, centroids, costs = (t.float().cpu().numpy() for t in (survivors, self.centroids, extra))
        found = []
        for number, (first, last) in enumerate(pairwise([0, *ends])):
            if first < last:
                cheapest = kmeans.assign(
                    values[first:last], centroids[number], code_bits=costs[number], code_cost=1.0
                )
                found.append(torch.from_numpy(cheapest.astype("int32")) + (number * k + 1))
        return torch.cat(found).to(survivors.device) if found else survivors.new_zeros(0, dtype=torch.int32)

    @staticmethod
    def _of(group: Tensor, table: Tensor) -> Tensor:
        """Returns for each weight its group's row of a table [groups, ...]; the table itself for one group."""
        return table[group] if len(table) > 1 else table

    @torch.no_grad()
    def count_bits(self, codes: Tensor) -> None:
        """Sets the bits of each code from how often `codes` use it."""
        counts = _sum_by_code(torch.ones_like(codes, dtype=torch.float32), codes, self.centroids.numel() + 1)
        used = counts[1:].to(self.bits.dtype).reshape(self.bits.shape) + 0.5
        self.bits.copy_(torch.log2(used.sum(1, keepdim=True) / used))

    def entropy(self, latent: Tensor) -> Tensor:
        """Returns the bits of all codes together, by the entropy of a soft assignment of weights to centroids.

        A weight's fraction of a centroid falls with the squared distance, as a normal density whose deviation is
        `SOFTNESS` times the mean distance of neighbouring centroids. The gradient goes to the latent weights alone: it
        should change codes, not values.
        """
        centroids = self.centroids.detach()
        used = centroids != 0
        least, most = (
            torch.where(used, centroids, torch.inf).amin(1),
            torch.where(used, centroids, -torch.inf).amax(1),
        )
        width = (SOFTNESS * (most - least) / (used.sum(1) - 1).clamp_min(1)).clamp_min(1e-8)
        scale = (-0.5 / width.square())[:, None]
        closed = torch.where(used, 0.0, -torch.inf)
        distance = (latent.reshape(-1)[self.positions, None] - self._of(self.group, centroids)).square()
        fractions = (distance * self._of(self.group, scale) + self._of(self.group, closed)).softmax(1)
        # Positions rise, and groups with them. On a GPU an indexed sum would add them in another order each time.
        sums = torch.stack([part.sum(0) for part in fractions.split(self.sizes)])
        return (
            sums * (sums.sum(1, keepdim=True).clamp_min(1e-12).log2() - sums.clamp_min(1e-12).log2())
        ).sum()


class EvenCodebook(TrainedCodebook):
    """An open codebook of evenly spaced values: a trained step times the integers from -num_values/2 to num_values/2.

    A weight is the nearest multiple of the step, zero among them, so that training decides which weights are zero. The
    gradient goes straight through to the latent weights (only inside the range), and to the step by its rounding error
    (Esser et al. 2020, Learned Step Size Quantization). The step is trained as its logarithm, so that an optimizer's step
    changes it by a fraction. Uniform values with an entropy code lose little to the best ones (Gish & Pierce 1968), and a
    packed file holds one number instead of a codebook.

    Args:
        alive: Bool of the weight's shape; other weights stay zero.
        step: The first step, a positive number.
        num_values: Values besides zero, an even number.
        round_step: Rounds the step, during training too.
    """

    def __init__(
        self, alive: Tensor, step: Tensor, num_values: int, round_step: Callable[[Tensor], Tensor]
    ) -> None:
        super().__init__(alive, step.new_zeros(1, num_values), step.new_zeros(1, 1))
        del self.centroids
        half = num_values // 2
        integers = [*range(-half, 0), *range(1, half + 1)]
        self.register_buffer("integers", step.new_tensor(integers)[None], persistent=False)
        self.highest = half
        self.round_step = round_step
        self.log_step = NoDecay(step.detach().log().reshape(1))

    @property
    def step(self) -> Tensor:
        """The rounded step [1], whose gradient goes straight through the rounding."""
        step = self.log_step.exp()
        return self.round_step(step.detach()) + (step - step.detach())

    def __getattr__(self, name: str) -> Any:
        # Not a property: torch.nn.Module takes an AttributeError in one for a missing attribute of that name.
        return self.integers * self.step if name == "centroids" else super().__getattr__(name)

    def forward(self, latent: Tensor) -> Tensor:
        step = self.step
        scaled = (latent / step).clamp(-self.highest, self.highest)
        whole = scaled.detach().round() + (scaled - scaled.detach())
        return torch.where(self.alive, whole * step, 0.0)

    @torch.no_grad()
    def codes(self, latent: Tensor) -> Tensor:
        whole = (latent / self.step).clamp(-self.highest, self.highest).round().int()
        codes = torch.where(whole < 0, whole + self.highest + 1, whole + self.highest)
        return torch.where(self.alive & (whole != 0), codes, 0)

    def entropy(self, latent: Tensor) -> Tensor:
        """Returns the bits of all codes together, zeros among them, as `TrainedCodebook.entropy` does."""
        levels = torch.cat([self.integers[0], self.integers.new_zeros(1)])
        scaled = (latent / self.step.detach()).reshape(-1)[self.positions, None]
        sums = ((scaled - levels).square() * (-0.5 / SOFTNESS**2)).softmax(1).sum(0)
        return (sums * (sums.sum().clamp_min(1e-12).log2() - sums.clamp_min(1e-12).log2())).sum()


class Rounded(nn.Module):
    """Rounds a tensor by a function at every step; the gradient goes straight through."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, tensor: Tensor) -> Tensor:
        return straight(self.function, tensor)


OURS = Mask | Codebook | TrainedCodebook


def parametrized(module: nn.Module, attribute: str) -> parametrize.ParametrizationList:
    """What torch holds of a parametrized tensor: the trainable one, `original`, and what makes the tensor of it."""
    lists: Any = module.parametrizations
    return lists[attribute]


def _own_class(layer: "Weight") -> None:
    """Gives each parametrized module of a weight a class of its own.

    torch stores a parametrized weight as a property of the module's class, and a copy.deepcopy of the module has the same
    class: a change of one would change the other.
    """
    for module, _ in layer.holders:
        if parametrize.is_parametrized(module):
            shared = type(module)
            body = {
                name: value for name, value in vars(shared).items() if name not in ("__dict__", "__weakref__")
            }
            module.__class__ = type(shared.__name__, shared.__bases__, body)


def parametrize_weight(layer: "Weight", parametrization: nn.Module) -> None:
    """Registers a parametrization on a weight, in place, on all modules that it is tied to."""
    _own_class(layer)
    (module, attribute), *tied = layer.holders
    trainable = getattr(module, attribute).requires_grad
    for other, name in tied:
        # Registration changes the tensor in place. A tied module gets a tensor of its own until it is tied again below.
        setattr(other, name, nn.Parameter(getattr(module, attribute).detach().clone()))
    parametrize.register_parametrization(module, attribute, parametrization)
    original = parametrized(module, attribute).original
    original.requires_grad_(trainable)
    if isinstance(parametrization, Codebook | TrainedCodebook):
        original.__class__ = NoDecay  # the centroids, or the latent weights that choose among them
    for other, name in tied:
        # Registration alone would make a second trainable tensor, so both modules get the same ParametrizationList.
        parametrize.register_parametrization(other, name, parametrization)
        lists: Any = other.parametrizations
        lists[name] = parametrized(module, attribute)


def bake_weight(layer: "Weight") -> None:
    """Turns a masked or shared weight into a plain parameter of the same values, in place."""
    _own_class(layer)
    plain = None
    for module, attribute in layer.holders:
        if not parametrize.is_parametrized(module, attribute):
            continue
        if plain is None:
            trainable = parametrized(module, attribute).original.requires_grad
            plain = nn.Parameter(getattr(module, attribute).detach().clone(), requires_grad=trainable)
        parametrize.remove_parametrizations(module, attribute, leave_parametrized=False)
        setattr(module, attribute, plain)
