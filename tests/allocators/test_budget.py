import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lit_prune.allocators import FromFile
from lit_prune.allocators.base import Layer, in_whole_levels, meet_budget, project_onto_budget
from lit_prune.errors import InputError

LAYERS = [Layer("a.q", 0, (2, 3), lambda: torch.zeros(2, 3)), Layer("a.k", 0, (4, 3), lambda: torch.zeros(4, 3))]


def test_worked_example() -> None:
    # Ratios (1, 2) at the same size and a target of 0.6 are (0.4, 0.8); with a bound of 0.7 the second is clipped and
    # the first takes what is left, 0.5.
    ratios, sizes = torch.tensor([1.0, 2.0]).double(), torch.tensor([6.0, 6.0]).double()
    torch.testing.assert_close(project_onto_budget(ratios, sizes, 0.6, 0.0, 0.9), torch.tensor([0.4, 0.8]).double())
    torch.testing.assert_close(project_onto_budget(ratios, sizes, 0.6, 0.0, 0.7), torch.tensor([0.5, 0.7]).double())
    torch.testing.assert_close(project_onto_budget(ratios, sizes, 0.6, 0.55, 0.9), torch.tensor([0.55, 0.65]).double())


@given(
    ratios=st.lists(st.floats(0.01, 10), min_size=1, max_size=12),
    seed=st.integers(0, 100),
    low=st.floats(0, 0.5),
    width=st.floats(0.01, 0.49),
    position=st.floats(0, 1),
)
def test_the_mean_is_exact_and_the_bounds_hold(
    ratios: list[float], seed: int, low: float, width: float, position: float
) -> None:
    sizes = torch.randint(1, 1000, (len(ratios),), generator=torch.Generator().manual_seed(seed)).double()
    high, target = low + width, low + position * width
    result = project_onto_budget(torch.tensor(ratios, dtype=torch.float64), sizes, target, low, high)
    assert (sizes * result).sum() / sizes.sum() == pytest.approx(target, abs=1e-9)
    assert (result >= low).all() and (result <= high).all()
    order = torch.tensor(ratios).argsort()
    assert (result[order].diff() >= -1e-12).all()  # a larger ratio never gets less, but for rounding at the bounds


def test_an_impossible_budget_is_refused() -> None:
    ones = torch.ones(2, dtype=torch.float64)
    with pytest.raises(InputError, match=r"no allocation with values in \[0, 0.5\] has the mean 0.6"):
        project_onto_budget(ones, ones, 0.6, 0.0, 0.5)
    with pytest.raises(InputError, match="cannot carry the budget"):
        project_onto_budget(torch.tensor([0.0, 1.0]).double(), ones, 0.6, 0.0, 0.9)
    with pytest.raises(InputError, match="finite"):
        project_onto_budget(torch.tensor([float("nan"), 1.0]).double(), ones, 0.6, 0.0, 0.9)


def write(path: Path, content: object) -> str:
    path.write_text(json.dumps(content))
    return str(path)


def test_from_file_scales_proportions_to_the_budget(tmp_path: Path) -> None:
    # Sizes 6 and 12 with ratios 1:2: eta (6 + 24) / 18 = 0.5 gives 0.3 and 0.6.
    sparsity = FromFile(write(tmp_path / "a.json", {"a.q": 0.1, "a.*": 0.2})).allocate(LAYERS, 0.5)
    assert sparsity == pytest.approx({"a.q": 0.3, "a.k": 0.6})


def test_from_file_reads_an_earlier_run(tmp_path: Path) -> None:
    layers = [{"name": "a.q", "asked": 0.2}, {"name": "a.k", "asked": 0.2}]
    sparsity = FromFile(write(tmp_path / "pruning.json", {"layers": layers})).allocate(LAYERS, 0.5)
    assert sparsity == pytest.approx({"a.q": 0.5, "a.k": 0.5})


