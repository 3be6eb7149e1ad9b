"""Build a smaller model of the same family from the units that a pruned model keeps."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, cast

import torch
from accelerate import init_empty_weights
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn

from lit_prune.calibration.replay import evaluation_mode
from lit_prune.errors import InputError, first_line
from lit_prune.models.blocks import find_blocks
from lit_prune.models.coupling import Kept
from lit_prune.models.experts import Experts, apart, put_together, take_apart
from lit_prune.models.widths import narrow, set_widths, widths_of
from lit_prune.sharding.parameters import read_weight, to_parameter_layout

_WIDTHS = re.compile(r"intermediate|inner|ffn")
"""Values of a config that are widths of MLPs."""
_COUNTS = re.compile(r"heads?(_kv)?$")
"""Values of a config that are numbers of heads."""
_DEPTHS = re.compile(r"layer")
"""Values of a config that are the number of blocks."""
_CHECKED = 64
"""Number of tokens on which the smaller model is compared with the masked one."""
Shapes = Mapping[str, tuple[int, ...]]
Mismatch = tuple[tuple[int, ...], tuple[int, ...]]


@torch.no_grad()
def shrink(
    model: nn.Module, kept: Mapping[str, Kept], removed_blocks: Collection[int] = (), uneven: bool = False
) -> nn.Module:
    """Return a smaller model with the units that a masked model keeps, which computes the same to rounding.

    Args:
        model: a causal language model of transformers, in which removed units have no effect; not modified.
        kept: what each of its layers keeps, by name; other layers keep everything.
        removed_blocks: indices of the decoder blocks to leave out.
        uneven: whether layers may have other widths than the family's config can express; see ``models/widths.py``.

    Raises:
        InputError: if the config of the model's family has no values for these sizes, or if the smaller model does not
            compute the same as the masked one.
    """
    with apart(model):
        small = _empty(model, smaller_config(model, kept, removed_blocks, uneven))
        values = {name: value.clone() for name, value in _kept_values(model, kept, removed_blocks)}
        small.load_state_dict(values, strict=False, assign=True)
        small.tie_weights()
        small.generation_config = copy.deepcopy(model.generation_config)
        put_together(small, next(model.parameters()).device)
    small.to(next(model.parameters()).device)
    with evaluation_mode(model):  # at the end of a training, dropout would be active
        _check_equal(model, small)
    return small.requires_grad_()


def smaller_config(
    model: nn.Module, kept: Mapping[str, Kept], removed_blocks: Collection[int] = (), uneven: bool = False
) -> Any:
    """Return the config of a smaller model of the same family; raise ``InputError`` if it has no values for the sizes.

    Args:
        model: the model, with its experts apart.
        kept: as for ``shrink``.
        removed_blocks: as for ``shrink``.
        uneven: as for ``shrink``.
    """
    twin = _empty(model, model.config)
    parameters = {name for name, _ in twin.named_parameters()}
    values = _kept_values(twin, kept, removed_blocks)
    shapes = {name: tuple(value.shape) for name, value in values if name in parameters}
    base: Any = copy.deepcopy(model.config)
    renamed = _renumbering(model, removed_blocks)
    widths = {new: shape for name, shape in widths_of(base).items() if (new := renamed(name)) is not None}
    if removed_blocks:
        base = _with_fewer_blocks(base, len(find_blocks(model)), removed_blocks)
    if widths:
        set_widths(base, widths)
    best, missing = base, _mismatches(model, base, shapes)
    if missing is None:
        raise InputError(
            f"the config of {base.model_type} does not describe a model without {len(removed_blocks)} blocks"
        )
    while missing:
        for change in _changes(best, missing):
            trial = copy.deepcopy(best)
            for name, value in change.items():
                setattr(trial.get_text_config(), name, value)
            left = _mismatches(model, trial, shapes)
            if left is not None and len(left) < len(missing):
                best, missing = trial, left
                break
        else:
            layers = {name.rpartition(".")[0] for name in missing}
            experts = [name for name, module in twin.named_modules() if isinstance(module, Experts)]
            fused = tuple(f"{renamed(name)}." for name in experts)
            narrowed = {new: _narrowed(twin, name, kept[name]) for name in sorted(kept) if (new := renamed(name))}
            possible = layers <= narrowed.keys() and not any(name.startswith(fused) for name in layers)
            if possible and (uneven or widths):
                set_widths(base, widths | narrowed)
                return base
            name, (found, needed) = next(iter(missing.items()))
            raise InputError(
                f"the config of {base.model_type} cannot express {name} of the shape {list(needed)} in place of "
                f"{list(found)}: this size is tied to others, such as the size of heads to their number; "
                "remove other units (plan.pattern.units)"
            )
    return best


def _changes(config: Any, missing: Mapping[str, Mismatch]) -> Iterator[dict[str, Any]]:
    """Yield changes of a config that may give parameters other shapes: one width, or all numbers of heads."""
    text = config.get_text_config()
    values = {name: value for name, value in text.to_dict().items() if not name.startswith("_")}
    sizes = {(old, new) for found, needed in missing.values() for old, new in zip(found, needed, strict=True)}
    for old, new in sorted(sizes):
        if old == new:
            continue
        yield from ({name: new} for name, value in values.items() if _WIDTHS.search(name) and value in (old, None))
        fewer = {
            name: count * new // old
            for name, count in values.items()
            if _COUNTS.search(name) and type(count) is int and count * new % old == 0
        }
        if fewer and not isinstance(getattr(type(text), "head_dim", None), property):
            yield {**fewer, "head_dim": getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads}


def _narrowed(model: nn.Module, name: str, kept: Kept) -> tuple[int, int]:
    outputs, inputs = read_weight(model.get_submodule(name)).shape
    return kept.shape_of((outputs, inputs))


def _with_fewer_blocks(config: Any, blocks: int, removed: Collection[int]) -> Any:
    text = config.get_text_config()
    for name, value in text.to_dict().items():
        if _DEPTHS.search(name) and type(value) is int and value == blocks:
            setattr(text, name, blocks - len(removed))
        elif isinstance(value, list) and len(value) == blocks:
            setattr(text, name, [item for index, item in enumerate(value) if index not in removed])
    return config


def _mismatches(like: nn.Module, config: Any, shapes: Shapes) -> dict[str, Mismatch] | None:
    """Return the parameters of a config whose shapes are not the given ones, by name: the shape, and the given one.

    None if the family refuses the config, as it does some numbers of heads, or if it has other parameters.
    """
    try:
        type(config).from_dict(config.to_dict())  # checks the values together, as when a folder is opened
        found = {name: tuple(value.shape) for name, value in _empty(like, config).named_parameters()}
    except (ValueError, StrictDataclassError):
        return None
    if found.keys() != shapes.keys():
        return None
    return {name: (found[name], shapes[name]) for name in found if found[name] != shapes[name]}


def _empty(like: nn.Module, config: Any) -> Any:
    """Return a model of a config with its experts apart, whose parameters are on the meta device."""
    kind: Any = type(like)
    with init_empty_weights(include_buffers=False):
        model = kind(copy.deepcopy(config))
        take_apart(model)
        narrow(model, widths_of(config))
    model.tie_weights()  # so far, each tied name has a parameter of its own
    return model.eval()


def _renumbering(model: nn.Module, removed_blocks: Collection[int]) -> Callable[[str], str | None]:
    """Return a function from names in the model to those in the smaller one; None = in a block that is removed."""
    blocks = find_blocks(model)
    left = [block for block in blocks if block.index not in removed_blocks]
    parent = f"{blocks[0].name.rpartition('.')[0]}."
    names = {f"{block.name}.": f"{parent}{index}." for index, block in enumerate(left)}

    def renamed(name: str) -> str | None:
        if not name.startswith(parent):
            return name
        before = name[: name.index(".", len(parent)) + 1]
        return names[before] + name.removeprefix(before) if before in names else None

    return renamed


def _kept_values(
    model: nn.Module, kept: Mapping[str, Kept], removed_blocks: Collection[int]
) -> Iterator[tuple[str, Tensor]]:
    """Yield the names and values of the parameters and persistent buffers of the smaller model."""
    renamed = _renumbering(model, removed_blocks)
    for name, value in model.state_dict().items():
        layer, _, own = name.rpartition(".")
        place = renamed(name)
        if place is None:
            continue
        if layer not in kept:
            yield place, value
        elif own == "weight":
            module = model.get_submodule(layer)
            yield place, to_parameter_layout(module, kept[layer].of(to_parameter_layout(module, value)))
        else:
            rows = kept[layer].rows
            yield place, value if rows is None else value[rows.to(value.device)]


def _check_equal(model: nn.Module, small: nn.Module) -> None:
    """Raise ``InputError`` if the smaller model does not compute the logits of the masked one to rounding."""
    device = next(model.parameters()).device
    vocabulary = cast(int, cast(Any, model).config.get_text_config().vocab_size)
    ids = torch.arange(_CHECKED, device=device).mul(37).remainder(vocabulary).reshape(2, -1)
    before = model(input_ids=ids, use_cache=False).logits.float()
    try:
        after = small(input_ids=ids, use_cache=False).logits.float()
    except (RuntimeError, ValueError) as failure:
        raise InputError(
            f"the smaller model does not run ({first_line(failure)}): use other units (plan.pattern.units), or other "
            "widths (plan.pattern.round_to, such as 8)"
        ) from failure
    rounding = torch.finfo(next(model.parameters()).dtype).eps ** 0.5
    error = ((after - before).square().mean() / before.var()).sqrt().item()
    if not error <= rounding:
        raise InputError(
            f"the smaller model differs from the one with removed units at zero by {error:.2g} of its logits' spread: "
            f"{type(model).__name__} does not allow these units to be removed; use others (plan.pattern.units)"
        )
