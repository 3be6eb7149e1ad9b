import pytest
import torch
from torch import Tensor

from lit_prune.errors import InputError
from lit_prune.ops import NM, LayerStats, Pattern, Unstructured
from lit_prune.ops.linalg import relative_output_error
from lit_prune.solvers import SparseGPT
from support.rounding import distance, stable


def test_worked_example() -> None:
    # Weights (1, 2, 3) in the first row, G = [[2, 1, 0], [1, 2, 0], [0, 0, 9]], a third to prune.
    # G⁻¹ = [[2/3, -1/3, 0], [-1/3, 2/3, 0], [0, 0, 1/9]]; the upper factor has U_00² = 2/3, U_01 = -1/3 / U_00,
    # U_11² = 2/3 - 1/6 = 1/2 and U_22² = 1/9. The saliencies of (1, 2, 3) are 1 / (2/3) = 1.5, 4 / (1/2) = 8 and
    # 9 / (1/9) = 81, so the first weight goes, with e = 1 / U_00, and the second becomes 2 - e U_01 = 2 + 1/2. A second
    # row (4, 1, 0) has the saliencies 24, 2 and 0: of the six weights the two smallest are its 0 and the first row's 1.
    gram = torch.tensor([[2.0, 1.0, 0.0], [1.0, 2.0, 0.0], [0.0, 0.0, 9.0]], dtype=torch.float64)
    stats = LayerStats.from_inputs(torch.linalg.cholesky(gram).T)
    solution = SparseGPT(damping=0.0).solve(
        torch.tensor([[1.0, 2.0, 3.0], [4.0, 1.0, 0.0]]), stats, Unstructured(1 / 3)
    )
    torch.testing.assert_close(solution.weight, torch.tensor([[0.0, 2.5, 3.0], [4.0, 1.0, 0.0]]))
    assert solution.keep.tolist() == [[False, True, True], [True, True, False]]


@pytest.mark.parametrize("block_size", [128, 32])
@pytest.mark.parametrize(("name", "pattern"), [("2of4", NM(2, 4)), ("4of8", NM(4, 8))])
def test_nm_weights_equal_the_reference(
    name: str, pattern: Pattern, block_size: int, golden: dict[str, Tensor], golden_stats: LayerStats
) -> None:
    solution = SparseGPT(block_size=block_size).solve(golden["weight"], golden_stats, pattern)
    reference = golden[f"sparsegpt.weight.{name}.block{block_size}"]
    # We work in float64; the reference factored its damped Gram matrix in float32.
    assert distance(solution.weight, reference) <= stable(golden["sparsegpt.hessian"], torch.float32)


@pytest.mark.parametrize("block_size", [128, 32])
@pytest.mark.parametrize("sparsity", [0.5, 0.75])
def test_unstructured_equals_the_reference_but_for_its_extra_weight(
    sparsity: float,
    block_size: int,
    golden: dict[str, Tensor],
    golden_stats: LayerStats,
    golden_errors: dict[str, float],
) -> None:
    # The reference prunes one weight more per column block than it is asked for.
    name = f"sparsegpt.weight.{sparsity}.block{block_size}"
    weight = golden["weight"]
    solution = SparseGPT(block_size=block_size).solve(weight, golden_stats, Unstructured(sparsity))
    assert solution.keep.sum() == weight.numel() - round(sparsity * weight.numel())
    assert (solution.keep == (golden[name] != 0)).float().mean() >= 0.998
    error = relative_output_error(weight, solution.weight, golden_stats.gram)
    assert error == pytest.approx(golden_errors[name], rel=0.01)


@pytest.mark.parametrize("sparsity", [0.5, 0.61])
@pytest.mark.parametrize("group", ["row", "matrix"])
def test_the_counts_of_uneven_blocks_add_up(sparsity: float, group: str) -> None:
    weight, stats = torch.randn(7, 50), LayerStats.from_inputs(torch.randn(4, 40, 50))
    keep = SparseGPT(block_size=16).solve(weight, stats, Unstructured(sparsity, group)).keep
    assert keep.sum() == 350 - round(sparsity * 350)
    if group == "row":
        assert keep.sum(1).max() - keep.sum(1).min() <= 1


def test_a_block_size_that_splits_runs_is_widened() -> None:
    weight, stats = torch.randn(5, 24), LayerStats.from_inputs(torch.randn(4, 40, 24))
    keep = SparseGPT(block_size=6).solve(weight, stats, NM(2, 4)).keep
    assert (keep.reshape(-1, 4).sum(1) == 2).all()


def test_repairing_beats_zeroing_for_a_given_mask(golden: dict[str, Tensor], golden_stats: LayerStats) -> None:
    score = golden["wanda.score"]
    solution = SparseGPT().solve(golden["weight"], golden_stats, Unstructured(0.5, "row"), score)
    assert torch.equal(solution.keep, golden["wanda.kept.0.5"])
    zeroed = relative_output_error(golden["weight"], golden["weight"] * solution.keep, golden_stats.gram)
    assert relative_output_error(golden["weight"], solution.weight, golden_stats.gram) < 0.8 * zeroed


def test_dead_inputs_get_zero_weight() -> None:
    inputs = torch.randn(2, 30, 6)
    inputs[..., 2] = 0.0
    solution = SparseGPT().solve(torch.randn(4, 6), LayerStats.from_inputs(inputs), Unstructured(0.5))
    assert (solution.weight[:, 2] == 0).all()
    assert solution.weight.isfinite().all()


def test_a_block_size_below_one_is_refused() -> None:
    with pytest.raises(InputError, match="block_size is 0"):
        SparseGPT(block_size=0)
