from typing import Any

import pytest
import torch
from torch import Tensor

from lit_prune.errors import InputError, NumericalError
from lit_prune.ops import NM, LayerStats, Pattern, Unstructured
from lit_prune.ops.linalg import relative_output_error
from lit_prune.solvers import ADMM, SparseGPT, Zero
from support.rounding import distance, stable


def test_worked_example() -> None:
    # One weight of each row of three is pruned. The inputs are (1, 1, 0) and (0, 0, 2): the first two always agree, the
    # Gram matrix is [[1, 1, 0], [1, 1, 0], [0, 0, 4]], and in the row (1, 2, 3) either of the two can do the other's
    # work: 1 goes, 2 becomes 3, and nothing is lost. Likewise (5, -1, 4) becomes (4, 0, 4).
    stats = LayerStats.from_inputs(torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 2.0]]))
    weight = torch.tensor([[1.0, 2.0, 3.0], [5.0, -1.0, 4.0]])
    solution = ADMM(damping=1e-5, iterations=60).solve(weight, stats, Unstructured(1 / 3, "row"))
    assert solution.keep.tolist() == [[False, True, True], [True, False, True]]
    torch.testing.assert_close(solution.weight, torch.tensor([[0.0, 3.0, 3.0], [4.0, 0.0, 4.0]]), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "solver", "pattern"),
    [
        ("0.5", ADMM(as_released=True), Unstructured(0.5)),
        ("0.75", ADMM(as_released=True), Unstructured(0.75)),
        ("0.5.cubic", ADMM(schedule="cubic"), Unstructured(0.5)),
        ("0.75.cubic", ADMM(schedule="cubic"), Unstructured(0.75)),
        ("0.5.per_row", ADMM(as_released=True), Unstructured(0.5, "row")),
        ("0.75.per_row", ADMM(schedule="cubic"), Unstructured(0.75, "row")),
        ("2of4", ADMM(as_released=True), NM(2, 4)),
        ("0.5.one_shot_mask", ADMM(as_released=True, mask="fixed"), Unstructured(0.5)),
    ],
)
def test_weights_equal_the_reference(
    name: str, solver: ADMM, pattern: Pattern, golden: dict[str, Tensor], golden_stats: LayerStats
) -> None:
    reference = golden[f"admm.weight.{name}"]
    solution = solver.solve(golden["weight"], golden_stats, pattern)
    # We work in float64; the reference solved with its damped matrix at unit norms in float32, once an iteration.
    damped = golden_stats.normalised(0.1)[1]
    assert distance(solution.weight, reference) <= solver._iterations * stable(damped, torch.float32)


@pytest.mark.parametrize("solver", [ADMM(as_released=True), ADMM(schedule="cubic")])
def test_errors_equal_the_reference_where_counts_differ(
    solver: ADMM, golden: dict[str, Tensor], golden_stats: LayerStats, golden_errors: dict[str, float]
) -> None:
    name = "admm.weight.0.7" if solver.as_released else "admm.weight.0.7.cubic"
    solution = solver.solve(golden["weight"], golden_stats, Unstructured(0.7))
    error = relative_output_error(golden["weight"], solution.weight, golden_stats.gram)
    assert error == pytest.approx(golden_errors[name], rel=2e-3)


@pytest.mark.parametrize(
    ("iterations", "reference", "bounds"),
    [
        (20, "admm.weight.{}.cubic", {"0.5": 0.83, "0.7": 0.95}),
        (20, "admm.weight.{}", {"2of4": 0.82}),
        (60, "alps.weight.{}", {"0.5": 0.90, "0.7": 0.99, "2of4": 0.93}),
    ],
)
def test_the_default_beats_the_references(
    iterations: int,
    reference: str,
    bounds: dict[str, float],
    golden: dict[str, Tensor],
    golden_stats: LayerStats,
    golden_errors: dict[str, float],
) -> None:
    patterns = {"0.5": Unstructured(0.5), "0.7": Unstructured(0.7), "2of4": NM(2, 4)}
    for name, bound in bounds.items():
        solution = ADMM(iterations=iterations).solve(golden["weight"], golden_stats, patterns[name])
        error = relative_output_error(golden["weight"], solution.weight, golden_stats.gram)
        assert error <= bound * golden_errors[reference.format(name)]


