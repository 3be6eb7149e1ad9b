"""Blocks that are made resident one at a time, wherever their weights are."""

import copy
import threading
from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from lit_prune.allocators import AlphaPruning
from lit_prune.models.blocks import Block, find_blocks
from lit_prune.ops import Unstructured
from lit_prune.pruning import PruningPlan, Reconstruction, prune
from lit_prune.scorers import GBLM
from lit_prune.sharding.block_store import BlockStore, InMemory, unsharded
from lit_prune.sharding.parameters import full_tensor_of
from lit_prune.solvers import ADMM, SparseGPT


def sharded(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (1,))
    for block in find_blocks(model):
        fully_shard(block.module, mesh=mesh)
    return fully_shard(model, mesh=mesh)


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma3_text"])  # gpt2: tied embeddings, and Conv1D
def test_a_skeleton_copy_holds_one_block_at_a_time(
    model_type: str, tiny_model: Callable[..., nn.Module], tokens: list[Tensor]
) -> None:
    plain = tiny_model(model_type)
    with unsharded(sharded(copy.deepcopy(plain))) as (skeleton, store):
        assert type(skeleton) is type(plain)
        first, second, *_ = find_blocks(skeleton)
        inside = {
            f"{block.name}.{name}" for block in find_blocks(skeleton) for name, _ in block.module.named_parameters()
        }
        for name, parameter in skeleton.named_parameters():
            expected = plain.get_parameter(name)
            assert parameter.shape == expected.shape and parameter.dtype == expected.dtype
            if name in inside:
                assert parameter.isnan().all() and parameter.untyped_storage().nbytes() == 4
            else:
                assert torch.equal(parameter, expected)
        for name, buffer in skeleton.named_buffers():
            assert torch.equal(buffer, plain.get_buffer(name))
        with store.resident(first):
            for name, parameter in first.module.named_parameters(prefix=first.name):
                assert torch.equal(parameter, plain.get_parameter(name))
            assert all(parameter.isnan().all() for parameter in second.module.parameters())
        assert all(parameter.isnan().all() for parameter in first.module.parameters())


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma3_text"])
@pytest.mark.parametrize(
    "plan",
    [
        PruningPlan(Unstructured(0.5), GBLM(), AlphaPruning()),
        PruningPlan(Unstructured(0.6), None, None, ADMM(iterations=6), 0.3, Reconstruction(steps=4)),
    ],
    ids=["GBLM", "ADMM"],
)
def test_a_sharded_model_is_pruned_like_a_plain_one(
    model_type: str, plan: PruningPlan, tiny_model: Callable[..., nn.Module], tokens: list[Tensor]
) -> None:
    plain, live = tiny_model(model_type), sharded(tiny_model(model_type))
    expected, report = prune(plain, tokens, plan), prune(live, tokens, plan)
    assert report.identity == expected.identity and report.allocation == expected.allocation
    for name, mask in expected.masks.items():
        assert torch.equal(mask.unpack(), report.masks[name].unpack())
    for name, parameter in live.named_parameters():
        assert torch.equal(full_tensor_of(parameter), plain.get_parameter(name)), name


class Counting(InMemory):
    """Fetches every block into tensors of its own, and counts."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded: list[int] = []
        self.loaded_apart: list[int] = []
        self.stored: list[int] = []

    def load(self, block: Block, device: torch.device) -> dict[str, Tensor]:
        self.loaded.append(block.index)
        if threading.current_thread() is not threading.main_thread():
            self.loaded_apart.append(block.index)
        return {name: parameter.data.clone() for name, parameter in block.module.named_parameters()}

    def store(self, block: Block, values: Mapping[str, Tensor]) -> None:
        self.stored.append(block.index)
        super().store(block, values)


def at(model: nn.Module, store: BlockStore) -> nn.Module:
    model.__dict__["block_store"] = store
    return model


def test_the_next_block_is_fetched_in_the_meantime(tiny_model: Callable[..., nn.Module], tokens: list[Tensor]) -> None:
    plain, store = tiny_model(), Counting()
    moved = at(tiny_model(), store)
    plan = PruningPlan(Unstructured(0.5), solver=SparseGPT())
    prune(plain, tokens, plan)
    prune(moved, tokens, plan)
    assert all(torch.equal(value, moved.state_dict()[name]) for name, value in plain.state_dict().items())
    assert store.stored == [0, 1, 2]
    assert store.loaded == [0, 1, 2, 0, 0, 1, 2]  # the digest of the weights; how blocks are called; the pruning
    assert store.loaded_apart == [1, 2]


def test_what_fails_leaves_the_block_as_it_was(tiny_model: Callable[..., nn.Module]) -> None:
    store, model = Counting(), tiny_model()
    block = find_blocks(model)[1]
    weight = model.get_parameter(f"{block.name}.mlp.up_proj.weight")
    before = weight.detach().clone()
    with pytest.raises(RuntimeError, match="stop"), store.resident(block) as changed:
        weight.data.zero_()
        changed.add(f"{block.name}.mlp.up_proj.weight")
        raise RuntimeError("stop")
    assert torch.equal(weight, before) and not store.stored
    with store.resident(block) as changed:
        weight.data.zero_()
    assert torch.equal(weight, before) and not store.stored  # nothing was said to have changed


def test_a_block_is_held_until_another_one_is(tiny_model: Callable[..., nn.Module]) -> None:
    store, model = Counting(), tiny_model()
    first, second, _ = find_blocks(model)
    at_home = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}

    def away() -> set[int]:
        return {
            block.index
            for block in (first, second)
            for name, parameter in block.module.named_parameters(prefix=block.name)
            if parameter.data_ptr() != at_home[name]
        }

    store.hold(first)
    store.hold(first)
    assert away() == {0} and store.loaded == [0]
    store.hold(second)
    assert away() == {1}
    with store.resident(first):
        assert away() == {0}
        store.hold(first)
        assert store.loaded == [0, 1, 0]
    store.hold(second)
    store.release()
    assert away() == set()
