"""Packs the teacher's outputs into the fields of a record, and restores logits from them."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from trainer.distillation.answer_file import Layout
from trainer.mistakes import Mistake
from trainer.networks.features import Seen


class Record(NamedTuple):
    """How one answer is kept: all logits [K], or the `top` highest and the mass of the rest; embedding [D], maps.

    layout: the fields of one record, in order. num_classes: K. top: None if all logits are kept.
    """

    layout: Layout
    num_classes: int
    top: int | None


def record_of(seen: Seen, kind: torch.dtype, top: int | None) -> Record:
    """Returns the record that keeps all outputs of `seen` in type `kind`. Raises Mistake for a `top` that saves nothing."""
    num_classes = seen.logits.shape[1]
    layout: Layout = {name: (tuple(part.shape[1:]), kind) for name, part in _parts(seen).items()}
    if top is not None:
        if top > num_classes - 2:
            raise Mistake(f"top {top} of {num_classes} classes saves nothing; leave top out")
        del layout["logits"]
        small = torch.int16 if num_classes <= 2**15 else torch.int32
        layout |= {"values": ((top,), kind), "classes": ((top,), small), "rest": ((1,), torch.float32)}
    return Record(layout, num_classes, top)


def logit_fields(record: Record) -> list[str]:
    """Returns the fields that the logits are restored from."""
    return ["logits"] if record.top is None else ["values", "classes", "rest"]


def pack(record: Record, seen: Seen) -> dict[str, Tensor]:
    """Returns the fields of a batch of answers, in the record's types: {field: [N, ...]}."""
    found = _parts(seen)
    if record.top is not None:
        logits = found.pop("logits").float()
        values, classes = logits.topk(record.top, dim=1)
        rest = logits.scatter(1, classes, -math.inf).logsumexp(1, keepdim=True)
        found |= {"values": values, "classes": classes, "rest": rest}
    return {name: found[name].to(kind) for name, (_, kind) in record.layout.items()}


def restore(record: Record, kept: dict[str, Tensor]) -> Tensor:
    """Returns logits [N, K] in float32; with `top` all other classes have an equal part of the rest's mass."""
    if record.top is None:
        return kept["logits"].float()
    num_others = record.num_classes - record.top
    logits = (kept["rest"] - math.log(num_others)).repeat(1, record.num_classes)
    return logits.scatter_(1, kept["classes"].long(), kept["values"].float())


def differences(record: Record, kept: dict[str, Tensor], live: Seen) -> tuple[list[float], list[float]]:
    """Returns for each record the largest difference of a kept logit from the live one, and the largest |live logit|."""
    full = live.logits.float()
    if record.top is None:
        difference = (kept["logits"].float() - full).abs().amax(1)
    else:
        classes = kept["classes"].long()
        difference = (kept["values"].float() - full.gather(1, classes)).abs().amax(1)
    return difference.tolist(), full.abs().amax(1).tolist()


def _parts(seen: Seen) -> dict[str, Tensor]:
    parts = {"logits": seen.logits}
    if seen.embedding is not None:
        parts["embedding"] = seen.embedding
    return parts | {f"map/{name}": map_ for name, map_ in seen.maps.items()}
