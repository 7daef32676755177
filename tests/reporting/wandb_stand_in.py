"""Stands in for the module wandb in the process that tracks a run: a service that is a file, and fails where it is told to.

The environment names the file (SERVICE: one JSON object a call) and the fault (FAULT: 'CALL', 'CALL:slow', 'CALL:connection').
"""

import json
import os
import time
from pathlib import Path

SERVICE = Path(os.environ["SERVICE"])
FAULT, _, HOW = os.environ.get("FAULT", "").partition(":")


def note(what: str, *told) -> None:
    with open(SERVICE, "a") as file:
        file.write(json.dumps([what, *told]) + "\n")
    if what == FAULT:
        if HOW == "slow":
            time.sleep(600)
        raise {"connection": ConnectionResetError, "exit": SystemExit}.get(HOW, RuntimeError)("lost\nmore")


class Settings:
    model_fields = {"init_timeout": None, "console": None}  # an older version: it has no login_timeout
    mode, identity_token_file, base_url = "online", None, "https://api.wandb.ai"

    def __init__(self, **given) -> None:
        self.given, self.api_key = given, os.environ.get("WANDB_API_KEY")


class setup:
    def __init__(self) -> None:
        self.settings = Settings()


class Table:
    def __init__(self, columns, data) -> None:
        self.content = [columns, data]


class Html:
    def __init__(self, data, inject) -> None:
        self.content = ["page", data, inject]


class Image:
    def __init__(self, path) -> None:
        self.content = ["image", Path(path).name]


class Artifact:
    def __init__(self, name, type) -> None:
        self.content = [name, type, []]

    def add_file(self, path, name) -> None:
        self.content[2].append([name, Path(path).stat().st_size])


class Run:
    """Has the steps of all runs with its id, as the service does."""

    def __init__(self, id: str) -> None:
        self.id, self.summary = id, self
        calls = [json.loads(line) for line in SERVICE.read_text().splitlines()]
        steps = [step for what, *told in calls if what == "log" for step in told[1:2] if told[2] == id]
        self.starting_step = max(steps, default=-1) + 1

    def define_metric(self, name, step_metric) -> None:
        note("define", name, step_metric)

    def log(self, values, step) -> None:
        note("log", {k: getattr(v, "content", v) for k, v in values.items()}, step, self.id)

    def log_artifact(self, artifact) -> None:
        note("artifact", *artifact.content)

    def update(self, values) -> None:
        note("summary", values)

    def finish(self) -> None:
        note("finish")


def init(project, name, group, id, resume, dir, config, tags, settings) -> Run:
    note("init", project, name, group, resume, dir, config, settings.given, tags)
    return Run(id)
