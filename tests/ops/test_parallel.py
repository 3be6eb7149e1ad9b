import pytest
import torch

from lit_prune.ops.parallel import in_parallel


def test_results_come_in_order_and_threads_are_put_back() -> None:
    before = torch.get_num_threads()
    assert list(in_parallel(lambda item: item * 2, range(50))) == list(range(0, 100, 2))
    assert torch.get_num_threads() == before


def test_an_error_comes_through() -> None:
    before = torch.get_num_threads()
    with pytest.raises(ZeroDivisionError):
        list(in_parallel(lambda item: 1 // item, [1, 0, 2]))
    assert torch.get_num_threads() == before
