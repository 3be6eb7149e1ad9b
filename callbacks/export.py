"""Save the trained, pruned model as a Hugging Face folder."""

from __future__ import annotations

from lightning.pytorch import Callback, LightningModule, Trainer

from lit_prune.callbacks.prune import find_prune
from lit_prune.errors import InputError
from lit_prune.models.access import whole_model
from lit_prune.models.io import check_output, save_pruned
from lit_prune.pruning.documents import render


class Export(Callback):
    """Writes the folder that ``AutoModelForCausalLM.from_pretrained`` opens when training ends.

    The masks are verified first: a pruned weight that came back is an error, and nothing is written.

    .. code-block:: yaml

        trainer: {callbacks: [{class_path: Export, init_args: {output: sparse-model}}]}
    """

    def __init__(self, output: str, overwrite: bool = False) -> None:
        """Keep the arguments.

        Args:
            output: Folder to write.
            overwrite: Replace the folder where it exists.
        """
        self.output = output
        self.overwrite = overwrite

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a folder that cannot be written before any training is done."""
        if stage == "fit":
            find_prune(trainer)
            check_output(self.output, self.overwrite)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save."""
        prune = find_prune(trainer)
        if prune.report is None:
            raise InputError("nothing was pruned in this run, so there is no report to export")
        model = pl_module.get_submodule("model")
        with whole_model(model) as whole:
            if str(trainer.precision).endswith("-true"):
                whole.to(next(model.parameters()).dtype)  # and not that of the float32 masters
            if trainer.is_global_zero:
                save_pruned(
                    self.output,
                    whole,
                    pl_module.load_tokenizer(),  # type: ignore[operator]
                    prune.report.masks,
                    render(prune.report, title=str(pl_module.pretrained)),
                    self.overwrite,
                )
        trainer.strategy.barrier("export")
