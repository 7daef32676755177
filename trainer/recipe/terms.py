"""What a loss may ask to be fed, and what that asks of the teacher."""

import inspect
from collections.abc import Sequence

from trainer.mistakes import Mistake, nearest
from trainer.recipe import shelves
from trainer.recipe.keys import TermKeys

# What a loss may ask for, by what has to be computed for it.
MAPS = {"student_map", "teacher_map", "projected_map"}
MAP_LISTS = {"student_maps", "teacher_maps"}
EMBEDDINGS = {"student_embedding", "teacher_embedding", "projected_embedding"}
WEIGHTS = {"student_weight", "teacher_weight"}
OTHERS = {"student_logits", "teacher_logits", "labels", "index", "teacher_head", "epoch"}
VOCABULARY = MAPS | MAP_LISTS | EMBEDDINGS | WEIGHTS | OTHERS
TEACHER_WORDS = {w for w in VOCABULARY if w.startswith("teacher")} | {"projected_map", "projected_embedding"}
WORDS_OF_CONSTRUCTORS = VOCABULARY | {"num_samples", "num_classes"}


def wants(term: TermKeys) -> list[str]:
    """The names that the term's loss asks to be fed. Raises Mistake for a word that nobody knows."""
    function = shelves.find("loss", term.loss)
    asks = shelves.fed(function)
    built_with = shelves.built_with(function) if inspect.isclass(function) else []
    for word, known in [(word, VOCABULARY) for word in asks] + [
        (word, WORDS_OF_CONSTRUCTORS) for word in built_with
    ]:
        if word not in known:
            raise Mistake(f"loss {term.loss!r} asks for {word!r}{nearest(word, sorted(known))}")
    return asks


def needs_teacher(term: TermKeys) -> bool:
    """Whether the term's loss asks for anything of the teacher's, or for layers, which come in pairs."""
    finishes = hasattr(shelves.find("loss", term.loss), "finish")  # which is given the teacher's classifier
    return finishes or bool((TEACHER_WORDS | MAPS | MAP_LISTS | WEIGHTS) & set(wants(term)))


def asked_of_teacher(terms: Sequence[TermKeys]) -> set[str]:
    """What a forward pass of the teacher has to give for the terms: of 'logits', 'embedding' and 'maps'."""
    asks = {word for term in terms for word in wants(term)}
    kinds = {
        "logits": {"teacher_logits"},
        "embedding": {"teacher_embedding"},
        "maps": {"teacher_map", "teacher_maps", "projected_map"},
    }
    return {kind for kind, words in kinds.items() if words & asks}
