"""Mistakes on the command line: each is one line that names the option or file, and nothing is written."""

import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from torch.multiprocessing.spawn import ProcessExitedException

from lit_prune import cli
from lit_prune.cli import main
from lit_prune.cli_errors import explain

PLAN_OF_ALL = {
    "pattern": {"class_path": "Unstructured", "init_args": {"sparsity": 0.5}},
    "scorer": {"class_path": "Magnitude"},
    "output_error": False,
}
CONFIG = {
    "model": {
        "pretrained": "random",
        "config": {
            "model_type": "llama",
            "hidden_size": 8,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
        },
    },
    "data": {"dataset": "embedded", "sequences": 2, "seqlen": 8, "max_windows": 2},
    "trainer": {"accelerator": "cpu", "logger": False, "enable_checkpointing": False},
}
FILES: dict[str, bytes] = {
    "binary.yaml": bytes(range(256)),
    "list.yaml": b"- 1\n- 2\n",
    "text.yaml": b"just words\n",
    "tabs.yaml": b"data:\n\tseqlen: 8\n",
    "twice.yaml": b"data: {dataset: embedded}\nmodel: {pretrained: random}\ndata: {dataset: embedded}\n",
    "unknown_empty.yaml": b"modle:\n",
    "unknown.yaml": b"modle: {pretrained: random}\n",
    "python.yaml": b"data: !!python/object/apply:os.system ['true']\n",
    "unclosed.yaml": b"data: {seqlen: 8\n",
    "nul.yaml": b"data: {dataset: \0}\n",
    "short.txt": b"short",
    "empty.txt": b"",
    "latin1.txt": ("Äpfel und Birnen. " * 50).encode("latin-1"),
    "utf16.txt": ("apples and pears. " * 50).encode("utf-16"),
    "null.jsonl": b'{"text": null}\n' * 20,
    "numbers.jsonl": b'{"text": 3}\n' * 20,
    "column.jsonl": b'{"words": "some words"}\n' * 20,
    "cut.parquet": b"PAR1\0\0",
    "empty.gguf": b"",
    "older.json": b"{}",
    "older.html": b"<p>",
    ".taken.journal": b"",
}
"""Files that are bad in one way each."""

# A number may be read as an int or a float: typing keeps the order of a union in which it was first seen.