def test_the_polish_comes_near_the_least_squares_of_the_mask(
    golden: dict[str, Tensor], golden_stats: LayerStats
) -> None:
    weight, gram = golden["weight"].double(), golden_stats.gram.double()
    solution = ADMM(iterations=60, polish=40, damping=1e-6).solve(weight, golden_stats, Unstructured(0.6))
    for row in (0, 50, 95):
        kept = solution.keep[row]
        exact = torch.linalg.solve(gram[kept][:, kept], gram[kept] @ weight[row])
        torch.testing.assert_close(solution.weight[row, kept], exact, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("mask", ["gradual", "fixed"])
def test_any_mask_can_be_repaired(mask: str, golden: dict[str, Tensor], golden_stats: LayerStats) -> None:
    weight, score, pattern = golden["weight"], golden["gblm.score.l2"], Unstructured(0.5, "row")
    zeroed = Zero().solve(weight, golden_stats, pattern, score)
    solution = ADMM(mask=mask).solve(weight, golden_stats, pattern, score)  # type: ignore[arg-type]
    assert torch.equal(solution.keep, zeroed.keep) == (mask == "fixed")
    swept = SparseGPT().solve(weight, golden_stats, pattern, score)
    errors = [relative_output_error(weight, s.weight, golden_stats.gram) for s in (solution, swept, zeroed)]
    assert errors == sorted(errors)


@pytest.mark.parametrize("solver", [ADMM(rows_at_once=7), ADMM(rows_at_once=7, schedule="cubic")])
@pytest.mark.parametrize("pattern", [Unstructured(0.6, "row"), NM(2, 4), Unstructured(0.6)], ids=repr)
def test_rows_in_chunks_give_the_same(
    solver: ADMM, pattern: Pattern, golden: dict[str, Tensor], golden_stats: LayerStats
) -> None:
    whole_solver = ADMM(schedule=solver.schedule)
    whole = whole_solver.solve(golden["weight"], golden_stats, pattern)
    chunks = solver.solve(golden["weight"], golden_stats, pattern)
    assert torch.equal(whole.keep, chunks.keep)  # in float64, and no two weights are so near a tie
    damped = golden_stats.normalised(whole_solver._damping)[1]
    assert distance(chunks.weight, whole.weight) <= solver._iterations * stable(damped)


def test_three_inverses_serve_all_updates(monkeypatch: pytest.MonkeyPatch) -> None:
    factored: list[Tensor] = []
    cholesky = torch.linalg.cholesky
    monkeypatch.setattr(torch.linalg, "cholesky", lambda matrix: factored.append(matrix) or cholesky(matrix))
    stats = LayerStats.from_inputs(torch.randn(4, 20, 12))
    for iterations, inverses in ((1, 1), (6, 2), (12, 3), (60, 3)):
        ADMM(iterations=iterations).solve(torch.randn(9, 12), stats, Unstructured(0.5))
        assert len(factored) == inverses
        factored.clear()


def test_fewer_tokens_than_inputs_and_dead_inputs_are_no_trouble() -> None:
    inputs = torch.randn(1, 5, 16)
    inputs[..., 3] = 0.0
    weight = torch.randn(6, 16)
    weight[2] = 0.0
    for pattern in (Unstructured(0.5), NM(2, 4)):
        solution = ADMM().solve(weight, LayerStats.from_inputs(inputs), pattern)
        assert solution.weight.isfinite().all()
        assert relative_output_error(weight, solution.weight, LayerStats.from_inputs(inputs).gram) < 0.2


@pytest.mark.parametrize("pattern", [Unstructured(0.5), Unstructured(0.5, "row"), NM(2, 4)], ids=repr)
def test_a_nan_weight_is_an_error_and_empties_no_row(pattern: Pattern) -> None:
    weight = torch.randn(6, 8)
    weight[1, 2] = float("nan")
    with pytest.raises(NumericalError, match="diverged"):
        ADMM().solve(weight, LayerStats.from_inputs(torch.randn(64, 8)), pattern)


@pytest.mark.parametrize(
    ("arguments", "expected"), [({}, (6, 2)), ({"iterations": 2}, (2, 1)), ({"polish": 0}, (6, 0))]
)
def test_a_draft_makes_less_effort_and_all_else_alike(arguments: dict[str, int], expected: tuple[int, int]) -> None:
    solver = ADMM(damping=0.02, mask="fixed", **arguments)  # type: ignore[arg-type]
    draft = solver.draft()
    assert (draft.iterations, draft.polish) == expected
    assert {**vars(draft), "iterations": solver.iterations, "polish": solver.polish} == vars(solver)


def test_nan_inputs_are_an_error() -> None:
    stats = LayerStats.from_inputs(torch.full((4, 4), float("nan")))
    with pytest.raises(NumericalError, match="NaN"):
        ADMM().solve(torch.randn(3, 4), stats, Unstructured(0.5))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"iterations": 0}, "iterations is 0"),
        ({"iterations": 5, "polish": 5}, "polish is 5: it must be from 0 to 4"),
        ({"schedule": "linear"}, "schedule is 'linear'"),
        ({"mask": "random"}, "mask is 'random'"),
        ({"damping": -1.0}, "damping is"),
        ({"rows_at_once": 0}, "rows_at_once is 0"),
    ],
)
def test_impossible_arguments_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ADMM(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("zero", ["weights", "inputs", "both"])
@pytest.mark.parametrize("mask", ["gradual", "fixed"])
def test_a_layer_of_zeros_is_pruned(zero: str, mask: Any) -> None:
    weight, inputs = torch.randn(8, 16), torch.randn(2, 9, 16)
    if zero != "inputs":
        weight.zero_()
    if zero != "weights":
        inputs.zero_()
    for pattern in (Unstructured(0.5), Unstructured(0.5, "row"), NM(2, 4)):
        solution = ADMM(mask=mask).solve(weight, LayerStats.from_inputs(inputs), pattern)
        assert int((~solution.keep).sum()) == 64 and not solution.weight[~solution.keep].any()
        assert solution.weight.isfinite().all()
