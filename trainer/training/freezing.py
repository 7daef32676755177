"""Keeps all of a network but its classifier as it is, for a whole training or its first epochs."""

from torch import nn

from trainer.mistakes import Mistake
from trainer.networks.features import classifiers


class Frozen:
    """Everything of a network but its head.

    Frozen, it gets no gradients, and modules with buffers (BatchNorm and its statistics) work as in evaluation.

    Raises Mistake for a network without a classifier, or without anything beside it.
    """

    def __init__(self, network: nn.Module) -> None:
        heads = [module for head in classifiers(network) for module in head.modules()]
        own = {id(parameter) for head in heads for parameter in head.parameters()}
        #: The parameters that are trained when the network is not frozen.
        self.parameters = [p for p in network.parameters() if p.requires_grad and id(p) not in own]
        if not self.parameters:
            raise Mistake(
                "train_only and freeze_epochs have no effect: the network is no more than its classifier"
            )
        outside = [module for module in network.modules() if all(module is not head for head in heads)]
        self._with_buffers = [m for m in outside if next(m.buffers(recurse=False), None) is not None]
        self._network = network
        self.is_on = False

    def set(self, is_on: bool) -> None:
        """Freezes, or ends that. The network must be in training mode."""
        self.is_on = is_on
        for parameter in self.parameters:
            parameter.requires_grad_(not is_on)
        for module in self._with_buffers:
            module.training = not is_on
