"""Removes whole channels, so that layers really become smaller.

torch-pruning's dependency graph (Fang et al. 2023, DepGraph: Towards Any Structural Pruning), an optional extra, finds
which channels are coupled. The new sizes are plain numbers in the network's spec, so a checkpoint or a packed file
rebuilds the small network without that library.
"""

import importlib.util
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from trainer.mistakes import Mistake
from trainer.networks.sizes import sizes_of

INSTALL = "method 'channels' needs the package torch-pruning: pip install 'tiny-student[channels]'"


def installed() -> bool:
    """Returns whether torch-pruning is installed."""
    return importlib.util.find_spec("torch_pruning") is not None


def remove(
    model: nn.Module,
    images: Tensor,
    sparsity: float | Mapping[str, float],
    keep: Iterable[str] = (),
    together: bool = False,
    multiple: int = 1,
) -> dict[str, list[int]]:
    """Removes the output channels of the least L2 norm from a network, in place; returns {layer: size} of changed layers.

    Coupled channels (through a residual sum, say) are removed together; their norm is the mean over their layers. A
    group of coupled layers keeps at least one channel.

    Args:
        model: The network.
        images: An example batch [N, C, H, W].
        sparsity: Fraction of channels removed from each group of coupled layers, or {layer: fraction}.
        keep: Layers whose outputs stay; the classifier must be among them.
        together: Whether all channels are ranked together, by their norm relative to their group's mean. sparsity is
            then the fraction of all channels.
        multiple: The channels that stay of a group that loses some are a multiple of this.

    Raises:
        Mistake: For layers that it cannot make smaller, and if the network then fails or loses outputs.
    """
    if not installed():
        raise Mistake(INSTALL)
    refuse_unknown(model)
    modules, names = dict(model.named_modules()), {module: name for name, module in model.named_modules()}
    before, was_training = sizes_of(model), model.training
    trainable = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    model.eval().requires_grad_(True)  # the dependency graph is read from autograd's
    expected = model(images).shape
    try:
        _prune(model, images, sparsity, [modules[name] for name in keep], together, multiple, names)
    except Mistake:
        raise
    except Exception as error:  # of torch-pruning, which follows only some of torch's operations
        raise Mistake(
            f"method 'channels' cannot follow this network ({type(error).__name__} in torch-pruning: {error}): "
            "prune single weights instead, by another method"
        ) from error
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trainable[name])
    try:
        with torch.no_grad():
            got = model(images).shape
    except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, ValueError) as error:
        raise Mistake(f"the network does not work without those channels: {error}") from error
    if got != expected:
        raise Mistake(
            f"outputs of the network were removed ({tuple(expected)[1:]} became {tuple(got)[1:]}): "
            "name its classifier in exclude"
        )
    model.train(was_training)
    return {name: size for name, size in sizes_of(model).items() if size != before[name]}


def _prune(
    model: nn.Module,
    images: Tensor,
    sparsity: float | Mapping[str, float],
    keep: list[nn.Module],
    together: bool,
    multiple: int,
    names: Mapping[nn.Module, str],
) -> None:
    """Does the work of `remove`. names: of the modules."""
    import torch_pruning  # here, because it takes seconds to import and is an optional extra

    graph = torch_pruning.DependencyGraph().build_dependency(model, images)
    score = torch_pruning.importance.GroupMagnitudeImportance(p=2, normalizer=None)
    roots, norms, fractions = [], [], []
    for group in graph.get_all_groups(
        ignored_layers=keep,
        root_module_types=[torch_pruning.ops.TORCH_CONV, torch_pruning.ops.TORCH_LINEAR],
    ):
        fractions.append(_fraction(graph, group, sparsity, names))
        norms.append(score(group).detach().cpu().double())
        roots.append((group[0].dep.target.module, group[0].dep.handler))
    if not roots:
        raise Mistake("there is no layer whose channels can be removed")
    counts = [
        min(round(fraction * len(norm)), len(norm) - 1)
        for fraction, norm in zip(fractions, norms, strict=True)
    ]
    if together:
        assert not isinstance(sparsity, Mapping), "one ranking has one sparsity"
        counts = _counts_together(norms, sparsity)
    counts = [_rounded(count, len(norm), multiple) for count, norm in zip(counts, norms, strict=True)]
    for (module, handler), norm, count in zip(roots, norms, counts, strict=True):
        chosen = torch.argsort(norm, stable=True)[:count].tolist()
        if chosen:
            graph.get_pruning_group(module, handler, sorted(chosen)).prune()


def _rounded(count: int, size: int, multiple: int) -> int:
    """Returns how many of a group's `size` channels go, about `count`, so that a multiple stays; a smaller group stays whole."""
    if count == 0:
        return 0
    stay = max(multiple, round((size - count) / multiple) * multiple)
    return max(0, size - stay)


def refuse_unknown(model: nn.Module) -> None:
    """Raises Mistake for layers that the graph cannot follow, or that cannot be rebuilt from sizes."""
    for name, module in model.named_modules():
        known = isinstance(module, _ConvNd | nn.Linear | _BatchNorm | nn.LayerNorm)
        if not known and any(True for _ in module.parameters(recurse=False)):
            raise Mistake(
                "method 'channels' knows convolutions, linear layers, batch and layer normalization; "
                f"{name or 'the network itself'} ({type(module).__name__}) has weights of another kind"
            )
        if (
            isinstance(module, _ConvNd)
            and module.groups > 1
            and not module.groups == module.in_channels == module.out_channels
        ):
            raise Mistake(
                f"method 'channels' knows dense and depthwise convolutions; {name!r} has "
                f"{module.groups} groups"
            )
    shared = [p for module in model.modules() for p in module.parameters(recurse=False)]
    if len({id(p) for p in shared}) < len(shared):
        raise Mistake("method 'channels' cannot make layers smaller that share one weight")


def _fraction(graph, group, sparsity: float | Mapping[str, float], names: Mapping[nn.Module, str]) -> float:
    """Returns the fraction asked for a group of layers. Raises Mistake if its layers ask for different ones."""
    if not isinstance(sparsity, Mapping):
        return sparsity
    layers = [
        names.get(dep.target.module) for dep, _ in group if graph.is_out_channel_pruning_fn(dep.handler)
    ]
    asked = {name: sparsity[name] for name in layers if name is not None and name in sparsity}
    if len(set(asked.values())) > 1:
        raise Mistake(
            f"sparsity: the channels of {', '.join(asked)} hang together, so theirs must be one number"
        )
    return next(iter(asked.values()), 0.0)


def _counts_together(norms: list[Tensor], sparsity: float) -> list[int]:
    """Returns how many channels each group loses in one ranking. Each group's strongest channel is not ranked."""
    total = sum(len(norm) for norm in norms)
    relative = torch.cat([(norm / norm.mean().clamp_min(1e-30)).sort().values[:-1] for norm in norms])
    owner = torch.cat([torch.full((len(norm) - 1,), i) for i, norm in enumerate(norms)])
    lost = owner[torch.argsort(relative, stable=True)[: round(sparsity * total)]]
    return torch.bincount(lost, minlength=len(norms)).tolist()
