"""A torch.export program, for phones and servers that run PyTorch without this package."""

import json
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from pydantic import Field

from trainer.exporting.subject import Exported, Subject
from trainer.exporting.tracing import program_of


def pt2(subject: Subject, folder: Path, *, batch: Annotated[int, Field(ge=2)] = 1024) -> Exported:
    """Writes student.pt2, which torch.export.load opens without this package; its weights are dense.

    batch: the largest number of images at a time. The input is normalised, float32 [N, C, H, W]. The archive's facts.json, an
    extra file of torch.export, has classes, mean, std and shape.
    """
    file = folder / "student.pt2"
    facts = json.dumps(subject.facts() | {"batch": batch})
    torch.export.save(
        program_of(subject.network, subject.shape, batch), file, extra_files={"facts.json": facts}
    )
    loaded = torch.export.load(file).module()

    def run(images: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return torch.cat([loaded(part) for part in torch.from_numpy(images).split(batch)]).numpy()

    return Exported([file], run, file.stat().st_size)
