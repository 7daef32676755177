"""`trainer run`: what its options change in the recipe, and those without effect."""

import pytest

from trainer.cli import main
from trainer.recipe.recipe import read
from trainer.recipe.text import RecipeError
from trainer.runs import runner


def test_no_images(monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(runner, "run", lambda path, changes, *rest: asked.append(changes))
    assert main(["run", "quickstart", "--no-images"]) == 0 and main(["run", "quickstart"]) == 0
    assert asked == [{"report_images": False}, {}]
    assert main(["run", "quickstart", "--no-images", "--set", "report_images=true"]) == 2
    assert "--set report_images: --no-images gives it too" in capsys.readouterr().err
    assert main(["run", "quickstart", "--no-images", "--dry-run"]) == 2
    assert "--no-images has no effect with --dry-run" in capsys.readouterr().err


def test_track_images_needs_track():
    with pytest.raises(RecipeError, match="track_images: has no effect without track"):
        read("quickstart", {"track_images": True})
    assert read("quickstart", {"track_images": True, "track": "wandb"})[0].track_images
