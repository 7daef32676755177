"""The names of a loss's arguments, and what they require of the teacher."""

import inspect
from collections.abc import Sequence

from trainer.mistakes import Mistake, nearest
from trainer.recipe import shelves
from trainer.recipe.keys import TermKeys

# The arguments that a loss may have, by what must be computed for them.
MAPS = {"student_map", "teacher_map", "projected_map"}
MAP_LISTS = {"student_maps", "teacher_maps"}
EMBEDDINGS = {"student_embedding", "teacher_embedding", "projected_embedding"}
WEIGHTS = {"student_weight", "teacher_weight"}
OTHERS = {"student_logits", "teacher_logits", "labels", "class_weights", "index", "teacher_head", "epoch"}
VOCABULARY = MAPS | MAP_LISTS | EMBEDDINGS | WEIGHTS | OTHERS
STUDENT_WORDS = {w for w in VOCABULARY if w.startswith(("student", "projected"))}
TEACHER_WORDS = {w for w in VOCABULARY if w.startswith("teacher")} | {"projected_map", "projected_embedding"}
WORDS_OF_CONSTRUCTORS = VOCABULARY | {"num_samples", "num_classes"}


def wants(term: TermKeys) -> list[str]:
    """Returns the names of the arguments of the term's loss. Raises Mistake for an unknown name, and a class without forward."""
    function = shelves.find("loss", term.loss)
    if inspect.isclass(function) and not hasattr(function, "forward"):
        raise Mistake(f"loss {term.loss!r} is a class without forward; a function or an nn.Module is allowed")
    asks = shelves.fed(function)
    built_with = shelves.built_with(function) if inspect.isclass(function) else []
    for word, known in [(word, VOCABULARY) for word in asks] + [
        (word, WORDS_OF_CONSTRUCTORS) for word in built_with
    ]:
        if word not in known:
            raise Mistake(f"loss {term.loss!r} asks for {word!r}{nearest(word, sorted(known))}")
    return asks


def needs_teacher(term: TermKeys) -> bool:
    """Returns whether the term's loss takes anything of the teacher, or layers, which come in pairs."""
    finishes = hasattr(shelves.find("loss", term.loss), "finish")  # which is given the teacher's classifier
    return finishes or bool((TEACHER_WORDS | MAPS | MAP_LISTS | WEIGHTS) & set(wants(term)))


def asks_answers(term: TermKeys) -> bool:
    """Returns whether the term's loss takes the teacher's logits or its classifier."""
    finishes = hasattr(shelves.find("loss", term.loss), "finish")  # which is given the teacher's classifier
    return finishes or bool({"teacher_logits", "teacher_head"} & set(wants(term)))


def asked_of_teacher(terms: Sequence[TermKeys]) -> set[str]:
    """Returns what a forward pass of the teacher must return for the terms: a set of 'logits', 'embedding' and 'maps'."""
    asks = {word for term in terms for word in wants(term)}
    kinds = {
        "logits": {"teacher_logits"},
        "embedding": {"teacher_embedding"},
        "maps": {"teacher_map", "teacher_maps", "projected_map"},
    }
    return {kind for kind, words in kinds.items() if words & asks}
