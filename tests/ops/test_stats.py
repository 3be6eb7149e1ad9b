import pytest
import torch

from lit_prune.errors import InputError, NumericalError
from lit_prune.ops import LayerStats


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
    torch.testing.assert_close(norms.input_sq_norm, LayerStats.from_inputs(inputs).input_sq_norm)
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
    torch.testing.assert_close(first.input_sq_norm, whole.input_sq_norm)
    assert (first.sequences, first.tokens) == (4, 24)


def test_half_precision_inputs_are_summed_in_float32() -> None:
    inputs = torch.full((1, 4096, 1), 1.0, dtype=torch.bfloat16)  # in bfloat16 the sum would stop at 256
    assert LayerStats.from_inputs(inputs).gram.item() == 4096


def test_factors_are_shared_until_new_inputs_arrive() -> None:
    stats = LayerStats.from_inputs(torch.randn(2, 8, 3))
    factor = stats.inverse_cholesky(0.01)
    assert stats.inverse_cholesky(0.01) is factor
    assert stats.inverse_cholesky(0.1) is not factor
    stats.update(torch.randn(1, 8, 3), sequences=1)
    assert not torch.equal(stats.inverse_cholesky(0.01), factor)


def test_infinite_inputs_name_the_layer() -> None:
    stats = LayerStats.from_inputs(torch.tensor([[1.0, float("inf")]]))
    with pytest.raises(NumericalError, match=r"inputs of model\.up_proj hold NaN or Inf"):
        stats.check_finite("model.up_proj")


def test_what_cannot_be_collected_is_refused() -> None:
    with pytest.raises(InputError, match="hessian"):
        LayerStats(frozenset({"hessian"}))
    with pytest.raises(InputError, match="shape"):
        LayerStats.from_inputs(torch.zeros(3))
