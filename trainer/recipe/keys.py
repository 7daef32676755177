"""Every key that a recipe has of its own, whatever files it names; the keys of a shelf's file are that file's arguments.

Light to import: whoever reads a recipe reads this, and nothing that computes.
"""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    PrivateAttr,
    model_validator,
)

from trainer.mistakes import Mistake
from trainer.recipe import shelves
from trainer.recipe.faults import Entry
from trainer.recipe.text import Text, at_path, where


class Mark(NamedTuple):
    """Stands in a type's annotation: general code knows a setting by it, whatever stage it belongs to (see `stages`)."""

    name: str


EXCLUDE = Mark("exclude")  # names of layers that a stage leaves alone
PER_LAYER = Mark("per layer")  # one value for all layers, or {layer: value}

Exclude = Annotated[list[str], EXCLUDE]
Fraction = Annotated[float, Field(ge=0, le=1)]
_Count = Annotated[int, Field(gt=0, lt=2**31)]


class Augment(BaseModel):
    """How the views of an image differ from it. Amounts are drawn uniformly; everything is off by default.

    What comes in from outside the image is 0. Geometry is bilinear; `shift` and `flip` alone are exact.

    Acted on by `views`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    flip: bool = Field(False, description="mirror left and right, half of the time")
    shift: NonNegativeInt = Field(0, description="whole pixels, up to so many in each direction")
    rotate: Annotated[float, Field(ge=0, le=180)] = Field(
        0.0, description="degrees, up to so many either way"
    )
    scale: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="0.1: between 0.9 and 1.1 times the size"
    )
    shear: Annotated[float, Field(ge=0, le=60)] = Field(0.0, description="degrees, up to so many either way")
    elastic: NonNegativeFloat = Field(
        0.0,
        description="pixels; a smooth warp whose 4 x 4 control points move up to so many in each direction",
    )
    brightness: Fraction = Field(0.0, description="0.2: values times a factor between 0.8 and 1.2")
    contrast: Fraction = Field(
        0.0, description="0.2: distance from the image's mean times between 0.8 and 1.2"
    )
    erase: Fraction = Field(
        0.0,
        description="share of the images of which a rectangle is set to 0, of 2 to 33 % of the area "
        "and with sides in a ratio of 0.3 to 3.3 (Zhong et al. 2020)",
    )


if TYPE_CHECKING:

    class _ShelfEntry(Entry):
        """Names a file of a shelf, and has that file's keys too; which they are, the type checker cannot know."""

        def __getattr__(self, name: str) -> Any: ...
else:
    _ShelfEntry = Entry


class DataKeys(_ShelfEntry):
    """The data section. validation: a fraction of the training set or a number of images, held out of it; or a folder.

    seed: of the validation split and of the augmented views; the run's own seed does not touch them, so that a
    teacher's kept logits serve every seed. views: how many augmented views before they repeat (None: endless).
    keep_views: keep them in memory, as float32, once they were made: later epochs and stages need not make them again.
    mean, std: of the normalisation, per channel, instead of the training images' own (0 and 1: images in [0, 1]).
    subset: use only so many training images. mixup, cutmix: the alpha of their Beta distributions, 0 for off.

    Acted on by `data`.
    """

    dataset: str
    seed: NonNegativeInt = 0
    validation: Annotated[float, Field(gt=0, lt=1)] | Annotated[int, Field(gt=0, strict=True)] | Path = 0.1
    subset: PositiveInt | None = None
    views: PositiveInt | None = None
    keep_views: bool = False
    augment: Augment = Augment()
    mixup: NonNegativeFloat = 0.0
    cutmix: NonNegativeFloat = 0.0
    workers: NonNegativeInt = 2
    mean: Annotated[tuple[float, ...], Field(min_length=1)] | None = None
    std: Annotated[tuple[Annotated[float, Field(gt=0)], ...], Field(min_length=1)] | None = None


class ModelKeys(_ShelfEntry):
    """A network in a recipe: `model` names a file of the models shelf, `timm/NAME`, `hf-hub:NAME` or `python:module:function`.

    Acted on by `teacher`.
    """

    model: str
    checkpoint: Path | None = None


class StudentKeys(ModelKeys):
    """The student; `from_teacher: copy` starts it from evenly spaced layers and leading channels of the teacher.

    Acted on by `teacher`.
    """

    from_teacher: Literal["copy"] | None = None


