"""What a network sees, and which layers look at which, over our own nets, anybody's and timm's."""

import copy

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional

from trainer.distillation.pairing import pair
from trainer.models.lenet5 import lenet5
from trainer.models.lenet300 import lenet300
from trainer.models.lstm import lstm
from trainer.networks.blocks import Blocks, as_map, max_pool
from trainer.networks.features import Layer, block_names, head, look, see

DIGITS = ((1, 28, 28), 10)


class Plain(nn.Module):
    """Anybody's network: no blocks, no timm calls; one layer that is never called, one that gives a list."""

    def __init__(self) -> None:
        super().__init__()
        convolutions = nn.Conv2d(1, 4, 3, stride=2, padding=1), nn.Conv2d(4, 6, 3, stride=2)
        self.body = nn.Sequential(convolutions[0], nn.ReLU(), convolutions[1])
        self.split = _Split()
        self.rnn = nn.GRU(6, 5, batch_first=True)
        self.spare = nn.Linear(2, 2)
        self.fc = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat(self.split(self.body(x)), dim=1)
        return self.fc(self.rnn(x.flatten(2).transpose(1, 2))[0][:, -1])


class _Split(nn.Module):
    def forward(self, x: Tensor) -> list[Tensor]:
        return [x[:, :3], x[:, 3:]]


def num_hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def build(name: str, size: int = 32, **settings) -> nn.Module:
    """A timm network of 7 classes; `img_size` for the families that must know it."""
    torch.manual_seed(0)
    try:
        return timm.create_model(name, num_classes=7, img_size=size, **settings)
    except TypeError:
        return timm.create_model(name, num_classes=7, **settings)


def without_feature_calls(family: str):
    """Skips a test on a release of timm whose `family` has no feature calls (1.0.31 has them for all)."""
    lacks = not hasattr(getattr(timm.models, family), "forward_intermediates")
    return pytest.mark.skipif(lacks, reason=f"this timm has no feature calls of {family}")


# --- as_map


def test_as_map_keeps_positions_and_channels():
    assert as_map(torch.zeros(2, 3, 4, 5)).shape == (2, 3, 4, 5)
    assert as_map(torch.zeros(2, 3)).shape == (2, 3, 1, 1)
    sequence = torch.randn(2, 7, 3)
    assert torch.equal(as_map(sequence)[:, :, 4, 0], sequence[:, 4])


@pytest.mark.parametrize("output", [torch.zeros(3), torch.zeros(1, 2, 3, 4, 5), [torch.zeros(2, 2)], None])
def test_as_map_refuses_what_is_no_map(output):
    with pytest.raises(ValueError, match="is no feature map"):
        as_map(output)


# --- see


def test_see_nothing_is_the_forward_pass():
    model = lenet300(*DIGITS).eval()
    images = torch.randn(2, *DIGITS[0])
    seen = see(model, images)
    assert torch.equal(seen.logits, model(images)) and seen.embedding is None and seen.maps == {}


def test_see_gives_the_layers_in_the_order_asked():
    model = lenet5(*DIGITS).eval()
    images = torch.randn(2, *DIGITS[0])
    seen = see(model, images, ["fc2", "conv1", "conv2"], embedding=True)
    assert list(seen.maps) == ["fc2", "conv1", "conv2"]
    expected = functional.max_pool2d(torch.relu(model.conv1(images)), 2)
    assert torch.equal(seen.maps["conv1"], expected)
    assert torch.equal(seen.maps["fc2"][:, :, 0, 0], seen.embedding)


def test_see_reads_stages_and_modules_together():
    model = build("resnet18").eval()
    images = torch.randn(2, 3, 32, 32)
    seen = see(model, images, ["layer2.0.conv1", "layer2", "maxpool"], embedding=True)
    assert list(seen.maps) == ["layer2.0.conv1", "layer2", "maxpool"]
    assert seen.maps["layer2.0.conv1"].shape == (2, 128, 4, 4) and seen.maps["layer2"].shape == (2, 128, 4, 4)
    torch.testing.assert_close(seen.logits, model(images))
    pooled = model.forward_head(model.forward_features(images), pre_logits=True)
    torch.testing.assert_close(seen.embedding, pooled)
    assert num_hooks(model) == 0


