import copy
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, T5Config

from lit_prune.checkpoint import files, outputs
from lit_prune.checkpoint.fingerprints import model_fingerprint
from lit_prune.checkpoint.masks import load_masks
from lit_prune.checkpoint.save import save_pruned
from lit_prune.errors import DiskError, InputError
from lit_prune.models.load import load_model
from lit_prune.models.tokenizer import load_tokenizer
from lit_prune.ops import PackedMask


def mask_of(model: nn.Module, name: str) -> dict[str, PackedMask]:
    keep = torch.rand(model.get_parameter(name).shape) < 0.5
    with torch.no_grad():
        model.get_parameter(name).masked_fill_(~keep, 0.0)
    return {name: PackedMask.pack(keep)}


UP = "model.layers.0.mlp.up_proj.weight"


def test_a_saved_folder_holds_model_tokenizer_masks_and_documents(
    tmp_path: Path, tiny_model: Callable[..., nn.Module]
) -> None:
    model = tiny_model()
    masks = mask_of(model, UP)
    out = save_pruned(tmp_path / "out", model, load_tokenizer("random"), masks, {"a.json": "{}", "b.png": b"\x89"})
    assert (out / "a.json").read_text() == "{}"
    assert (out / "b.png").read_bytes() == b"\x89"
    loaded = AutoModelForCausalLM.from_pretrained(out)
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())
    assert torch.equal(load_masks(out)[UP].unpack(), masks[UP].unpack())
    assert load_tokenizer(str(out))("hi")["input_ids"] == load_tokenizer("random")("hi")["input_ids"]
    assert os.listdir(tmp_path) == ["out"]


def test_a_revived_weight_is_not_saved(tmp_path: Path, tiny_model: Callable[..., nn.Module]) -> None:
    model = tiny_model()
    masks = mask_of(model, UP)
    pruned = (~masks[UP].unpack()).nonzero()[0]
    model.get_parameter(UP).data[tuple(pruned)] = 1e-9
    with pytest.raises(RuntimeError, match=rf"{UP}: 1 pruned weights are not zero"):
        save_pruned(tmp_path / "out", model, None, masks, {})
    assert not (tmp_path / "out").exists()


def test_an_existing_folder_is_kept_unless_overwritten(tmp_path: Path, tiny_model: Callable[..., nn.Module]) -> None:
    out = tmp_path / "out"
    save_pruned(out, tiny_model(), None, {}, {"pruning.json": "old"})
    with pytest.raises(InputError, match="it exists and is kept"):
        save_pruned(out, tiny_model(), None, {}, {"pruning.json": "new"})
    assert (out / "pruning.json").read_text() == "old"
    save_pruned(out, tiny_model(), None, {}, {"README.md": "new"}, overwrite=True)
    assert (out / "README.md").read_text() == "new" and not (out / "pruning.json").exists()
    assert os.listdir(tmp_path) == ["out"]


def test_what_is_no_model_folder_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match=r"holds no config\.json, so it is not overwritten"):
        outputs.check_output(tmp_path, overwrite=True)