class TeacherKeys(ModelKeys):
    """A teacher: `resize` (pixels) and `mean`/`std` are how it wants to see images; `weight` counts among several.

    Acted on by `teacher`.
    """

    resize: PositiveInt | None = None
    mean: Annotated[tuple[float, ...], Field(min_length=1)] | None = None
    std: Annotated[tuple[Annotated[float, Field(gt=0)], ...], Field(min_length=1)] | None = None
    weight: PositiveFloat = 1.0


class CacheKeys(Entry):
    """The teacher's kept answers. where: in `memory`, for this run (mapped to a file in its folder, so that it finds them
    again when it was interrupted; removed at its end), or on `disk`, for later runs too (in views/ in the folder of
    TRAINER_DATA, by default ~/.cache/tiny-student; never removed by the program).

    type: `float16` halves the size; its error is measured and told. top: keep only so many of the highest logits and
    the mass of the rest, for many classes. embeddings, maps: keep those too that the recipe's losses ask for; maps are
    large, and stages whose losses want something that is not kept ask the teacher each time. limit_gib: the largest
    size that is allowed (2 in memory, on disk whatever is free).

    Acted on by `cache`.
    """

    where: Literal["memory", "disk"] = "memory"
    type: Literal["float32", "float16"] = "float32"
    top: PositiveInt | None = None
    embeddings: bool = False
    maps: bool = False
    limit_gib: PositiveFloat | None = None

    def serve(self, asked: set[str]) -> bool:
        """Whether answers kept so are all that losses need which ask for these of 'logits', 'embedding' and 'maps'."""
        kept = {"logits": True, "embedding": self.embeddings, "maps": self.maps}
        return bool(asked) and all(kept[kind] for kind in asked)


# A layer: a stage's name, a module's dotted name, or a stage's number (from 0; -1 is the last).
Name = str | int
At = (
    Literal["auto", "last"]
    | Annotated[list[Name], Field(min_length=1)]
    | Annotated[dict[Name, Name], Field(min_length=1)]
)


class WeightSchedule(Entry):
    """A term's weight over the first `epochs` of its stage (all when not given); then it stays as it is.

    schedule: `constant`; `warm_up`, from 0 to `value` in a straight line; `linear` and `cosine`, from `value`
    to `to` (0).

    Acted on by `objective`.
    """

    value: NonNegativeFloat
    schedule: Literal["constant", "warm_up", "linear", "cosine"]
    epochs: PositiveFloat | None = None
    to: NonNegativeFloat | None = None

    @model_validator(mode="after")
    def _has_effect(self) -> "WeightSchedule":
        if self.to is not None and self.schedule in ("constant", "warm_up"):
            raise Mistake(f"to has no effect with schedule {self.schedule!r}; 'linear' and 'cosine' have it")
        if self.epochs is not None and self.schedule == "constant":
            raise Mistake("epochs has no effect with schedule 'constant'")
        if self.schedule != "constant" and self.value == (self.to or 0.0):
            raise Mistake(
                f"schedule {self.schedule!r} has no effect: value and where it goes are both {self.value}"
            )
        return self

    def at(self, epoch: float, num_epochs: float) -> float:
        """The weight when `epoch` epochs of a stage of `num_epochs` are done."""
        if self.schedule == "constant":
            return self.value
        fraction = min(1.0, epoch / (self.epochs or num_epochs))
        if self.schedule == "warm_up":
            return self.value * fraction
        end = 0.0 if self.to is None else self.to
        if self.schedule == "cosine":
            fraction = (1 - math.cos(math.pi * fraction)) / 2
        return self.value + (end - self.value) * fraction


class TermKeys(_ShelfEntry):
    """One term of an objective. weight: a number or a schedule; a term of weight 0 is only logged.

    at: which layers look at which, for losses on layers: `auto` (when not given), `last`, the student's
    layers, or {student layer: teacher layer}.

    Acted on by `objective`.
    """

    loss: str
    weight: NonNegativeFloat | WeightSchedule = 1.0
    at: At | None = None


