"""Sparse forms of pruned layers, and what is said of their speed."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn

from lit_prune.errors import InputError
from lit_prune.ops import NM, PackedMask, Unstructured
from lit_prune.pruning import PruningPlan, prune
from lit_prune.runtime import sparse_layers
from lit_prune.runtime.sparse_layers import Speed, is_two_of_four, measure_speed, use_semi_structured
from lit_prune.scorers import Magnitude
from support.rounding import check_sums, distance


def test_two_of_four_is_recognised() -> None:
    keep = torch.tensor([[1, 1, 0, 0, 0, 1, 1, 0], [0, 0, 0, 0, 1, 0, 0, 1]]).bool()
    assert is_two_of_four(PackedMask.pack(keep))
    keep[0, 2] = True
    assert not is_two_of_four(PackedMask.pack(keep))
    assert not is_two_of_four(PackedMask.pack(keep[:, :6]))


@pytest.mark.parametrize("compiler", [True, False])
def test_the_sparse_forms_compute_the_same(compiler: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not compiler:
        monkeypatch.setattr(sparse_layers, "kernel_on", lambda _: None)
    weight = torch.randint(-7, 8, (6, 8)) * (torch.rand(6, 8) < 0.5).float()
    weight[:, 0] = 7  # so that the integers of every form have the scale 1 / 1, 7 / 127 or 1
    inputs = torch.randint(-127, 128, (3, 8)).float()
    forms = sparse_layers._sparse_forms(weight, PackedMask.pack(weight != 0))
    assert list(forms) == (["16 bits", "8 bits", "4 bits"] if compiler else ["CSR"])
    for form, (make, size) in forms.items():
        sizes = inputs.abs() @ weight.abs().T
        if form in ("CSR", "16 bits"):
            check_sums(make()(inputs), inputs @ weight.T, 8, sizes)
        else:  # half a step of 7 / 127, and the rounding of inputs, which are whole already or not
            assert ((make()(inputs) - inputs @ weight.T).abs() <= 0.01 * sizes.amax()).all()
        assert size > 0


def test_one_layer_of_each_shape_is_timed(tiny_model: Callable[..., nn.Module]) -> None:
    model = tiny_model()
    report = prune(model, [], PruningPlan(Unstructured(0.5), Magnitude(), output_error=False))
    figures = measure_speed(model, report.masks, tokens=(1, 4), seconds=0.001)
    # q and o, k and v, gate and up, down; each in three forms.
    assert [figure.tokens for figure in figures] == [1, 4] * 3 * 4
    assert len({figure.shape for figure in figures}) == 4
    assert all(
        figure.dense > 0 and figure.sparse > 0 and figure.sparsity == pytest.approx(0.5, abs=0.01) for figure in figures
    )


def test_sparse_rows_in_half_precision_are_refused_on_cpus(
    tiny_model: Callable[..., nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model().bfloat16()
    report = prune(model, [], PruningPlan(Unstructured(0.5), Magnitude(), output_error=False))
    figures = measure_speed(model, report.masks, tokens=(1,), seconds=0.001)
    assert {figure.form for figure in figures} == {"16 bits", "8 bits", "4 bits"}
    monkeypatch.setattr(sparse_layers, "kernel_on", lambda _: None)
    with pytest.raises(InputError, match=r"the model is in torch\.bfloat16 on cpu: torch multiplies .* float32"):
        measure_speed(model, report.masks, tokens=(1,), seconds=0.001)
    with pytest.raises(InputError, match="nothing to time"):
        measure_speed(tiny_model("gpt2"), {}, tokens=(1,))


def test_no_gain_is_called_that() -> None:
    figure = Speed("q_proj", (4, 4), 0.5, 1, "CSR", dense=1e-3, sparse=2e-3)
    assert figure.verdict == "no gain (0.50)"
    assert replace(figure, dense=1e-3, sparse=0.98e-3).verdict == "no gain (1.02)"
    assert replace(figure, dense=3e-3).verdict == "1.50 times faster"


def test_semi_structured_layers_need_their_device_and_their_masks(tiny_model: Callable[..., nn.Module]) -> None:
    model = tiny_model()
    report = prune(model, [], PruningPlan(Unstructured(0.5), Magnitude(), output_error=False))
    with pytest.raises(InputError, match="no layer has a 2:4 mask"):
        use_semi_structured(model, report.masks)
    report = prune(model, [], PruningPlan(NM(2, 4), Magnitude(), output_error=False))
    with pytest.raises(InputError, match=r"the model is on cpu in torch\.float32: .* compute capability 8\.0"):
        use_semi_structured(model, report.masks)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_semi_structured_layers_compute_the_same(tiny_model: Callable[..., nn.Module]) -> None:
    model = tiny_model(hidden_size=128, intermediate_size=256).to("cuda", torch.bfloat16)
    report = prune(model, [], PruningPlan(NM(2, 4), Magnitude(), output_error=False))
    tokens = torch.arange(64, device="cuda")[None]
    with torch.no_grad():
        expected = model(tokens).logits
        assert len(use_semi_structured(model, report.masks)) == 21
        # bfloat16 rounds what passes between layers, here some forty times; sums within a layer are in float32.
        assert distance(model(tokens).logits, expected) <= 40 * torch.finfo(torch.bfloat16).eps
