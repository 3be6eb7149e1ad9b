import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lit_prune.errors import InputError, NumericalError
from lit_prune.ops import LayerStats, linalg
from support.rounding import check_sums, distance, stable


def test_worked_example() -> None:
    # G = [[4, 0], [0, 1]] without damping: G⁻¹ = [[1/4, 0], [0, 1]], so U = [[1/2, 0], [0, 1]].
    factor = linalg.inverse_cholesky(torch.tensor([[4.0, 0.0], [0.0, 1.0]]), damping=0.0)
    assert factor.tolist() == [[0.5, 0.0], [0.0, 1.0]]
    # Damping 0.1 adds 0.1 * mean(4, 1) = 0.25 to the diagonal.
    assert linalg.damp(torch.tensor([[4.0, 0.0], [0.0, 1.0]]), 0.1).diagonal().tolist() == [4.25, 1.25]


@given(size=st.integers(1, 12) | st.sampled_from([128, 129, 300]), seed=st.integers(0, 500))
def test_the_factor_is_the_upper_root_of_the_inverse(size: int, seed: int) -> None:
    inputs = torch.randn(40 + size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    gram = inputs.T @ inputs
    factor = linalg.inverse_cholesky(gram.clone(), 0.01)
    assert torch.equal(factor, factor.triu())
    damped = linalg.damp(gram.clone(), 0.01)
    # Three factorisations of a matrix of that condition, and a product of `size` terms.
    assert distance(factor.T @ factor, torch.linalg.inv(damped)) <= (3 + size) * stable(damped)


def test_a_dead_input_gets_a_diagonal_of_one() -> None:
    gram = torch.tensor([[4.0, 0.0], [0.0, 0.0]])
    assert linalg.damp(gram.clone(), 0.0).tolist() == [[4.0, 0.0], [0.0, 1.0]]
    assert linalg.inverse_cholesky(gram, 0.0).tolist() == [[0.5, 0.0], [0.0, 1.0]]


def test_damping_is_the_references(golden: dict[str, torch.Tensor], golden_stats: LayerStats) -> None:
    hessian = linalg.damp(golden_stats.gram.clone(), 0.01) * 2 / 6  # the reference scales by 2 / sequences
    norms = hessian.diagonal().sqrt()
    # Sums over 6 * 64 tokens that the reference took in float32, damped and scaled.
    check_sums(hessian.float(), golden["sparsegpt.hessian"], 6 * 64 + 3, torch.outer(norms, norms))


def test_a_singular_matrix_raises_with_the_numbers() -> None:
    with pytest.raises(NumericalError, match=r"Gram matrix \[2, 2\] is not positive definite at damping 0 "):
        linalg.inverse_cholesky(torch.ones(2, 2), damping=0.0)


@pytest.mark.parametrize("damping", [-0.1, float("nan"), "x"])
def test_a_negative_damping_is_refused(damping: float) -> None:
    with pytest.raises(InputError, match="damping is"):
        linalg.check_damping(damping)


def test_relative_output_error_is_that_of_the_outputs() -> None:
    inputs, weight = torch.randn(50, 6, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64)
    pruned = weight * (torch.rand(4, 6) < 0.5)
    expected = (inputs @ (pruned - weight).T).square().sum() / (inputs @ weight.T).square().sum()
    assert linalg.relative_output_error(weight, pruned, inputs.T @ inputs) == pytest.approx(expected.item())
    assert linalg.relative_output_error(torch.zeros(2, 6), torch.zeros(2, 6), inputs.T @ inputs) == 0.0


def test_token_errors_are_relative_to_each_token() -> None:
    # A token of norm 5 that moves by 5, one of norm 500 that moves by 5, and one that stays.
    dense = torch.tensor([[3.0, 4.0], [300.0, 400.0], [1.0, 0.0]])
    outputs = torch.tensor([[0.0, 0.0], [303.0, 404.0], [1.0, 0.0]])
    torch.testing.assert_close(linalg.relative_token_errors(outputs, dense), torch.tensor([1.0, 1e-4, 0.0]))
    assert linalg.relative_token_errors(outputs.bfloat16(), dense.bfloat16()).dtype == torch.float32
