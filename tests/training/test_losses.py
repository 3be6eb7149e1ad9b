import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lit_prune.checkpoint.save import save_pruned
from lit_prune.errors import InputError
from lit_prune.models.tokenizer import load_tokenizer
from lit_prune.training.losses import Distillation, Student, Truth, kl_divergence, square_head
from support.rounding import gamma


def test_the_kl_divergence_worked_example() -> None:
    # The teacher says (3/4, 1/4), the student (1/2, 1/2): 3/4 ln(3/2) + 1/4 ln(1/2) = 0.130812.
    # At temperature 2 the student's logits (0, 2 ln 3) become (0, ln 3), the distribution (1/4, 3/4).
    teacher = Truth(torch.tensor([[[0.75, 0.25]]]).log(), None)
    assert kl_divergence(torch.zeros(1, 1, 2), teacher, 1.0).item() == pytest.approx(0.130812, abs=1e-6)
    student = torch.tensor([[[0.0, 2 * math.log(3)]]])
    expected = 0.75 * math.log(3) - 0.25 * math.log(3)
    assert kl_divergence(student, teacher, 2.0).item() == pytest.approx(expected)


def test_the_kl_divergence_of_the_likeliest_worked_example() -> None:
    # The teacher says (1/2, 1/4, 1/8, 1/8), of which the first is known: (1/2, rest 1/2). The student says 1/4 of
    # each: (1/4, rest 3/4). 1/2 ln 2 + 1/2 ln(2/3) = 0.143841; with all four known it is 0.173287.
    p = torch.tensor([[[0.5, 0.25, 0.125, 0.125]]]).log()
    one = Truth(p[..., :1], torch.tensor([[[0]]]))
    assert kl_divergence(torch.zeros(1, 1, 4), one, 1.0).item() == pytest.approx(0.143841, abs=1e-6)
    assert kl_divergence(torch.zeros(1, 1, 4), Truth(p, None), 1.0).item() == pytest.approx(0.173287, abs=1e-6)
    assert kl_divergence(p, one, 1.0).item() == pytest.approx(0.0, abs=1e-6)


def test_top_k_of_everything_is_the_whole_divergence() -> None:
    torch.manual_seed(0)
    p, logits = torch.randn(2, 3, 8).log_softmax(-1), torch.randn(2, 3, 8)
    top = Truth(*p.topk(8))
    whole = kl_divergence(logits, Truth(p, None), 1.0).item()
    assert kl_divergence(logits, top, 1.0).item() == pytest.approx(whole, rel=2 * gamma(6 * 8 * 10, torch.float32))
    assert kl_divergence(logits, Truth(*p.topk(3)), 1.0).item() < whole


def test_square_head_worked_example() -> None:
    # Block 1: ((1 - 2)² + 0) / (2² + 1²) = 1/5; block 2: the same as the teacher, 0. Mean 1/10.
    student = [torch.tensor([[[1.0, 1.0]]]), torch.tensor([[[3.0, 3.0]]])]
    teacher = [torch.tensor([[[2.0, 1.0]]]), torch.tensor([[[3.0, 3.0]]])]
    assert square_head(student, teacher).item() == pytest.approx(0.1)


@pytest.fixture
def teacher(tmp_path: Path, tiny_model: Callable[..., nn.Module]) -> str:
    save_pruned(tmp_path / "teacher", tiny_model("llama", seed=1), load_tokenizer("random"), {}, {})
    return str(tmp_path / "teacher")


def losses(loss: Distillation, student: nn.Module, tokens: Tensor) -> dict[str, Tensor]:
    loss.prepare(Student(student, load_tokenizer("random")))
    return loss(student, tokens)


