"""The floors of pyproject.toml are the versions that the test suite was run with."""

import re
import tomllib
from pathlib import Path

TOP = Path(__file__).parents[1]


def pins(file: str) -> dict[str, str]:
    lines = (TOP / "scripts" / file).read_text().splitlines()
    found = (line.partition("#")[0].strip().partition("==") for line in lines)
    return {name.lower(): version for name, equal, version in found if equal}


def numbers(version: str) -> list[int]:
    found = [int(part) for part in version.split(".")]
    return found + [0] * (3 - len(found))


def test_floors_are_the_oldest_set_and_not_above_the_newest():
    project = tomllib.loads((TOP / "pyproject.toml").read_text())["project"]
    required = [re.fullmatch(r"([\w-]+)>=([\d.]+)", line) for line in project["dependencies"]]
    assert required and all(required), "a dependency has a floor and nothing else"
    floors = {match[1].lower(): match[2] for match in required}
    oldest, newest = pins("requirements_oldest.txt"), pins("requirements.txt")
    for name, floor in floors.items():
        assert numbers(floor) == numbers(oldest[name]), name
        assert numbers(floor) <= numbers(newest[name]), name
