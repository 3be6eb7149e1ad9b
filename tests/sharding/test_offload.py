"""Models that stay on disk, pruned from folder to folder."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from lit_prune.allocators import AlphaPruning, Measured
from lit_prune.checkpoint.masks import load_masks
from lit_prune.checkpoint.save import save_pruned
from lit_prune.errors import InputError
from lit_prune.models.blocks import Block, find_blocks
from lit_prune.models.load import load_model
from lit_prune.ops import Unstructured
from lit_prune.pruning import PruningPlan, Reconstruction, prune
from lit_prune.scorers import GBLM
from lit_prune.sharding.offload import OnDisk, disk_store_of
from lit_prune.solvers import ADMM, SparseGPT
from support.killed import KilledError, kill_at
from support.scripts import run_script

PLANS = {
    "gblm": PruningPlan(Unstructured(0.5), GBLM(), AlphaPruning()),
    "sparsegpt": PruningPlan(Unstructured(0.5), None, Measured(sequences=2), SparseGPT()),
    "sequential": PruningPlan(
        Unstructured(0.6), solver=SparseGPT(), correction=0.3, sequential=True, residual_correction=0.3
    ),
    "all": PruningPlan(Unstructured(0.6), None, None, ADMM(iterations=6), 0.3, Reconstruction(steps=4)),
}


@pytest.fixture
def saved(tiny_model: Callable[..., nn.Module], tmp_path: Path) -> Callable[..., Path]:
    """Save a tiny model as transformers does, in one file or in several."""

    def save(model_type: str = "llama", shard_size: str = "1GB") -> Path:
        tiny_model(model_type).save_pretrained(tmp_path / "source", max_shard_size=shard_size)
        return tmp_path / "source"

    return save


@pytest.mark.parametrize(("model_type", "shard_size"), [("llama", "1GB"), ("gpt2", "30KB"), ("gemma3_text", "1GB")])
def test_it_computes_what_the_whole_model_does(
    model_type: str, shard_size: str, saved: Callable[..., Path], tokens: list[Tensor], tmp_path: Path
) -> None:
    folder = saved(model_type, shard_size)
    whole, lazy = load_model(str(folder)), load_model(str(folder), lazy=tmp_path / "changes")
    with torch.no_grad():
        assert torch.equal(lazy(input_ids=tokens[0]).logits, whole(input_ids=tokens[0]).logits)
    lazy.double()  # placeholders move, and stay one value each
    store = disk_store_of(lazy)
    assert store is not None
    store.release()
    for block in find_blocks(lazy):
        for parameter in block.module.parameters():
            assert parameter.dtype == torch.float64 and parameter.untyped_storage().nbytes() == 8
    with torch.no_grad():
        assert torch.equal(lazy(input_ids=tokens[0]).logits, whole.double()(input_ids=tokens[0]).logits)


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_it_is_pruned_like_the_whole_model(
    model_type: str, plan: PruningPlan, saved: Callable[..., Path], tokens: list[Tensor], tmp_path: Path
) -> None:
    folder, changes = saved(model_type), tmp_path / "changes"
    whole, lazy = load_model(str(folder)), load_model(str(folder), lazy=changes)
    expected, report = prune(whole, tokens, plan), prune(lazy, tokens, plan)
    assert report.identity == expected.identity
    assert len(list(changes.iterdir())) == 3
    save_pruned(tmp_path / "pruned", lazy, None, report.masks, {})
    reopened = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned")
    for name, value in whole.state_dict().items():
        assert torch.equal(value, reopened.state_dict()[name]), name
    assert load_masks(tmp_path / "pruned").keys() == expected.masks.keys()
    assert len(list((tmp_path / "pruned").glob("model-*.safetensors"))) == (6 if model_type == "llama" else 4)
    again = load_model(str(tmp_path / "pruned"), lazy=changes)  # what it writes, it reads
    with torch.no_grad():
        assert torch.equal(again(input_ids=tokens[0]).logits, whole(input_ids=tokens[0]).logits)
    assert not list(changes.iterdir())


def test_each_block_is_read_once_for_every_pass(
    saved: Callable[..., Path], tokens: list[Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(str(saved()), lazy=tmp_path / "changes")
    loaded: list[int] = []
    load = OnDisk.load

    def counted(disk: OnDisk, block: Block, device: torch.device) -> dict[str, Tensor]:
        loaded.append(block.index)
        return load(disk, block, device)

    monkeypatch.setattr(OnDisk, "load", counted)
    prune(model, [*tokens, *tokens], PruningPlan(Unstructured(0.5), solver=SparseGPT()))
    embeddings, head = 3, 4
    assert loaded[:5] == [0, 1, 2, embeddings, head]  # the digest of the weights
    assert loaded[5:8] == [embeddings, 0, embeddings]  # what a block returns, then how each one is called
    assert loaded[8:] == [0, 1, 2]  # the pruning


def test_it_resumes(saved: Callable[..., Path], tokens: list[Tensor], tmp_path: Path) -> None:
    plan, folder = PLANS["all"], str(saved())
    whole = load_model(folder)
    prune(whole, tokens, plan)

    journal = tmp_path / "journal"
    with pytest.raises(KilledError):
        prune(load_model(folder, lazy=tmp_path / "c"), tokens, plan, journal_folder=journal, on_progress=kill_at(2))
    resumed = load_model(folder, lazy=tmp_path / "c")
    report = prune(resumed, tokens, plan, journal_folder=journal, resume=True)
    save_pruned(tmp_path / "pruned", resumed, None, report.masks, {})
    reopened = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned")
    assert all(torch.equal(value, reopened.state_dict()[name]) for name, value in whole.state_dict().items())


def test_a_checkpoint_of_the_model_without_its_head_is_read(
    saved: Callable[..., Path], tokens: list[Tensor], tmp_path: Path
) -> None:
    folder = saved("gpt2")
    whole = load_model(str(folder))
    bare = {name.removeprefix("transformer."): t for name, t in load_file(folder / "model.safetensors").items()}
    (folder / "model.safetensors").unlink()  # the whole model may have it mapped
    save_file(bare, folder / "model.safetensors", {"format": "pt"})
    with torch.no_grad():
        lazy = load_model(str(folder), lazy=tmp_path / "changes")
        assert torch.equal(lazy(input_ids=tokens[0]).logits, whole(input_ids=tokens[0]).logits)


def test_what_cannot_be_opened_is_refused(
    tiny_model: Callable[..., nn.Module], saved: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"'random': model\.lazy opens folders"):
        load_model("random", config={"model_type": "llama"}, lazy=tmp_path / "c")
    folder = saved()
    model = load_model(str(folder), lazy=tmp_path / "c")
    with pytest.raises(InputError, match="written as hf-sharded"):
        save_pruned(tmp_path / "out", model, None, {}, {}, to="bitmask")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(InputError, match=r"no file has 'model\.layers\.1\.mlp\.up_proj\.weight'"):
        load_model(str(folder), lazy=tmp_path / "c")
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"neither model\.safetensors nor"):
        load_model(str(folder), lazy=tmp_path / "c")
    experts = load_model(
        "random", config={"model_type": "mixtral", "hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 16}
    )
    experts.save_pretrained(tmp_path / "mixtral")
    with pytest.raises(InputError, match="has fused experts"):
        load_model(str(tmp_path / "mixtral"), lazy=tmp_path / "c")


@pytest.mark.parametrize("other", ["run.record", "block_notes.safetensors", "model.safetensors"])
def test_nothing_else_is_dropped_with_the_blocks_that_have_changed(
    other: str, saved: Callable[..., Path], tmp_path: Path
) -> None:
    changes = tmp_path / "changes"
    changes.mkdir()
    for name in ("block_0000.safetensors", other):
        (changes / name).touch()
    with pytest.raises(InputError, match=rf"it holds '{other}', and blocks that lie there are dropped"):
        load_model(str(saved()), lazy=changes)
    assert len(list(changes.iterdir())) == 2


def test_a_folder_of_changed_blocks_is_of_one_process(saved: Callable[..., Path], tmp_path: Path) -> None:
    folder, changes = str(saved()), tmp_path / "changes"
    first = load_model(folder, lazy=changes)
    script = tmp_path / "open.py"
    script.write_text(f"from lit_prune import load_model; load_model({folder!r}, lazy={str(changes)!r})")
    other = run_script(tmp_path / "log", script)
    assert "InputError: model.lazy is" in other.said and "another run keeps its blocks there" in other.said
    load_model(folder, lazy=changes)  # the same process may open it again
    store = disk_store_of(first)
    assert store is not None
    store.forget()
    assert run_script(tmp_path / "log", script).code == 0
