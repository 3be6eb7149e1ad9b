"""Code in any kind of entry of any kind of file that is read does not run, and is one line for the user."""

import json
import os
import pickle
import tarfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.checkpoint import load as load_shards
from torch.distributed.checkpoint import save
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import _StoragePrefix
from torch.distributed.checkpoint.metadata import MetadataIndex

from lit_prune.callbacks import Export
from lit_prune.checkpoint import training_checkpoints
from lit_prune.checkpoint.files import load_tensors
from lit_prune.checkpoint.masks import load_masks
from lit_prune.checkpoint.training_checkpoints import check_trusted, plain_data_only, read_checkpoint
from lit_prune.cli import main
from lit_prune.commands.checks import check_checkpoint
from lit_prune.errors import InputError
from lit_prune.models.load import load_model
from lit_prune.models.tokenizer import load_tokenizer
from lit_prune.ops import PackedMask
from lit_prune.trainer import PruningTrainer
from lit_prune.training import LitCausalLM
from lit_prune.training.strategies import FSDP2, DeepSpeed
from support.training import SMALLER


class Payload:
    """Makes a folder if it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = str(mark)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.mark,)


def state() -> dict[str, Tensor]:
    return {"model.layer.weight": torch.arange(6.0).reshape(2, 3)}


def single(folder: Path, **content: Any) -> Path:
    progress = {"pytorch-lightning_version": "2.6.0", "epoch": 0, "global_step": 0, "loops": {}}
    torch.save({"state_dict": state(), "callbacks": {}, **progress, **content}, folder / "last.ckpt")
    return folder / "last.ckpt"


def in_weights(folder: Path, payload: Payload) -> Path:
    return single(folder, state_dict={**state(), "model.other": payload})


def in_callbacks(folder: Path, payload: Payload) -> Path:
    return single(folder, callbacks={"Prune{}": {"masks": payload}})


def in_hyper_parameters(folder: Path, payload: Payload) -> Path:
    return single(folder, hyper_parameters={"x": payload})


def in_learning_rate(folder: Path, payload: Payload) -> Path:
    return single(folder, optimizer_states=[{"state": {}, "param_groups": [{"lr": payload}]}])


def in_plain_pickle(folder: Path, payload: Payload) -> Path:
    (folder / "last.ckpt").write_bytes(pickle.dumps(payload))
    return folder / "last.ckpt"


def in_old_torch_file(folder: Path, payload: Payload) -> Path:
    torch.save(payload, folder / "last.ckpt", _use_new_zipfile_serialization=False)
    return folder / "last.ckpt"


def in_tar_of_old_torch(folder: Path, payload: Payload) -> Path:
    for name in ("sys_info", "pickle", "storages", "tensors"):
        (folder / name).write_bytes(pickle.dumps(payload, protocol=2))
    with tarfile.open(folder / "last.ckpt", "w:", format=tarfile.PAX_FORMAT) as tar:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            tar.add(folder / name, arcname=name)
    return folder / "last.ckpt"


def sharded(folder: Path, lr: Any = 0.1) -> Path:
    path = folder / "sharded.ckpt"
    save({"state_dict": state(), "optimizer_0": {"lr": lr}}, checkpoint_id=path, no_dist=True)
    torch.save({"callbacks": {}}, path / "meta.pt")
    return path


def in_shard(folder: Path, payload: Payload) -> Path:
    return sharded(folder, lr=payload)


def in_metadata(folder: Path, payload: Payload) -> Path:
    (sharded(folder) / ".metadata").write_bytes(pickle.dumps(payload))
    return folder / "sharded.ckpt"


def in_metadata_of_a_rank(folder: Path, payload: Payload) -> Path:
    (sharded(folder) / "__0.metadata").write_bytes(pickle.dumps(payload))
    return folder / "sharded.ckpt"


def in_meta(folder: Path, payload: Payload) -> Path:
    torch.save({"callbacks": payload}, sharded(folder) / "meta.pt")
    return folder / "sharded.ckpt"


def in_shard_elsewhere(folder: Path, payload: Payload) -> Path:
    inside, outside = sharded(folder), folder / "outside.distcp"
    (shard,) = inside.glob("*.distcp")
    shard.rename(outside)
    shard.symlink_to(outside)
    torch.save(payload, inside / "unused.bin")
    return inside


def behind_a_path_of_metadata(folder: Path, payload: Payload) -> Path:
    inside = sharded(folder, lr=payload)
    (shard,) = inside.glob("*.distcp")
    shard.rename(folder / "outside.distcp")
    index = inside / ".metadata"
    metadata = pickle.loads(index.read_bytes())
    for place in metadata.storage_data.values():
        place.relative_path = "../outside.distcp"
    index.write_bytes(pickle.dumps(metadata))
    return inside


def deepspeed(folder: Path, model: Any = None, optimizer: Any = None) -> Path:
    path = folder / "zero.ckpt"
    (path / "checkpoint").mkdir(parents=True)
    (path / "latest").write_text("checkpoint")
    torch.save({"module": model}, path / "checkpoint" / "zero_pp_rank_0_mp_rank_00_model_states.pt")
    torch.save({"optimizer": optimizer}, path / "checkpoint" / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt")
    return path


def in_model_states(folder: Path, payload: Payload) -> Path:
    return deepspeed(folder, model=payload)


def in_optimizer_states(folder: Path, payload: Payload) -> Path:
    return deepspeed(folder, optimizer=payload)


def in_a_linked_folder(folder: Path, payload: Payload) -> Path:
    path = deepspeed(folder, model=payload)
    (path / "checkpoint").rename(folder / "elsewhere")
    (path / "checkpoint").symlink_to(folder / "elsewhere")
    return path


def in_a_folder_that_latest_names(folder: Path, payload: Payload) -> Path:
    path = deepspeed(folder)
    (path / "latest").write_text("../elsewhere")
    (folder / "elsewhere").mkdir()
    torch.save(payload, folder / "elsewhere" / "mp_rank_00_model_states.pt")
    return path


CHECKPOINTS = [
    in_weights,
    in_callbacks,
    in_hyper_parameters,
    in_learning_rate,
    in_plain_pickle,
    in_old_torch_file,
    in_tar_of_old_torch,
    in_shard,
    in_metadata,
    in_metadata_of_a_rank,
    in_meta,
    in_shard_elsewhere,
    behind_a_path_of_metadata,
    in_model_states,
    in_optimizer_states,
    in_a_linked_folder,
    in_a_folder_that_latest_names,
]
Write = Callable[[Path, Payload], Path]


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("write", CHECKPOINTS, ids=lambda write: write.__name__)
def test_a_checkpoint_runs_no_code(write: Write, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    path = write(tmp_path, Payload(mark))
    for load in (check_trusted, read_checkpoint, FSDP2().load_checkpoint, DeepSpeed().load_checkpoint):
        with pytest.raises(InputError, match=f"{path.name}.*(holds more than|is a link|outside)") as raised:
            load(path)
        assert "\n" not in str(raised.value)
    assert not mark.exists()


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("write", [in_learning_rate, in_shard, in_a_linked_folder], ids=lambda write: write.__name__)
@pytest.mark.parametrize("command", ["fit", "test", "export"])
def test_the_command_line_runs_no_code(
    command: str, write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mark = tmp_path / "ran"
    path = write(tmp_path, Payload(mark))
    option = "--checkpoint" if command == "export" else "--ckpt_path"
    assert main([command, "-c", config(tmp_path), option, str(path), *output(command, tmp_path)]) == 2
    assert len(errors(capsys)) == 1
    assert not mark.exists() and not (tmp_path / "out").exists()


def test_what_is_trusted_is_loaded(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    read_checkpoint(in_hyper_parameters(tmp_path, Payload(mark)), trust=True)
    assert mark.exists()


def config(folder: Path, **plan: Any) -> str:
    plan = {"pattern": {"class_path": "Unstructured", "init_args": {"sparsity": 0.5}}, "output_error": False, **plan}
    content = {
        "model": {"pretrained": "random", "config": SMALLER},
        "data": {"dataset": "embedded", "sequences": 2, "seqlen": 8, "max_windows": 2},
        "trainer": {
            "accelerator": "cpu",
            "logger": False,
            "enable_checkpointing": False,
            "callbacks": [{"class_path": "Prune", "init_args": {"plan": {"scorer": {"class_path": "Wanda"}, **plan}}}],
        },
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(content))
    return str(folder / "config.yaml")


def output(command: str, folder: Path) -> list[str]:
    return ["--output", str(folder / "out")] if command in ("prune", "export") else []


def errors(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("lit-prune: error: ")]


@pytest.fixture
def model_folder(tiny_model: Any, tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    tiny_model().save_pretrained(folder)
    load_tokenizer("random").save_pretrained(folder)
    return folder


def as_bin(folder: Path, payload: Payload) -> None:
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save({**weights, "more": payload}, folder / "pytorch_model.bin")


def as_sharded_bin(folder: Path, payload: Payload) -> None:
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save({**weights, "more": payload}, folder / "pytorch_model-00001-of-00001.bin")
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, "pytorch_model-00001-of-00001.bin")}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def in_place_of_safetensors(folder: Path, payload: Payload) -> None:
    (folder / "model.safetensors").write_bytes(pickle.dumps(payload))


def as_remote_code(folder: Path, payload: Payload) -> None:
    content = json.loads((folder / "config.json").read_text())
    content |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.C", "AutoModelForCausalLM": "mine.M"}}
    (folder / "config.json").write_text(json.dumps(content))
    (folder / "mine.py").write_text(f"import os\nos.mkdir({payload.mark!r})\n")


MODELS = [as_bin, as_sharded_bin, in_place_of_safetensors, as_remote_code]


@pytest.mark.parametrize("write", MODELS, ids=lambda write: write.__name__)
def test_a_model_folder_runs_no_code(
    write: Callable[[Path, Payload], None], model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: "n")
    mark = tmp_path / "ran"
    write(model_folder, Payload(mark))
    with pytest.raises(InputError, match=r"model\.pretrained is .*model'|weights beside it are too few") as raised:
        load_model(str(model_folder))
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 700, str(raised.value)
    assert not mark.exists()


def test_masks_and_records_run_no_code(tmp_path: Path) -> None:
    mark, file = tmp_path / "ran", tmp_path / "masks.safetensors"
    file.write_bytes(pickle.dumps(Payload(mark)))
    with pytest.raises(InputError, match="not a safetensors file"):
        load_masks(file)
    with pytest.raises(InputError, match="cannot be read as safetensors"):
        load_tensors(file)  # caches of gradients and of a teacher's outputs, and the tensors of a journal
    assert not mark.exists()


def test_a_cache_runs_no_code_and_damage_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache, mark = tmp_path / "cache", tmp_path / "ran"
    plan = {"scorer": {"class_path": "GBLM"}, "allocator": {"class_path": "AlphaPruning"}, "cache": str(cache)}
    command = ["prune", "-c", config(tmp_path, **plan), "--output"]
    assert main([*command, str(tmp_path / "first")]) == 0
    payload = pickle.dumps(Payload(mark))
    for name, contents in {
        "gradients": [payload],
        "alpha_peak": [payload, b"[]", b"null", b'{"a": "x"}', b'{"a": []}'],
    }.items():
        (file,) = cache.glob(f"{name}*")
        valid = file.read_bytes()
        for content in contents:
            file.write_bytes(content)
            errors(capsys)
            assert main([*command, str(tmp_path / "out")]) == 2
            said = file.name if content is payload else f"{str(file)!r}, which is damaged"
            assert [said in line for line in errors(capsys)] == [True]
            assert not mark.exists() and not (tmp_path / "out").exists()
        file.write_bytes(valid)


@pytest.mark.parametrize(
    "masks",
    [
        {"masks": {"layer": torch.zeros(1, dtype=torch.uint8)}},
        {"masks": {"layer": torch.zeros(1, dtype=torch.uint8)}, "mask_shapes": {"layer": [10**9, 10**9]}},
        {"masks": {"layer": torch.zeros(6)}, "mask_shapes": {"layer": [2, 3]}},
        {"masks": [1], "mask_shapes": {}},
        [1],
    ],
)
def test_masks_that_a_checkpoint_only_claims_are_refused(masks: Any, tmp_path: Path) -> None:
    path = single(tmp_path, callbacks={"Prune{}": masks})
    with pytest.raises(InputError, match="the checkpoint's masks, of Prune, are damaged"):
        _ = read_checkpoint(path).masks


def test_sound_masks_are_read(tmp_path: Path) -> None:
    mask = PackedMask.pack(torch.tensor([[True, False, True], [False, False, True]]))
    path = single(tmp_path, callbacks={"Prune{}": {"masks": {"layer": mask.bits}, "mask_shapes": {"layer": [2, 3]}}})
    assert torch.equal(read_checkpoint(path).masks["layer.weight"].unpack(), mask.unpack())


def with_index(folder: Path, payload: Payload, change: Callable[[Any], None]) -> Path:
    path = sharded(folder, lr=payload)
    metadata = pickle.loads((path / ".metadata").read_bytes())
    change(metadata)
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    return path


def shadowed_lookup(metadata: Any) -> None:
    table = OrderedDict(metadata.state_dict_metadata)
    table.get = _StoragePrefix  # type: ignore[method-assign, assignment]
    metadata.state_dict_metadata = table


def absurd_sizes(metadata: Any) -> None:
    metadata.state_dict_metadata["state_dict.model.layer.weight"].size = torch.Size([10**9, 10**9])
    del metadata.state_dict_metadata["optimizer_0.lr"]


def bytes_beyond_the_file(metadata: Any) -> None:
    metadata.storage_data[MetadataIndex("optimizer_0.lr")].offset = 10**9


INDICES = [(shadowed_lookup, "OrderedDict"), (absurd_sizes, "would take 4,000,"), (bytes_beyond_the_file, "not all in")]


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize(("change", "said"), INDICES, ids=[change.__name__ for change, _ in INDICES])
def test_an_index_cannot_hide_what_it_leads_to(change: Callable[[Any], None], said: str, tmp_path: Path) -> None:
    path = with_index(tmp_path, Payload(tmp_path / "ran"), change)
    for load in (check_trusted, read_checkpoint, FSDP2().load_checkpoint):
        with pytest.raises(InputError, match=said):
            load(path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_the_load_itself_runs_no_code_if_the_files_change_after_the_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = sharded(tmp_path, lr=Payload(tmp_path / "ran"))
    monkeypatch.setattr(training_checkpoints, "check_trusted", lambda *_: None)
    monkeypatch.setattr(training_checkpoints, "_check_entries", lambda *_: None)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    with plain_data_only(path), pytest.raises(CheckpointException, match="Weights only load failed"):
        load_shards({"optimizer_0": {"lr": 0.1}}, checkpoint_id=path, no_dist=True)
    assert os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] == "1" and "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ
    (path / ".metadata").write_bytes(pickle.dumps(Payload(tmp_path / "ran")))
    # torch 2.9 goes on after the refusal, and finds that it has no metadata
    refused = r"it names posix\.mkdir|assert metadata is not None"
    with plain_data_only(path), pytest.raises(CheckpointException, match=refused):
        load_shards({"optimizer_0": {"lr": 0.1}}, checkpoint_id=path, no_dist=True)
    assert not (tmp_path / "ran").exists()


def test_the_best_checkpoint_of_a_resumed_run_runs_no_code(tmp_path: Path) -> None:
    best = ModelCheckpoint(monitor="val/perplexity")
    best.best_model_path = str(in_hyper_parameters(tmp_path, Payload(tmp_path / "ran")))  # as a checkpoint may say
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, callbacks=[best])
    with pytest.raises(InputError, match=r"last\.ckpt holds more than"):
        Export(str(tmp_path / "out"), best=True).on_train_end(trainer, LightningModule())
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("strategy", [FSDP2, DeepSpeed])
def test_trust_reaches_the_strategy(strategy: Any, tmp_path: Path) -> None:
    trainer = PruningTrainer(accelerator="cpu", logger=False)
    trainer._accelerator_connector.strategy = strategy()
    for trust in (True, False):
        check_checkpoint(trainer, single(tmp_path), trust)
        assert trainer.strategy.trusted is trust


def test_plain_data_in_torchs_old_format_is_read(tmp_path: Path) -> None:
    torch.save({"state_dict": state()}, tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    assert list(read_checkpoint(tmp_path / "old.ckpt").weights) == ["layer.weight"]


@pytest.mark.parametrize("content", [b"\x80\x02.", b"\x80\x02h\x05.", b"PK\x03\x04", b"\x80\x02(u."])
def test_a_damaged_pickle_is_one_line(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "last.ckpt").write_bytes(content)
    with pytest.raises(InputError, match=r"last\.ckpt holds more than tensors and plain data, or is damaged"):
        check_trusted(tmp_path / "last.ckpt")


@pytest.mark.parametrize("state", [{"best_k_models": {"/run/../home": 1.0}}, {"kth_best_model_path": "a/../../b"}])
def test_a_checkpoint_has_nothing_deleted_elsewhere(state: dict[str, Any], tmp_path: Path) -> None:
    """Lightning deletes the worst of the files that a resumed checkpoint says it has kept."""
    run = tmp_path / "run"
    victim = tmp_path / "victim"
    victim.mkdir()
    folder = ModelCheckpoint(run)
    assert folder._should_remove_checkpoint(Trainer(logger=False), f"{run}/../victim", "new")  # so it would
    with pytest.raises(InputError, match=r"must not lead out of its folder"):
        LitCausalLM("random").on_load_checkpoint({"callbacks": {"ModelCheckpoint": state}})


def test_a_kernel_of_a_hub_is_not_loaded(model_folder: Path) -> None:
    config = model_folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"attn_implementation": "someone/attention"}))
    try:
        model: Any = load_model(str(model_folder))
    except InputError as error:
        assert "the attn_implementation 'someone/attention', code of a hub" in str(error)
    else:  # a transformers that takes no such value out of a file
        assert "/" not in model.config._attn_implementation


def test_a_chat_template_does_not_choose_where_it_is_written(model_folder: Path) -> None:
    load_tokenizer("random").save_pretrained(model_folder)
    config = model_folder / "tokenizer_config.json"
    templates = [{"name": "default", "template": ""}, {"name": "../evil", "template": ""}]
    config.write_text(json.dumps(json.loads(config.read_text()) | {"chat_template": templates}))
    with pytest.raises(InputError, match=r"a chat template of the name '\.\./evil': it must be a plain word"):
        load_tokenizer(str(model_folder))


@pytest.mark.parametrize("file", ["tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize("argument", ["vocab", "vocab_file", "init_inputs"])
def test_a_tokenizer_reads_no_file_elsewhere(argument: str, file: str, model_folder: Path) -> None:
    load_tokenizer("random").save_pretrained(model_folder)
    secret = model_folder.parent / "secret.json"
    secret.write_text(json.dumps({"secret": 0}))
    config = model_folder / file
    before = json.loads(config.read_text()) if config.exists() else {}
    config.write_text(json.dumps(before | {argument: ["../secret.json"] if argument == "init_inputs" else str(secret)}))
    with pytest.raises(InputError, match=rf"secret\.json', which {file} names, is outside of the folder"):
        load_tokenizer(str(model_folder))


def test_where_a_tokenizer_was_once_is_not_asked(model_folder: Path) -> None:
    load_tokenizer("random").save_pretrained(model_folder)
    old = model_folder.parent / "special_tokens_map.json"
    old.write_text("{}")
    config = model_folder / "tokenizer_config.json"
    former = {"special_tokens_map_file": str(old), "name_or_path": str(old), "chat_template": "{{ '/' }}" * 1000}
    config.write_text(json.dumps(json.loads(config.read_text()) | former))
    assert len(load_tokenizer(str(model_folder))) == len(load_tokenizer("random"))


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("name", ["../other.safetensors", "/other.safetensors"])
def test_a_config_names_no_weights_elsewhere(name: str, lazy: bool, model_folder: Path) -> None:
    config = model_folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"transformers_weights": name}))
    with pytest.raises(InputError, match=r"other\.safetensors', which its config names, is outside of the folder"):
        load_model(str(model_folder), lazy=model_folder.parent / "changes" if lazy else None)
