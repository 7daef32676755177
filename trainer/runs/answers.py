"""Whether and where the teacher's answers are kept."""

from trainer.data.fetch import cache_folder
from trainer.distillation.answers import Answers
from trainer.distillation.objective import Objective
from trainer.mistakes import Mistake
from trainer.recipe.keys import Augment, CacheKeys, Recipe, StageKeys
from trainer.recipe.terms import asked_of_teacher
from trainer.recipe.text import RecipeError
from trainer.training.run import Run


def keep_answers(run: Run, recipe: Recipe, stages: list[StageKeys]) -> Answers | None:
    """Opens the cache of the teacher's answers for the stages to come: as the recipe says, or, where it says nothing, in
    memory, with what the most stages need that fits. Raises RecipeError when what the recipe says cannot be done.
    """
    teaching = [
        stage
        for stage in stages
        if getattr(stage, "training", None) and asked_of_teacher(getattr(stage, "losses", None) or [])
    ]
    asked = [asked_of_teacher(stage.losses) for stage in teaching]
    data, accelerator = run.data, run.accelerator
    if recipe.cache == "off" or not asked:
        return None
    if recipe.cache is not None:
        wishes = [recipe.cache if isinstance(recipe.cache, CacheKeys) else CacheKeys(where=recipe.cache)]
    elif data.mixup or data.cutmix or (data.augment != Augment() and data.views is None):
        wishes = []
        refused = (
            "mixed images are never seen twice"
            if data.mixup or data.cutmix
            else "data.views does not limit the views"
        )
    else:
        embeddings, maps = (any(kind in kinds for kinds in asked) for kind in ("embedding", "maps"))
        combinations = dict.fromkeys([(embeddings, maps), (embeddings, False), (False, False)])
        wishes = [
            keys
            for e, m in combinations
            if any((keys := CacheKeys(embeddings=e, maps=m)).serve(k) for k in asked)
        ]
        refused = "every loss asks for more than logits"
    for keys in wishes:
        layers: dict[str, None] = {}
        for stage in teaching if keys.maps else []:
            objective = Objective(run.student, stage.losses, data, run.teacher, device=accelerator.device)
            layers |= dict.fromkeys(objective.teacher_layers)
        folder = (cache_folder() if keys.where == "disk" else run.folder) / "views"
        try:
            cache = Answers(
                run.teacher,
                data,
                folder,
                keys,
                layers=list(layers),
                device=accelerator.device,
                precision=recipe.precision,
            )
            with accelerator.autocast():
                cache.check()
                lost = cache.measure() if accelerator.is_main_process else {}
        except Mistake as error:
            if recipe.cache is not None:
                raise RecipeError(recipe.fault(("cache",), str(error))) from error
            refused = str(error)
            continue
        run.log.numbers("cache", 0, num_bytes=cache.file.num_bytes, **lost)
        if accelerator.is_main_process:
            told = "".join(f"; {key} {value:.3g}" for key, value in lost.items())
            print(f"the teacher's answers are kept: {cache.describe()}{told}", flush=True)
        return cache
    if accelerator.is_main_process:
        print(f"the teacher's answers are not kept: {refused}", flush=True)
    return None
