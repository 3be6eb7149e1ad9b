import pytest
import torch
from torch import Tensor

from lit_prune.errors import InputError, NumericalError
from lit_prune.ops import LayerStats
from support.rounding import check_sums, distance


def test_worked_example() -> None:
    # Two sequences of one token with three inputs: (1, 2, 0) and (3, 0, 0). XᵀX has 1 + 9 = 10 and 4 on its diagonal
    # and 1 * 2 = 2 beside it; the squared norms are averaged over the two sequences.
    stats = LayerStats.from_inputs(torch.tensor([[[1.0, 2.0, 0.0]], [[3.0, 0.0, 0.0]]]))
    assert stats.gram.tolist() == [[10, 2, 0], [2, 4, 0], [0, 0, 0]]
    assert stats.input_sq_norm.tolist() == [5, 2, 0]
    assert (stats.sequences, stats.tokens) == (2, 2)


def test_norms_alone_equal_the_gram_diagonal() -> None:
    inputs = torch.randn(3, 5, 4)
    norms = LayerStats(frozenset({"input_sq_norm"}))
    norms.update(inputs, sequences=3)
    check_sums(norms.input_sq_norm, LayerStats.from_inputs(inputs).input_sq_norm, 3 * 5)
    with pytest.raises(InputError, match="no Gram matrix"):
        _ = norms.gram


@pytest.mark.parametrize("needs", [frozenset({"gram"}), frozenset({"input_sq_norm"})])
def test_merging_shares_equals_seeing_everything(needs: frozenset[str]) -> None:
    inputs = torch.randn(4, 6, 5)
    whole, first, second = LayerStats(needs), LayerStats(needs), LayerStats(needs)
    whole.update(inputs, sequences=4)
    first.update(inputs[:1], sequences=1)
    second.update(inputs[1:], sequences=3)
    first.merge(second)
    check_sums(first.input_sq_norm, whole.input_sq_norm, 4 * 6)
    assert (first.sequences, first.tokens) == (4, 24)


def test_half_precision_inputs_are_summed_in_float32() -> None:
    inputs = torch.full((1, 4096, 1), 1.0, dtype=torch.bfloat16)  # in bfloat16 the sum would stop at 256
    assert LayerStats.from_inputs(inputs).gram.item() == 4096


def test_factors_are_shared_until_new_inputs_arrive() -> None:
    stats = LayerStats.from_inputs(torch.randn(2, 8, 3))
    factor = stats.inverse_cholesky(0.01, take_gram=True)  # others may read it: a Gram matrix of its own is factored
    assert stats.inverse_cholesky(0.01) is factor
    assert stats.inverse_cholesky(0.1) is not factor
    stats.update(torch.randn(1, 8, 3), sequences=1)
    assert not torch.equal(stats.inverse_cholesky(0.01), factor)


def test_a_factor_takes_the_memory_of_a_gram_matrix_that_nobody_reads_any_more() -> None:
    stats, other = (LayerStats.from_inputs(torch.ones(2, 8, 3).cumsum(1)) for _ in range(2))
    copied = stats.with_gradient({})
    assert stats.shares_inputs(copied)
    assert not stats.shares_inputs(other)
    memory, norms, expected = stats.gram.data_ptr(), stats.input_sq_norm, other.inverse_cholesky(0.01)
    stats.mark_last_use()
    assert stats.inverse_cholesky(0.1).data_ptr() != memory  # its caller goes on to read the matrix
    factor = stats.inverse_cholesky(0.01, take_gram=True)
    assert factor.data_ptr() == memory and torch.equal(factor, expected)
    assert torch.equal(stats.input_sq_norm, norms)
    with pytest.raises(InputError, match=r"no Gram matrix .* take_gram may have put its factor there"):
        _ = stats.gram


def test_infinite_inputs_name_the_layer() -> None:
    stats = LayerStats.from_inputs(torch.tensor([[1.0, float("inf")]]))
    with pytest.raises(NumericalError, match=r"inputs of model\.up_proj hold NaN or Inf"):
        stats.check_finite("model.up_proj")


