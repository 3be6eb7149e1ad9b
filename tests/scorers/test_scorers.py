import pytest
import torch
from torch import Tensor

from lit_prune.ops import NM, LayerStats, Pattern, Unstructured, select
from lit_prune.scorers import Magnitude, SparseGPTSaliency, Wanda

# The worked 2x3 example: weights, and two one-token sequences of inputs.
WEIGHT = torch.tensor([[1.0, -2.0, 3.0], [-4.0, 5.0, -6.0]])
INPUTS = torch.tensor([[[2.0, 1.0, 0.0]], [[2.0, 0.0, 1.0]]])


def test_magnitude_worked_example() -> None:
    assert Magnitude().score(WEIGHT, LayerStats(frozenset())).tolist() == [[1, 2, 3], [4, 5, 6]]


def test_wanda_worked_example() -> None:
    # Squared norms averaged over the two sequences: (4 + 4) / 2 = 4, (1 + 0) / 2 = 0.5, 0.5.
    score = Wanda().score(WEIGHT, LayerStats.from_inputs(INPUTS))
    torch.testing.assert_close(
        score, torch.tensor([[2.0, 2 * 0.5**0.5, 3 * 0.5**0.5], [8.0, 5 * 0.5**0.5, 6 * 0.5**0.5]])
    )


def test_sparsegpt_saliency_worked_example() -> None:
    # With orthogonal inputs the Gram matrix is diag(4, 1, 1) and 1 / U_jj² its diagonal: the saliency is W² * diag.
    stats = LayerStats.from_inputs(torch.diag(torch.tensor([2.0, 1.0, 1.0])))
    score = SparseGPTSaliency(damping=0.0).score(WEIGHT, stats)
    torch.testing.assert_close(score, torch.tensor([[4.0, 4.0, 9.0], [64.0, 25.0, 36.0]]))


def test_sparsegpt_saliency_is_the_reference_formula(golden: dict[str, Tensor], golden_stats: LayerStats) -> None:
    inverse = torch.linalg.inv(golden["sparsegpt.hessian"].double())  # damped already
    expected = (golden["weight"] / torch.linalg.cholesky(inverse, upper=True).diagonal()).square()
    actual = SparseGPTSaliency().score(golden["weight"], golden_stats).double()
    torch.testing.assert_close(actual / actual.sum(), expected / expected.sum(), rtol=1e-3, atol=0.0)


def test_wanda_scores_equal_the_reference(golden: dict[str, Tensor], golden_stats: LayerStats) -> None:
    torch.testing.assert_close(golden_stats.input_sq_norm, golden["wanda.input_sq_norm"], rtol=1e-5, atol=0.0)
    score = Wanda().score(golden["weight"], golden_stats)
    torch.testing.assert_close(score, golden["wanda.score"], rtol=1e-5, atol=0.0)


@pytest.mark.parametrize(
    ("name", "pattern"),
    [("0.5", Unstructured(0.5)), ("0.75", Unstructured(0.75)), ("2of4", NM(2, 4)), ("4of8", NM(4, 8))],
)
def test_wanda_masks_equal_the_reference(
    name: str, pattern: Pattern, golden: dict[str, Tensor], golden_stats: LayerStats
) -> None:
    score = Wanda().score(golden["weight"], golden_stats)
    assert torch.equal(select(score, pattern.grouped(Wanda.group)), golden[f"wanda.kept.{name}"])
