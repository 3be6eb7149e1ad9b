"""What lies in a model's folder is checked: nothing random, foreign or damaged goes through."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lit_prune.errors import InputError
from lit_prune.models.io import load_masks, load_model, load_tokenizer, save_pruned
from lit_prune.models.peft_format import adapter_files
from lit_prune.ops import PackedMask

Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture
def folder(tiny_model: Callable[..., nn.Module], tmp_path: Path) -> Path:
    path = tmp_path / "model"
    save_pruned(path, tiny_model(), load_tokenizer("random"), {Q: mask()}, {})
    return path


def mask() -> PackedMask:
    return PackedMask.pack(torch.ones(32, 32, dtype=torch.bool))


def change_weights(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def change_config(folder: Path, **values: object) -> None:
    content = json.loads((folder / "config.json").read_text()) | values
    (folder / "config.json").write_text(json.dumps(content))


def lose_a_weight(folder: Path) -> None:
    change_weights(folder, lambda weights: weights.pop(Q))


def gain_a_weight(folder: Path) -> None:
    change_weights(folder, lambda weights: weights.update(extra=torch.ones(2)))


def take_another_shape(folder: Path) -> None:
    change_config(folder, intermediate_size=40)


def take_another_type(folder: Path) -> None:
    change_config(folder, model_type="gpt_neox", architectures=["GPTNeoXForCausalLM"])


def become_an_encoder_decoder(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "t5", "architectures": ["T5Model"]}))


def cut_the_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "lla')


def list_the_config(folder: Path) -> None:
    (folder / "config.json").write_text("[1, 2]")


def cut_the_weights(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])


def lose_the_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def link_the_weights(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder.parent / "elsewhere.safetensors")
    (folder / "model.safetensors").symlink_to(folder.parent / "elsewhere.safetensors")


def link_the_adapter(folder: Path) -> None:
    (folder.parent / "secret").write_text("secret")
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_config.json").symlink_to(folder.parent / "secret")


def index_weights_elsewhere(folder: Path) -> None:
    names = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder.parent / "elsewhere.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "../elsewhere.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def put_an_adapter_beside(folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')


DAMAGES = {
    put_an_adapter_beside: r"an adapter_config\.json lies beside its weights",
    lose_a_weight: r"lacks model\.layers\.1\.self_attn\.q_proj\.weight, so it would be random",
    gain_a_weight: "holds extra, which a model of its config does not have",
    take_another_shape: "shape|size",
    take_another_type: "lacks",
    become_an_encoder_decoder: r"cannot be loaded .*T5",
    cut_the_config: "config.json",
    list_the_config: "cannot be loaded",
    cut_the_weights: "cannot be loaded",
    lose_the_weights: "model.safetensors",
    link_the_weights: r"elsewhere\.safetensors'.*is outside of the folder",
    link_the_adapter: r"secret'.*is outside of the folder",
    index_weights_elsewhere: r"'\.\./elsewhere\.safetensors'.*is outside of the folder",
}


@pytest.mark.parametrize(("damage", "said"), DAMAGES.items(), ids=lambda x: getattr(x, "__name__", ""))
def test_a_damaged_model_is_refused_in_one_line(damage: Callable[[Path], None], said: str, folder: Path) -> None:
    load_model(str(folder))
    damage(folder)
    with pytest.raises(InputError, match=said) as raised:
        load_model(str(folder))
    assert str(folder) in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize("damage", [lose_a_weight, link_the_weights, index_weights_elsewhere, cut_the_config])
def test_a_damaged_model_is_not_opened_lazily(damage: Callable[[Path], None], folder: Path, tmp_path: Path) -> None:
    damage(folder)
    with pytest.raises(InputError, match=str(folder)):
        load_model(str(folder), lazy=tmp_path / "changes")


def test_the_links_of_the_hubs_cache_are_followed(folder: Path, tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "123", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    folder.rename(blobs)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(Path("../../blobs") / file.name)
    load_model(str(snapshot))
    load_tokenizer(str(snapshot))


def test_a_link_among_adapters_is_not_handed_on(folder: Path) -> None:
    link_the_adapter(folder)
    with pytest.raises(InputError, match="is a link or a folder"):
        adapter_files(folder)
    (folder / "adapter" / "adapter_config.json").unlink()
    (folder / "adapter" / "adapter_model.safetensors").mkdir()
    with pytest.raises(InputError, match="is a link or a folder"):
        adapter_files(folder)


def rewrite_masks(folder: Path, bits: Tensor | None = None, **metadata: str) -> None:
    file = folder / "masks.safetensors"
    with safe_open(file, "pt") as handle:
        kept = dict(handle.metadata())
    save_file({Q: mask().bits if bits is None else bits}, file, {k: v for k, v in {**kept, **metadata}.items() if v})


MASKS = [
    {"shapes": ""},
    {"shapes": "{"},
    {"shapes": "[1]"},
    {"shapes": json.dumps({Q: [10**9, 10**9]})},
    {"shapes": json.dumps({Q: [32, 31, 5]})},
    {"shapes": json.dumps({Q: "32"})},
    {"shapes": json.dumps({"another": [32, 32]})},
    {"bits": torch.zeros(3, dtype=torch.uint8)},
    {"bits": torch.zeros(128)},
]


@pytest.mark.parametrize("damage", MASKS, ids=str)
def test_damaged_masks_are_refused_in_one_line(damage: dict[str, object], folder: Path) -> None:
    rewrite_masks(folder, **damage)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"the masks of .* are damaged") as raised:
        load_masks(folder)
    assert "\n" not in str(raised.value)


def test_a_damaged_bitmask_model_is_refused_in_one_line(tiny_model: Callable[..., nn.Module], tmp_path: Path) -> None:
    save_pruned(tmp_path / "out", tiny_model(), load_tokenizer("random"), {Q: mask()}, {}, to="bitmask")
    file = tmp_path / "out" / "model.bitmask.safetensors"
    with safe_open(file, "pt") as handle:
        metadata = dict(handle.metadata())
    tensors = load_file(file)
    for change, said in (
        ({f"{Q}.kept": torch.zeros(7)}, "keeps 1024 weights, and the file has"),
        ({f"{Q}.mask": torch.zeros(7, dtype=torch.uint8)}, r"\[128\] is needed"),
        ({"model.norm.weight": torch.zeros(3)}, "do not belong together"),
    ):
        save_file({**tensors, **change}, file, metadata)
        with pytest.raises(InputError, match=said) as raised:
            load_model(str(tmp_path / "out"))
        assert "\n" not in str(raised.value)
    save_file(tensors, file, {**metadata, "tied": '{"a": "nowhere"}'})
    with pytest.raises(InputError, match="is damaged"):
        load_model(str(tmp_path / "out"))
