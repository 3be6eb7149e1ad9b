import pytest
import torch
from torch import Tensor

from lit_prune.errors import InputError
from lit_prune.ops import NM, LayerStats, Pattern, Unstructured, select
from lit_prune.scorers import GBLM, Magnitude, SparseGPTSaliency, Wanda
from support.rounding import distance, gamma, stable

# The worked 2x3 example: weights, and two one-token sequences of inputs.
WEIGHT = torch.tensor([[1.0, -2.0, 3.0], [-4.0, 5.0, -6.0]])
INPUTS = torch.tensor([[[2.0, 1.0, 0.0]], [[2.0, 0.0, 1.0]]])
# The references added the squares of 6 sequences of 64 tokens up in float32, and took a root and two products.
BY_TOKENS = 2 * gamma(6 * 64 + 3, torch.float32)


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
    hessian = golden["sparsegpt.hessian"]  # damped already, and of another scale; the reference's float32 is in it
    expected = (golden["weight"] / torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True).diagonal()).square()
    actual = SparseGPTSaliency().score(golden["weight"], golden_stats)
    assert distance(actual / actual.sum(), expected / expected.sum()) <= 2 * stable(hessian, torch.float32)


def test_wanda_scores_equal_the_reference(golden: dict[str, Tensor], golden_stats: LayerStats) -> None:
    norms, score = golden_stats.input_sq_norm, Wanda().score(golden["weight"], golden_stats)
    torch.testing.assert_close(norms, golden["wanda.input_sq_norm"], rtol=BY_TOKENS, atol=0.0)
    torch.testing.assert_close(score, golden["wanda.score"], rtol=BY_TOKENS, atol=0.0)


@pytest.mark.parametrize(
    ("name", "pattern"),
    [("0.5", Unstructured(0.5)), ("0.75", Unstructured(0.75)), ("2of4", NM(2, 4)), ("4of8", NM(4, 8))],
)
def test_wanda_masks_equal_the_reference(
    name: str, pattern: Pattern, golden: dict[str, Tensor], golden_stats: LayerStats
) -> None:
    score = Wanda().score(golden["weight"], golden_stats)
    assert torch.equal(select(score, pattern.grouped(Wanda.group)), golden[f"wanda.kept.{name}"])


def test_gblm_worked_example() -> None:
    # Input norms as for Wanda: 2, sqrt(0.5), sqrt(0.5). Two samples whose gradients are 0.03 and 0.04 everywhere: with
    # alpha 100 the l2 norm is 100 * 0.05 = 5, the l1 norm 100 * 0.07 = 7.
    gradients = torch.stack([torch.full((2, 3), 0.03), torch.full((2, 3), -0.04)])
    stats = LayerStats.from_inputs(INPUTS, gradients)
    norms = torch.tensor([2.0, 0.5**0.5, 0.5**0.5])
    torch.testing.assert_close(GBLM().score(WEIGHT, stats), WEIGHT.abs() * (norms + 5))
    torch.testing.assert_close(GBLM("l1").score(WEIGHT, stats), WEIGHT.abs() * (norms + 7))
    torch.testing.assert_close(GBLM(gradient_only=True, alpha=10).score(WEIGHT, stats), WEIGHT.abs() * 0.5)


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_gblm_scores_and_masks_equal_the_reference(norm: str, golden: dict[str, Tensor]) -> None:
    stats = LayerStats.from_inputs(golden["inputs"], golden["gblm.sample_gradients"])
    scorer = GBLM(norm)  # type: ignore[arg-type]
    few = 2 * gamma(5 + 3, torch.float32)  # samples, each scaled, squared and added, and a root
    torch.testing.assert_close(
        stats.gradient(scorer.gradient_norm) * 100, golden[f"gblm.grad_{norm}"], rtol=few, atol=0.0
    )
    score = scorer.score(golden["weight"], stats)
    torch.testing.assert_close(score, golden[f"gblm.score.{norm}"], rtol=BY_TOKENS, atol=0.0)
    assert torch.equal(select(score, Unstructured(0.5).grouped(GBLM.group)), golden[f"gblm.kept.{norm}.0.5"])


def test_gblm_refuses_what_it_cannot_use() -> None:
    with pytest.raises(InputError, match="norm is 'max'"):
        GBLM("max")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="alpha is 0"):
        GBLM(alpha=0)
    with pytest.raises(InputError, match="no l2 norm of gradients was collected"):
        GBLM().score(WEIGHT, LayerStats.from_inputs(INPUTS))