def test_see_by_dotted_name_in_our_own_nets():
    model = lenet5(*DIGITS, batch_norm=True).eval()
    images = torch.randn(2, *DIGITS[0])
    seen = see(model, images, ["norm1"])
    assert torch.equal(seen.maps["norm1"], model.norm1(model.conv1(images)))
    assert torch.equal(seen.logits, model(images)) and num_hooks(model) == 0


def test_see_anybodys_network():
    model = Plain()
    images = torch.randn(4, 1, 12, 12)
    seen = see(model, images, ["body.0", "rnn"], embedding=True)
    assert torch.equal(seen.maps["body.0"], model.body[0](images))
    assert seen.maps["rnn"].shape == (4, 5, 4, 1)
    assert torch.equal(seen.embedding, seen.maps["rnn"][:, :, -1, 0])
    assert torch.equal(head(model)(seen.embedding), seen.logits) and torch.equal(seen.logits, model(images))
    assert num_hooks(model) == 0


def test_see_is_differentiable():
    for model in (lenet5(*DIGITS), Plain()):
        first, _ = next(model.named_children())
        seen = see(model, torch.randn(2, *DIGITS[0]), [first], embedding=True)
        (next(iter(seen.maps.values())).square().mean() + seen.embedding.sum()).backward()
        assert next(model.parameters()).grad.abs().sum() > 0


@pytest.mark.parametrize("kind", ["own", "plain", "timm"])
def test_a_wrong_name_is_an_error_and_leaves_no_hook(kind):
    model = {"own": lenet5(*DIGITS), "plain": Plain(), "timm": build("test_resnet", in_chans=1)}[kind]
    first = next(name for name, module in model.named_modules() if isinstance(module, nn.Conv2d))
    images = torch.randn(2, *DIGITS[0])
    for wrong in ("conv9", "", "layer1.conv7"):
        with pytest.raises(ValueError, match=f"there is no layer {wrong!r}; there are "):
            see(model, images, [first, wrong])
        with pytest.raises(ValueError, match=f"there is no layer {wrong!r}"):
            look(model, images, [wrong])
        assert num_hooks(model) == 0


def test_a_layer_without_a_map_is_an_error_and_leaves_no_hook():
    model = Plain()
    images = torch.randn(2, 1, 12, 12)
    with pytest.raises(ValueError, match="'spare' is not called"):
        see(model, images, ["spare"])
    with pytest.raises(ValueError, match="type list is no feature map"):
        see(model, images, ["split"])
    assert num_hooks(model) == 0


def test_an_error_in_the_network_leaves_no_hook():
    for model in (lenet5(*DIGITS), Plain()):
        with pytest.raises(RuntimeError):
            layer = "conv1" if isinstance(model, Blocks) else "body"
            see(model, torch.randn(2, 5, 28, 28), [layer], embedding=True)
        assert num_hooks(model) == 0


def test_an_embedding_needs_a_linear_layer():
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(ValueError, match="Sequential has no Linear layer"):
        see(model, torch.randn(2, 1, 8, 8), embedding=True)
    assert num_hooks(model) == 0


# --- head


@pytest.mark.parametrize(
    "name",
    [
        *("test_resnet", "test_vit", "resnetv2_18", "mobilenetv4_conv_small_035", "shvit_s1"),
        pytest.param("dla46_c", marks=without_feature_calls("DLA")),
    ],
)
def test_head_of_the_embedding_is_the_logits(name):
    model = build(name).eval()
    seen = see(model, torch.randn(2, 3, 32, 32), embedding=True)
    torch.testing.assert_close(head(model)(seen.embedding), seen.logits)
    assert set(head(model).parameters()) <= set(model.parameters())


def test_several_classifiers_are_an_error():
    with pytest.raises(ValueError, match="VisionTransformerDistilled has several classifiers"):
        head(build("deit_tiny_distilled_patch16_224"))


# --- look


def test_look_leaves_the_network_as_it_was():
    for training in (True, False):
        model = build("test_resnet").train(training)
        before = copy.deepcopy(model.state_dict())
        layers = look(model, torch.randn(2, 3, 32, 32))
        assert [layer.name for layer in layers] == block_names(model)
        assert model.training is training and num_hooks(model) == 0
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_look_names_modules_and_shapes():
    images = torch.randn(1, *DIGITS[0])
    assert look(lstm(*DIGITS, hidden=8), images) == [Layer("lstm", (8, 28, 1))]
    found = look(lenet5(*DIGITS), images, ["conv2", "conv1"])
    assert found == [Layer("conv2", (16, 5, 5)), Layer("conv1", (6, 14, 14))]
    assert look(Plain(), torch.randn(1, 1, 12, 12)) == [Layer("body", (6, 2, 2)), Layer("rnn", (5, 4, 1))]