def test_what_cannot_be_collected_is_refused() -> None:
    with pytest.raises(InputError, match="hessian"):
        LayerStats(frozenset({"hessian"}))
    with pytest.raises(InputError, match="shape"):
        LayerStats.from_inputs(torch.zeros(3))


def drifted(inputs: Tensor, dense: Tensor) -> LayerStats:
    stats = LayerStats(frozenset({"gram", "drift"}))
    stats.update(inputs, len(inputs), dense)
    return stats


def test_making_up_for_drift_worked_example() -> None:
    # One input that has shrunk to half: X = (1, 1), D = (2, 2). (D - X)ᵀX = 2 and XᵀX = 2, which at unit norm is 1, and
    # 1.1 when damped by 0.1: the whole correction multiplies the weight by 1 + 1 / 1.1, half of it by 1 + 0.5 / 1.1.
    stats = drifted(torch.ones(1, 2, 1), torch.full((1, 2, 1), 2.0))
    weight = torch.tensor([[3.0]])
    torch.testing.assert_close(stats.correct_drift(weight, 1.0), weight * (1 + 1 / 1.1))
    torch.testing.assert_close(stats.correct_drift(weight, 0.5), weight * (1 + 0.5 / 1.1))
    assert stats.correct_drift(weight, 0.0) is weight


def test_output_target_worked_example() -> None:
    # Two tokens with inputs X = (1, 1); three outputs lack E = (4, 0, -2) at each of them: EᵀX = (8, 0, -4). XᵀX = 2,
    # damped by 0.1: 2.2. So (8, 0, -4) / 2.2 is added.
    stats = LayerStats(frozenset({"gram", "output_target"}))
    lacking = torch.tensor([4.0, 0.0, -2.0]).expand(1, 2, 3)
    stats.update(torch.ones(1, 2, 1), 1, output_target=lacking)
    weight, added = torch.tensor([[3.0], [1.0], [0.0]]), torch.tensor([[8.0], [0.0], [-4.0]]) / 2.2
    torch.testing.assert_close(stats.correct_drift(weight, 0.0), weight + added)
    # The dense model's inputs were D = (2, 2), and its outputs D W = (6, 2, 0) at each token. With a strength of 0.5, T
    # is E + (3, 1, 0), so TᵀX = EᵀX + (6, 2, 0), and 0.5 W XᵀX = (3, 1, 0): W + (W + EᵀX) / 2.2.
    stats = LayerStats(frozenset({"gram", "output_target"}))
    stats.update(torch.ones(1, 2, 1), 1, output_target=lacking + 0.5 * torch.tensor([6.0, 2.0, 0.0]))
    torch.testing.assert_close(stats.correct_drift(weight, 0.5), weight + weight / 2.2 + added)


def test_making_up_for_drift_brings_outputs_nearer_the_dense_ones() -> None:
    generator = torch.Generator().manual_seed(0)
    dense, weight = torch.randn(4, 50, 12, generator=generator), torch.randn(7, 12, generator=generator)
    inputs = 0.8 * dense @ torch.linalg.qr(torch.eye(12) + 0.1 * torch.randn(12, 12, generator=generator))[0]
    stats = drifted(inputs, dense)
    target = dense @ weight.T
    errors = [
        (inputs @ stats.correct_drift(weight, strength).T - target).square().sum().item()
        for strength in (0.0, 0.3, 0.6, 0.9)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.2 * errors[0]


def test_drift_merges_and_dead_inputs_are_left_alone() -> None:
    inputs, dense = torch.randn(2, 4, 9, 5, dtype=torch.float64)
    inputs[..., 2] = 0.0
    whole, first, second = drifted(inputs, dense), drifted(inputs[:1], dense[:1]), drifted(inputs[1:], dense[1:])
    first.merge(second)
    weight = torch.randn(3, 5, dtype=torch.float64)
    corrected = whole.correct_drift(weight, 0.7)
    # Sums over 4 * 9 tokens, and a solve with a matrix whose condition the damping keeps below 5 / 0.1.
    assert distance(first.correct_drift(weight, 0.7), corrected) <= 36 * 50 * torch.finfo(torch.float64).eps
    assert corrected.isfinite().all()
    assert torch.equal(corrected[:, 2], weight[:, 2])