SPEED = "--model.pretrained {at}/pruned --model.config null --tokens 1"
FIT = "fit --trainer.max_steps 1"
# {at} is the folder of those files, and of the pruned model "pruned". The second string is in the line that is said.
ARGUMENTS = [
    ("", 'expected "subcommand" to be one of'),
    ("prine", "did you mean prune?"),
    ("prune --data.nope 3", "unrecognized arguments: --data.nope 3"),
    ("prune --data.seqlenn 3", "unrecognized arguments: --data.seqlenn 3; did you mean --data.seqlen?"),
    ("prune extra", "unrecognized arguments: extra"),
    ("prune --overwrite maybe", "overwrite: Expected a <class 'bool'>. Got value: maybe"),
    ("prune --resume maybe", "Expected a typing.Literal['auto', 'never']"),
    ("prune --debugg", "unrecognized arguments: --debugg; did you mean --debug?"),
    ("prune --seed_everything -1", "--seed_everything is -1: it must be from 0 to 4,294,967,295"),
    ("prune --seed_everything 99999999999999999999", "--seed_everything is 99999999999999999999: it must be"),
    ("prune --seed_everything banana", "seed_everything: Expected a <class 'bool'>"),
    ("prune -c {at}/missing.yaml", "missing.yaml': there is no such file, and no configuration of that name"),
    (f"prune -c {'x' * 300}", "there is no such file, and no configuration of that name"),
    (f"prune --plan {'x' * 5000}", "there is no such file, and no configuration of that name"),
    ("prune -c {at}", "there is no such file, and no configuration of that name"),
    ("prune -c {at}/binary.yaml", "binary.yaml' is not text in UTF-8 (invalid start byte at byte 128): give a YAML"),
    ("prune -c {at}/latin1.txt", "latin1.txt' is not text in UTF-8"),
    ("prune -c {at}/list.yaml", "Unexpected config: - 1"),
    ("prune -c {at}/text.yaml", "Unexpected config: just words"),
    ("prune -c {at}/tabs.yaml", "Problems parsing config: while scanning for the next token"),
    ("prune -c {at}/twice.yaml", "Problems parsing config: the key 'data' appears twice"),
    ("prune -c {at}/unknown_empty.yaml", "Unexpected config: modle:"),
    ("prune -c {at}/unknown.yaml", "Subcommand 'prune' does not accept option 'modle.pretrained'"),
    ("prune -c {at}/python.yaml", "Problems parsing config: could not determine a constructor for"),
    ("prune -c {at}/unclosed.yaml", "Problems parsing config: while parsing a flow mapping"),
    ("prune -c {at}/nul.yaml", "Problems parsing config: unacceptable character #x0000: special"),
    ("prune -c", "-c has no value: give one after it"),
    ("prune --data '{{seqlen: 8, seqlen: 16}}'", "data: Unable to load config '{seqlen: 8, seqlen: 16}'"),
    ("prune --trainer.max_steps many", "trainer.max_steps: Expected a <class 'int'>. Got value: many"),
    ("prune --data.seqlen 1e400", "data.seqlen: Expected a <class 'int'>. Got value: inf"),
    ("prune --data.seqlen '[8]'", "data.seqlen: Expected a <class 'int'>. Got value: [8]"),
    ("prune --model.dtype float8", "model.dtype: Expected a typing.Literal['auto', 'float32',"),
    ("prune --model null", "model: Unable to load config"),
    ("prune --trainer banana", "trainer: Unable to load config"),
    ("prune --prompts '[\"\"]'", "prompts hold '': give each some words, or --prompts '[]' for"),
    ("prune --prompts ''", "prompts hold '': give each some words"),
    (
        "prune --tasks arc_eazy",
        "tasks name 'arc_eazy', which lm-evaluation-harness does not define: did you mean arc_easy",
    ),
    ("prune --harness.limit 0", "harness.limit is 0: it must be 1 or more, or null"),
    ("analyze --sparsities '[2]'", "sparsities is 2.0: it must be a number in [0, 1), such as 0.5"),
    ("analyze --sparsities '[]'", "sparsities are empty: give at least one, such as [0.5]"),
    ("analyze --histograms '[\"*.nothing\"]'", "histograms: '*.nothing' matches no layer; their names are like"),
    (
        "speed --model.pretrained {at}/pruned --model.config null --tokens '[0]'",
        "tokens are [0]: give numbers from 1 to 1,000,000, such as [1,",
    ),
    (
        "speed --model.pretrained {at}/pruned --model.config null --tokens '[-3]'",
        "tokens are [-3]: give numbers from 1 to 1,000,000, such as [1,",
    ),
    (
        "speed --model.pretrained {at}/pruned --model.config null --tokens '[]'",
        "tokens are []: give numbers from 1 to 1,000,000, such as [1,",
    ),
    ("speed", "masks are asked of 'random': there is no such file; name a"),
    ("evaluate --tasks '[]'", "tasks are empty: name some, such as --tasks '[arc_easy, piqa]'"),
    ("evaluate", "the following arguments are required: evaluate.tasks"),
]
PLAN = [
    (
        "pattern: {class_path: Unstructured, init_args: {sparsity: 1.2}}",
        "sparsity is 1.2: it must be a number in [0, 1), such as 0.5 for",
    ),
    (
        "pattern: {class_path: Unstructured, init_args: {sparsity: .nan}}",
        "sparsity is nan: it must be a number in [0, 1), such as 0.5 for",
    ),
    ("pattern: {class_path: Unstructured}", "trainer.callbacks: Prune: plan.pattern: Unstructured: the"),
    ("pattern: 2:4", "trainer.callbacks: Prune: plan.pattern: Not a valid subclass of"),
    ("pattern: {class_path: NM, init_args: {keep: 2, of: 3}}", "2:3 needs inputs divisible by 3, and"),
    ("scorer: {class_path: Wandah}", "trainer.callbacks: Prune: plan.scorer: there is no class"),
    ("scorer: {class_path: no.such.Module}", "trainer.callbacks: Prune: plan.scorer: no.such.Module: No"),
    ("scorer: banana", "trainer.callbacks: Prune: plan.scorer: there is no class 'banana'; use"),
    ("cache: '{at}/short.txt'", "plan.cache is '"),
    ("scorrer: null", "trainer.callbacks: Prune: Group 'plan' does not accept option"),
    ("solver: {class_path: ADMM, init_args: {iterations: 0}}", "iterations is 0: it must be at least 1, such as 12"),
    ("include: '*.nothing'", "plan.include"),
    ("correction: 2", "plan.correction is 2.0: it must be in [0, 1], such as 0.3"),
    ("device: cuda", "plan.device is 'cuda', which cannot be used here ("),
    ("device: cuda:99", "plan.device is 'cuda:99', which cannot be used here ("),
    ("hidden_device: cuda", "plan.hidden_device is 'cuda', which cannot be used here ("),
    ("propagate: sideways", "trainer.callbacks: Prune: plan.propagate: Expected a"),
    (
        "reconstruction: {class_path: Reconstruction, init_args: {rate: .nan}}",
        "reconstruction rate is nan: it must be a number above 0, such",
    ),
    (
        "allocator: {class_path: FromFile, init_args: {path: nowhere.json}}",
        "allocator.path is 'nowhere.json': there is no such file",
    ),
    ("allocator: {class_path: AlphaPruning, init_args: {metric: beta}}", "trainer.callbacks: Prune: plan.allocator:"),
]
DATA = [
    ("prune --data.dataset nowhere.txt", "data.dataset: the text is 'nowhere.txt': there is no such file"),
    (
        "prune --plan wanda --trainer.callbacks null --data.calibration nowhere.txt",
        "data.calibration: the text is 'nowhere.txt': there is no such file",
    ),
    ("prune --data.dataset {at}", "a folder: name one of its files"),
    ("prune --data.dataset {at}/list.yaml", ": it must end in .txt, .raw, .md, .jsonl, .parquet"),
    ("prune --data.dataset {at}/short.txt", "tokens, fewer than one sequence of 8: give a longer text"),
    ("prune --data.dataset {at}/empty.txt", "empty.txt' is empty: give a file that holds text"),
    ("prune --data.dataset {at}/latin1.txt", "is not UTF-8 (byte 0xC4 at 0): convert it"),
    ("prune --data.dataset {at}/utf16.txt", "is not UTF-8 (byte 0xFF at 0): convert it"),
    ("prune --data.dataset {at}/null.jsonl", "null.jsonl' has None in column 'text', which is not text"),
    ("prune --data.dataset {at}/numbers.jsonl", "numbers.jsonl' has 3 in column 'text', which is not text"),
    ("prune --data.dataset {at}/cut.parquet", "cannot be read (Parquet file size is 6 bytes, smaller than the"),
    ("prune --data.dataset {at}/column.jsonl", "has no column 'text', only ['words']: name one with"),
    ("prune --data.dataset ''", "data.dataset is '': name a text source"),
    ("prune --data.dataset :x", "data.dataset is ':x': name a text source"),
    ("prune --data.seqlen 1", "data.seqlen is 1: it must be at least 2, so that there is a"),
    ("prune --data.sequences 0", "data.sequences is 0: it must be from 1 to"),
    (
        "prune --data.sequences 1000000000 --data.seqlen 100",
        "data.sequences is 1000000000 and data.seqlen 100: their 800 GB",
    ),
    ("prune --data.batch_size -1", "data.batch_size is -1: it must be from 1 to"),
    ("prune --data.num_workers -1", "data.num_workers is -1: it must be from 0 to 512"),
    ("prune --data.seed -1", "data.seed is -1: it must be from 0 to 2^63 - 1"),
    ("prune --data.documents short", "data.documents: Expected a typing.Literal['joined', 'long']."),
    ("prune --data.tokenizer nowhere/at/all", "data.tokenizer is 'nowhere/at/all': there is no such file or"),
    ("validate --data.other_val nothing.txt", "data.other_val: the text is 'nothing.txt': there is no"),
    ("validate --data.other_val '[a.txt, b/a.txt]'", "data.other_val is ['a.txt', 'b/a.txt']: two texts have one"),
    (
        "prune --model.config '{{model_type: gpt2, n_embd: 8, n_layer: 1, n_head: 2, n_positions: 4}}'",
        "data.seqlen is 8, and the model has learned 4 positions: lower",
    ),
    ("prune --output a/b/c --model.config.vocab_size 100", "the text has the token 198, and the model a vocabulary of"),
    ("prune --model.config.vocab_size 100", "the text has the token 198, and the model a vocabulary of 100:"),
]
MODEL = [
    ("prune --model.pretrained nowhere/at/all", "model.pretrained is 'nowhere/at/all': there is no such file or"),
    (f"prune --model.pretrained {'x' * 300}", "which cannot be a name: give a local folder"),
    ("prune --model.pretrained ~nobody-of-this-name/model", "which cannot be a name: give a local folder"),
    ("prune --model.pretrained {at}/short.txt", ": a file must be a .gguf file; give the model's folder"),
    ("prune --model.config null", "model.pretrained is 'random': model.config must name a"),
    ("prune --model.config.model_type banana", "model.config makes no causal language model (Unrecognized model"),
    ("prune --model.config.hidden_size many", "model.config makes no causal language model ("),
    ("prune --model.config.hidden_size -8", "model.config.hidden_size is -8: it must be at least 1"),
    ("prune --model.config.num_hidden_layers 0", "model.config.num_hidden_layers is 0: it must be at least 1"),
    ("prune --model.lazy {at}/lazy", "model.pretrained is 'random': model.lazy opens folders with"),
    (
        "export --model.pretrained {at}/pruned --model.config null --to hf-sharded --shard_size banana",
        "shard_size is 'banana': give a positive number and KB, MB, GB",
    ),
    (
        "export --model.pretrained {at}/pruned --model.config null --to hf-sharded --shard_size=-5MB",
        "shard_size is '-5MB': give a positive number and KB, MB, GB or",
    ),
    ("export --checkpoint {at}/short.txt", ": short.txt holds more than tensors and plain data, or is"),
    ("prune --output {at}/taken", ".taken.journal' is a file or a link: the journal of this run needs a folder there"),
    (f"speed {SPEED} --output {{at}}/pruned/config.json", "pruned', which this run reads; choose another file"),
    (f"speed {SPEED} --output {{at}}/older.json", "it exists and is kept; choose another file or add --overwrite"),
    (f"speed {SPEED} --output ''", "output is empty"),
    (f"speed {SPEED} --output times.txt", "name a file that ends in .json"),
    (f"speed {SPEED} --output {{at}}/folder.json", "it is a folder; name a file"),
    ("evaluate --tasks x --output {at}/older.json", "it exists and is kept; choose another file or add --overwrite"),
    ("compare {at}/pruned --output {at}/older.html", "it exists and is kept; choose another file or add --overwrite"),
]
TRAINING = [
    ("prune --trainer.accelerator foo", "You selected an invalid accelerator name: `accelerator='foo'`."),
    ("prune --trainer.strategy foo", "You selected an invalid strategy name: `strategy='foo'`. It"),
    ("prune --trainer.strategy deepspeed", "trainer.strategy is DeepSpeedStrategy: to prune once, use ddp,"),
    ("prune --trainer.strategy lit_prune.training.strategies.FSDP3", "You selected an invalid strategy name:"),
    ("prune --trainer.devices 0", "`Trainer(devices='0')` value is not a valid input using cpu"),
    ("prune --trainer.devices banana", "`devices` selected with `CPUAccelerator` should be an int > 0."),
    ("prune --trainer.num_nodes 0", "`num_nodes` must be a positive integer, but got 0."),
    ("prune --trainer.precision fp7", "trainer.precision: give one of 64, 32, 16, 'transformer-engine'"),
    (
        "prune --trainer.logger TensorBoardLoger",
        "trainer.logger: there is no class 'TensorBoardLoger'; use the name of a known class",
    ),
    (
        "fit --trainer.callbacks KeepMasks --trainer.callbacks.KeepMasks.masks nowhere",
        "masks are asked of 'nowhere': there is no such file",
    ),
    (
        "fit --trainer.callbacks KeepMasks --trainer.callbacks.KeepMasks.masks '[a'",
        "--trainer.callbacks.KeepMasks.masks cannot be '[a' (while parsing a flow sequence)",
    ),
    (
        "fit --trainer.callbacks KeepMasks --trainer.callbacks.KeepMasks.masks zeros "
        "--trainer.callbacks.KeepMasks.masks.x 3",
        "--trainer.callbacks.KeepMasks.masks.x cannot be '3'",
    ),
    ("prune --trainer.callbacks Banana", "trainer.callbacks: there is no class 'Banana'; use the name of"),
    (
        "prune --trainer.callbacks '[{{class_path: Prune, init_args: {{plan: {{scorer: {{class_path: Wandah}}}}}}}}]'",
        "trainer.callbacks: Prune: plan.scorer: there is no class 'Wandah'; use",
    ),
    (
        "prune --trainer.callbacks '[{{class_path: KeepMasks, init_args: {{maks: 3}}}}]'",
        "trainer.callbacks: KeepMasks: Option 'maks' is not accepted",
    ),
    (
        "prune --trainer.callbacks '[{{class_path: EarlyStopping, init_args: {{monitor: x, patience: many}}}}]'",
        "EarlyStopping: patience: Expected a <class 'int'>. Got value: many",
    ),
    (
        "fit --trainer.max_steps 1 --model.lr_scheduler torch.optim.lr_scheduler.StepLR"
        " --model.lr_scheduler.step_size 0",
        "model.lr_scheduler cannot be used (integer modulo by zero)",
    ),
    ("fit --trainer.max_steps 1 --trainer.min_steps -7", "trainer.min_steps is -7: it must be 0"),
    (
        "fit --trainer.max_steps 1 --trainer.logger true --trainer.default_root_dir {at}/short.txt/x",
        "short.txt/x', which is not writable: name another folder",
    ),
    ("prune --trainer.callbacks '[]'", "trainer.callbacks has 0 Prune callbacks: exactly one is needed"),
    ("prune --trainer.profiler banana", "When passing string value for the `profiler` parameter of"),
    ("prune --trainer.limit_test_batches 1.5", "You have passed invalid value 1.5 for limit_test_batches, it"),
    ("prune --trainer.limit_test_batches banana", "trainer.limit_test_batches: Expected a <class "),
    (
        "fit --trainer.max_steps 1 --trainer.accumulate_grad_batches -1",
        "trainer.accumulate_grad_batches is -1: it must be 1",
    ),
    ("fit --trainer.max_steps 1 --trainer.val_check_interval 0", "trainer.val_check_interval is 0"),
    (
        "fit --trainer.max_steps 1 --trainer.val_check_interval -1",
        "You have passed invalid value -1",
    ),
    ("fit --trainer.max_steps 1 --trainer.log_every_n_steps -1", "trainer.log_every_n_steps is -1: it must be 0"),
    (
        "fit --trainer.max_steps 1 --trainer.limit_train_batches -1",
        "You have passed invalid value -1",
    ),
    ("fit --trainer.max_steps 1 --trainer.gradient_clip_val -1", "trainer.gradient_clip_val is -1"),
    (
        "fit --trainer.max_steps 1 --trainer.overfit_batches -1",
        "You have passed invalid value -1",
    ),
    ("fit --trainer.max_steps 1 --ckpt_path best", '`.fit(ckpt_path="best")` is set but `ModelCheckpoint` is not'),
    (f"{FIT} --ckpt_path {{at}}/empty.ckpt", "it is not one of Lightning ('pytorch-lightning_version' is missing)"),
    (f"{FIT} --ckpt_path {{at}}/list.ckpt", "it is not one of Lightning (it holds a list)"),
    (f"{FIT} --ckpt_path {{at}}/names.ckpt", "it is not one of Lightning (it holds a list)"),
    (f"{FIT} --ckpt_path {{at}}/pruned/model.safetensors", "model.safetensors'"),
    (f"{FIT} --ckpt_path {'x' * 300}", "it cannot be read ([Errno 36] File name too long"),
    (f"{FIT} --ckpt_path ''", "ckpt_path is empty: name a checkpoint"),
    (f"{FIT} --ckpt_path s3://x/y.ckpt", "ckpt_path is 's3://x/y.ckpt': only a local file or folder can be checked"),
    ("validate --ckpt_path last", "ckpt_path is 'last', and no ModelCheckpoint has one: name the file or folder"),
    ("validate --model.config.rms_norm_eps .nan", "val/loss is NaN: the model, its configuration or its precision"),
    (f"{FIT} --model.trainable LoRA --model.trainable.include null", "LoRA.include or exclude is null: give shell"),
    (f"{FIT} --model.optimizer SparseAdam", "model.optimizer cannot be used (SparseAdam does not support dense"),
    (
        f"{FIT} --model.optimizer AdamW --model.optimizer.foreach true --model.optimizer.fused true",
        "model.optimizer cannot be used: `fused` and `foreach` cannot be `True` together",
    ),
    (
        "fit --trainer.max_steps 3 --trainer.callbacks+=KeepMasks --model.optimizer SGD --model.optimizer.lr 1 "
        "--model.optimizer.momentum .nan",
        "holds NaN or Inf: the training diverged; lower the learning rate, or check the optimizer",
    ),
    ("validate --ckpt_path nowhere.ckpt", "Checkpoint file not found: nowhere.ckpt"),
    (
        "fit --trainer.max_steps 1 --model.optimizer torch.optim.AdamW --model.optimizer.lr -1",
        "model.optimizer cannot be used: Invalid learning rate: -1.0",
    ),
    (
        "fit --trainer.max_steps 1 --model.optimizer torch.optim.AdamW --model.optimizer.lr .nan",
        "model.optimizer cannot be used: Invalid learning rate: nan",
    ),
    (
        "fit --trainer.max_steps 1 --model.optimizer torch.optim.AdamW --model.optimizer.lr fast",
        "model.optimizer: Type",
    ),
    (
        "fit --trainer.max_steps 1 --model.optimizer torch.optim.AdamW --model.optimizer.betas '[2, 3]'",
        "model.optimizer cannot be used: Invalid beta parameter at index",
    ),
    (
        "fit --trainer.max_steps 1 --model.lr_scheduler Banana",
        "model.lr_scheduler: there is no class 'Banana'",
    ),
    (
        "fit --trainer.max_steps 1 --model.loss Banana",
        "model.loss: there is no class 'Banana'",
    ),
    (
        "fit --trainer.max_steps 1 --model.trainable LoRA --model.trainable.rank 100000",
        "LoRA.rank is 100000, and model.layers.0.self_attn.q_proj has",
    ),
    (
        "fit --trainer.max_steps 1 --trainer.callbacks+=EarlyStopping --trainer.callbacks.monitor banana",
        "Early stopping conditioned on metric `banana` which is not",
    ),
    ("fit --trainer.max_time '{{a: 1}}'", "trainer.max_time is {'a': 1}: give DD:HH:MM:SS, such as"),
    ("fit --trainer.max_time '{{days: -1}}'", "trainer.max_time is {'days': -1}: give DD:HH:MM:SS, such as"),
    ("fit --trainer.max_time banana", "trainer.max_time is 'banana': give DD:HH:MM:SS, such as"),
    (f"{FIT} --trainer.val_check_interval '{{{{a: 1}}}}'", "trainer.val_check_interval is {'a': 1}: give"),
    (f"{FIT} --model.lr_scheduler '{{{{}}}}'", "model.lr_scheduler is {}: name a class, such as WarmupCosine"),
    (f"{FIT} --trainer.callbacks+=Exprt", "there is no class 'Exprt'; use the name of a known class, or a full import"),
    (f"{FIT} --trainer.callbacks+=Exprt", "did you mean Export?"),
    (f"{FIT} --trainer.callbacks+=ModelChekpoint", "did you mean ModelCheckpoint?"),
    (
        f"{FIT} --model.loss Distillation --model.loss.teacher nowhere/at/all",
        "Distillation.teacher is 'nowhere/at/all': there is no such file or folder",
    ),
    (
        "validate --trainer.logger true --trainer.default_root_dir {at}/short.txt",
        "trainer.default_root_dir or a logger's folder is ",
    ),
    (
        "test --trainer.logger true --trainer.default_root_dir {at}/short.txt",
        "trainer.default_root_dir or a logger's folder is ",
    ),
    (
        "fit --trainer.max_steps 1 --trainer.callbacks+=FindLearningRate --trainer.callbacks.steps 1",
        "FindLearningRate.steps is 1: it must be at least 20",
    ),
]


