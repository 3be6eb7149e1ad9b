"""Export a training checkpoint or a pruned folder as a folder to distribute."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, cast

from lit_prune.checkpoint.masks import masks_of
from lit_prune.checkpoint.outputs import check_output
from lit_prune.checkpoint.peft_format import adapter_files, without_adapters
from lit_prune.checkpoint.save import Format, check_shard_size, save_pruned
from lit_prune.checkpoint.training_checkpoints import by_layer, read_checkpoint
from lit_prune.commands.output import check_sparse, refuse_lazy, show
from lit_prune.errors import InputError, first_line
from lit_prune.models.weights import check_all_finite
from lit_prune.pruning import PruningReport
from lit_prune.reporting.documents import read_report, render
from lit_prune.runtime.packed_model import Bits, HeadBits, packed_parts, unpack_model
from lit_prune.training import LitCausalLM, TextDataModule

if TYPE_CHECKING:
    from lit_prune.trainer import PruningTrainer


def export(
    trainer: PruningTrainer,
    model: LitCausalLM,
    datamodule: TextDataModule,
    checkpoint: str | None = None,
    output: str = "exported",
    to: Format = "hf",
    shard_size: str = "1GB",
    bits: Bits | None = None,
    head_bits: HeadBits | None = None,
    overwrite: bool = False,
    trust: bool = False,
) -> None:
    """Converts a training checkpoint or a pruned folder to a folder for publication, and verifies the masks.

    Args:
        trainer: Trainer, whose strategy is not used.
        model: The language model that was trained, for architecture, dtype and tokenizer; or a pruned folder.
        datamodule: Not used.
        checkpoint: Checkpoint file, or the folder of a sharded checkpoint (FSDP2, DeepSpeed); null = export the
            model as stored in its folder.
        output: Folder to write.
        to: Format: as saved by transformers (hf), in files of limited size (hf-sharded), or the kept weights and one
            bit per weight: bitmask (lossless; lit_prune.load_model reads it) or packed (computes without being
            unpacked, and faster; transformers opens it after import lit_prune).
        shard_size: Maximum file size for hf-sharded, such as 1GB.
        bits: Bits per kept weight for packed: 16, 8 or 4, rounded to nearest; null = those that plan.quantize rounded
            to, which loses nothing, else 16.
        head_bits: Bits per weight of embedding and head for packed; null = 16 for 16 bits, else 8.
        overwrite: Replace the folder if it exists.
        trust: Load the checkpoint even if it holds more than tensors and plain data, which may run code.
    """
    refuse_lazy(model, "export")
    check_shard_size(shard_size)
    if to != "packed" and (bits or head_bits):
        raise InputError(f"bits and head_bits are for --to packed, and to is {to!r}: leave them out")
    check_output(output, overwrite, reads=[model.pretrained, *([checkpoint] if checkpoint else [])])
    read = None if checkpoint is None else read_checkpoint(checkpoint, trust)
    masks = read.masks if read else masks_of(model.pretrained)
    if read:
        kept = read.callbacks.get("Prune", {}).get("report")
        report = PruningReport.from_dict(kept, by_layer(masks), f"the report in {checkpoint!r}") if kept else None
    else:
        report = read_report(model.pretrained, masks)
    quantised = cast(Bits | None, report.bits) if report and not read else None
    model.configure_model()
    if packed_parts(model.model):
        if read:
            raise InputError(f"model.pretrained is {model.pretrained!r}: it is packed; name the model that was trained")
        unpack_model(model.model)
    if read:
        try:
            model.model.load_state_dict(read.weights)
        except RuntimeError as error:
            raise InputError(
                f"checkpoint is {checkpoint!r}: it is not of the model {model.pretrained!r} ({first_line(error)})"
            ) from error
        check_all_finite(model.model, f"checkpoint is {checkpoint!r}")
    check_sparse(model.model, masks, checkpoint or model.pretrained)
    with without_adapters(model.model) as trained:
        adapters = trained if read else adapter_files(model.pretrained)
        title = Path(model.pretrained).name
        documents = adapters | (render(report, title, to, adapters=bool(adapters)) if report else {})
        tokenizer = model.load_tokenizer()
        whole = model.model
        if report and report.kept:
            whole, masks = (report.smaller(whole) if read else whole), {}
        if to == "bitmask" and not masks:
            raise InputError("to is 'bitmask': a model that became smaller has no zeros to leave out; make it hf")
        folder = save_pruned(
            output, whole, tokenizer, masks, documents, overwrite, to, shard_size, bits or quantised or 16, head_bits
        )
    show(trainer, [], folder)
