import json
from collections.abc import Callable

import pytest
import torch
from rich.console import Console
from torch import nn

from lit_prune.allocators import AlphaPruning
from lit_prune.errors import InputError, NumericalError
from lit_prune.models.blocks import find_blocks
from lit_prune.models.targets import Target, as_layer, find_targets
from lit_prune.ops.spectrum import METRICS, alpha_peak, eigenvalues
from lit_prune.reporting.analysis import analyze
from lit_prune.reporting.figures import analysis_figures, as_png


def targets_of(model: nn.Module) -> list[Target]:
    return find_targets(model, find_blocks(model))


def test_every_layer_is_described_and_nothing_is_changed(tiny_model: Callable[..., nn.Module]) -> None:
    model = tiny_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    seen: list[int] = []
    analysis = analyze(model, targets_of(model), AlphaPruning(epsilon=0.1), [0.4, 0.6], ["*.down_proj"], seen.append)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert seen == list(range(1, 22))
    first = analysis.layers[0]
    values = eigenvalues(model.get_submodule(first.name).weight)
    assert first.tail == alpha_peak(values)
    assert first.metrics == {name: metric(values) for name, metric in METRICS.items()}
    assert list(analysis.spectra) == [f"model.layers.{block}.mlp.down_proj" for block in range(3)]
    content = json.loads(json.dumps(analysis.as_dict()))
    assert len(content["layers"]) == 21 and set(content["allocations"]) == {"0.4", "0.6"}


def test_the_allocations_are_the_allocators_own(tiny_model: Callable[..., nn.Module]) -> None:
    model = tiny_model()
    allocator = AlphaPruning("stable_rank", mapping="mixed", windows=True)
    analysis = analyze(model, targets_of(model), allocator, [0.5])
    expected = allocator.allocate([as_layer(target) for target in targets_of(model)], 0.5)
    assert analysis.allocations[0.5] == pytest.approx(expected)


def test_table_and_figures_show_blocks_metrics_and_allocations(tiny_model: Callable[..., nn.Module]) -> None:
    model = tiny_model()
    analysis = analyze(model, targets_of(model), AlphaPruning(), [0.5, 0.7], ["*.0.mlp.up_proj"])
    console = Console(record=True, width=160)
    console.print(analysis.table())
    text = console.export_text()
    assert "alpha_peak" in text and "at 50%" in text and "at 70%" in text
    figures = analysis_figures(analysis)
    assert set(figures) == {"metric_by_block", "allocation", "esd_model.layers.0.mlp.up_proj"}
    assert all(as_png(figure).startswith(b"\x89PNG") for figure in figures.values())


def test_what_cannot_be_analysed_is_named(tiny_model: Callable[..., nn.Module]) -> None:
    model = tiny_model()
    with pytest.raises(InputError, match=r"histograms: '\*\.fc1' matches no layer"):
        analyze(model, targets_of(model), AlphaPruning(), histograms=["*.fc1"])
    with pytest.raises(InputError, match=r"a target sparsity is 1\.5"):
        analyze(model, targets_of(model), AlphaPruning(), [1.5])
    model.model.layers[1].mlp.up_proj.weight.data.zero_()
    with pytest.raises(NumericalError, match=r"model\.layers\.1\.mlp\.up_proj: .*all zero.*plan\.exclude"):
        analyze(model, targets_of(model), AlphaPruning())
