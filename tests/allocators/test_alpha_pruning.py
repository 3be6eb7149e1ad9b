import json
from pathlib import Path

import numpy as np
import pytest
import torch

from lit_prune.allocators import AlphaPruning
from lit_prune.allocators.alpha_pruning import linear_mapping
from lit_prune.allocators.base import Layer, project_onto_budget
from lit_prune.errors import InputError, NumericalError

PUBLISHED = json.loads((Path(__file__).parents[1] / "data" / "alphapruning_llama.json").read_text())
CASES = [(name, case) for name, model in PUBLISHED.items() for case in model["block_sparsity_unclipped"]]


def llama_layers(model: dict) -> list[Layer]:
    hidden, inner = model["hidden"], model["intermediate"]
    shapes = [(hidden, hidden)] * 4 + [(inner, hidden)] * 2 + [(hidden, inner)]
    return [
        Layer(f"layers.{k}", k // 7, shapes[k % 7], lambda: torch.zeros(0)) for k in range(len(model["alpha_peak"]))
    ]


def test_worked_example() -> None:
    # Alphas 2, 3, 4 with epsilon 0.2 map to 0.8, 1.0, 1.2; at equal sizes and a target of 0.5 that is 0.4, 0.5, 0.6.
    ratios = linear_mapping(torch.tensor([2.0, 3.0, 4.0], dtype=torch.float64), 0.2)
    torch.testing.assert_close(ratios, torch.tensor([0.8, 1.0, 1.2], dtype=torch.float64))
    sizes = torch.ones(3, dtype=torch.float64)
    torch.testing.assert_close(project_onto_budget(ratios, sizes, 0.5, 0.0, 0.9), ratios / 2)
    assert linear_mapping(torch.tensor([3.0, 3.0]), 0.2).tolist() == [1, 1]


@pytest.mark.parametrize(("name", "case"), CASES)
def test_published_alphas_give_the_published_allocation(name: str, case: str, tmp_path: Path) -> None:
    model = PUBLISHED[name]
    target, epsilon = map(float, case.split("/"))
    np.save(tmp_path / "alpha.npy", np.array(model["alpha_peak"]))
    layers = llama_layers(model)
    expected = torch.tensor(model["block_sparsity_unclipped"][case], dtype=torch.float64)
    # Before projection: the mapping of the block means, scaled to the budget.
    means = torch.tensor(model["alpha_peak"], dtype=torch.float64).reshape(-1, 7).mean(1)
    ratios = linear_mapping(means, epsilon)
    torch.testing.assert_close(ratios * target / ratios.mean(), expected, rtol=0.0, atol=1e-5)
    # After it: every value within the bound, the mean exact, and the published values where nothing had to be clipped.
    allocator = AlphaPruning(epsilon=epsilon, values=str(tmp_path / "alpha.npy"), max_sparsity=0.95)
    sparsity = allocator.allocate(layers, target)
    assert max(sparsity.values()) <= 0.95
    mean = sum(sparsity[x.name] * x.numel for x in layers) / sum(x.numel for x in layers)
    assert mean == pytest.approx(target, abs=1e-9)
    if expected.max() <= 0.95:
        assert [sparsity[f"layers.{7 * b}"] for b in range(len(expected))] == pytest.approx(expected.tolist(), abs=1e-5)


def test_one_published_allocation_would_empty_layers() -> None:
    assert max(max(m["block_sparsity_unclipped"]["0.8/0.3"]) for m in PUBLISHED.values()) > 1


def layers_of(weights: list[torch.Tensor], per_block: int = 2) -> list[Layer]:
    return [Layer(f"l{k}", k // per_block, tuple(w.shape), lambda w=w: w) for k, w in enumerate(weights)]


def heavy(seed: int, strength: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(24, 32, generator=generator) * torch.logspace(0, strength, 32)


def test_heavy_tails_keep_more() -> None:
    layers = layers_of([heavy(k, strength) for k, strength in enumerate([0, 0, 1, 1, 2, 2])])
    sparsity = AlphaPruning("alpha_mid").allocate(layers, 0.5)
    assert sparsity["l0"] == sparsity["l1"] > sparsity["l2"] > sparsity["l4"]


@pytest.mark.parametrize("mapping", ["matrix", "mixed"])
def test_matrices_of_a_block_can_differ(mapping: str) -> None:
    layers = layers_of([heavy(k, strength) for k, strength in enumerate([0, 1, 1, 2, 2, 3])])
    sparsity = AlphaPruning("alpha_mid", mapping=mapping).allocate(layers, 0.5)  # type: ignore[arg-type]
    assert sparsity["l0"] > sparsity["l1"] and sparsity["l4"] > sparsity["l5"]
    assert sum(sparsity.values()) / 6 == pytest.approx(0.5)


def test_windows_are_another_reading() -> None:
    layers = layers_of([heavy(k, k / 3) for k in range(6)])
    whole, windows = AlphaPruning().allocate(layers, 0.5), AlphaPruning(windows=True).allocate(layers, 0.5)
    assert whole != windows


@pytest.mark.parametrize("weight", [torch.zeros(4, 6), torch.ones(4, 6)])
def test_a_layer_without_a_spectrum_is_named(weight: torch.Tensor) -> None:
    with pytest.raises(NumericalError, match=r"l1: .*; leave it out with plan\.exclude"):
        AlphaPruning().allocate(layers_of([heavy(0, 1), weight]), 0.5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"metric": "beta"}, "metric is 'beta'"),
        ({"epsilon": 1.0}, r"epsilon is 1\.0"),
        ({"mapping": "layer"}, "mapping is 'layer'"),
        ({"max_sparsity": 1.0}, "max_sparsity is 1"),
        ({"values": "none.npy"}, "cannot be read as .npy"),
    ],
)
def test_impossible_arguments_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        AlphaPruning(**arguments)  # type: ignore[arg-type]


def test_values_of_another_model_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "alpha.npy", np.arange(1.0, 6.0))
    with pytest.raises(InputError, match="has 5 values and the model has 2 layers to prune"):
        AlphaPruning(values=str(tmp_path / "alpha.npy")).allocate(layers_of([heavy(0, 1), heavy(1, 1)]), 0.5)
    np.save(tmp_path / "nan.npy", np.array([float("nan")]))
    with pytest.raises(InputError, match="finite"):
        AlphaPruning(values=str(tmp_path / "nan.npy"))
