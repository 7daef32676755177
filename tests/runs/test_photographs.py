"""A whole run on photographs: cut views, a teacher of larger images, the store and workers change no bit."""

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from trainer.runs import runner
from trainer.storage.weights_file import digest

RECIPE = """name: {name}
data:
  dataset: image_folder
  folder: {folder}
  size: 16
  validation: 6
  augment: {augment}
  workers: {workers}
  store: {store}
teacher: {{model: lenet5, width: 2, resize: 24}}
student: {{model: lenet5, width: 2}}
stages:
  - {{stage: train, who: teacher, training: {{epochs: 2, batch_size: 8}}}}
  - {{stage: distill, training: {{epochs: 2, batch_size: 8}}, losses: [{{loss: kl}}]}}
allow_untrained: true
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TRAINER_DATA", str(tmp_path / "cache"))
    random = np.random.default_rng(0)
    for number in range(40):
        height, width = [(60, 80), (90, 50), (40, 40)][number % 3]
        colour = random.integers(0, 100, 3) + (0, 100 * (number % 2), 0)
        pixels = (random.integers(0, 50, (height, width, 3)) + colour).astype(np.uint8)
        path = tmp_path / "photos" / ("test" if number < 8 else "train") / "ab"[number % 2] / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    return tmp_path / "photos"


@pytest.mark.parametrize(
    "augment", ["light", "{random_resized_crop: {}, hue: 0.1, blur: 1, rand_augment: {}}"]
)
def test_neither_store_nor_workers_change_a_bit(folder, tmp_path, augment):
    found = []
    for number, (workers, store) in enumerate(
        [(2, "{short_side: 32}"), (0, "{short_side: 32}"), (0, "{short_side: 32, limit_gib: 1.0e-6}")]
    ):
        path = tmp_path / "x.yaml"
        text = RECIPE.format(name=f"x{number}", folder=folder, augment=augment, workers=workers, store=store)
        path.write_text(text)
        report = runner.run(path, folder=tmp_path / str(number))
        [weights] = tmp_path.glob(f"{number}/x{number}/checkpoints/01-distill/*/student.safetensors")
        found.append((digest(load_file(weights)), [row.get("top1") for row in report["rows"]]))
    assert found[0] == found[1] == found[2]
