"""Imported once by the server that test processes are forked from: work that each of them would do again."""

import io
import json
import tempfile
from contextlib import redirect_stdout, suppress

import torch

import support.docstrings
import support.figures
import support.samples
import support.tokens  # noqa: F401
from lit_prune.allocators import AlphaPruning
from lit_prune.cli import build
from lit_prune.models.load import load_model
from lit_prune.models.tokenizer import load_tokenizer
from lit_prune.ops import Unstructured
from lit_prune.pruning import PruningPlan, prune
from lit_prune.scorers import Wanda
from lit_prune.training import TextDataModule
from support.training import SMALLER

_PRUNE = {"class_path": "Prune", "init_args": {"plan": {"pattern": {"class_path": "Unstructured"}}}}
_COMMANDS = (
    ["prune", "--model.pretrained", "random", "--plan", "admm", "--plan.allocator", "AlphaPruning"],
    ["fit", "-c", "recipes/gradual"],
    ["fit", "-c", "recipes/recover", "-c", "strategies/zero3"],
    ["fit", "--trainer.callbacks", json.dumps([_PRUNE])],
    ["prune", "--trainer.callbacks", json.dumps([_PRUNE])],
)


def _parse_docstrings() -> None:
    for command in _COMMANDS:
        with redirect_stdout(io.StringIO()), suppress(SystemExit):
            build([*command, "--print_config"])  # main would also set what a process inherits, such as malloc


def _tokenise_and_draw() -> None:
    model = load_model("random", config=SMALLER)
    data = TextDataModule("random", dataset="embedded", sequences=1, seqlen=16)
    data.val_dataloader(), data.test_dataloader()
    plan = PruningPlan(Unstructured(0.5), Wanda(), AlphaPruning())
    with tempfile.TemporaryDirectory() as folder:
        prune(model, data.calibration_batches(), plan).save(f"{folder}/out", model, load_tokenizer("random"))


_parse_docstrings()
threads = torch.get_num_threads()
torch.set_num_threads(1)  # a forked process would wait for ever for threads that the server has started
_tokenise_and_draw()
torch.set_num_threads(threads)
torch.compile(_tokenise_and_draw)  # as modules of DeepSpeed do: it compiles nothing yet, but imports for two seconds