def test_parts_are_weighted_and_the_teacher_agrees_with_itself(
    teacher: str, tiny_model: Callable[..., nn.Module], tokens: list[Tensor]
) -> None:
    other = losses(
        Distillation(teacher, 0.5, 2.0, 3.0, temperature=2.0, dtype="float32"), tiny_model("llama"), tokens[0]
    )
    expected = 0.5 * other["language_model"] + 2 * other["logits"] + 3 * other["hidden"]
    assert other["loss"].item() == pytest.approx(expected.item())
    assert all(part > 0 for part in other.values())
    same = losses(Distillation(teacher, hidden=1.0, dtype="float32"), tiny_model("llama", seed=1), tokens[0])
    assert same["logits"].item() == pytest.approx(0, abs=1e-6) and same["hidden"].item() == 0
    assert set(losses(Distillation(teacher, 0.0), tiny_model("llama"), tokens[0])) == {"loss", "logits"}


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_teacher_is_frozen_and_in_its_own_precision(
    dtype: str, teacher: str, tiny_model: Callable[..., nn.Module], tokens: list[Tensor]
) -> None:
    loss, student = Distillation(teacher, hidden=1.0, dtype=dtype), tiny_model("llama")  # type: ignore[arg-type]
    loss.prepare(Student(student, load_tokenizer("random")))
    with torch.autocast("cpu", torch.bfloat16):
        loss(student, tokens[0])["loss"].backward()
    model = loss.teacher.model
    assert model.dtype == getattr(torch, dtype) and not model.training
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in model.parameters())
    assert all(parameter.grad is not None for parameter in student.parameters())


def test_what_the_cache_holds_is_not_asked_again(
    teacher: str, tmp_path: Path, tiny_model: Callable[..., nn.Module], tokens: list[Tensor]
) -> None:
    student, cache = tiny_model("llama"), tmp_path / "cache"
    direct = losses(Distillation(teacher, top_k=8), student, tokens[0])
    filling = Distillation(teacher, top_k=8, cache=str(cache))
    # The cache has log probabilities, here of size 6 at most, in float16.
    halved = 6 * torch.finfo(torch.float16).eps
    assert losses(filling, student, tokens[0])["logits"].item() == pytest.approx(direct["logits"].item(), abs=halved)
    assert len(list(cache.rglob("*.safetensors"))) == 3
    reading = Distillation(teacher, top_k=8, cache=str(cache))
    again = losses(reading, student, tokens[0].flip(0))["logits"].item()
    assert again == pytest.approx(direct["logits"].item(), abs=halved)
    assert reading.teacher.model is None  # all three windows were there, in another order
    losses(Distillation(teacher, top_k=8, temperature=2.0, cache=str(cache)), student, tokens[0])
    assert len(list(cache.iterdir())) == 2  # another temperature is another key


def test_a_teacher_with_another_vocabulary_is_refused(
    teacher: str, tmp_path: Path, tiny_model: Callable[..., nn.Module]
) -> None:
    with pytest.raises(InputError, match="its vocabulary has 384 tokens and the student's 300"):
        losses(Distillation(teacher), tiny_model("llama", vocab_size=300), torch.zeros(1, 2).long())
    tokenizer = load_tokenizer("random")
    tokenizer.add_tokens(["<new>"])
    with pytest.raises(InputError, match="its tokenizer is not the student's"):
        Distillation(teacher).prepare(Student(tiny_model("llama"), tokenizer))
    with pytest.raises(InputError, match=r"\(3, 32\) blocks and features and the student \(2, 32\)"):
        losses(Distillation(teacher, hidden=1.0), tiny_model("llama", num_hidden_layers=2), torch.zeros(1, 2).long())
    with pytest.raises(InputError, match="top_k is 1000: the vocabulary has 384"):
        losses(Distillation(teacher, top_k=1000), tiny_model("llama"), torch.zeros(1, 2).long())
    with pytest.raises(InputError, match=r"no config\.json, so it is not a model"):
        losses(Distillation(str(tmp_path)), tiny_model("llama"), torch.zeros(1, 2).long())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"logits": -1.0}, r"Distillation\.logits is -1"),
        ({"logits": 0.0}, "logits and hidden are both 0"),
        ({"temperature": 0.0}, r"temperature is 0\.0: it must be from 0\.001"),
        ({"temperature": math.nan}, "temperature is nan: it must be from"),
        ({"temperature": math.inf}, "temperature is inf: it must be from"),
        ({"logits": math.nan}, r"Distillation\.logits is nan: it must be a number"),
        ({"hidden": math.inf}, r"Distillation\.hidden is inf: it must be a number"),
        ({"cache": "", "top_k": 8}, r"Distillation\.cache is ''"),
        ({"top_k": 0}, "top_k is 0"),
        ({"cache": "c"}, "set top_k, and hidden to 0"),
        ({"cache": "c", "top_k": 8, "hidden": 1.0}, "set top_k, and hidden to 0"),
    ],
)
def test_bad_weights_are_refused(options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Distillation("teacher", **options)
