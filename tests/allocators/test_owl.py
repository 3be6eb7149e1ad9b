from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lit_prune.allocators import OWL
from lit_prune.allocators.base import Layer
from lit_prune.errors import InputError
from lit_prune.ops import LayerStats, Pattern, Unstructured
from lit_prune.pruning import PruningPlan, prune
from lit_prune.scorers import Wanda


def layer(weight: Tensor, block: int = 0, evidence: float | None = None) -> Layer:
    return Layer(f"l{block}", block, tuple(weight.shape), lambda: weight, evidence)


def observe(owl: OWL, layers: list[Layer], stats: list[LayerStats]) -> float:
    def never(pattern: Pattern) -> float:
        raise AssertionError("OWL tries nothing")

    return owl.observe(layers, stats, Unstructured(0.5), never)


def test_worked_example() -> None:
    # Scores |W| * ||X|| with norms (1, 2, 1): 1, 2, 1 and 1, 2, 29. Their mean is 6, so with a threshold of 2 one of
    # the six is an outlier.
    weight = torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.0, 29.0]])
    stats = LayerStats.from_inputs(torch.tensor([[1.0, 2.0, 1.0]]))
    assert observe(OWL(threshold=2), [layer(weight)], [stats]) == pytest.approx(1 / 6)
    # Outlier ratios 0, 0.1 and 0.2 with a spread of 0.1 shift by 0, 0.1 and 0.2 around their mean of 0.1.
    layers = [layer(weight, block, ratio) for block, ratio in enumerate([0.0, 0.1, 0.2])]
    assert OWL(spread=0.1).allocate(layers, 0.5) == pytest.approx({"l0": 0.6, "l1": 0.5, "l2": 0.4})


def test_outliers_are_counted_over_the_whole_block() -> None:
    small, large = torch.ones(2, 3), torch.full((2, 3), 100.0)
    stats = LayerStats.from_inputs(torch.ones(1, 3))
    owl = OWL(threshold=1.5)
    assert observe(owl, [layer(small), layer(large)], [stats, stats]) == 0.5
    assert observe(owl, [layer(large)], [stats]) == 0.0


def test_the_engine_shows_it_the_dense_model(tiny_model: Callable[..., nn.Module], tokens: list[Tensor]) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[:, :2] *= 200
    report = prune(model, tokens, PruningPlan(Unstructured(0.5), Wanda(), OWL(spread=0.2)))
    by_block = [layers[0].asked for _, layers in report.blocks()]
    assert by_block[1] == min(by_block) < 0.4
    assert report.sparsity == pytest.approx(0.5, abs=0.01)
    assert "observe" in report.seconds


def test_impossible_arguments_are_refused() -> None:
    with pytest.raises(InputError, match=r"spread is 0\.5"):
        OWL(spread=0.5)
    with pytest.raises(InputError, match="threshold is 0"):
        OWL(threshold=0)
    with pytest.raises(InputError, match="got no outlier ratios"):
        OWL().allocate([layer(torch.ones(2, 3))], 0.5)
