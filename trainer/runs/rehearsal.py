"""Rehearses a network before anything is trained: both of its modes, its state, and its packed file."""

import copy

import torch
from torch import Tensor, nn

from trainer.compression.weights import refuse_computed
from trainer.distillation.examine import FAILURES, look
from trainer.mistakes import Mistake
from trainer.networks.output import hook_of, needs_logits


def rehearse(
    network: nn.Module, images: Tensor, num_classes: int | None, who: str, is_trained: bool
) -> list[str]:
    """Runs a network in evaluation mode, and a copy of it in training mode; returns notes for the user.

    Args:
        network: The network.
        images: Example images [2, C, H, W], as its input.
        num_classes: The number of logits that it must return; None for a teacher whose answers are not looked at.
        who: Its name in messages, such as 'the student'.
        is_trained: Whether the recipe trains it.

    Raises:
        Mistake: For a network that fails, does not return logits in a mode that is used, answers at random in
            evaluation, or has state that cannot be saved.
    """
    _refuse_state(network, who, is_trained)
    with torch.random.fork_rng(devices=[]):
        logits, again = (look(network, images, False, num_classes, who).logits for _ in range(2))
        if logits.isnan().any():
            raise Mistake(f"{who} gives logits that are no numbers (NaN) for images of the data's size")
        tolerance = 1e-3 * logits.abs().max().item()
        if not torch.allclose(logits, again, rtol=1e-3, atol=tolerance, equal_nan=True):
            raise Mistake(
                f"{who} gives other logits for the same images each time, in evaluation mode: no accuracy could be "
                "repeated. Let it draw random numbers in training mode only (self.training)"
            )
        hook = hook_of(network)
        if num_classes is not None and (is_trained or hook is not None):
            taken = hook is not None and hook.taken
            taken |= _train_once(network, images, num_classes, who)
            if hook is not None and not taken:
                raise Mistake(f"output: has no effect: {who} returns one tensor in both modes")
    if num_classes is not None and num_classes > 1 and _are_probabilities(logits):
        return [
            f"{who} returns probabilities, and losses take them as logits: leave out the softmax at its end"
        ]
    return []


def _are_probabilities(outputs: Tensor) -> bool:
    return bool((outputs >= 0).all()) and torch.allclose(
        outputs.float().sum(1), torch.ones(len(outputs)).to(outputs.device)
    )


def _refuse_state(network: nn.Module, who: str, is_trained: bool) -> None:
    """Raises Mistake for state that digests, or of a trained network checkpoints and packed files, cannot hold."""
    for name, value in network.state_dict().items():
        if not isinstance(value, Tensor):
            raise Mistake(
                f"{who} has state that is no tensor ({name!r}: {type(value).__name__}), which no checkpoint could "
                "hold: keep it in a buffer, or outside get_extra_state"
            )
        if is_trained and value.is_complex():
            raise Mistake(
                f"{who} has complex numbers in its state ({name!r}: {value.dtype}), which cannot be packed: keep "
                "real and imaginary part (torch.view_as_real), or register the buffer with persistent=False"
            )
    if is_trained:
        refuse_computed(network)


def _train_once(network: nn.Module, images: Tensor, num_classes: int, who: str) -> bool:
    """Runs a copy in training mode, forward and backward; returns whether it took one of several outputs."""
    copied = copy.deepcopy(network).train().requires_grad_(True)
    try:
        logits = copied(images)
    except FAILURES as error:
        if isinstance(error, Mistake):
            raise
        raise Mistake(f"{who} fails in training mode: {type(error).__name__}: {error}") from error
    if not isinstance(logits, Tensor) or logits.shape != (len(images), num_classes):
        raise Mistake(needs_logits(f"{who} gives while it trains", logits, num_classes))
    try:
        logits.float().square().sum().backward()
    except FAILURES as error:
        raise Mistake(f"{who} has no gradient: {type(error).__name__}: {error}") from error
    hook = hook_of(copied)
    return hook is not None and hook.taken
