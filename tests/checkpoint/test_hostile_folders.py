"""What lies in a model's folder is checked: nothing random, foreign or damaged goes through."""

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from safetensors.torch import save_file as save_any
from torch import Tensor, nn

from lit_prune.checkpoint import folders
from lit_prune.checkpoint.masks import load_masks
from lit_prune.checkpoint.peft_format import adapter_files
from lit_prune.checkpoint.save import save_pruned
from lit_prune.errors import InputError
from lit_prune.models.load import load_model
from lit_prune.models.tokenizer import load_tokenizer
from lit_prune.ops import PackedMask

Q = "model.layers.1.self_attn.q_proj.weight"


def save_file(tensors: dict[str, Tensor], file: Path, metadata: dict[str, str] | None = None) -> None:
    try:
        save_any(tensors, file, metadata)
    except KeyError:
        pytest.skip("this version of safetensors stores no complex numbers")


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


def cut_the_generation_config(folder: Path) -> None:
    (folder / "generation_config.json").write_text('{"a')


def link_far_inside(folder: Path) -> None:
    (folder / "deep" / "deeper").mkdir(parents=True)
    (folder / "deep" / "deeper" / "x").symlink_to("/etc/passwd")


def link_to_nothing(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("nothing")


def ask_for_a_huge_vocabulary(folder: Path) -> None:
    change_config(folder, vocab_size=10**10)


def ask_for_huge_layers(folder: Path) -> None:
    change_config(folder, intermediate_size=10**11)


def ask_for_many_layers(folder: Path) -> None:
    change_config(folder, num_hidden_layers=10**9)


def ask_for_huge_heads(folder: Path) -> None:
    change_config(folder, head_dim=10**9)


def give_a_value_of_another_type(folder: Path) -> None:
    change_config(folder, rms_norm_eps="small")


def store_integers(folder: Path) -> None:
    change_weights(folder, lambda weights: weights.update({Q: weights[Q].to(torch.int8)}))


def store_bools(folder: Path) -> None:
    change_weights(folder, lambda weights: weights.update({"model.norm.weight": torch.ones(32, dtype=torch.bool)}))


def store_complex_numbers(folder: Path) -> None:
    change_weights(folder, lambda weights: weights.update({"lm_head.weight": weights["lm_head.weight"] + 0j}))


def name_no_weights(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text('{"weight_map": ["a"]}')


def become_an_adapter(folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "x"}')


def spoil_a_norm(folder: Path) -> None:
    change_weights(folder, lambda weights: weights["model.norm.weight"][:1].fill_(float("nan")))


def spoil_the_head(folder: Path) -> None:
    change_weights(folder, lambda weights: weights["lm_head.weight"].fill_(float("inf")))


def spoil_a_target(folder: Path) -> None:
    change_weights(folder, lambda weights: weights[Q].fill_(float("-inf")))


DAMAGES = {
    lose_a_weight: r"lacks model\.layers\.1\.self_attn\.q_proj\.weight, so it would be random",
    gain_a_weight: "holds extra, which a model of its config does not have",
    take_another_shape: r"holds model\.layers\.0\.mlp\.down_proj\.weight \[32, 48\], and not \[32, 40\] and 8 more",
    take_another_type: "lacks",
    become_an_encoder_decoder: "t5 is an encoder and a decoder",
    cut_the_config: "config.json",
    list_the_config: r"config\.json' holds a JSON list: an object is needed",
    cut_the_weights: "cannot be loaded",
    lose_the_weights: "model.safetensors",
    link_the_weights: r"elsewhere\.safetensors'.*is outside of the folder",
    link_the_adapter: r"secret'.*is outside of the folder",
    index_weights_elsewhere: r"'\.\./elsewhere\.safetensors'.*is outside of the folder",
    cut_the_generation_config: r"generation_config\.json' cannot be read as JSON",
    link_far_inside: r"passwd'.*is outside of the folder",
    link_to_nothing: r"the link 'model\.safetensors' leads to .* which is not there",
    ask_for_a_huge_vocabulary: r"config\.json' has vocab_size 10,000,000,000, for which the weights .* are too few",
    ask_for_huge_layers: r"has intermediate_size 100,000,000,000, for which",
    ask_for_many_layers: r"has num_hidden_layers 1,000,000,000, for which",
    ask_for_huge_heads: r"has head_dim 1,000,000,000, for which",
    give_a_value_of_another_type: r"Field 'rms_norm_eps' expected float, got str .*; correct it",
    store_integers: r"model\.safetensors' holds model\.layers\.1\.self_attn\.q_proj\.weight as I8: a weight must",
    store_bools: r"model\.safetensors' holds model\.norm\.weight as BOOL",
    store_complex_numbers: r"model\.safetensors' holds lm_head\.weight as C64",
    name_no_weights: r"model\.safetensors\.index\.json' has no weight_map",
    become_an_adapter: "it is an adapter and no model",
    spoil_a_norm: r"model\.norm\.weight holds NaN or Inf in 1 of 32 places",
    spoil_the_head: r"lm_head\.weight holds NaN or Inf",
    spoil_a_target: r"model\.layers\.1\.self_attn\.q_proj\.weight holds NaN or Inf",
}


@pytest.mark.parametrize(("damage", "said"), DAMAGES.items(), ids=lambda x: getattr(x, "__name__", ""))
def test_a_damaged_model_is_refused_in_one_line(damage: Callable[[Path], None], said: str, folder: Path) -> None:
    load_model(str(folder))
    damage(folder)
    with pytest.raises(InputError, match=said) as raised:
        load_model(str(folder))
    assert str(folder) in str(raised.value) and "\n" not in str(raised.value)


LAZILY = {
    **DAMAGES,
    lose_a_weight: r"no file has 'model\.layers\.1\.self_attn\.q_proj\.weight'",
    take_another_type: "no file has",
    cut_the_weights: "cannot be read as safetensors",
    lose_the_weights: "neither model.safetensors nor",
}


@pytest.mark.parametrize(("damage", "said"), LAZILY.items(), ids=lambda x: getattr(x, "__name__", ""))
def test_a_damaged_model_is_not_opened_lazily(
    damage: Callable[[Path], None], said: str, folder: Path, tokens: list[Tensor], tmp_path: Path
) -> None:
    damage(folder)
    with pytest.raises(InputError, match=said) as raised:  # weights within blocks are read when they are needed
        load_model(str(folder), lazy=tmp_path / "changes")(input_ids=tokens[0])
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("lazy", [False, True])
def test_a_shard_that_is_damaged_or_lost_is_named(
    lazy: bool, tiny_model: Callable[..., nn.Module], tmp_path: Path
) -> None:
    tiny_model().save_pretrained(tmp_path / "model", max_shard_size="20KB")  # type: ignore[operator]
    shard = min((tmp_path / "model").glob("model-*"))
    options = {"lazy": tmp_path / "changes"} if lazy else {}
    content = shard.read_bytes()
    for damage in (content[:-8], b"", None):
        shard.unlink()
        if damage is not None:
            shard.write_bytes(damage)
        with pytest.raises(InputError, match=str(tmp_path / "model")):
            load_model(str(tmp_path / "model"), **options)
        shard.write_bytes(content)
    load_model(str(tmp_path / "model"), **options)


def place_elsewhere(index: dict[str, str], folder: Path) -> None:
    index[Q] = index["model.norm.weight"]


def leave_out(index: dict[str, str], folder: Path) -> None:
    del index[Q]


def list_another(index: dict[str, str], folder: Path) -> None:
    index["another"] = index[Q]


def store_twice(index: dict[str, str], folder: Path) -> None:
    file = folder / index["model.norm.weight"]
    save_file({**load_file(file), Q: torch.ones(32, 32)}, file, {"format": "pt"})


INDICES = {
    place_elsewhere: rf"lacks {Q}, which is there according to model\.safetensors\.index\.json",
    leave_out: rf"model-\d+-of-\d+\.safetensors' holds {Q}, which model\.safetensors\.index\.json does not list",
    list_another: "lacks another, which is there according to",
    store_twice: rf"holds {Q}, which model\.safetensors\.index\.json places in 'model-\d+-of-",
}


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize(("change", "said"), INDICES.items(), ids=lambda x: getattr(x, "__name__", ""))
def test_an_index_that_differs_from_its_shards_is_refused(
    change: Callable[[dict[str, str], Path], None],
    said: str,
    lazy: bool,
    tiny_model: Callable[..., nn.Module],
    tmp_path: Path,
) -> None:
    tiny_model().save_pretrained(tmp_path / "model", max_shard_size="20KB")  # type: ignore[operator]
    index = tmp_path / "model" / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    change(content["weight_map"], tmp_path / "model")
    index.write_text(json.dumps(content))
    with pytest.raises(InputError, match=said):
        load_model(str(tmp_path / "model"), **({"lazy": tmp_path / "changes"} if lazy else {}))


def test_buffers_may_be_of_other_dtypes(tiny_model: Callable[..., nn.Module], tmp_path: Path) -> None:
    tiny_model("gpt2").save_pretrained(tmp_path)  # type: ignore[operator]
    mask = torch.ones(1, 1, 64, 64, dtype=torch.bool).tril()  # which older versions of transformers saved
    change_weights(tmp_path, lambda weights: weights.update({"transformer.h.0.attn.bias": mask}))
    load_model(str(tmp_path))


def test_a_config_with_an_invalid_value_is_not_blamed_on_the_tokenizer(folder: Path) -> None:
    give_a_value_of_another_type(folder)
    with pytest.raises(InputError, match=r"Field 'rms_norm_eps' expected float, got str .*; correct it") as raised:
        load_tokenizer(str(folder))
    assert "tokenizer" not in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", ['{"a', "[]", "\udcff"])
def test_a_damaged_tokenizer_is_named(name: str, content: str, folder: Path) -> None:
    (folder / name).write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(InputError, match=f"{name}' (cannot be read as JSON|holds a JSON list)"):
        load_tokenizer(str(folder))


def test_masks_that_lie_elsewhere_are_not_read(folder: Path) -> None:
    (folder / "masks.safetensors").rename(folder.parent / "other")
    (folder / "masks.safetensors").symlink_to(folder.parent / "other")
    with pytest.raises(InputError, match="outside of the folder"):
        load_masks(folder)
    assert load_masks(folder.parent / "other").keys() == {Q}  # which the user has named


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_file_that_may_not_be_read_is_named(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if os.geteuid():
        (folder / name).chmod(0)
    else:  # root reads everything
        monkeypatch.setattr(folders, "_check_readable", refusing(folder / name, folders._check_readable))
    with pytest.raises(InputError, match=rf"{name}' cannot be read \(Permission denied\): ask its owner"):
        load_model(str(folder))


def refusing(refused: Path, check: Callable[[Path], None]) -> Callable[[Path], None]:
    def refuse(file: Path) -> None:
        if file == refused:
            folders._cannot_be_read(PermissionError(errno.EACCES, "Permission denied", str(file)))
        check(file)

    return refuse


def test_the_links_of_the_hubs_cache_are_followed(folder: Path, tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "123", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    folder.rename(blobs)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(Path("../../blobs") / file.name)
    load_model(str(snapshot))
    load_tokenizer(str(snapshot))


def test_a_tokenizer_of_the_hub_opens_no_file_of_this_machine(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / "hub" / "models--a--b"
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text("123")
    (model / "snapshots").mkdir()
    folder.rename(model / "snapshots" / "123")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert load_tokenizer("a/b")("word")["input_ids"]
    file, secret = model / "snapshots" / "123" / "tokenizer_config.json", tmp_path / "secret"
    secret.write_text("secret")
    file.write_text(json.dumps({**json.loads(file.read_text()), "vocab_file": str(secret)}))
    with pytest.raises(InputError, match=r"secret', which tokenizer_config\.json names, is outside of the folder"):
        load_tokenizer("a/b")


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
    {"shapes": "{}"},
]


@pytest.mark.parametrize("damage", MASKS, ids=str)
def test_damaged_masks_are_refused_in_one_line(damage: dict[str, object], folder: Path) -> None:
    rewrite_masks(folder, **damage)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"the masks of .* are damaged") as raised:
        load_masks(folder)
    assert "\n" not in str(raised.value)


KEPT, NORM = f"{Q}.kept", "model.norm.weight"
BITMASKS = {
    "too few kept": ({KEPT: torch.zeros(7)}, {}, "keeps 1024 weights, and the file has"),
    "too few bits": ({f"{Q}.mask": torch.zeros(7, dtype=torch.uint8)}, {}, r"\[128\] is needed"),
    "no kept": ({KEPT: None}, {}, f"lacks {KEPT}"),
    "no mask": ({f"{Q}.mask": None}, {}, rf"lacks {Q}\.mask"),
    "integers": ({KEPT: torch.zeros(1024, dtype=torch.int8)}, {}, rf"holds {KEPT} as torch\.int8: it must be float32"),
    "float8": ({KEPT: torch.zeros(1024).to(torch.float8_e4m3fn)}, {}, rf"holds {KEPT} as torch\.float8_e4m3fn"),
    "complex": ({KEPT: torch.zeros(1024, dtype=torch.complex64)}, {}, rf"holds {KEPT} as torch\.complex64"),
    "kept in float64": (
        {KEPT: torch.zeros(1024).double()},
        {},
        rf"holds {Q} as torch\.float64: it must be torch\.float32",
    ),
    "norm in float64": (
        {NORM: torch.zeros(32).double()},
        {},
        rf"holds {NORM} as torch\.float64: it must be torch\.float32",
    ),
    "norm of integers": (
        {NORM: torch.zeros(32).int()},
        {},
        rf"holds {NORM} as torch\.int32: it must be torch\.float32",
    ),
    "also dense": ({Q: torch.zeros(32, 32)}, {}, f"holds {Q} both with a mask and without one"),
    "another shape": ({NORM: torch.zeros(3)}, {}, "do not belong together"),
    "NaN": ({NORM: torch.full((32,), float("nan"))}, {}, f"{NORM} holds NaN or Inf"),
    "tied to nothing": ({}, {"tied": '{"a": "nowhere"}'}, "lacks nowhere, to which another tensor is tied"),
    "dense and tied": ({}, {"tied": json.dumps({NORM: Q})}, f"holds {NORM}, which is tied to another tensor"),
    "masked and tied": ({}, {"tied": json.dumps({Q: NORM})}, f"holds {Q}, which is tied to another tensor"),
    "deep": ({}, {"shapes": "[" * 100_000}, "is damaged"),
    "no shapes": ({}, {"shapes": None}, "'shapes' is missing"),
}


@pytest.mark.parametrize(("tensors", "metadata", "said"), BITMASKS.values(), ids=BITMASKS)
def test_a_damaged_bitmask_model_is_refused_in_one_line(
    tensors: dict[str, Tensor | None],
    metadata: dict[str, str | None],
    said: str,
    tiny_model: Callable[..., nn.Module],
    tmp_path: Path,
) -> None:
    save_pruned(tmp_path / "out", tiny_model(), load_tokenizer("random"), {Q: mask()}, {}, to="bitmask")
    file = tmp_path / "out" / "model.bitmask.safetensors"
    with safe_open(file, "pt") as handle:
        described = {**handle.metadata(), **metadata}
    stored = {name: tensor.clone() for name, tensor in load_file(file).items()}  # load_file may map the file
    stored = {name: tensor for name, tensor in {**stored, **tensors}.items() if tensor is not None}
    save_file(stored, file, {name: value for name, value in described.items() if value is not None})
    with pytest.raises(InputError, match=said) as raised:
        load_model(str(tmp_path / "out"))
    assert str(tmp_path / "out") in str(raised.value) and "\n" not in str(raised.value)
