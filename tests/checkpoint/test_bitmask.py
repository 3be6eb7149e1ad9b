"""The bitmask format: smaller, and the same to the last bit."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import lit_prune
from lit_prune.checkpoint.bitmask import BITMASK_FILE, read_bitmask, save_bitmask
from lit_prune.checkpoint.files import load_tensors
from lit_prune.checkpoint.save import save_pruned
from lit_prune.errors import InputError
from lit_prune.ops import PackedMask


def prune_at_random(model: nn.Module, sparsity: float) -> dict[str, PackedMask]:
    masks = {}
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and "embed" not in name and "wte" not in name and "wpe" not in name:
            keep = torch.rand(parameter.shape) >= sparsity
            parameter.data.masked_fill_(~keep, 0.0)
            masks[name] = PackedMask.pack(keep)
    return masks


def test_a_worked_example(tmp_path: Path) -> None:
    # [[1, 0, 2], [0, 3, 0]] keeps bits 0, 2 and 4 of its byte: 1 + 4 + 16 = 21, and the values 1, 2, 3.
    layer = nn.Linear(3, 2, bias=False)
    layer.weight.data = torch.tensor([[1.0, 0.0, 2.0], [0.0, 3.0, 0.0]])
    save_bitmask(tmp_path / BITMASK_FILE, layer, {"weight": PackedMask.pack(layer.weight != 0)})
    stored = load_tensors(tmp_path / BITMASK_FILE)
    assert stored["weight.kept"].tolist() == [1, 2, 3] and stored["weight.mask"].tolist() == [21]
    assert torch.equal(read_bitmask(tmp_path)["weight"], layer.weight)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma3_text"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_comes_back_to_the_bit(
    model_type: str, dtype: torch.dtype, tmp_path: Path, tiny_model: Callable[..., nn.Module]
) -> None:
    model = tiny_model(model_type).to(dtype)
    masks = prune_at_random(model, 0.5)
    save_pruned(tmp_path / "out", model, None, masks, {}, to="bitmask")
    save_pruned(tmp_path / "plain", model, None, masks, {})
    again, plain = (lit_prune.load_model(str(tmp_path / folder)) for folder in ("out", "plain"))
    assert not again.training and next(again.parameters()).dtype == dtype
    assert list(again.state_dict()) == list(model.state_dict())
    for name, value in again.state_dict().items():
        assert value.dtype == dtype and torch.equal(value.view(torch.int8), model.state_dict()[name].view(torch.int8))
    tokens = torch.arange(8)[None]
    assert torch.equal(again(tokens).logits, plain(tokens).logits)


@pytest.mark.parametrize(("sparsity", "most"), [(0.5, 0.57), (0.7, 0.37)])
def test_the_file_is_as_small_as_the_kept_weights_and_their_bits(sparsity: float, most: float, tmp_path: Path) -> None:
    layer = nn.Linear(512, 512, bias=False, dtype=torch.bfloat16)
    save_bitmask(tmp_path / BITMASK_FILE, layer, prune_at_random(layer, sparsity))
    assert (tmp_path / BITMASK_FILE).stat().st_size <= most * 2 * layer.weight.numel()


def test_what_is_no_bitmask_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no such file"):
        read_bitmask(tmp_path)
    (tmp_path / BITMASK_FILE).write_text("no")
    with pytest.raises(InputError, match="not a safetensors file"):
        read_bitmask(tmp_path)
    save_file({"a": torch.zeros(1)}, tmp_path / BITMASK_FILE)
    with pytest.raises(InputError, match="the file holds none"):
        read_bitmask(tmp_path)
