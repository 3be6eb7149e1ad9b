from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lit_prune.errors import InputError
from lit_prune.ops import NM, PackedMask, Pattern, Unstructured, select
from lit_prune.ops.masks import density_variances, keep_only

# A worked 2x3 example. Scores:
#     3 1 2
#     6 4 5
# Half of the matrix is 3 of 6 weights: 1, 2 and 3 go, which is the whole first row. A third of each row is 1 of 3: 1
# goes from the first row and 4 from the second.
SCORES = torch.tensor([[3.0, 1.0, 2.0], [6.0, 4.0, 5.0]])


def test_worked_example() -> None:
    assert select(SCORES, Unstructured(0.5)).tolist() == [[False] * 3, [True] * 3]
    assert select(SCORES, Unstructured(1 / 3, group="row")).tolist() == [[True, False, True]] * 2
    assert select(SCORES, NM(1, 3)).tolist() == [[True, False, False]] * 2


@given(
    rows=st.integers(1, 7),
    columns=st.integers(1, 30),
    sparsity=st.floats(0, 0.999),
    group=st.sampled_from(["row", "matrix"]),
)
def test_counts_are_exact_even_with_ties(rows: int, columns: int, sparsity: float, group: str) -> None:
    pruned = ~select(torch.ones(rows, columns), Unstructured(sparsity, group))
    assert pruned.sum().item() == round(sparsity * pruned.numel())
    if group == "row":
        assert pruned.sum(1).max() - pruned.sum(1).min() <= 1


def test_rows_share_out_the_rounding_by_their_next_scores() -> None:
    # A quarter of 2 x 6 weights is 3: one from each row, and one more from the row whose second smallest score is the
    # smaller one. That is the second row (2 < 5).
    scores = torch.tensor([[1.0, 5.0, 6.0, 7.0, 8.0, 9.0], [1.0, 2.0, 60.0, 70.0, 80.0, 90.0]])
    assert select(scores, Unstructured(0.25, "row")).tolist() == [[False, *[True] * 5], [False, False, *[True] * 4]]


@given(
    seed=st.integers(0, 1000),
    rows=st.integers(1, 6),
    columns=st.integers(2, 12),
    sparsities=st.tuples(st.floats(0, 0.9), st.floats(0, 0.9)),
)
def test_a_further_pruning_by_row_never_needs_a_pruned_weight_back(
    seed: int, rows: int, columns: int, sparsities: tuple[float, float]
) -> None:
    generator = torch.Generator().manual_seed(seed)
    first, second = sorted(sparsities)
    allowed = select(torch.rand(rows, columns, generator=generator), Unstructured(first, "row"))
    further = Unstructured(second, "row")
    assert not (select(torch.rand(rows, columns, generator=generator), further, allowed) & ~allowed).any()


@given(runs=st.integers(1, 6), of=st.integers(1, 8), data=st.data())
def test_nm_keeps_exactly_n_of_every_run(runs: int, of: int, data: st.DataObject) -> None:
    keep = data.draw(st.integers(1, of))
    mask = select(torch.ones(3, runs * of), NM(keep, of))
    assert (mask.reshape(-1, of).sum(1) == keep).all()


@given(seed=st.integers(0, 10_000), group=st.sampled_from(["row", "matrix"]))
def test_permuting_scores_permutes_the_mask(seed: int, group: str) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randperm(24, generator=generator).reshape(4, 6).float()
    order = torch.randperm(6, generator=generator)
    pattern = Unstructured(0.4, group)
    assert torch.equal(select(scores[:, order], pattern), select(scores, pattern)[:, order])


def test_a_parameter_can_be_ranked() -> None:
    for pattern in (Unstructured(0.5), Unstructured(0.5, "row"), NM(1, 3)):
        assert torch.equal(select(torch.nn.Parameter(SCORES), pattern), select(SCORES, pattern))


def test_only_the_order_of_scores_counts() -> None:
    scores = torch.rand(5, 8)
    for pattern in (Unstructured(0.3), Unstructured(0.3, "row"), NM(2, 4)):
        assert torch.equal(select(scores, pattern), select(scores.exp() * 7, pattern))


@pytest.mark.parametrize("sparsity", [1.2, -0.1, 1.0, float("nan"), "abc", None, True])
def test_a_sparsity_outside_0_to_1_is_refused(sparsity: object) -> None:
    with pytest.raises(InputError, match=r"sparsity is .*: it must be a number in \[0, 1\)"):
        Unstructured(sparsity)  # type: ignore[arg-type]


@pytest.mark.parametrize(("keep", "of"), [(5, 4), (0, 4), (-1, 4), (1.5, 4)])
def test_an_impossible_nm_is_refused(keep: int, of: int) -> None:
    with pytest.raises(InputError, match=f"N:M is {keep}:{of}"):
        NM(keep, of)


def test_an_unknown_group_is_refused() -> None:
    with pytest.raises(InputError, match="group is 'column'"):
        Unstructured(0.5, "column")  # type: ignore[arg-type]