@pytest.fixture(scope="module")
def at(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with bad files, a configuration and a small pruned model."""
    folder = tmp_path_factory.mktemp("mistakes")
    for name, content in FILES.items():
        (folder / name).write_bytes(content)
    torch.save({"state_dict": {}}, folder / "empty.ckpt")
    torch.save([1, 2], folder / "list.ckpt")
    torch.save(["state_dict", "pytorch-lightning_version"], folder / "names.ckpt")
    (folder / "folder.json").mkdir()
    write_config(folder / "config.yaml", {})
    assert main(["prune", "-c", str(folder / "config.yaml"), "--output", str(folder / "pruned"), "--quiet"]) == 0
    return folder


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    yield
    assert not list(tmp_path.iterdir())  # a mistake leaves nothing behind


def write_config(path: Path, plan: dict[str, object]) -> None:
    callbacks = [{"class_path": "Prune", "init_args": {"plan": PLAN_OF_ALL | plan}}]
    path.write_text(yaml.safe_dump({**CONFIG, "trainer": {**CONFIG["trainer"], "callbacks": callbacks}}))


def is_one_line(said: str, capsys: pytest.CaptureFixture[str], arguments: list[str], status: int = 2) -> None:
    capsys.readouterr()
    assert main(arguments) == status
    shown = capsys.readouterr().err
    lines = [line for line in shown.splitlines() if line.startswith("lit-prune: error: ")]
    assert len(lines) == 1 and "Traceback" not in shown, shown
    assert said in lines[0], lines[0]


@pytest.mark.parametrize(("mistake", "said"), [*ARGUMENTS, *DATA, *MODEL, *TRAINING])
@pytest.mark.usefixtures("few_tasks")
def test_a_mistake_is_one_line(mistake: str, said: str, at: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = shlex.split(mistake.format(at=at))
    if arguments and arguments[0] in cli.SUBCOMMANDS:
        arguments[1:1] = ["-c", str(at / "config.yaml")]
    is_one_line(said, capsys, arguments)


@pytest.mark.parametrize(("mistake", "said"), PLAN)
def test_a_mistake_in_a_plan_is_one_line(
    mistake: str, said: str, at: Path, tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path_factory.mktemp("plan") / "plan.yaml"
    write_config(config, yaml.safe_load(mistake.replace("{at}", str(at))))
    is_one_line(said, capsys, ["prune", "-c", str(config)])


def test_an_unexpected_error_is_one_line_that_says_so(
    at: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError("division\nby zero")

    monkeypatch.setattr("lit_prune.commands.prune.continuations", fail)
    command = ["prune", "-c", str(at / "config.yaml")]
    is_one_line(
        "unexpected ZeroDivisionError (division by zero); --debug shows the traceback", capsys, command, status=1
    )
    with pytest.raises(ZeroDivisionError):
        main([*command, "--resume", "never", "--debug"])


def test_a_flag_may_have_its_value_behind_it(at: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    output = tmp_path_factory.mktemp("out") / "pruned"
    command = ["prune", "-c", str(at / "config.yaml"), "--output", str(output), "--quiet"]
    assert main(command) == 0
    assert main([*command, "--overwrite", "True"]) == 0


@pytest.mark.parametrize(
    ("exit_code", "signal", "said"),
    [
        (-9, "SIGKILL", "process 1 was ended by SIGKILL, usually because memory ran out: lower --trainer.devices"),
        (-11, "SIGSEGV", "process 1 was ended by SIGSEGV; --trainer.devices 1 may show the error"),
        (3, None, "process 1 ended with status 3; its error is above"),
    ],
)
def test_the_end_of_another_process_is_explained(exit_code: int, signal: str | None, said: str) -> None:
    message, status = explain(ProcessExitedException("process 1 terminated", 1, 4321, exit_code, signal))
    assert message.startswith(said) and status == 2


def test_a_damaged_report_is_refused_before_the_model_is_loaded(
    at: Path,
    tmp_path_factory: pytest.TempPathFactory,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pruned = tmp_path_factory.mktemp("damaged") / "pruned"
    shutil.copytree(at / "pruned", pruned)
    (pruned / "pruning.json").write_text((pruned / "pruning.json").read_text().replace('"asked": 0.5', '"asked": 7'))
    monkeypatch.setattr("lit_prune.training.LitCausalLM.configure_model", pytest.fail)
    export = ["export", "-c", str(at / "config.yaml"), "--model.pretrained", str(pruned), "--model.config", "null"]
    for command in (export, ["compare", str(pruned)]):
        is_one_line("pruning.json' is damaged (layers[0].asked is 7.0: it must be in [0, 1])", capsys, command)
