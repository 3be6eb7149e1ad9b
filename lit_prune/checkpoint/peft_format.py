"""Plain adapters in the format of PEFT."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors.torch import save
from torch import nn

from lit_prune.errors import InputError
from lit_prune.models.lora import Adapted, adapted_layers, merged

FOLDER = "adapter"
_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[dict[str, str | bytes]]:
    """Merge masked adapters and remove plain ones within the context; yield the PEFT files of the plain adapters.

    The files are by name relative to the model folder; ``PeftModel.from_pretrained(model, "OUTPUT/adapter")`` of the
    package ``peft`` adds the adapters to the pruned model. All adapters must have the rank and scale of the first,
    which is always true for ``LoRA``.
    """
    files = _files({name: layer for name, layer in adapted_layers(model).items() if layer.keep is None})
    with merged(model):
        yield files


def has_adapters(folder: str | Path) -> bool:
    """Return whether plain adapters are stored with a saved model."""
    return (Path(folder).expanduser() / FOLDER).is_dir()


def adapter_files(folder: str | Path) -> dict[str, str | bytes]:
    """Return the files of plain adapters stored with a saved model, by name relative to its folder."""
    files = [Path(folder).expanduser() / FOLDER / name for name in (_CONFIG, _WEIGHTS)]
    for file in files:
        if file.is_symlink() or (file.exists() and not file.is_file()):
            raise InputError(f"{str(file)!r} is a link or a folder: adapters are plain files; copy it there")
    return {f"{FOLDER}/{file.name}": file.read_bytes() for file in files if file.exists()}


def _files(layers: Mapping[str, Adapted]) -> dict[str, str | bytes]:
    if not layers:
        return {}
    from peft import LoraConfig

    first = next(iter(layers.values()))
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=first.lora_rank,
        lora_alpha=first.lora_scale * first.lora_rank,  # type: ignore[arg-type]
        target_modules=list(layers),
        fan_in_fan_out=first.stored_transposed,
    )
    tensors = {}
    for name, layer in layers.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = layer.lora_a.detach().cpu().contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = layer.lora_b.detach().cpu().contiguous()
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        (file,) = Path(folder).iterdir()
        return {f"{FOLDER}/{file.name}": file.read_text(), f"{FOLDER}/{_WEIGHTS}": save(tensors)}
