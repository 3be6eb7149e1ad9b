"""What the engine learns from the dense model, and keeps for other runs."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from torch import Tensor, nn

from lit_prune.allocators import AlphaPruning
from lit_prune.allocators.base import Allocator
from lit_prune.ops import Unstructured
from lit_prune.ops.spectrum import eigenvalues
from lit_prune.pruning import PruningPlan, prune
from lit_prune.scorers import Magnitude


@pytest.fixture
def spectra(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Collect the weights whose eigenvalues are worked out."""
    seen: list[Tensor] = []

    def counted(weight: Tensor) -> Tensor:
        seen.append(weight)
        return eigenvalues(weight)

    monkeypatch.setattr("lit_prune.allocators.alpha_pruning.eigenvalues", counted)
    return seen


def plan_of(allocator: Allocator, cache: Path | None, sparsity: float = 0.5, **more: object) -> PruningPlan:
    cached = None if cache is None else str(cache)
    return PruningPlan(Unstructured(sparsity), Magnitude(), allocator, cache=cached, output_error=False, **more)  # type: ignore[arg-type]


def test_spectral_metrics_are_kept_for_the_next_run(
    tiny_model: Callable[..., nn.Module], spectra: list[Tensor], tmp_path: Path
) -> None:
    expected = prune(tiny_model(), [], plan_of(AlphaPruning(), None))
    first = prune(tiny_model(), [], plan_of(AlphaPruning(), tmp_path))
    assert len(spectra) == 2 * 21 and "measure" in first.seconds
    # Neither the sparsity nor the mapping changes what is read off the spectrum.
    second = prune(tiny_model(), [], plan_of(AlphaPruning(), tmp_path))
    prune(tiny_model(), [], plan_of(AlphaPruning(epsilon=0.1, mapping="matrix"), tmp_path, 0.7))
    assert len(spectra) == 2 * 21 and "measure" not in second.seconds
    for report in (first, second):
        assert [layer.asked for layer in report.layers] == [layer.asked for layer in expected.layers]
    (file,) = tmp_path.iterdir()
    assert len(json.loads(file.read_text())) == 21


def test_only_layers_that_are_new_are_measured(
    tiny_model: Callable[..., nn.Module], spectra: list[Tensor], tmp_path: Path
) -> None:
    prune(tiny_model(), [], plan_of(AlphaPruning(), tmp_path, include=["*.mlp.*"]))
    assert len(spectra) == 9
    prune(tiny_model(), [], plan_of(AlphaPruning(), tmp_path))
    assert len(spectra) == 21


def test_other_metrics_windows_and_weights_share_nothing(
    tiny_model: Callable[..., nn.Module], spectra: list[Tensor], tmp_path: Path
) -> None:
    prune(tiny_model(), [], plan_of(AlphaPruning(), tmp_path))
    prune(tiny_model(), [], plan_of(AlphaPruning("stable_rank"), tmp_path))
    prune(tiny_model(), [], plan_of(AlphaPruning(windows=True), tmp_path))
    prune(tiny_model(seed=1), [], plan_of(AlphaPruning(), tmp_path))
    pruned = tiny_model()
    prune(pruned, [], plan_of(AlphaPruning(), None, 0.1))
    before = len(spectra)
    prune(pruned, [], plan_of(AlphaPruning(), tmp_path))
    assert len(spectra) == before + 21
    contents = [tuple(json.loads(file.read_text()).values()) for file in tmp_path.iterdir()]
    assert len(contents) == len(set(contents)) == 5


def test_values_from_a_file_are_not_measured(
    tiny_model: Callable[..., nn.Module], spectra: list[Tensor], tmp_path: Path
) -> None:
    np.save(tmp_path / "alpha.npy", np.linspace(2, 4, 21))
    prune(tiny_model(), [], plan_of(AlphaPruning(values=str(tmp_path / "alpha.npy")), tmp_path / "cache"))
    assert not spectra and not (tmp_path / "cache").exists()