class Training(Entry):
    """How to train. batch_size counts the images of all processes; `accumulate` batches make one step.

    schedule: `constant`, `cosine` to 0, `one_cycle` (up over the first 30 %, then down to 1/10000), `step` (times `gamma` at
    each epoch of `milestones`); `warmup`: epochs of linear rise before it. clip: largest norm of the gradient. keep: the
    `last` weights or those of the `best` validation accuracy. patience: stop after so many epochs without a better
    one. ema: decay of the exponential moving average of the weights, which is then what is kept. momentum and nesterov
    are sgd's.

    weight_decay: of the student's weights alone, as in timm; its norms and biases, shared values (centroids), projectors
    and parameters of losses have none. decay_all: of everything but shared values.

    How it is run, which changes results by rounding only: compile, by torch.compile (a minute more at the start; on CPUs it
    needs a C++ compiler); channels_last, with images and convolutions in that memory layout. The recipe's `precision` is that
    of all its stages.

    Acted on by `fit`.
    """

    epochs: _Count
    batch_size: _Count = 128
    lr: PositiveFloat = 1e-3
    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    weight_decay: NonNegativeFloat = 0.0
    decay_all: bool = False
    momentum: Annotated[float, Field(ge=0, lt=1)] | None = None
    nesterov: bool = False
    schedule: Literal["constant", "cosine", "one_cycle", "step"] = "constant"
    warmup: NonNegativeFloat = 0.0
    milestones: list[PositiveInt] | None = None
    gamma: PositiveFloat | None = None
    clip: PositiveFloat | None = None
    accumulate: _Count = 1
    keep: Literal["last", "best"] = "last"
    patience: PositiveInt | None = None
    validate_every: PositiveInt = 1
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
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
        if self.warmup >= self.epochs:
            raise Mistake(f"warmup of {self.warmup} epochs leaves nothing of {self.epochs}")
        return self


class StageKeys(_ShelfEntry):
    """One stage of a recipe.

    Acted on by `runner`.
    """

    stage: str


# What names a shelf's file has that file's keys too. The type checker, which cannot run this, sees the keys of all.
if TYPE_CHECKING:
    DataEntry = DataKeys
    Student = StudentKeys
    TeacherEntry = TeacherKeys
    Term = TermKeys
    Stage = StageKeys
else:
    DataEntry = shelves.from_shelf("dataset", DataKeys)
    Student = shelves.from_shelf("model", StudentKeys)
    TeacherEntry = shelves.from_shelf("model", TeacherKeys)
    Term = shelves.from_shelf("loss", TermKeys)
    Stage = shelves.from_shelf("stage", StageKeys)


class Recipe(Entry):
    """A recipe.

    name: of the run and its folder. seed: of initial weights, order and dropout (the data section has its
    own). teachers: several instead of one teacher; combine says how they speak as one. cache: where the
    teacher's answers are kept (when not given: in memory, if they are asked for again and take no more than 2
    GiB). precision: of training. threads: of torch in each process (when not given: one for each physical core that
    it may use, divided among the processes of a machine, and no more than OMP_NUM_THREADS says). Paths
    (checkpoint, folder) are relative to the folder the program is started in.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=100)]
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    data: DataEntry
    teacher: TeacherEntry | None = None
    teachers: Annotated[list[TeacherEntry], Field(min_length=2)] | None = None
    combine: Literal["logits", "probabilities", "confidence"] | None = None
    student: Student
    stages: Annotated[list[Stage], Field(min_length=1)]
    cache: Literal["off", "memory", "disk"] | CacheKeys | None = None
    track: Literal["wandb"] | None = None
    precision: Literal["no", "fp16", "bf16"] = "no"
    threads: Annotated[int, Field(gt=0, le=4096)] | None = None
    _text: Text | None = PrivateAttr(None)
    _allows_python: bool = PrivateAttr(False)

    @property
    def teacher_entries(self) -> list[TeacherKeys]:
        return self.teachers or ([self.teacher] if self.teacher else [])

    @property
    def allows_python(self) -> bool:
        """Whether it may name `python:module:name`."""
        return self._allows_python

    @property
    def written(self) -> Text:
        """What it was read from."""
        assert self._text is not None, "this recipe was not read from a text"
        return self._text

    def fault(self, path: tuple, message: str) -> str:
        """A message about a path of this recipe, ('stages', 1, 'keep'), with its file and line."""
        if self._text is None:  # not read from a file
            return f"{where(path)}: {message}"
        first, found, rest = message.partition(": ")
        if found and first in at_path(self._text.plain, path):  # 'at: ...' is about the entry's own key
            path, message = (*path, first), rest
        return self._text.fault(path, message)
