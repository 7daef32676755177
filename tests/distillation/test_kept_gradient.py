"""What a cache of the teacher's highest logits does to the gradients of the losses that learn from them."""

import pytest
import torch
import torch.nn.functional as F
from pydantic import TypeAdapter
from torch import nn

from tests.distillation.test_answers import a_teacher, opened, some_data
from trainer.data.views import Views
from trainer.distillation.answer_record import pack, record_of, restore
from trainer.distillation.kept_gradient import _own, least_cosine, refuse_misled
from trainer.distillation.teacher import Teacher
from trainer.mistakes import Mistake
from trainer.models.lenet5 import lenet5
from trainer.networks.features import Seen
from trainer.recipe import shelves
from trainer.recipe.keys import CacheKeys, TeacherKeys, Term, TermKeys
from trainer.recipe.recipe import read
from trainer.recipe.terms import wants
from trainer.recipe.text import RecipeError

TERMS = TypeAdapter(list[Term])


def squares(student_logits, teacher_logits):
    """A loss of one's own on the values of all logits."""
    return F.mse_loss(student_logits, teacher_logits)


def many_classes():
    """Data, student and teacher of 100 classes."""
    data = some_data(views=None, augment={})
    data.classes = [str(number) for number in range(100)]
    torch.manual_seed(0)
    student, network = (lenet5(data.shape, 100, width=width) for width in (2, 4))
    return data, student, Teacher([network.eval()], [TeacherKeys(model="lenet5")], data.mean, data.std)


@pytest.mark.parametrize("name", shelves.names("loss"))
def test_the_losses_that_the_highest_logits_mislead_say_so(name):
    """By its gradient too: of 100 logits the 10 highest are kept."""
    function = shelves.find("loss", name)
    term = shelves.checker(function, TermKeys).model_validate({"loss": name})
    declared = bool(shelves.beside(function, "NEEDS_ALL_LOGITS"))
    if "teacher_logits" not in wants(term):
        assert not declared
        return
    data, student, teacher = many_classes()
    keys = CacheKeys(top=10)
    if name == "logit_standardized":
        with pytest.raises(
            Mistake, match=r"its gradient would be 2\.\d+ times as long, with a cosine of 0\.8\d"
        ):
            refuse_misled(student, [term], data, teacher, keys, "cpu")
    elif name == "refined":  # the least probable classes count as much
        with pytest.raises(
            Mistake, match=r"its gradient would be 0\.3\d+ times as long, with a cosine of 0\.4"
        ):
            refuse_misled(student, [term], data, teacher, keys, "cpu")
    else:
        refuse_misled(student, [term], data, teacher, keys, "cpu")
    assert declared == (name in ("logit_standardized", "refined", "semantic"))
    refuse_misled(student, [term], data, teacher, CacheKeys(type="float16"), "cpu")  # nothing is left out


def test_a_loss_of_ones_own_is_found_by_its_gradient():
    data, student, teacher = many_classes()
    [term] = TypeAdapter(list[Term]).validate_python(
        [{"loss": f"python:{__name__}:squares", "weight": 0}], context={"allow_python": True}
    )
    before = torch.random.get_rng_state()
    with pytest.raises(
        Mistake, match=r"squares' takes the values of all logits, and the cache keeps the 5 highest of 100"
    ):
        refuse_misled(student, [term], data, teacher, CacheKeys(top=5), "cpu")
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(parameter.grad is None for parameter in student.parameters())


def test_a_recipe_is_refused_before_anything_is_built(tmp_path):
    path = tmp_path / "x.yaml"
    text = (
        "name: x\ndata: {dataset: digits}\nteacher: {model: lenet5}\nstudent: {model: lenet5, width: 2}\n"
        "cache: {top: 3}\nstages:\n  - {stage: train, who: teacher, training: {epochs: 1}}\n"
        "  - {stage: distill, training: {epochs: 1}, losses: [{loss: kl}, {loss: LOSS}]}\n"
    )
    for name in ("logit_standardized", "semantic"):
        path.write_text(text.replace("LOSS", name).replace("top: 3", "top: 3, embeddings: true"))
        if name == "logit_standardized":
            path.write_text(text.replace("LOSS", name))
        with pytest.raises(RecipeError) as caught:
            read(path)
        assert str(caught.value) == (
            f"{path}:5: cache.top: loss {name!r} of stages[1] takes the values of all logits: leave out top"
        )
    path.write_text(text.replace("LOSS", "decoupled"))
    read(path)


@pytest.mark.parametrize(
    "keys", [CacheKeys(top=3), CacheKeys(type="float16"), CacheKeys(top=2, embeddings=True)]
)
def test_the_cosine_is_that_of_the_weighted_losses(tmp_path, keys):
    data = some_data()
    guide = a_teacher(data)
    cache = opened(data, guide, tmp_path, keys)
    torch.manual_seed(1)
    student = lenet5(data.shape, 10, width=2)
    terms = TERMS.validate_python(
        [{"loss": "kl", "weight": 0.9, "temperature": 2}, {"loss": "cross_entropy", "weight": 0.1}]
    )
    found = least_cosine(cache, student, [terms, terms], "cpu")

    index = data.train.ids[:64]
    images = Views(data).augmented(data.train.images.images[index], index, 0)
    full = guide.see(images).logits
    record = record_of(Seen(full, None, {}), getattr(torch, keys.type), keys.top)
    gradients = []
    for teacher in (full, restore(record, pack(record, Seen(full, None, {})))):
        logits = student.eval()((images - data.mean[0]) / data.std[0])
        soft = F.kl_div((logits / 2).log_softmax(1), (teacher / 2).softmax(1), reduction="batchmean") * 4
        loss = 0.9 * soft + 0.1 * F.cross_entropy(logits, data.train.labels[:64])
        gradients.append(nn.utils.parameters_to_vector(torch.autograd.grad(loss, list(student.parameters()))))
    expected = F.cosine_similarity(*gradients, dim=0).item()
    assert found == pytest.approx(expected, abs=1e-5) and 0.3 < found <= 1 + 1e-9
    assert (found < 0.999) == (keys.top is not None)


def test_stages_that_the_cache_does_not_serve_are_not_measured(tmp_path):
    data = some_data()
    cache = opened(data, a_teacher(data), tmp_path, CacheKeys(top=3))
    hint = TERMS.validate_python([{"loss": "hint"}])
    assert least_cosine(cache, lenet5(data.shape, 10, width=2), [hint], "cpu") is None


def test_random_generators_of_one_gpu_at_most_are_kept():
    """Of all, torch would open each of them."""
    assert _own("cpu") == [] and _own(torch.device("cuda", 1)) == [torch.device("cuda", 1)]
