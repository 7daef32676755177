"""Exports untrained networks to every kind of target, and tabulates whose answers agree, and what is refused and why.

    python scripts/sweep_exports.py                                # our models shelf and 69 timm classifiers: hours
    python scripts/sweep_exports.py timm/resnet18 lenet5 --to c page

Each network keeps a tenth of its weights, 16 values a tensor, so that files are small; normalizations have the statistics of random
images. Each export is proven on `--inputs` random images by its own runtime: onnxruntime, gcc on this machine, node, torch.
The table says how far logits differ, in parts of the largest, and the seconds of each export.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from tabulate import tabulate
from torch import nn

from trainer.exporting import onnx_file, proof
from trainer.exporting import subject as exporting_subject
from trainer.exporting.export import export_all, subject_of
from trainer.exports import c as target_c
from trainer.exports import page
from trainer.mistakes import Mistake
from trainer.networks.build import build
from trainer.recipe import shelves
from trainer.recipe.recipe import targets_of

SIZE, CLASSES = 64, 10
KEPT, VALUES = 0.1, 16  # of the weights of a tensor
ALIKE = 1e-3  # of the largest logit: what images must differ by
SMALL = 1000  # a tensor of fewer numbers stays as it is
# Our own networks by the shape of the images they are made for; those without a number of their own get (3, 32, 32).
OURS = {"lenet300": (1, 28, 28), "lenet5": (1, 28, 28), "lenet5_caffe": (1, 28, 28), "gru": (1, 28, 28), "lstm": (1, 28, 28)}  # fmt: skip
LEFT_OUT = ("python", "timm")
SEPARABLE = {"widths": [16, 32, 48, 64], "strides": [2, 1, 2, 1], "residual": True}
TIMM = """mobilenetv3_small_050 swin_tiny_patch4_window7_224 vit_tiny_patch16_224 ghostnetv2_100 convnextv2_atto levit_128s skresnet18
edgenext_xx_small mobilevit_xxs efficientformerv2_s0 fastvit_t8 pit_ti_224 cait_xxs24_224 gmlp_ti16_224 pvt_v2_b0 xcit_nano_12_p16_224
coat_lite_tiny mobileone_s0 nfnet_l0 poolformer_s12 efficientvit_b0 crossvit_tiny_240 mobilevitv2_050 hrnet_w18_small resnest14d
resnet10t resnet18 resnext26ts seresnet18 mobilenetv2_035 mobilenetv4_conv_small efficientnet_b0 efficientnet_lite0 tf_efficientnetv2_b0
mnasnet_small semnasnet_050 lcnet_035 hardcorenas_a tinynet_e rexnet_100 ghostnet_050 regnetx_002 regnety_002 gernet_s dla34 legacy_xception
deit_tiny_patch16_224 convnext_atto starnet_s1 inception_next_atto repvit_m0_9 ese_vovnet19b_dw repvgg_a0 inception_v3
densenet121 vgg11_bn visformer_tiny efficientformer_l1 resmlp_12_224 mixer_s32_224 res2net50d xception41 darknet17 cspresnet50 dpn48b
selecsls42 convmixer_768_32 resnet50 wide_resnet50_2""".split()
# Networks that know the size of their images: 'img_size' takes it, a number is the only one.
SIZES = {
    **dict.fromkeys("vit_tiny_patch16_224 deit_tiny_patch16_224 cait_xxs24_224 mixer_s32_224 resmlp_12_224".split(), 64),
    **dict.fromkeys("gmlp_ti16_224 visformer_tiny".split(), 64),
    "pit_ti_224": 128, "swin_tiny_patch4_window7_224": 112, "inception_v3": 96, "efficientformer_l1": 224,
    "efficientformerv2_s0": 224, "levit_128s": 224, "crossvit_tiny_240": 240, "xcit_nano_12_p16_224": 64, "coat_lite_tiny": 64,
}  # fmt: skip
IMG_SIZE = """vit_tiny_patch16_224 deit_tiny_patch16_224 cait_xxs24_224 mixer_s32_224 resmlp_12_224 gmlp_ti16_224 visformer_tiny
pit_ti_224 swin_tiny_patch4_window7_224 coat_lite_tiny""".split()
TARGETS = ["onnx", "c", "page", "pt2"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("networks", nargs="*", help="timm/NAME or a name of the models shelf; all by default")
    parser.add_argument("--to", nargs="+", default=TARGETS)
    parser.add_argument("--inputs", type=int, default=8, help="random images that each is proven on (8)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    exporting_subject.NUM_RANDOM = options.inputs
    target_c.LINUX, target_c.BOARD_BYTES = {}, 0  # this machine alone
    proof.latency = lambda run, images: (0.0, 0.0)  # nothing is timed
    page.timed = lambda script, image: {"latency_seconds": 0.0, "latency_p95_seconds": 0.0}
    onnx_file._measured = lambda path, shape: {}
    names = options.networks or [
        *(n for n in shelves.names("model") if n not in LEFT_OUT),
        *(f"timm/{n}" for n in TIMM),
    ]
    rows = []
    for name in names:
        rows.append(row_of(name, options.to))
        print(*rows[-1], sep=" | ", flush=True)
    print(tabulate(rows, ["network", "input", *options.to], tablefmt="pipe"))
    for number, target in enumerate(options.to, 2):
        print(f"{target}: {sum(row[number].startswith('agrees') for row in rows)} of {len(rows)} agree")


def row_of(name: str, to: list[str]) -> list[str]:
    """Returns a network's row: its input, and for each target whether it agrees and how far, or why not."""
    settings, shape = _settings(name)
    torch.manual_seed(0)
    network = _coarse(build(settings, shape, CLASSES), shape)
    row = [name, "x".join(map(str, shape))]
    with torch.no_grad():
        answers = network(torch.rand(8, *shape))
    if (answers - answers.mean(0)).abs().max() < ALIKE * answers.abs().max():
        return row + ["shows nothing: its answers are alike for all images"] * len(to)
    try:
        subject = subject_of(network, shape)
    except Mistake as error:
        return row + [f"refused: {error}"] * len(to)
    return row + [_found(subject, target) for target in to]


