"""Load and save models, masks and reports: the only file I/O of the library. Writes are atomic."""

from __future__ import annotations

import hashlib
import inspect
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from difflib import get_close_matches
from pathlib import Path
from pickle import UnpicklingError
from types import ModuleType
from typing import Any, Literal

import torch
from huggingface_hub.utils import logging as hub_logging
from safetensors import SafetensorError
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as transformers_logging

from lit_prune.errors import InputError, first_line
from lit_prune.models.bitmask import BITMASK_FILE, opened, read_bitmask, save_bitmask
from lit_prune.models.blocks import find_blocks
from lit_prune.models.configs import load_generation_config, read_config, save_configs
from lit_prune.models.experts import apart, together
from lit_prune.models.files import replacing_folder, save_tensors_in_order
from lit_prune.models.folders import check_folder, check_tokenizer_files
from lit_prune.models.homes import Home, home_of
from lit_prune.models.lazy import disk_of, open_lazily, save_lazily
from lit_prune.models.outputs import ANALYSIS, check_output, check_space
from lit_prune.models.weights import check_all_finite, check_complete, check_finite
from lit_prune.ops import PackedMask

Format = Literal["hf", "hf-sharded", "bitmask"]
"""How a model lies on disk: as transformers saves it, in files of a bounded size, or kept weights and one bit for
each."""
MASKS_FILE = "masks.safetensors"
REPORT_FILE = "pruning.json"
RANDOM = "random"
"""The ``pretrained`` that builds a model from a config, with random weights and a byte-level tokenizer."""
_MODEL_REMEDY = (
    "give a local folder, a .gguf file, or the name of a causal language model on a hub that this machine can reach"
)
_FORMAT = "lit-prune keep masks, one bit per weight, least significant bit first, row by row"


def load_model(
    pretrained: str,
    dtype: torch.dtype | None = None,
    config: Mapping[str, Any] | None = None,
    trust_remote_code: bool = False,
    lazy: str | Path | None = None,
) -> nn.Module:
    """Load a causal language model in evaluation mode.

    Args:
        pretrained: hub name, local Hugging Face folder, ``bitmask`` export, path of a GGUF file, or ``random``.
        dtype: of the weights; None = as stored.
        config: for ``random``: ``model_type`` and any value of that model's config.
        trust_remote_code: whether code that comes with the model may run.
        lazy: folder for blocks that have changed: the model stays on disk then, in safetensors files, and each block is
            read when it is worked on; None = the model is loaded whole.

    Raises:
        InputError: where there is no such model, or the hub cannot be reached.
    """
    if lazy is not None:
        with _explained(pretrained):
            return open_lazily(pretrained, lazy, dtype, trust_remote_code)
    if pretrained == RANDOM:
        return _random_model(config, dtype or torch.float32).eval()
    if (Path(pretrained).expanduser() / BITMASK_FILE).is_file():
        return _load_bitmask(Path(pretrained).expanduser(), dtype, trust_remote_code).eval()
    options: dict[str, Any] = {"dtype": dtype or "auto", "trust_remote_code": trust_remote_code}
    with _explained(pretrained):
        location, extra = _locate(pretrained)
        if not extra:
            read_config(location, pretrained, trust_remote_code)
        options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
        with quiet_transformers():  # which prints a table of what is told in one line below
            loaded: Any = AutoModelForCausalLM.from_pretrained(location, **extra, **options)
        model, found = loaded
        if getattr(model, "_hf_peft_config_loaded", False):
            raise InputError(f"model.pretrained is {pretrained!r}: it is an adapter; merge it into its model first")
        check_complete(found, pretrained)
        check_all_finite(model, f"model.pretrained is {pretrained!r}")
    if extra:  # transformers has dequantised the GGUF file: what it holds now is a plain float model
        vars(model.config).pop("quantization_config", None)
        model.hf_quantizer = None
    return model.eval()


