"""Model families of transformers, each from a small config: replayed, pruned, saved, reopened; three are trained first.

How a model was trained changes nothing of how its family is taken apart, so what pruning costs in perplexity is shown
for three: with plain linear layers, with Conv1D, and with experts.
"""

from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

from lit_prune.calibration.replay import BlockReplay
from lit_prune.checkpoint.save import save_pruned
from lit_prune.models.blocks import find_blocks
from lit_prune.models.load import load_model
from lit_prune.ops import LayerStats, Unstructured
from lit_prune.pruning import PruningPlan, PruningReport, prune
from lit_prune.scorers import Wanda
from lit_prune.scorers.base import Scorer
from lit_prune.training.losses import next_token_loss
from lit_prune.training.text_sources import EMBEDDED, read_documents
from support.rounding import distance, network

_COMMON = {
    "vocab_size": 256,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_GROUPED = {**_COMMON, "intermediate_size": 128, "num_key_value_heads": 2}
_HEADS = {**_GROUPED, "head_dim": 16}
FAMILIES: dict[str, dict[str, object]] = {
    "llama": _GROUPED,
    "mistral": {**_HEADS, "sliding_window": 16},
    "qwen2": _GROUPED,
    "qwen3": _HEADS,
    "gemma2": {**_HEADS, "sliding_window": 16, "query_pre_attn_scalar": 16},
    "gemma3_text": {**_HEADS, "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]},
    "phi3": _GROUPED,
    "opt": {**_COMMON, "ffn_dim": 128, "word_embed_proj_dim": 64},
    "gpt2": {"vocab_size": 256, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "gpt_neox": {**_COMMON, "intermediate_size": 128},
    "bloom": {"vocab_size": 256, "hidden_size": 64, "n_layer": 2, "n_head": 4},
    "falcon": {**_COMMON, "num_kv_heads": 2, "new_decoder_architecture": True},
    "stablelm": _GROUPED,
    "granite": _GROUPED,
    "olmo2": _GROUPED,
    "mixtral": {**_GROUPED, "num_local_experts": 4},
    "qwen3_moe": {**_HEADS, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64},
}
_TOKENS, _STEPS = 64, 150


class Random(Scorer):
    """Any weight matters as much as any other."""

    needs: ClassVar[frozenset[str]] = frozenset()

    def score(self, weight: Tensor, stats: LayerStats) -> Tensor:
        """Return random numbers."""
        return torch.rand(weight.shape, generator=torch.Generator().manual_seed(weight.numel()))


def windows(split: str, count: int) -> Tensor:
    """Return ``count`` windows of the embedded text's bytes, ``[count, tokens]``."""
    text = "\n\n".join(read_documents(EMBEDDED, split, "text", 0)).encode()  # type: ignore[arg-type]
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    starts = torch.randint(len(data) - _TOKENS, (count,), generator=torch.Generator().manual_seed(0))
    return torch.stack([data[start : start + _TOKENS] for start in starts.tolist()])


def trained(model_type: str) -> nn.Module:
    torch.manual_seed(0)
    model = load_model("random", config={"model_type": model_type, **FAMILIES[model_type]})
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    batches = windows("train", _STEPS * 16).split(16)
    for batch in batches:
        next_token_loss(model(input_ids=batch).logits, batch).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@torch.no_grad()
def perplexity(model: nn.Module) -> float:
    batch = windows("test", 32)
    return next_token_loss(model(input_ids=batch).logits, batch).exp().item()


def pruned(model: nn.Module, scorer: Scorer) -> PruningReport:
    report = prune(model, list(windows("train", 16).split(8)), PruningPlan(Unstructured(0.5, "row"), scorer))
    assert report.sparsity == 0.5
    return report


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "mixtral"])
def test_a_trained_model_is_pruned_better_than_at_random(model_type: str) -> None:
    model = trained(model_type)
    dense = {name: value.clone() for name, value in model.state_dict().items()}
    before, after = perplexity(model), {}
    for scorer in (Random(), Wanda()):
        model.load_state_dict(dense)
        pruned(model, scorer)
        after[type(scorer).__name__] = perplexity(model)
    print(f"{model_type}: {before:.2f} dense, {after['Wanda']:.2f} Wanda, {after['Random']:.2f} at random")
    assert before < 20  # of 256 bytes: it has learnt something that can be lost
    assert before < after["Wanda"] < after["Random"]


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_family_is_replayed_pruned_better_than_at_random_and_reopened(model_type: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = load_model("random", config={"model_type": model_type, **FAMILIES[model_type]}).eval()
    check_replay(model)
    dense = {name: value.clone() for name, value in model.state_dict().items()}
    at_random = pruned(model, Random())
    model.load_state_dict(dense)
    report = pruned(model, Wanda())
    for ours, theirs in zip(report.layers, at_random.layers, strict=True):
        assert ours.output_error is not None and theirs.output_error is not None
        assert ours.output_error < theirs.output_error, ours.name
    again = load_model(str(save_pruned(tmp_path / "out", model, None, report.masks, {})))
    batch = windows("test", 2)
    assert torch.equal(again(input_ids=batch).logits, model(input_ids=batch).logits)


@torch.no_grad()
def check_replay(model: nn.Module) -> None:
    """Check that a block's outputs in a replay are those in a pass through the whole model."""
    blocks, batch = find_blocks(model), windows("train", 4)
    whole: list[Tensor] = []
    handles = [
        block.module.register_forward_hook(lambda _, __, out: whole.append(out if isinstance(out, Tensor) else out[0]))
        for block in blocks
    ]
    model(input_ids=batch)
    for handle in handles:
        handle.remove()
    replay = BlockReplay(model, blocks, [batch])
    for block, expected in zip(blocks, whole, strict=True):
        (found,) = replay.outputs(block.index)
        assert distance(found, expected) <= network(model), block.name
        replay.advance(block.index)