def test_nm_needs_divisible_inputs() -> None:
    with pytest.raises(InputError, match="2:4 needs inputs divisible by 4, and up_proj has 30"):
        NM(2, 4).check((8, 30), "up_proj")
    with pytest.raises(InputError, match="divisible by 4"):
        select(torch.rand(2, 30), NM(2, 4))


@pytest.mark.parametrize("scores", [torch.tensor([[1.0, float("nan")]]), torch.rand(3)])
def test_scores_that_cannot_be_ranked_are_refused(scores: torch.Tensor) -> None:
    with pytest.raises(InputError, match=r"NaN|matrix"):
        select(scores, Unstructured(0.5))


@pytest.mark.parametrize("pattern", [Unstructured(0.5), Unstructured(0.5, "row"), NM(4, 8)])
def test_retargeting_keeps_the_structure(pattern: Pattern) -> None:
    other = pattern.at(0.25)
    assert type(other) is type(pattern)
    assert other.sparsity == 0.25
    assert repr(other.at(0.5)) == repr(pattern)


def test_retargeted_nm_never_empties_a_run() -> None:
    assert NM(2, 4).at(0.99).keep == 1


def test_a_default_group_yields_to_the_users() -> None:
    assert Unstructured(0.5).grouped("row").group == "row"
    assert Unstructured(0.5, "matrix").grouped("row").group == "matrix"


@given(numel=st.integers(0, 70), seed=st.integers(0, 1000))
def test_packing_is_one_bit_per_weight_and_loses_nothing(numel: int, seed: int) -> None:
    keep = torch.rand(numel, generator=torch.Generator().manual_seed(seed)) < 0.5
    packed = PackedMask.pack(keep)
    assert packed.bits.numel() == -(-numel // 8)
    assert torch.equal(packed.unpack(), keep)


def test_packed_bits_are_least_significant_first() -> None:
    assert PackedMask.pack(torch.tensor([[True, False, True], [False, False, True]])).bits.tolist() == [0b100101]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@given(seed=st.integers(0, 1000))
def test_only_what_is_kept_is_left_bit_for_bit(dtype: torch.dtype, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(5, 7, generator=generator).to(dtype)
    values[0], values[1] = float("nan"), float("-inf")
    keep = torch.rand(5, 7, generator=generator) < 0.5
    for layout in (values, values.T):
        kept = keep if layout is values else keep.T
        expected = layout.masked_fill(~kept, 0.0)
        torch.testing.assert_close(keep_only(layout, kept), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("bits", "shape", "said"),
    [
        (torch.zeros(1, dtype=torch.uint8), (2, 9), r"shape \[2, 9\] has bits of the shape \[1\]: \[3\] is needed"),
        (torch.zeros(4, dtype=torch.uint8), (2, 9), r"bits of the shape \[4\]"),
        (torch.zeros(1, dtype=torch.uint8), (10**9, 10**9), r"\[125000000000000000\] is needed"),
        (torch.zeros(1, 3, dtype=torch.uint8), (2, 9), r"bits of the shape \[1, 3\]"),
        (torch.zeros(3), (2, 9), r"are torch\.float32: a uint8 tensor is needed"),
        ([0, 0, 0], (2, 9), "are list: a uint8 tensor is needed"),
        (torch.zeros(1, dtype=torch.uint8), (-2, -4), "a tuple of sizes, 0 or more, is needed"),
        (torch.zeros(1, dtype=torch.uint8), ("2", 4), "a tuple of sizes"),
        (torch.zeros(1, dtype=torch.uint8), (2.0, 4), "a tuple of sizes"),
        (torch.zeros(1, dtype=torch.uint8), (True, 4), "a tuple of sizes"),
        (torch.zeros(1, dtype=torch.uint8), [2, 4], "a tuple of sizes"),
    ],
)
def test_bits_that_do_not_fit_the_shape_are_refused(bits: Any, shape: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        PackedMask(bits, shape)


def test_a_mask_of_floats_is_refused() -> None:
    with pytest.raises(InputError, match=r"a mask is torch\.float32: bool is needed"):
        PackedMask.pack(torch.ones(2, 4))


def test_the_structure_of_a_mask_is_measured_over_chance() -> None:
    # Two rows that keep the same two of four inputs: the columns' counts 2 2 0 0 deviate from 1 by 4 in squares. At
    # random places, each row adds 2 · 2 / 4 = 1. The counts of the rows are equal.
    assert density_variances(torch.tensor([[True, True, False, False]] * 2)) == (0.0, 2.0)
    scores = torch.rand(200, 300, generator=torch.Generator().manual_seed(0))
    rows, columns = density_variances(select(scores, Unstructured(0.5)))
    # Ratios of chi-squared variables to their 199 and 299 degrees of freedom: five standard deviations.
    assert abs(rows - 1) < 5 * (2 / 199) ** 0.5 and abs(columns - 1) < 5 * (2 / 299) ** 0.5
    assert density_variances(torch.ones(3, 4, dtype=torch.bool)) == (0.0, 0.0)