def _load_bitmask(folder: Path, dtype: torch.dtype | None, trust_remote_code: bool) -> nn.Module:
    with _explained(str(folder)):
        check_folder(folder, str(folder))
        config = read_config(folder, str(folder), trust_remote_code, weights_per_byte=8)
        as_stored = dtype is None
        dtype = dtype or config.dtype
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
        load_generation_config(folder, model)
    weights = read_bitmask(folder)
    with apart(model) if not model.state_dict().keys() <= weights.keys() else nullcontext():
        try:
            # In the dtypes of the file, which may differ from tensor to tensor.
            model.load_state_dict(weights, assign=as_stored)
        except RuntimeError as error:
            raise InputError(
                f"model.pretrained is {str(folder)!r}: its {BITMASK_FILE} and its config.json do not belong together "
                f"({' '.join(str(error).split())[:300]})"
            ) from error
    model.tie_weights()
    check_all_finite(model, f"model.pretrained is {str(folder)!r}")
    return model


def hub_model(pretrained: str) -> str | None:
    """Return the name of a model on the hub, or None for one that is a file, a folder or random."""
    return None if pretrained == RANDOM or Path(pretrained).expanduser().exists() else pretrained


def load_tokenizer(pretrained: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load the tokenizer that belongs to ``pretrained`` (bytes for ``random``)."""
    if pretrained == RANDOM:
        return _byte_tokenizer()
    remedy = "copy the files of its tokenizer into the folder" if hub_model(pretrained) is None else _MODEL_REMEDY
    with _explained(pretrained, remedy):
        location, extra = _locate(pretrained)
        if not extra:
            check_tokenizer_files(Path(location))
        return AutoTokenizer.from_pretrained(location, **extra, trust_remote_code=trust_remote_code)


def _byte_tokenizer() -> PreTrainedTokenizerBase:
    """Return a tokenizer of the 256 bytes and an end-of-text token, for models with random weights."""
    vocabulary = {byte: index for index, byte in enumerate(sorted(ByteLevel.alphabet()))}
    tokenizer = Tokenizer(BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")


def _random_model(config: Mapping[str, Any] | None, dtype: torch.dtype) -> nn.Module:
    if not config or "model_type" not in config:
        raise InputError("model.pretrained is 'random': model.config must name a model_type, such as llama")
    values = dict(config)
    model_type = values.pop("model_type")
    values.setdefault("vocab_size", len(_byte_tokenizer()))
    try:
        made = AutoConfig.for_model(model_type, **values)
        _refuse_unknown(values, made)
        return AutoModelForCausalLM.from_config(made, dtype=dtype)
    except InputError:
        raise
    except Exception as error:  # each architecture finds out in its own way that its values do not fit
        raise InputError(
            f"model.config makes no causal language model ({' '.join(str(error).split())[:300]})"
        ) from error


def _refuse_unknown(values: Mapping[str, Any], made: PreTrainedConfig) -> None:
    """Raise ``InputError`` if a config was given a value under a name that is nearly one of its own.

    Others are let through: some models read values that their configs do not declare, such as Qwen3-MoE's ``head_dim``.
    """
    known = {*vars(type(made)()), *made.attribute_map, *inspect.signature(type(made)).parameters}
    for name in values.keys() - known:
        if near := get_close_matches(name, known, n=1, cutoff=0.85):
            raise InputError(f"model.config.{name} is no value of {type(made).__name__}; did you mean {near[0]}?")


def _locate(pretrained: str) -> tuple[str, dict[str, str]]:
    """Return what ``from_pretrained`` wants for a GGUF file, a folder or a hub name."""
    path = Path(pretrained).expanduser()
    if path.is_file():
        if path.suffix != ".gguf":
            raise InputError(
                f"model.pretrained is {pretrained!r}: a file must be a .gguf file; give the model's folder"
            )
        return str(path.parent), {"gguf_file": path.name}
    if path.is_dir():
        check_folder(path, pretrained)
        return str(path), {}
    if pretrained.startswith((".", "/", "~")) or pretrained.count("/") > 1:
        raise InputError(f"model.pretrained is {pretrained!r}: there is no such file or folder")
    return pretrained, {}


@contextmanager
def _explained(pretrained: str, remedy: str = _MODEL_REMEDY) -> Iterator[None]:
    """Turn what transformers raises for a model that it cannot load into one line, which ends with what to do."""
    try:
        with quiet_hub():
            yield
    except InputError:
        raise
    except ImportError as error:
        raise InputError(f"model.pretrained is {pretrained!r}: {first_line(error)}") from error
    except UnpicklingError as error:
        raise InputError(
            f"model.pretrained is {pretrained!r}: its weights hold more than tensors, so they may run code, and are "
            "not loaded; give a model in safetensors files"
        ) from error
    except Exception as error:  # transformers and tokenizers raise all kinds for a file that they cannot read
        raise InputError(
            f"model.pretrained is {pretrained!r}: it cannot be loaded ({first_line(error)}); {remedy}"
        ) from error


def quiet_hub() -> AbstractContextManager[None]:
    """Keep the hub client's retry messages off the screen; an error is raised all the same."""
    return _quiet(hub_logging)


def quiet_transformers() -> AbstractContextManager[None]:
    """Keep the warnings of transformers off the screen."""
    return _quiet(transformers_logging)


@contextmanager
def _quiet(logging: ModuleType) -> Iterator[None]:
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def disable_model_progress_bars() -> None:
    """Load and save models without a progress bar of transformers'."""
    transformers_logging.disable_progress_bar()


def save_pruned(
    folder: str | Path,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None,
    masks: Mapping[str, PackedMask],
    documents: Mapping[str, str | bytes],
    overwrite: bool = False,
    to: Format = "hf",
    shard_size: str = "1GB",
) -> Path:
    """Write a model, its masks and ``documents`` (file name to content) as one folder, all or nothing.

    Args:
        folder: Where.
        model: Whose pruned weights are exactly zero.
        tokenizer: Its tokenizer, if any.
        masks: Keep masks by parameter name.
        documents: Further files, by name.
        overwrite: Replace the folder where it exists.
        to: How the weights are laid down.
        shard_size: Largest file, for ``hf-sharded``.

    Raises:
        InputError: where the folder exists and ``overwrite`` is off, or the disk has no room.
        RuntimeError: where a weight that its mask prunes is not exactly zero.
    """
    if to == "bitmask" and disk_of(model):
        raise InputError("to is 'bitmask': a model that was opened lazily is written as hf-sharded, a file per block")
    with apart(model):
        check_masks_hold(model, masks)
    path = check_output(folder, overwrite)
    check_space(path, model)
    with replacing_folder(path) as temporary:
        _write_model(temporary, model, masks, to, shard_size)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        save_masks(temporary / MASKS_FILE, masks)
        _write_documents(temporary, documents)
    return path


def _write_model(folder: Path, model: Any, masks: Mapping[str, PackedMask], to: Format, shard_size: str) -> None:
    if disk := disk_of(model):
        save_lazily(folder, model, disk)
    elif to != "bitmask":
        with together(model):
            model.save_pretrained(folder, **({"max_shard_size": shard_size} if to == "hf-sharded" else {}))
    else:
        save_configs(folder, model)
        with apart(model):
            save_bitmask(folder / BITMASK_FILE, model, masks)


def save_documents(folder: str | Path, documents: Mapping[str, str | bytes], overwrite: bool = False) -> Path:
    """Write an analysis (name to content) as one folder, all or nothing; an older one is kept unless ``overwrite``."""
    path = check_output(folder, overwrite, ANALYSIS)
    with replacing_folder(path) as temporary:
        _write_documents(temporary, documents)
    return path


def _write_documents(folder: Path, documents: Mapping[str, str | bytes]) -> None:
    for name, content in documents.items():
        (folder / name).parent.mkdir(exist_ok=True)
        # A name that is quoted in it may have bytes that are no text.
        (folder / name).write_bytes(content.encode(errors="replace") if isinstance(content, str) else content)


def check_shard_size(size: str) -> None:
    """Raise ``InputError`` if ``size`` is no positive number of bytes with a unit, such as 500MB."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*[KMGT]B", size.strip(), re.IGNORECASE)
    if found is None or not float(found[1]):
        raise InputError(f"shard_size is {size!r}: give a positive number and KB, MB, GB or TB, such as 500MB")


def check_masks_hold(model: nn.Module, masks: Mapping[str, PackedMask]) -> None:
    """Raise ``RuntimeError`` that names the first parameter with a pruned weight that is not exactly zero.

    A mask of a parameter that the model does not have, or of another shape, is an ``InputError``.
    """
    home, parameters = home_of(model), dict(model.named_parameters())
    for name, mask in masks.items():
        if name not in parameters or tuple(parameters[name].shape) != mask.shape:
            raise InputError(f"the masks are of another model: it has no {name} of the shape {list(mask.shape)}")
    for block in find_blocks(model):
        with home.resident(block):
            for name, parameter in block.module.named_parameters(prefix=block.name):
                if name in masks:
                    _check_mask_holds(name, parameter.detach(), masks[name])


def _check_mask_holds(name: str, parameter: Tensor, mask: PackedMask) -> None:
    revived = int(parameter[~mask.unpack().to(parameter.device)].count_nonzero())
    if revived:
        raise RuntimeError(
            f"{name}: {revived} pruned weights are not zero, so this model is not as sparse as its masks"
        )


def save_masks(path: Path, masks: Mapping[str, PackedMask]) -> None:
    """Write keep masks by parameter name: uint8 bits, the shapes in the metadata."""
    shapes = {name: list(mask.shape) for name, mask in masks.items()}
    bits = {name: mask.bits.cpu().contiguous() for name, mask in masks.items()}
    metadata = {"format": _FORMAT, "shapes": json.dumps(shapes)}
    save_tensors_in_order(path, bits, metadata)


def load_masks(path: str | Path) -> dict[str, PackedMask]:
    """Read keep masks by parameter name; a pruned folder may be given for its ``masks.safetensors``."""
    with opened(path, MASKS_FILE, _FORMAT, "masks are") as (handle, metadata):
        try:
            shapes = {name: tuple(shape) for name, shape in json.loads(metadata["shapes"]).items()}
            if others := set(handle.keys()) - shapes.keys():
                raise InputError(f"{min(others)} has no shape")
            return {name: PackedMask(handle.get_tensor(name), shape) for name, shape in shapes.items()}
        except (InputError, AttributeError, KeyError, TypeError, ValueError, SafetensorError) as error:
            raise InputError(f"the masks of {str(path)!r} are damaged ({first_line(error)})") from error


def model_fingerprint(model: nn.Module, home: Home | None = None) -> str:
    """Return a digest of every parameter's name, shape, dtype and up to 4,096 of its values, evenly spread.

    All values are looked at: one that is NaN or infinite is an ``InputError``, wherever it is in the model.

    Args:
        model: the model.
        home: of its blocks; None = the model itself, or as it says.
    """
    home, samples = home or home_of(model), {}
    for part in home.parts(model):
        with home.resident(part):
            for name, parameter in part.module.named_parameters(prefix=part.name):
                samples[name] = _sample(name, parameter)
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        digest.update(samples.get(name) or _sample(name, parameter))
    return digest.hexdigest()[:16]


def _sample(name: str, parameter: Tensor) -> bytes:
    check_finite(name, parameter.detach(), "the model")
    flat = parameter.detach().reshape(-1)
    return flat[:: max(1, flat.numel() // 4096)].double().cpu().numpy().tobytes()


def data_fingerprint(batches: Sequence[Tensor | Mapping[str, Tensor]]) -> str:
    """Return a digest of the calibration set's tokens, in order."""
    digest = hashlib.sha256()
    for batch in batches:
        for name, tensor in sorted(batch.items()) if isinstance(batch, Mapping) else [("input_ids", batch)]:
            digest.update(f"{name} {tuple(tensor.shape)}".encode())
            digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
