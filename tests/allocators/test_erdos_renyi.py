import pytest
import torch

from lit_prune.allocators import ErdosRenyi
from lit_prune.allocators.base import Layer
from lit_prune.errors import InputError


def layers(*shapes: tuple[int, int]) -> list[Layer]:
    return [Layer(f"l{index}", index, shape, lambda: torch.empty(0)) for index, shape in enumerate(shapes)]


def test_worked_example() -> None:
    # Weights [2, 3] and [3, 3]: (o + i) / (o i) is 5 / 6 and 6 / 9, so the layers keep 5 and 6 of every 11 weights. At
    # 50 % 7.5 of the 15 weights are kept: 3.41 of 6 and 4.09 of 9.
    found = ErdosRenyi().allocate(layers((2, 3), (3, 3)), 0.5)
    assert found == pytest.approx({"l0": 1 - 7.5 * 5 / 11 / 6, "l1": 1 - 7.5 * 6 / 11 / 9})
    # At 10 % 13.5 are kept. The first layer would keep 6.14 of its 6, so it is dense; the second one keeps 7.5 of 9.
    assert ErdosRenyi().allocate(layers((2, 3), (3, 3)), 0.1) == pytest.approx({"l0": 0.0, "l1": 1 - 7.5 / 9})
    # With a dense last layer, the first two carry the 12 zeros of 24 weights alone: they keep 3 of 15, 5 to 6.
    found = ErdosRenyi(dense_last=True).allocate(layers((2, 3), (3, 3), (3, 3)), 0.5)
    assert found == pytest.approx({"l0": 1 - 3 * 5 / 11 / 6, "l1": 1 - 3 * 6 / 11 / 9, "l2": 0.0})


def test_a_budget_that_the_other_layers_cannot_carry_is_refused() -> None:
    with pytest.raises(InputError, match=r"dense_last leaves l1 dense, .* sparsity of 0\.7 below max_sparsity 0\.99"):
        ErdosRenyi(dense_last=True).allocate(layers((2, 3), (3, 3)), 0.7)
    with pytest.raises(InputError, match="dense_last leaves l0 dense"):
        ErdosRenyi(dense_last=True).allocate(layers((2, 3)), 0.1)
    assert ErdosRenyi(dense_last=True).allocate(layers((2, 3)), 0.0) == {"l0": 0.0}
    with pytest.raises(InputError, match=r"min_sparsity 0\.5 is above max_sparsity 0\.2"):
        ErdosRenyi(min_sparsity=0.5, max_sparsity=0.2)