@without_feature_calls("CoaT")
def test_stages_that_share_a_module_name_are_numbered():
    coat = build("coat_tiny")
    assert block_names(coat) == ["serial_blocks1", "stage1", "stage2", "stage3"]
    assert [layer.shape[1] for layer in look(coat, torch.randn(1, 3, 32, 32))] == [8, 4, 2, 1]


# --- pair


def layers(*shapes: tuple[int, int]) -> list[Layer]:
    return [Layer(f"layer{i}", (channels, size, size)) for i, (channels, size) in enumerate(shapes)]


def names(pairs: list[tuple[Layer, Layer]]) -> list[tuple[str, str]]:
    return [(student.name, teacher.name) for student, teacher in pairs]


def test_pairs_have_the_same_stride_and_take_the_deepest():
    student = layers((8, 16), (16, 8), (32, 4))
    teacher = layers((64, 16), (64, 16), (128, 8), (256, 4), (512, 2))
    assert names(pair(student, teacher, 32)) == [
        ("layer0", "layer1"),
        ("layer1", "layer2"),
        ("layer2", "layer3"),
    ]


def test_pairs_of_other_strides_take_the_nearest():
    student = layers((8, 14), (16, 5), (84, 1))
    teacher = layers((64, 14), (64, 7), (128, 4), (256, 2), (512, 1))
    assert names(pair(student, teacher, 28)) == [
        ("layer0", "layer0"),
        ("layer1", "layer2"),
        ("layer2", "layer4"),
    ]


def test_nets_of_one_size_are_paired_by_depth():
    vit = layers(*[(192, 4)] * 12)
    assert names(pair(layers(*[(64, 4)] * 6), vit, 32))[-1] == ("layer5", "layer11")
    assert names(pair(layers((300, 1), (100, 1)), vit, 32)) == [("layer0", "layer5"), ("layer1", "layer11")]
    assert names(pair(vit, layers((8, 16), (16, 8), (32, 4)), 32)) == [
        ("layer3", "layer0"),
        ("layer7", "layer1"),
        ("layer11", "layer2"),
    ]


def test_no_layers_no_pairs():
    assert pair([], layers((8, 4)), 32) == [] and pair(layers((8, 4)), [], 32) == []


# --- families of timm, as students and as teachers

CONVOLUTIONAL = """
    resnet18 resnetv2_18 seresnet18 skresnet18 legacy_seresnet18 res2net50_14w_8s resnest14d
    mobilenetv2_035 mobilenetv3_small_050 mobilenetv4_conv_small_035 efficientnet_lite0
    tf_efficientnetv2_b0 convnext_atto convnextv2_atto regnetx_002 regnety_002 densenet121 vgg11 repvgg_a0
    mobileone_s0 dla46_c dpn48b mnasnet_small lcnet_035 tinynet_e fbnetc_100 ghostnet_050 repghostnet_050
    hardcorenas_a rexnet_100 hgnetv2_b0 selecsls42 hrnet_w18_small cspresnet50 ese_vovnet19b_dw
    nf_regnet_b0 inception_next_atto fasternet_t0 starnet_s1 rdnet_tiny mambaout_femto xception41
    tresnet_m gernet_s
    """.split()
TRANSFORMER = """
    vit_tiny_patch16_224 deit_tiny_patch16_224 deit_tiny_distilled_patch16_224 eva02_tiny_patch14_224
    cait_xxs24_224 convit_tiny xcit_nano_12_p16_224 vit_relpos_small_patch16_224 tnt_s_legacy_patch16_224
    pit_ti_224 levit_128s swin_tiny_patch4_window7_224 swinv2_tiny_window8_256 pvt_v2_b0 twins_svt_small
    nest_tiny hiera_tiny_224 mvitv2_tiny davit_tiny focalnet_tiny_srf gcvit_xxtiny volo_d1_224
    efficientvit_m0 shvit_s1
    """.split()
