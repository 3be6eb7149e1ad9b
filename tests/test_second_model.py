"""The second model's text is prose, its held-out documents are unseen, and its training resumes on time."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

SCRIPTS = Path(__file__).parents[1] / "scripts" / "second_model"


def loaded(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # its annotations are looked up there
    spec.loader.exec_module(module)
    return module


prose, train = loaded("prose"), loaded("train")
PROSE = (
    "The names of the files in a folder are read in the order in which they have been written to the disk by the user."
)
CODE = (
    "for index in range(len(values)): values[index] = function(values[index], key=lambda item: item.name) or None # x"
)


def test_prose_is_told_from_code() -> None:
    assert prose.is_prose(PROSE)
    assert not prose.is_prose(CODE)
    assert not prose.is_prose(PROSE[:40])  # too short
    assert not prose.is_prose("Parameters: " + PROSE)
    assert prose.paragraphs(f"{PROSE}\n\n{CODE}\n\n{PROSE.replace(' in ', chr(10) + 'in ', 1)}") == [PROSE, PROSE]


def test_strings_of_a_python_file_are_its_long_ones_in_order(tmp_path: Path) -> None:
    file = tmp_path / "module.py"
    file.write_text(f'"""{PROSE}"""\nx = "short"\n\ndef f():\n    """{PROSE.upper()}\n\n    Second.\n    """\n')
    assert prose.texts("package/module.py", file) == [PROSE, f"{PROSE.upper()}\n\nSecond."]
    file.write_text("this is no Python: (")
    assert prose.texts("package/module.py", file) == []
    assert prose.texts("package/tests/module.py", file) == []


def test_a_folder_is_in_one_split_and_held_out_paragraphs_share_no_phrases() -> None:
    assert prose.split_of("a/b/c.py") == prose.split_of("a/b/d.py")
    splits = [prose.split_of(f"folder{k}/x.py") for k in range(3000)]
    # 28 of 30 folders train: 2,800 expected, with a standard deviation of sqrt(3000 · 28/30 · 2/30) = 14.
    assert abs(splits.count("train") - 2800) < 5 * 14
    other = "Nothing of this sentence can be found in the other one, except for a few words that all of the texts have."
    held_out = prose.held_out([prose.Document("d", [PROSE, other])], prose.phrases_of(PROSE))
    assert held_out == [prose.Document("d", [other])]
    assert prose.held_out([prose.Document("d", [PROSE])], prose.phrases_of(PROSE)) == []


def test_the_learning_rate_follows_the_time_spent_through_a_resumption() -> None:
    class FakeTrainer:
        optimizers = (torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0),)

    def rate(schedule: object) -> float:
        schedule.on_train_batch_start(FakeTrainer(), None, None, 0)  # type: ignore[attr-defined]
        return FakeTrainer.optimizers[0].param_groups[0]["lr"]

    schedule = train.TimedCosine(10, Path("unused"))
    assert rate(schedule) == pytest.approx(train.RATE * 0.01)  # warm-up begins at 1e-4 of 1e-2
    schedule.spent = 300.0  # half of the time: half of the way from 1 to 1 / 50
    assert rate(schedule) == pytest.approx(train.RATE * 0.51)
    resumed = train.TimedCosine(10, Path("unused"))
    resumed.load_state_dict(schedule.state_dict())
    assert rate(resumed) == pytest.approx(train.RATE * 0.51)
    resumed.spent = 600.0
    assert rate(resumed) == pytest.approx(train.RATE * 0.02)


def test_the_model_has_the_architecture_and_the_size_that_it_states() -> None:
    model = train.untrained()
    assert 9e6 < sum(parameter.numel() for parameter in model.parameters()) < 10e6
    assert model.config.use_parallel_residual
