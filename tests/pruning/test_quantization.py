"""Kept weights rounded to 8 and 4 bits within a run."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from lit_prune.allocators import Measured
from lit_prune.callbacks import KeepMasks, Prune
from lit_prune.callbacks.export import _masks_and_report
from lit_prune.checkpoint.masks import check_masks_hold, load_masks
from lit_prune.errors import InputError
from lit_prune.models.blocks import find_blocks
from lit_prune.models.targets import find_targets
from lit_prune.ops import NM, Structured, Unstructured
from lit_prune.ops.packing import Kind, pack
from lit_prune.pruning import PruningPlan, Quantize, Reconstruction, prune
from lit_prune.pruning.preflight import preflight
from lit_prune.reporting.summary import method
from lit_prune.runtime.packed_model import pack_model, packed_parts
from lit_prune.scorers import Magnitude, Wanda
from lit_prune.sharding.parameters import read_weight, to_parameter_layout
from lit_prune.solvers import ADMM, SparseGPT

KINDS: dict[int, Kind] = {8: "int8", 4: "int4"}


def plan_of(bits: Literal[8, 4] = 4, passes: int = 4, **more: Any) -> PruningPlan:
    return PruningPlan(**{"pattern": Unstructured(0.5), "solver": SparseGPT(), **more}, quantize=Quantize(bits, passes))


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(
    "more",
    [
        {},
        {"solver": ADMM(), "correction": 0.3, "residual_correction": 0.3},
        {"pattern": NM(2, 4), "scorer": Wanda(), "solver": None, "output_error": False, "sequential": False},
    ],
    ids=["sparsegpt", "admm", "wanda"],
)
def test_weights_are_on_the_grids_of_packed_models(
    model_type: str, bits: Literal[8, 4], more: Any, tiny_model: Callable[..., nn.Module], tokens: list[Tensor]
) -> None:
    model = tiny_model(model_type)
    report = prune(model, tokens, plan_of(bits, **more))
    check_masks_hold(model, report.masks)
    assert report.bits == bits and method(report).endswith(f"{bits} bits")
    for target in find_targets(model, find_blocks(model)):
        weight = read_weight(target.module)
        keep = to_parameter_layout(target.module, report.masks[target.parameter].unpack())
        assert torch.equal(pack(weight, keep, KINDS[bits]).unpack(), weight)


def test_errors_are_far_below_those_of_rounding_afterwards(
    tiny_model: Callable[..., nn.Module], tokens: list[Tensor]
) -> None:
    errors = {
        passes: [layer.output_error for layer in prune(tiny_model(), tokens, plan_of(4, passes)).layers]
        for passes in (0, 4)
    }
    assert all(after < before for before, after in zip(errors[0], errors[4], strict=True) if before and after)


def test_a_model_is_quantised_without_pruning(tiny_model: Callable[..., nn.Module], tokens: list[Tensor]) -> None:
    model = tiny_model()
    report = prune(model, tokens, plan_of(pattern=Unstructured(0.0), scorer=Magnitude(), solver=None))
    assert report.sparsity == 0
    pack_model(model, report.masks, 4)
    linear = [part for name, part in packed_parts(model).items() if ".layers." in name]
    assert linear and not any(part.layout.masked for part in linear)  # nothing is stored for a mask


def test_a_quantised_run_is_estimated_and_resumed(
    tmp_path: Path, tiny_model: Callable[..., nn.Module], tokens: list[Tensor]
) -> None:
    plan = plan_of()
    work = [preflight(tiny_model(), tokens, each).work.solve for each in (plan_of(4, 0), plan)]  # type: ignore[union-attr]
    assert work[0] < work[1]
    first, second = tiny_model(), tiny_model()
    prune(first, tokens, plan, journal_folder=tmp_path / "journal")
    with pytest.raises(InputError, match="quantize"):
        prune(second, tokens, plan_of(8), journal_folder=tmp_path / "journal", resume=True)
    prune(second, tokens, plan, journal_folder=tmp_path / "journal", resume=True)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_trials_of_an_allocator_are_not_quantised(tiny_model: Callable[..., nn.Module], tokens: list[Tensor]) -> None:
    allocator = Measured(sequences=2)
    plain = prune(tiny_model(), tokens, PruningPlan(Unstructured(0.5), solver=SparseGPT(), allocator=allocator))
    assert prune(tiny_model(), tokens, plan_of(allocator=allocator)).allocation == plain.allocation


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Quantize(3), r"quantize bits is 3: it must be 8 or 4"),  # type: ignore[arg-type]
        (lambda: Quantize(4, -1), r"quantize passes is -1: it must be a whole number"),
        (lambda: plan_of(reconstruction=Reconstruction()), r"plan\.reconstruction trains them off it"),
        (lambda: plan_of(pattern=Structured(0.5), solver=ADMM()), r"quantise the smaller model in a second run"),
        (lambda: PruningPlan(Unstructured(0.5), Wanda(), quantize=4), r"plan\.quantize is 4: it must be a Quantize"),  # type: ignore[arg-type]
    ],
)
def test_wrong_values_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()


def test_training_of_a_quantised_model_is_refused() -> None:
    with pytest.raises(InputError, match=r"plan\.quantize rounds weights to a grid, and training moves them off it"):
        Prune(plan_of()).on_train_start(None, None)  # type: ignore[arg-type]


def test_weights_that_were_trained_are_not_quantised_any_more(
    tmp_path: Path, tiny_model: Callable[..., nn.Module], tokens: list[Tensor]
) -> None:
    model = tiny_model()
    report = prune(model, tokens, plan_of())
    folder = report.save(tmp_path / "quantised", model)
    keep_masks = KeepMasks(masks=str(folder))
    keep_masks.source, keep_masks.masks = str(folder), load_masks(folder)
    trained = _masks_and_report(SimpleNamespace(callbacks=[keep_masks]))[1]  # type: ignore[arg-type]
    assert report.bits == 4 and trained is not None and trained.bits is None