def test_a_full_disk_is_told_before(
    tmp_path: Path, tiny_model: Callable[..., nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outputs.shutil, "disk_usage", lambda path: type("usage", (), {"free": 1000}))
    with pytest.raises(InputError, match=r"it needs 0\.00 GB, and 0\.00 GB are free"):
        outputs.check_space(tmp_path / "out", tiny_model())


def test_a_failure_while_saving_leaves_nothing(tmp_path: Path) -> None:
    with (
        pytest.raises(DiskError, match="out' cannot be written: full"),
        files.replacing_folder(tmp_path / "out") as folder,
    ):
        (folder / "half").write_text("half")
        raise OSError("full")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("existing", [False, True])
def test_a_kill_while_saving_leaves_the_old_folder_or_none(tmp_path: Path, existing: bool) -> None:
    out = tmp_path / "out"
    if existing:
        out.mkdir()
        (out / "config.json").write_text("old")
    program = f"""
        import time
        from pathlib import Path
        from lit_prune.checkpoint.files import replacing_folder
        with replacing_folder(Path({str(out)!r})) as folder:
            (folder / "config.json").write_text("half")
            Path({str(tmp_path / "writing")!r}).touch()
            time.sleep(60)
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(program)])
    while not (tmp_path / "writing").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (out / "config.json").read_text() == "old" if existing else not out.exists()
    with files.replacing_folder(out) as folder:  # the next run clears what the killed one left
        (folder / "config.json").write_text("new")
    (tmp_path / "writing").unlink()
    assert os.listdir(tmp_path) == ["out"]
    assert (out / "config.json").read_text() == "new"


def test_a_folder_without_a_tokenizer_says_what_to_do(tmp_path: Path, tiny_model: Callable[..., nn.Module]) -> None:
    tiny_model().save_pretrained(tmp_path)  # type: ignore[operator]
    with pytest.raises(InputError, match=r"cannot be loaded \(the folder has none\); copy the files of its tokenizer"):
        load_tokenizer(str(tmp_path))


def test_an_encoder_and_decoder_is_no_causal_language_model(tmp_path: Path) -> None:
    T5Config(vocab_size=300, d_model=16, d_kv=4, d_ff=32, num_layers=1, num_heads=2).save_pretrained(tmp_path)
    with pytest.raises(
        InputError, match=r"t5 is an encoder and a decoder; give .* the name of a causal language model"
    ):
        load_model(str(tmp_path))


@pytest.mark.parametrize(
    ("pretrained", "message"),
    [
        ("{tmp}", "the folder has no config.json"),
        ("{tmp}/none", "there is no such file or folder"),
        ("{tmp}/weights.bin", r"a file must be a \.gguf file"),
        ("{tmp}/broken", "cannot be loaded"),
        ("{tmp}/broken.gguf", "cannot be loaded|GGUF"),
        ("nobody/no-such-model", "couldn't connect.*give a local folder"),
    ],
)
def test_what_is_no_model_is_refused_in_one_line(pretrained: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "weights.bin").touch()
    (tmp_path / "broken.gguf").touch()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{}")
    with pytest.raises(InputError, match=message) as error:
        load_model(pretrained.format(tmp=tmp_path))
    assert "\n" not in str(error.value)


def test_random_needs_a_model_type() -> None:
    with pytest.raises(InputError, match="must name a model_type"):
        load_model("random")
    with pytest.raises(InputError, match="lama"):
        load_model("random", config={"model_type": "lama"})


@pytest.mark.parametrize(
    ("model_type", "values", "said"),
    [
        ("llama", {"num_hidden_layers": -1}, r"model\.config\.num_hidden_layers is -1: it must be at least 1"),
        ("llama", {"num_hidden_layers": 10**9}, r"num_hidden_layers is 1,000,000,000: it must be from 1 to 10,000"),
        ("gpt2", {"n_layer": 10**9}, r"model\.config\.n_layer is 1,000,000,000: it must be from 1 to 10,000"),
        ("gpt2", {"n_embd": 0}, r"model\.config\.n_embd is 0: it must be at least 1"),
        ("llama", {"head_dim": 10**9}, r"makes a model of 4,\d{3} GB, and .* GB of memory are free: lower its sizes"),
        ("llama", {"vocab_size": 10**12}, r"makes a model of 2\d\d,\d{3} GB, and"),
        ("gpt2", {"n_positions": 10**11}, r"makes a model of 12,\d{3} GB, and"),
        ("llama", {"num_key_value_heads": 3}, "num_key_value_heads is 3: it must divide num_attention_heads, 4"),
    ],
    ids=str,
)
def test_a_random_model_of_invalid_sizes_is_refused(
    model_type: str, values: dict[str, int], said: str, tiny_model: Callable[..., nn.Module]
) -> None:
    with pytest.raises(InputError, match=said) as raised:
        tiny_model(model_type, **values)
    assert "\n" not in str(raised.value)


def test_masks_are_asked_of_the_right_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no such file"):
        load_masks(tmp_path)
    files.save_tensors(tmp_path / "other.safetensors", {"x": torch.zeros(1)})
    with pytest.raises(InputError, match="holds none"):
        load_masks(tmp_path / "other.safetensors")
    (tmp_path / "text").write_text("not safetensors at all")
    with pytest.raises(InputError, match="not a safetensors file"):
        load_masks(tmp_path / "text")


def test_a_fingerprint_tells_models_apart(tiny_model: Callable[..., nn.Module]) -> None:
    assert model_fingerprint(tiny_model(seed=0)) == model_fingerprint(tiny_model(seed=0))
    assert model_fingerprint(tiny_model(seed=0)) != model_fingerprint(tiny_model(seed=1))
    # Every single weight and buffer counts, and so does the config, whose rotary base is in no weight.
    dense = model_fingerprint(tiny_model())
    changed, buffered, rotary = tiny_model(), tiny_model(), tiny_model(rope_parameters={"rope_theta": 5e4})
    with torch.no_grad():
        changed.get_parameter(UP)[-1, -2] *= 2
    buffered.register_buffer("bias", torch.ones(1))
    other = copy.deepcopy(buffered)
    other.get_buffer("bias").mul_(2)
    found = [model_fingerprint(model) for model in (changed, buffered, other, rotary)]
    assert len({dense, *found}) == 5


def test_json_is_read_as_written(tmp_path: Path) -> None:
    files.write_json(tmp_path / "deep" / "a.json", {"x": [1, None]})
    assert files.read_json(tmp_path / "deep" / "a.json") == {"x": [1, None]}
    assert json.loads((tmp_path / "deep" / "a.json").read_text()) == {"x": [1, None]}


def test_equal_masks_are_equal_files(tmp_path: Path) -> None:
    """Also of several processes: safetensors orders metadata by a hash that is seeded anew in each."""
    program = """
import sys, torch
from pathlib import Path
from lit_prune.checkpoint.masks import save_masks
from lit_prune.ops import PackedMask
masks = {name: PackedMask.pack(torch.arange(12).reshape(3, 4) % 5 > 1) for name in ("b.weight", "a.weight")}
for number in range(8):
    save_masks(Path(sys.argv[1]) / f"{number}.safetensors", masks)
"""
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True)
    files = list(tmp_path.iterdir())
    assert len(files) == 8 and len({file.read_bytes() for file in files}) == 1
    masks = load_masks(files[0])
    assert torch.equal(masks["a.weight"].unpack(), torch.arange(12).reshape(3, 4) % 5 > 1)