def test_from_file_names_what_does_not_fit(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"gives no sparsity for a\.k"):
        FromFile(write(tmp_path / "a.json", {"a.q": 0.1})).allocate(LAYERS, 0.5)
    with pytest.raises(InputError, match=r"'b\.\*' matches no layer"):
        FromFile(write(tmp_path / "b.json", {"*": 0.1, "b.*": 0.2})).allocate(LAYERS, 0.5)
    with pytest.raises(InputError, match="there is no such file"):
        FromFile(str(tmp_path / "none.json"))
    for content in ([], {}, {"a": "x"}):
        with pytest.raises(InputError, match="must hold an object"):
            FromFile(write(tmp_path / "c.json", content))
    for layers in ([1], [{"name": "a.q"}], [{"name": ["a.q"], "asked": 0.5}]):
        with pytest.raises(InputError, match="its layers have no name and asked sparsity"):
            FromFile(write(tmp_path / "c.json", {"layers": layers}))
    for damaged in ("{", "[" * 100_000):
        (tmp_path / "d.json").write_text(damaged)
        with pytest.raises(InputError, match="not a JSON file"):
            FromFile(str(tmp_path / "d.json"))
    with pytest.raises(InputError, match=r"min_sparsity 0\.5 is above max_sparsity 0\.2"):
        FromFile(write(tmp_path / "e.json", {"*": 0.1}), min_sparsity=0.5, max_sparsity=0.2)


def test_whole_levels_worked_example() -> None:
    layers = [Layer(name, 0, (4, 4), lambda: torch.zeros(4, 4)) for name in "ab"]
    assert in_whole_levels(layers, {"a": 0.3, "b": 0.45}, 0.375, 4) == {"a": 0.25, "b": 0.5}


@given(
    sparsity=st.lists(st.floats(0, 0.7), min_size=2, max_size=12),
    seed=st.integers(0, 99),
    levels=st.sampled_from([4, 8]),
)
def test_whole_levels_meet_the_budget_to_one_step(sparsity: list[float], seed: int, levels: int) -> None:
    widths = torch.randint(1, 9, (len(sparsity),), generator=torch.Generator().manual_seed(seed)).tolist()
    layers = [Layer(str(k), 0, (width, 8), lambda: torch.zeros(0)) for k, width in enumerate(widths)]
    total = sum(layer.numel for layer in layers)
    target = sum(s * layer.numel for s, layer in zip(sparsity, layers, strict=True)) / total
    rounded = in_whole_levels(layers, {str(k): s for k, s in enumerate(sparsity)}, target, levels)
    assert all(value * levels == int(value * levels) and value < 1 for value in rounded.values())
    mean = sum(rounded[layer.name] * layer.numel for layer in layers) / total
    assert abs(mean - target) * total <= max(layer.numel for layer in layers) / levels + 1e-6


@given(
    proportions=st.lists(st.floats(0.2, 1.0), min_size=2, max_size=8),
    seed=st.integers(0, 99),
    targets=st.lists(st.floats(0.05, 0.6), min_size=2, max_size=6),
)
def test_whole_levels_of_a_growing_sparsity_never_fall(
    proportions: list[float], seed: int, targets: list[float]
) -> None:
    widths = torch.randint(1, 9, (len(proportions),), generator=torch.Generator().manual_seed(seed)).tolist()
    layers = [Layer(str(k), 0, (width, 8), lambda: torch.zeros(0)) for k, width in enumerate(widths)]
    total, before = sum(layer.numel for layer in layers), dict.fromkeys((layer.name for layer in layers), 0.0)
    for target in sorted(targets):
        asked = meet_budget(layers, dict(zip(before, proportions, strict=True)), target, 0.0, 0.99)
        now = in_whole_levels(layers, asked, target, 8, before)
        assert all(now[name] >= before[name] for name in now)
        mean = sum(now[layer.name] * layer.numel for layer in layers) / total
        assert (mean - target) * total <= max(layer.numel for layer in layers) / 8 + 1e-6
        before = now