def _settings(name: str) -> tuple[dict, tuple[int, int, int]]:
    short = name.removeprefix("timm/")
    if short == name:
        return {"model": name, **(SEPARABLE if name == "separable" else {})}, OURS.get(name, (3, 32, 32))
    size = SIZES.get(short, SIZE)
    return {"model": name, **({"img_size": size} if short in IMG_SIZE else {})}, (3, size, size)


def _found(subject: exporting_subject.Subject, target: str) -> str:
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        try:
            [row], _ = export_all(subject, targets_of(target, False), Path(folder))
        except Mistake as error:
            return f"refused: {error}"
        except Exception as error:
            return f"FAILS: {type(error).__name__}: {error}"
    largest = float(np.abs(subject.logits(subject.normalized(next(subject.proof_batches(8))[0]))).max())
    return f"agrees to {row['max_difference'] / largest:.0e} ({time.monotonic() - started:.0f} s)"


@torch.no_grad()
def _coarse(network: nn.Module, shape: tuple[int, int, int]) -> nn.Module:
    """Makes an untrained network's weights few and shared, its scales different from one another, its statistics those of noise."""
    for parameter in network.parameters():
        if (
            parameter.max() == parameter.min()
        ):  # a normalization's, a bias, a branch's scale, timm's zero classifiers
            parameter.copy_(
                parameter.clamp(0.1 if parameter.max() > 0 else 0) + 0.1 * torch.randn_like(parameter)
            )
        if parameter.ndim < 2 or parameter.numel() < SMALL:
            continue
        least = parameter.abs().flatten().kthvalue(int(parameter.numel() * (1 - KEPT))).values
        step, most = parameter.std() / 2, VALUES // 2
        few = (parameter / step).round().clamp(-most, most) * step
        parameter.copy_(torch.where(parameter.abs() > least, few, 0) / KEPT**0.5)
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = None
    network.train()
    network(torch.rand(8, *shape))
    return network.eval()


if __name__ == "__main__":
    main()
