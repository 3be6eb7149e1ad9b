from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from lit_prune.checkpoint.infer_masks import masks_of_zeros
from lit_prune.checkpoint.masks import check_masks_hold
from lit_prune.errors import InputError
from lit_prune.sharding.parameters import (
    count_revived,
    full_model,
    full_shape,
    full_tensor_of,
    is_managed,
    mask_gradient,
    sets_sharded_gradients,
    shards,
    write_full_tensor,
    zero_pruned,
)

KEEP = torch.tensor([[True, False, True], [False, True, True]])


def trained(
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer], shard: bool = False
) -> tuple[nn.Parameter, torch.optim.Optimizer]:
    """Return the weight of a linear layer after two steps."""
    torch.manual_seed(0)
    layer = nn.Linear(3, 2, bias=False)
    if shard:
        fully_shard(layer, mesh=init_device_mesh("cpu", (1,)))
    stepper = optimizer(list(layer.parameters()))
    for _ in range(2):
        layer(torch.randn(4, 3)).square().sum().backward()
        stepper.step()
    return layer.weight, stepper


def adamw(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.1)


def test_an_untrained_weight_is_in_one_place() -> None:
    weight = nn.Parameter(torch.ones(2, 3))
    assert [shard.place for shard in shards(weight, adamw([weight]))] == ["weight"]
    assert [shard.place for shard in shards(weight)] == ["weight"]


@pytest.mark.parametrize(
    ("optimizer", "moments"),
    [
        (adamw, ["exp_avg", "exp_avg_sq"]),
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), ["momentum_buffer"]),
        (lambda p: torch.optim.SGD(p, lr=0.1), []),
        (torch.optim.Adafactor, []),  # its moments are those of rows and columns
    ],
    ids=["adamw", "momentum", "sgd", "adafactor"],
)
def test_zeroing_reaches_weight_and_moments_and_nothing_that_is_kept(
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer], moments: list[str]
) -> None:
    weight, stepper = trained(optimizer)
    before = {shard.place: shard.read().clone() for shard in shards(weight, stepper)}
    assert list(before) == ["weight", *moments]
    looked_at = [place for place, values in before.items() if (values < 0).any()]  # the others only scale steps
    assert "weight" in looked_at and "exp_avg_sq" not in looked_at
    assert count_revived(weight, KEEP, stepper) == dict.fromkeys(looked_at, 2)
    zero_pruned(weight, KEEP, stepper)
    assert not any(count_revived(weight, KEEP, stepper).values())
    for shard in shards(weight, stepper):
        assert torch.equal(shard.read()[KEEP], before[shard.place][KEEP])


def test_nan_counts_as_revived() -> None:
    weight = nn.Parameter(torch.tensor([[1.0, float("nan"), 1.0], [0.0, 1.0, 1.0]]))
    assert count_revived(weight, KEEP) == {"weight": 1}


def test_gradients_are_masked_where_there_are_any() -> None:
    weight = nn.Parameter(torch.ones(2, 3))
    mask_gradient(weight, KEEP)
    assert weight.grad is None
    weight.grad = torch.full((2, 3), 2.0)
    mask_gradient(weight, KEEP)
    assert torch.equal(weight.grad, 2.0 * KEEP)


@pytest.mark.usefixtures("one_process")
def test_shards_of_fsdp2_are_zeroed_masked_and_counted() -> None:
    weight, stepper = trained(adamw, shard=True)
    assert sets_sharded_gradients(weight) and is_managed(weight) and full_shape(weight) == (2, 3)
    assert count_revived(weight, KEEP, stepper) == {"weight": 2, "exp_avg": 2}
    zero_pruned(weight, KEEP, stepper)
    assert count_revived(weight, KEEP, stepper) == {"weight": 0, "exp_avg": 0}
    mask_gradient(weight, KEEP)
    gradient = weight.grad.full_tensor()  # type: ignore[union-attr]
    assert torch.equal(gradient != 0, KEEP)
    value = torch.arange(6.0).reshape(2, 3)
    write_full_tensor(weight, value)
    assert torch.equal(full_tensor_of(weight), value)


def test_a_plain_model_is_whole_already(tiny_model: Callable[..., nn.Module]) -> None:
    model = tiny_model()
    with full_model(model) as whole:
        assert whole is model
    weight = model.get_parameter("model.layers.0.mlp.up_proj.weight")
    assert not is_managed(weight) and not sets_sharded_gradients(weight) and full_shape(weight) == (48, 32)


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("model_type", ["llama", "gpt2"])  # gpt2: Conv1D and tied embeddings
def test_a_sharded_model_has_a_whole_copy(
    model_type: str, tiny_model: Callable[..., nn.Module], tokens: list[Tensor]
) -> None:
    plain, model = tiny_model(model_type).eval(), tiny_model(model_type).eval()
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    with full_model(model) as whole:
        assert type(whole) is type(plain)
        assert torch.equal(whole(input_ids=tokens[0]).logits, plain(input_ids=tokens[0]).logits)


def test_masks_are_read_off_zeros_when_asked_for(tiny_model: Callable[..., nn.Module]) -> None:
    model = tiny_model()
    with pytest.raises(InputError, match="no weight of the model is zero, so it is not pruned"):
        masks_of_zeros(model)
    weight = model.get_parameter("model.layers.1.mlp.up_proj.weight")
    weight.data[:, ::2] = 0.0
    model.get_parameter("model.embed_tokens.weight").data[0] = 0.0  # no linear layer of a block: never pruned
    masks = masks_of_zeros(model)
    assert list(masks) == ["model.layers.1.mlp.up_proj.weight"]
    assert torch.equal(masks["model.layers.1.mlp.up_proj.weight"].unpack(), weight != 0)
    check_masks_hold(model, masks)
