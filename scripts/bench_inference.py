"""Measures how much faster `make_ready` (`trainer.distillation.cpu`) makes a teacher, and how its logits differ.

Run: python scripts/bench_inference.py [--rounds 7]. Freshly initialised networks, one thread, processor time; the two
take turns and medians are compared. The difference of their logits is given relative to the largest logit.
"""

import argparse
import copy
import statistics
import sys
import time
from pathlib import Path

import torch
from tabulate import tabulate

sys.path.insert(0, str(Path(__file__).parents[1]))

from trainer.distillation.cpu import make_ready
from trainer.models.timm import timm
from trainer.networks.build import build

SHAPES = {(1, 28, 28): 128, (3, 32, 32): 64, (3, 224, 224): 4}  # {shape: batch size}
NAMES = ("resnet18", "mobilenetv3_small_100", "efficientnet_lite0")
LARGE = ("convnext_atto", "densenet121", "vit_tiny_patch16_224")  # which need larger images


@torch.no_grad()
def measure(network: torch.nn.Module, shape: tuple[int, int, int], rounds: int) -> list[float]:
    """Returns microseconds an image unprepared and made ready, their ratio, and the relative difference of logits."""
    images = torch.rand(SHAPES[shape], *shape)
    sides = [network.eval(), make_ready(copy.deepcopy(network))]
    first, second = (side(images) for side in sides)
    spent: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for side, seconds in zip(sides, spent, strict=True):
            started = time.process_time()
            side(images)
            seconds.append(time.process_time() - started)
    plain, ready = (statistics.median(seconds) / len(images) * 1e6 for seconds in spent)
    return [plain, ready, plain / ready, ((first - second).abs().max() / first.abs().max()).item()]


def main() -> None:
    """Measures all networks and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    torch.manual_seed(0)
    digits = (1, 28, 28)
    lenet = {"model": "lenet5", "width": 20, "batch_norm": True}
    rows = [["lenet5, width 20", digits, *measure(build(lenet, digits, 10), digits, rounds)]]
    for shape in SHAPES:
        for name in NAMES + LARGE * (shape[1] == 224):
            rows.append([name, shape, *measure(timm(shape, 10, name), shape, rounds)])
    rows = [[name, "x".join(map(str, shape)), *rest] for name, shape, *rest in rows]
    heads = ["teacher", "images", "as it is, us/image", "made ready", "times as fast", "difference"]
    print(tabulate(rows, heads, tablefmt="github", floatfmt=("", "", ",.0f", ",.0f", ".2f", ".0e")))


if __name__ == "__main__":
    main()
