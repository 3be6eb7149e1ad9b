import pytest
import torch
from torch import Tensor

from lit_prune.errors import InputError, NumericalError
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


def test_gblm_diagnostics_worked_example() -> None:
    # As above: the ratios of the terms are 5 / 2, and twice 5 / sqrt(0.5), which is their median: 7.07. Of the row
    # (1, -2, 3), Wanda's scores are (2, 1.41, 2.12) and GBLM's (7, 11.4, 17.1): Wanda prunes the second weight, and
    # GBLM the first, so that two of three bits differ.
    gradients = torch.stack([torch.full((1, 3), 0.03), torch.full((1, 3), -0.04)])
    stats, row = LayerStats.from_inputs(INPUTS, gradients), torch.tensor([[1.0, -2.0, 3.0]])
    ratio, changed = "gradient term / activation term", "mask differs from Wanda's"
    found = GBLM().diagnose(row, stats, Unstructured(1 / 3, "row"))
    assert found == {ratio: pytest.approx(5 / 0.5**0.5), changed: pytest.approx(2 / 3)}
    tiny = GBLM(alpha=1e-3)
    assert tiny.diagnose(row, stats, Unstructured(1 / 3, "row"))[changed] == 0.0
    concern = tiny.concern(tiny.diagnose(row, stats, Unstructured(1 / 3, "row"))) or ""
    assert "is 0.01% of" in concern and "0.00% of the mask differs" in concern and "which is 0.001" in concern
    assert GBLM().concern(found) is None
    assert list(GBLM(gradient_only=True).diagnose(row, stats, Unstructured(1 / 3))) == [changed]


def test_gblm_balances_its_terms_in_every_layer() -> None:
    """With alpha: auto, the median ratio is the share asked for, whatever the unit of the loss."""
    gradients = torch.rand(3, 2, 3, generator=torch.Generator().manual_seed(0))
    scores = []
    for unit in (1e-6, 1.0, 1e6):
        stats = LayerStats.from_inputs(INPUTS, unit * gradients)
        scorer = GBLM(alpha="auto", share=0.25)
        scores.append(scorer.score(WEIGHT, stats))
        assert scorer.diagnose(WEIGHT, stats, Unstructured(0.5))["gradient term / activation term"] == 0.25
    few = 8 * gamma(3 + 5, torch.float32)  # as the reference's norms, and a median, a product and a sum
    torch.testing.assert_close(scores[0], scores[1], rtol=few, atol=0.0)
    torch.testing.assert_close(scores[2], scores[1], rtol=few, atol=0.0)


def test_gblm_refuses_what_it_cannot_use() -> None:
    with pytest.raises(InputError, match="alpha is 'large': it must be a positive number, such as 100, or auto"):
        GBLM(alpha="large")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="share is 0"):
        GBLM(share=0)
    with pytest.raises(InputError, match="gradient_only omits one"):
        GBLM(alpha="auto", gradient_only=True)
    with pytest.raises(NumericalError, match="alpha is 'auto', and the gradients of most weights are zero"):
        GBLM(alpha="auto").score(WEIGHT, LayerStats.from_inputs(INPUTS, torch.zeros(2, 2, 3)))
    with pytest.raises(InputError, match="norm is 'max'"):
        GBLM("max")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="alpha is 0"):
        GBLM(alpha=0)
    with pytest.raises(InputError, match="no l2 norm of gradients was collected"):
        GBLM().score(WEIGHT, LayerStats.from_inputs(INPUTS))
