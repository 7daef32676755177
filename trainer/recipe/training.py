"""How to train: the keys of every `training` section of a recipe."""

import math
from typing import Annotated, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from trainer.mistakes import Mistake
from trainer.recipe.faults import Entry
from trainer.recipe.keys import EPOCHS

_Count = Annotated[int, Field(gt=0, lt=2**31)]


class Training(Entry):
    """How to train. The recipe's `precision` holds for all stages.

    Attributes:
        batch_size: Images of a batch, over all processes.
        lr: The highest learning rate.
        weight_decay: Of the student's weights alone, as in timm: norms, biases, shared values (centroids), projectors and
            parameters of losses have none.
        decay_all: Whether everything but shared values has weight decay.
        momentum, nesterov: Of sgd.
        schedule: Of the learning rate: `constant`; `cosine` to 0; `one_cycle`, up over the first 30 %, then down to
            1/10000; `step`, times gamma (0.1) at each epoch of milestones.
        warmup: Epochs of linear rise before the schedule.
        milestones, gamma: Of `step`.
        clip: The largest norm of the gradient.
        accumulate: Batches of one optimizer step.
        keep: The `last` weights, or those of the `best` validation accuracy: of the balanced one, in which each class counts
            alike, with class_weights or sampler `balanced`.
        patience: Stop after this many epochs without a better validation accuracy, as of `keep`.
        validate_every: Epochs between two validations.
        ema: Decay of the exponential moving average of the weights. The averaged weights are then kept.
        train_only: `head` trains the classifier alone: all else, BatchNorm's statistics too, stays as it is.
        freeze_epochs: For the first so many epochs only the classifier is trained, as with `train_only: head`.
        layer_decay: A layer's learning rate is lr times layer_decay^(layers above it), as in timm: the classifier has lr, the
            first layer the lowest rate. Layers are timm's groups of the network, elsewhere its blocks.
        class_weights: `balanced` weighs each image, in the losses that take the weights (cross_entropy), by 1 over its
            class's frequency, as scikit-learn does: the mean weight of an image is 1.
        sampler: `balanced` draws as many images of each class in an epoch, rare ones several times and some of the frequent
            ones not; images without a label once each. An epoch has as many images as without it.
        compile: Whether torch.compile is used (a minute more at the start; on CPUs it needs a C++ compiler). It changes
            results by rounding only, as channels_last does.
        channels_last: Whether images and convolutions have that memory layout.

    Acted on by `training.fit`.
    """

    epochs: Annotated[_Count, EPOCHS]
    batch_size: _Count = 128
    lr: PositiveFloat = 1e-3
    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    weight_decay: NonNegativeFloat = 0.0
    decay_all: bool = False
    momentum: Annotated[float, Field(ge=0, lt=1)] | None = None
    nesterov: bool = False
    schedule: Literal["constant", "cosine", "one_cycle", "step"] = "constant"
    warmup: Annotated[NonNegativeFloat, EPOCHS] = 0.0
    milestones: Annotated[list[PositiveInt] | None, EPOCHS] = None
    gamma: PositiveFloat | None = None
    clip: PositiveFloat | None = None
    accumulate: _Count = 1
    keep: Literal["last", "best"] = "last"
    patience: Annotated[PositiveInt | None, EPOCHS] = None
    validate_every: Annotated[PositiveInt, EPOCHS] = 1
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    train_only: Literal["head"] | None = None
    freeze_epochs: Annotated[NonNegativeInt, EPOCHS] = 0
    layer_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    class_weights: Literal["balanced"] | None = None
    sampler: Literal["balanced"] | None = None
    compile: bool = False
    channels_last: bool = False

    @model_validator(mode="after")
    def _has_effect(self) -> "Training":
        if self.optimizer != "sgd" and (self.momentum is not None or self.nesterov):
            raise Mistake(
                f"momentum and nesterov have no effect with optimizer {self.optimizer!r}; 'sgd' has them"
            )
        if self.nesterov and not self.momentum:
            raise Mistake("nesterov has no effect without momentum")
        if self.class_weights and self.sampler:
            raise Mistake(
                "class_weights and sampler both make the classes count alike; one of them is allowed"
            )
        if self.decay_all and not self.weight_decay:
            raise Mistake("decay_all has no effect with weight_decay 0")
        if self.schedule != "step" and (self.milestones is not None or self.gamma is not None):
            raise Mistake(
                f"milestones and gamma have no effect with schedule {self.schedule!r}; 'step' has them"
            )
        if self.schedule == "step" and not self.milestones:
            raise Mistake("schedule 'step' needs milestones, the epochs at which the rate falls")
        if self.schedule == "one_cycle" and self.warmup:
            raise Mistake("warmup has no effect with schedule 'one_cycle', which rises by itself")
        if self.train_only and (self.freeze_epochs or self.layer_decay):
            raise Mistake(
                "freeze_epochs and layer_decay have no effect with train_only, which trains no other layer"
            )
        if self.freeze_epochs >= self.epochs:
            raise Mistake(
                f"freeze_epochs {self.freeze_epochs} leaves no epoch of {self.epochs}; train_only: head trains the head alone"
            )
        if self.warmup >= self.epochs:
            raise Mistake(f"warmup of {self.warmup} epochs leaves nothing of {self.epochs}")
        late = [milestone for milestone in self.milestones or [] if milestone >= self.epochs]
        if late:
            raise Mistake(f"milestones has {late[0]}, which is never reached: there are {self.epochs} epochs")
        if self.patience is not None and self._first_stop() >= self.epochs:
            raise Mistake(
                f"patience {self.patience} has no effect: it can stop after epoch {self._first_stop()} at the "
                f"earliest, and there are {self.epochs}"
            )
        return self

    @property
    def balances(self) -> bool:
        """Whether rare classes count as much as frequent ones."""
        return self.class_weights is not None or self.sampler is not None

    def _first_stop(self) -> int:
        """Returns the first epoch after which patience can stop the training: the first validation was the best."""
        assert self.patience is not None
        return self.validate_every * (1 + math.ceil(self.patience / self.validate_every))
