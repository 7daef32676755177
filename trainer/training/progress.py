"""Saves a training's progress so that it can continue after a kill, and logs its losses."""

import math
from pathlib import Path
from typing import Any, NotRequired

import torch
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor
from typing_extensions import TypedDict

from trainer.distillation.objective import Objective
from trainer.mistakes import Mistake, say
from trainer.storage import checkpoint
from trainer.training.optimizer import Averaged
from trainer.training.run import Run


class Window:
    """The losses since the last log, kept on the device."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.loss = math.nan
        self._kept: list[Tensor] = []
        self._where: list[tuple[int, int]] = []
        self._names: list[str] = []

    def add(self, terms: dict[str, Tensor], epoch: int, step: int) -> None:
        """Adds the losses of one batch."""
        self._names = list(terms)
        self._kept.append(torch.stack([value.detach().float() for value in terms.values()]))
        self._where.append((epoch, step))

    def flush(self, step: int, rate: float) -> None:
        """Logs the means over steps and processes. Raises FloatingPointError, on all processes, if one is not finite."""
        values = self.run.accelerator.reduce(torch.stack(self._kept), "mean").cpu()
        bad = (~torch.isfinite(values)).nonzero()
        if len(bad):
            row = int(bad[0, 0])
            broken = [
                n
                for n, v in zip(self._names, values[row], strict=True)
                if n != "loss" and not math.isfinite(v)
            ]
            epoch, at = self._where[row]
            raise FloatingPointError(
                f"stage {self.run.stage_name!r}, epoch {epoch + 1}, step {at + 1}: "
                f"{', '.join(broken) or 'the weighted sum'} is not finite (the run stops; its last checkpoint stands)"
            )
        means = dict(zip(self._names, values.mean(0).tolist(), strict=True))
        self.loss = means["loss"]
        self.run.log_numbers(step, lr=rate, **means)
        self._kept, self._where = [], []


class _Tally(TypedDict):
    images: int
    seconds: float
    best: float | None
    best_epoch: int | None
    finished: bool
    ratios: NotRequired[dict[str, dict[str, float]]]


class _Facts(TypedDict):
    """The facts of a training's checkpoint."""

    step: NonNegativeInt
    tally: _Tally
    layers: dict[str, dict[str, Any]]
    processes: NotRequired[PositiveInt]
    steps_per_epoch: NotRequired[PositiveInt]


class Progress:
    """The checkpoints of a training: parameters, buffers, optimizer, average, best weights, steps done.

    Args:
        run: The run.
        folder: Of the checkpoints.
        objective, optimizer, averaged: What is saved and loaded.
        steps_per_epoch: Of this training, which a resumed one must have too.
    """

    def __init__(
        self,
        run: Run,
        folder: Path,
        objective: Objective,
        optimizer: torch.optim.Optimizer,
        averaged: Averaged | None,
        steps_per_epoch: int,
    ) -> None:
        self.run, self.folder, self.objective = run, folder, objective
        self.steps_per_epoch = steps_per_epoch
        self.optimizer, self.averaged = optimizer, averaged
        self.best: dict[str, Tensor] | None = None

    def remember_best(self) -> None:
        """Copies the present weights, averaged if there is an average, as the best ones."""
        if self.averaged is not None:
            self.averaged.swap()
        self.best = {name: tensor.detach().clone() for name, tensor in self.objective.state_dict().items()}
        if self.averaged is not None:
            self.averaged.swap()

    def recall_best(self) -> None:
        """Loads the best weights, if any were remembered."""
        if self.best is not None:
            self.objective.load_state_dict(self.best)

    def save(self, step: int, tally: dict) -> None:
        """Writes a checkpoint on the main process; all processes wait for it."""
        accelerator = self.run.accelerator
        if self.run.cache is not None:
            self.run.cache.file.sync()
        if accelerator.is_main_process:
            facts = {
                "step": step,
                "tally": tally,
                "layers": self.run.layers,
                "processes": accelerator.num_processes,
                "steps_per_epoch": self.steps_per_epoch,
            }
            groups, states = {"objective": self.objective.state_dict()}, {}
            if not tally["finished"]:
                states["optimizer"] = self.optimizer.state_dict()
                facts["scaler"] = accelerator.scaler.state_dict() if accelerator.scaler is not None else {}
                if self.averaged is not None:
                    groups["average"] = {str(i): t for i, t in enumerate(self.averaged.average)}
                if self.best is not None:
                    groups["best"] = self.best
            checkpoint.save(self.folder, groups, facts, states=states)
        accelerator.wait_for_everyone()

    def _fits(self, state: dict | None) -> bool:
        """Returns whether a saved state of the optimizer has the same groups of parameters."""
        if state is None:  # the training is finished
            return True
        kept, own = state["param_groups"], self.optimizer.param_groups
        return [len(group["params"]) for group in kept] == [len(group["params"]) for group in own]

    def _compare_processes(self, facts: dict[str, Any]) -> None:
        """Says that another number of processes goes on. Raises Mistake if the epochs have other steps by that."""
        now, kept = self.run.accelerator.num_processes, facts.get("processes")
        if kept is None or kept == now or facts["tally"]["finished"]:
            return
        began = f"{self.folder}: began with {_counted(kept)}"
        if facts.get("steps_per_epoch", self.steps_per_epoch) != self.steps_per_epoch:
            raise Mistake(
                f"{began} and {facts['steps_per_epoch']} steps an epoch; with {_counted(now)} an epoch has "
                f"{self.steps_per_epoch}, and it cannot go on: start as many as before"
            )
        if self.run.accelerator.is_main_process:
            say(
                f"{began} and goes on with {_counted(now)}: rounding, and BatchNorm's statistics, depend on it"
            )

    def load(self) -> tuple[int, dict]:
        """Loads the newest valid checkpoint, if any; returns the steps done and the tally.

        Raises Mistake for a checkpoint of an older version of the program, and for one whose epochs had another number of
        steps: the order of the images follows from the step.
        """
        found = checkpoint.load(self.folder, _Facts, ("objective",))
        if found is None:
            return 0, {"images": 0, "seconds": 0.0, "best": None, "best_epoch": None, "finished": False}
        groups, facts = found
        if "optimizer" in facts or not self._fits(groups.get("optimizer")):
            raise Mistake(
                f"{self.folder}: an older version of the program was interrupted in this training, and this one cannot go on from "
                "there: remove that folder, and the training begins anew; the stages before it stand"
            )
        self._compare_processes(facts)
        self.run.log_numbers(facts["step"], resumed=1)
        self.run.layers = facts["layers"]
        self.objective.load_state_dict(groups["objective"])
        if not facts["tally"]["finished"]:
            self.optimizer.load_state_dict(groups["optimizer"])
            # It has none of a part on a machine that has no float16.
            if self.run.accelerator.scaler is not None and facts.get("scaler"):
                self.run.accelerator.scaler.load_state_dict(facts["scaler"])
            if self.averaged is not None:
                for i, tensor in enumerate(self.averaged.average):
                    tensor.copy_(groups["average"][str(i)])
            self.best = groups.get("best")
        return facts["step"], facts["tally"]


def _counted(processes: int) -> str:
    return "1 process" if processes == 1 else f"{processes} processes"