HYBRID = """
    edgenext_xx_small mobilevit_xxs mobilevitv2_050 efficientformerv2_s0 fastvit_t8 tiny_vit_5m_224
    coat_tiny coat_lite_tiny coatnet_pico_rw_224 maxvit_rmlp_pico_rw_256 visformer_tiny swiftformer_xs
    repvit_m0_9 efficientvit_b0 botnet26t_256 lambda_resnet26t nextvit_small vitamin_small_224
    vit_small_r26_s32_224 poolformer_s12 caformer_s18 convmixer_768_32
    """.split()
PERCEPTRON = "mixer_s32_224 resmlp_12_224 gmlp_ti16_224 sequencer2d_s".split()
QUICK = """
    test_resnet test_efficientnet test_convnext test_nfnet test_mambaout mobilenetv3_small_050 lcnet_035
    test_vit test_vit2 levit_128s xcit_nano_12_p16_224 edgenext_xx_small mobilevit_xxs pvt_v2_b0
    gmlp_ti16_224
    """.split()
EVERY = [*CONVOLUTIONAL, *TRANSFORMER, *HYBRID, *PERCEPTRON]


def check_architecture(name: str) -> None:
    """What is seen is the forward pass's own, and `hint` works over the pairs, as student and as teacher."""
    model = build(name)
    images = torch.randn(4, 3, 32, 32)
    layers = look(model, images)
    assert len({layer.name for layer in layers}) == len(layers) >= 1
    model.eval()
    with torch.no_grad():
        seen = see(model, images, [layer.name for layer in layers], embedding=True)
        torch.testing.assert_close(seen.logits, model(images))
    assert seen.embedding.shape[0] == 4 and seen.embedding.dim() == 2
    assert [tuple(m.shape[1:]) for m in seen.maps.values()] == [layer.shape for layer in layers]

    for partner in (build("test_resnet"), build("test_vit")):
        hint(model, partner, images)
        hint(partner, model, images)


def hint(student: nn.Module, teacher: nn.Module, images: Tensor) -> None:
    """FitNets' loss over the automatic pairs is finite and so is its gradient, which reaches the student."""
    pairs = pair(look(student, images), look(teacher, images), images.shape[-1])
    assert pairs and len({a.name for a, _ in pairs}) == len(pairs)
    teacher.eval()
    with torch.no_grad():
        taught = see(teacher, images, [b.name for _, b in pairs])
    student.train()
    student.zero_grad()
    seen = see(student, images, [a.name for a, _ in pairs])
    terms = []
    for mine, theirs in pairs:
        projected = nn.Conv2d(mine.shape[0], theirs.shape[0], 1)(seen.maps[mine.name])
        target = taught.maps[theirs.name]
        size = tuple(min(sizes) for sizes in zip(projected.shape[2:], target.shape[2:], strict=True))
        projected, target = (functional.adaptive_avg_pool2d(m, size) for m in (projected, target))
        terms.append(functional.mse_loss(projected, target))
    loss = sum(terms)
    loss.backward()
    assert torch.isfinite(loss)
    gradients = [p.grad for p in student.parameters() if p.grad is not None]
    assert all(torch.isfinite(g).all() for g in gradients) and any(g.abs().sum() > 0 for g in gradients)
    assert all(p.grad is None for p in teacher.parameters())
    student.zero_grad()


@pytest.mark.parametrize("name", QUICK)
def test_architecture_is_seen_and_paired(name):
    check_architecture(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in EVERY if name not in QUICK])
def test_every_family_is_seen_and_paired(name):
    check_architecture(name)


@pytest.mark.parametrize("shape", [(3, 2, 8, 6), (2, 1, 7, 5), (1, 3, 2, 2), (2, 2, 3, 2)])
def test_max_pool_is_torchs_with_and_without_gradient(shape):
    images = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    expected = functional.max_pool2d(images, 2)
    assert torch.equal(max_pool(images), expected)
    pooled = max_pool(images.requires_grad_())
    assert torch.equal(pooled, expected)
    (gradient,) = torch.autograd.grad(pooled.sum(), images)
    assert gradient.sum() == expected.numel() and set(gradient.unique().tolist()) <= {0.0, 1.0}


def test_max_pool_stays_one_operation_in_a_traced_network():
    with torch.no_grad():
        graph = str(torch.export.export(_Pooled(), (torch.rand(1, 1, 4, 4),)).graph)
    assert "max_pool2d" in graph and "maximum" not in graph


class _Pooled(nn.Module):
    def forward(self, x):
        return max_pool(x)
