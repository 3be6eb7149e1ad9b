"""The command line as a person uses it."""

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import jsonschema
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lit_prune.checkpoint.files import read_json
from lit_prune.checkpoint.masks import load_masks
from lit_prune.checkpoint.save import save_pruned
from lit_prune.cli import main
from lit_prune.commands.prune import PROMPTS
from lit_prune.models.experts import take_apart
from lit_prune.models.load import load_model
from lit_prune.models.tokenizer import load_tokenizer

SCHEMA = Path(__file__).parents[1] / "docs" / "pruning.schema.json"
MODELS = {
    "llama": {"num_key_value_heads": 2, "intermediate_size": 48},
    "qwen2": {"num_key_value_heads": 2, "intermediate_size": 48, "tie_word_embeddings": True},
    "gemma3_text": {"num_key_value_heads": 2, "intermediate_size": 48, "head_dim": 8, "sliding_window": 8},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "gpt2": {"n_inner": 48},
    "gpt_neox": {"intermediate_size": 48},
    "mixtral": {"num_key_value_heads": 2, "intermediate_size": 48, "num_local_experts": 4},
}


def unstructured(sparsity: object) -> dict[str, object]:
    return {"class_path": "Unstructured", "init_args": {"sparsity": sparsity}}


WANDA = {"pattern": unstructured(0.5), "scorer": {"class_path": "Wanda"}}


def write_config(folder: Path, model_type: str = "llama", plan: object = None, **data: object) -> str:
    model = {"model_type": model_type, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = {
        "model": {"pretrained": "random", "config": {**model, **MODELS[model_type]}},
        "data": {"dataset": "embedded", "sequences": 4, "seqlen": 32, "max_windows": 3, **data},
        "trainer": {
            "accelerator": "cpu",
            "default_root_dir": str(folder / "logs"),
            "logger": False,
            "callbacks": [{"class_path": "Prune", "init_args": {"plan": plan or WANDA}}],
        },
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return str(path)


def fails_with(message: str, capsys: pytest.CaptureFixture[str], *arguments: str) -> None:
    """Run the command line; it must end with one line that matches ``message``, and no traceback."""
    capsys.readouterr()
    assert main(arguments) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("lit-prune: error: ")]
    assert len(errors) == 1
    assert re.search(message, errors[0]), errors[0]


FOREIGN = """
import math, sys, torch
from pydoc_data.topics import topics
from transformers import AutoModelForCausalLM, AutoTokenizer
texts = sorted(topics.values(), key=lambda text: (len(text), text))
text = "\\n\\n".join(text for k, text in enumerate(texts) if k % 10 == 9)
for line in sys.stdin:
    model = AutoModelForCausalLM.from_pretrained(line.strip()).eval()
    tokens = AutoTokenizer.from_pretrained(line.strip())(text, return_tensors="pt").input_ids[0]
    with torch.no_grad():
        losses = [model(input_ids=w[None], labels=w[None]).loss.item() for w in tokens[: 3 * 32].reshape(3, 32)]
    assert "lit_prune" not in sys.modules
    print(math.exp(sum(losses) / len(losses)), flush=True)
"""


@pytest.fixture(scope="module")
def foreign_perplexity() -> Iterator[Callable[[Path], float]]:
    """Return what measures a folder's perplexity in a process that knows nothing of lit_prune."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", FOREIGN], **pipes) as process:

        def measure(folder: Path) -> float:
            process.stdin.write(f"{folder}\n")
            process.stdin.flush()
            return float(process.stdout.readline())

        yield measure
        process.stdin.close()


@pytest.mark.parametrize("model_type", MODELS)
def test_prune_gives_the_sparsity_asked_and_opens_anywhere(
    model_type: str, foreign_perplexity: Callable[[Path], float], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    logger = ["--trainer.logger", "null"] if model_type == "llama" else []
    assert main(["prune", "-c", write_config(tmp_path, model_type), "--output", str(out), *logger]) == 0
    report = json.loads((out / "pruning.json").read_text())
    model = load_model(str(out))
    take_apart(model)  # masks of experts are by expert
    for name, mask in load_masks(out).items():
        keep = mask.unpack()
        assert (model.get_parameter(name)[~keep] == 0).all()
        assert abs((~keep).sum().item() - 0.5 * keep.numel()) <= 1
    assert report["sparsity"] == pytest.approx(0.5, abs=1e-3)
    assert foreign_perplexity(out) == pytest.approx(report["evaluation"]["perplexity_after"], rel=1e-4)
    events = list((tmp_path / "logs").rglob("events.out.tfevents*"))
    assert bool(events) == bool(logger)  # TensorBoard is the default logger


def test_a_precision_of_the_trainer_is_used(tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ["--trainer.precision", "bf16-true", "--output", str(out)]
    assert main(["prune", "-c", write_config(tmp_path), *options]) == 0
    assert load_model(str(out)).dtype == torch.bfloat16


def test_an_allocator_is_given_another_as_its_prior(tmp_path: Path) -> None:
    prior = {"class_path": "AlphaPruning", "init_args": {"epsilon": 0.3}}
    allocator = {"class_path": "Measured", "init_args": {"prior": prior, "trust": 0.25}}
    out = tmp_path / "out"
    config = write_config(tmp_path, plan={**WANDA, "allocator": allocator, "cache": str(tmp_path / "cache")})
    assert main(["prune", "-c", config, "--output", str(out)]) == 0
    report = json.loads((out / "pruning.json").read_text())
    written = report["plan"]["allocator"]["init_args"]
    assert written["trust"] == 0.25 and written["prior"]["init_args"]["epsilon"] == 0.3
    assert len({layer["asked"] for layer in report["layers"]}) == 2  # one for each block
    assert [file.name.split("-")[0] for file in (tmp_path / "cache").iterdir()] == ["alpha_peak"]


def test_a_reconstruction_is_carried_out_and_written_down(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reconstruction = {"class_path": "Reconstruction", "init_args": {"steps": 3, "rate": 0.002}}
    plan, out = {**WANDA, "reconstruction": reconstruction}, tmp_path / "out"
    with pytest.raises(SystemExit, match="0"):
        main(["prune", "-c", write_config(tmp_path, plan=plan), "--print_config"])
    (tmp_path / "again.yaml").write_text(capsys.readouterr().out)
    assert main(["prune", "-c", str(tmp_path / "again.yaml"), "--output", str(out)]) == 0
    report = json.loads((out / "pruning.json").read_text())
    arguments = {"steps": 3, "rate": 0.002, "sequences": 2, "norms_and_biases": True}
    assert report["plan"]["reconstruction"] == {"class_path": "Reconstruction", "init_args": arguments}
    assert all(0 < done["after"] <= done["before"] for done in report["reconstructions"])
    assert [done["block"] for done in report["reconstructions"]] == [0, 1]
    assert (out / "block_error.png").is_file()


def test_analyze_writes_spectra_and_allocations(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = {**WANDA, "allocator": {"class_path": "AlphaPruning", "init_args": {"metric": "alpha_mid"}}}
    config, out = write_config(tmp_path, plan=plan), tmp_path / "analysis"
    assert main(["analyze", "-c", config, "--output", str(out), "--sparsities", "[0.5, 0.6]"]) == 0
    content = json.loads((out / "analysis.json").read_text())
    assert content["metric"] == "alpha_mid" and set(content["allocations"]) == {"0.5", "0.6"}
    assert len(list(out.glob("esd_model.layers.0.*.png"))) == 7
    assert (out / "allocation.png").is_file() and (out / "metric_by_block.png").is_file()
    fails_with("it exists and is kept", capsys, "analyze", "-c", config, "--output", str(out))
    assert main(["analyze", "-c", config, "--output", str(out), "--overwrite"]) == 0
    fails_with("matches no layer", capsys, "analyze", "-c", config, "--histograms", '["*.nothing"]')
    for model_type in ("gpt2", "opt"):
        config, out = write_config(tmp_path, model_type), tmp_path / model_type
        assert main(["analyze", "-c", config, "--output", str(out)]) == 0
        assert len(list(out.glob("esd_*"))) == {"gpt2": 4, "opt": 6}[model_type]


def test_fit_validate_and_test_run(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    assert main(["fit", "-c", config, "--trainer.max_steps", "2", "--trainer.logger", "false"]) == 0
    assert main(["validate", "-c", config]) == 0
    assert main(["test", "-c", config]) == 0


def test_a_checkpoint_is_resumed_and_exported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = yaml.safe_load(Path(write_config(tmp_path)).read_text())
    saves = {"dirpath": str(tmp_path), "filename": "at-{step}", "every_n_train_steps": 1, "save_top_k": -1}
    config["trainer"]["callbacks"] += [
        {"class_path": "KeepMasks"},
        {"class_path": "ModelCheckpoint", "init_args": saves},
    ]
    path = tmp_path / "fit.yaml"
    path.write_text(yaml.safe_dump(config))
    fit = ["fit", "-c", str(path), "--trainer.limit_val_batches", "0", "--trainer.max_steps"]
    assert main([*fit, "2"]) == 0
    checkpoint = str(tmp_path / "at-step=2.ckpt")
    assert main([*fit, "3", "--ckpt_path", checkpoint]) == 0
    assert (tmp_path / "at-step=3.ckpt").is_file()
    export = ["export", "-c", write_config(tmp_path), "--checkpoint"]
    out = tmp_path / "out"
    assert main([*export, checkpoint, "--output", str(out)]) == 0
    saved = torch.load(checkpoint, weights_only=True)["state_dict"]
    model, masks = load_model(str(out)), load_masks(out)
    assert all(torch.equal(saved[f"model.{name}"], value) for name, value in model.state_dict().items())
    assert all((model.get_parameter(name)[~mask.unpack()] == 0).all() for name, mask in masks.items())
    assert json.loads((out / "pruning.json").read_text())["sparsity"] == pytest.approx(0.5, abs=1e-3)
    # Another model, no checkpoint, a checkpoint that would run code, masks that the weights break.
    other = ["--output", str(tmp_path / "other")]
    small = ["--model.config.hidden_size", "16"]
    fails_with("it is not of the model 'random'", capsys, *export, checkpoint, *other, *small)
    fails_with("there is no such file", capsys, *export, str(tmp_path / "no.ckpt"), *other)
    evil = str(tmp_path / "evil.ckpt")
    torch.save({"state_dict": saved, "callbacks": {}, "code": yaml.safe_load}, evil)
    fails_with("holds more than tensors and plain data.*--trust", capsys, *export, evil, *other)
    fails_with("holds more than tensors and plain data.*--trust", capsys, *fit, "4", "--ckpt_path", evil)
    assert not (tmp_path / "other").exists()


def test_a_pruned_folder_is_exported_in_every_format(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pruned, config = tmp_path / "pruned", write_config(tmp_path)
    assert main(["prune", "-c", config, "--output", str(pruned)]) == 0
    (pruned / "adapter").mkdir()
    (pruned / "adapter" / "adapter_config.json").write_text("{}")
    weights, masks = load_model(str(pruned)).state_dict(), load_masks(pruned)
    export = ["export", "-c", config, "--model.pretrained", str(pruned), "--model.config", "null"]
    for to in ("hf", "hf-sharded", "bitmask"):
        out = tmp_path / to
        assert main([*export, "--to", to, "--shard_size", "50KB", "--output", str(out)]) == 0
        again = load_model(str(out)).state_dict()
        assert list(again) == list(weights) and all(torch.equal(again[name], weights[name]) for name in weights)
        assert all(torch.equal(mask.bits, masks[name].bits) for name, mask in load_masks(out).items())
        assert read_json(out / "pruning.json") == read_json(pruned / "pruning.json")
        assert (out / "report.html").is_file() and (out / "adapter" / "adapter_config.json").read_text() == "{}"
    assert len(list((tmp_path / "hf-sharded").glob("model-*.safetensors"))) > 1
    assert [file.name for file in (tmp_path / "bitmask").glob("model*")] == ["model.bitmask.safetensors"]
    test = ["test", "-c", config, "--model.config", "null", "--model.pretrained"]
    assert main([*test, str(tmp_path / "bitmask")]) == 0
    fails_with("masks are asked of 'random'", capsys, "export", "-c", config, "--output", str(tmp_path / "none"))


def test_a_pruned_folder_is_packed_and_made_dense_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pruned, packed, dense = (str(tmp_path / name) for name in ("pruned", "packed", "dense"))
    config = write_config(tmp_path)
    assert main(["prune", "-c", config, "--output", pruned]) == 0
    given = ["-c", config, "--model.config", "null", "--model.pretrained"]
    fails_with("bits and head_bits are for --to packed", capsys, "export", *given, pruned, "--bits", "8")
    assert main(["export", *given, pruned, "--to", "packed", "--output", packed]) == 0
    assert main(["test", *given, packed]) == 0
    fails_with("it is packed; name a model to compare it --against", capsys, "speed", *given, packed)
    fails_with("nothing to prune", capsys, "prune", *given, packed, "--output", str(tmp_path / "none"))
    assert main(["export", *given, packed, "--output", dense]) == 0
    before, after = (load_model(folder).state_dict() for folder in (pruned, dense))
    for name, weight in before.items():  # what is packed is rounded to float16, and norms are not
        assert torch.equal(after[name], weight) or torch.equal(after[name], weight.half().to(weight.dtype))
    assert all(torch.equal(mask.bits, load_masks(pruned)[name].bits) for name, mask in load_masks(dense).items())
    assert read_json(Path(dense) / "pruning.json") == read_json(Path(pruned) / "pruning.json")


def test_a_quantised_folder_is_packed_with_its_bits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pruned, packed, dense = (str(tmp_path / name) for name in ("pruned", "packed", "dense"))
    plan = {"pattern": WANDA["pattern"], "solver": {"class_path": "SparseGPT"}}
    wrong = {**plan, "quantize": {"class_path": "Quantize", "init_args": {"bits": 5}}}
    fails_with("bits.* 5", capsys, "prune", "-c", write_config(tmp_path, plan=wrong), "--output", pruned)
    config = write_config(tmp_path, plan={**plan, "quantize": {"class_path": "Quantize", "init_args": {"bits": 4}}})
    assert main(["prune", "-c", config, "--output", pruned]) == 0
    check_report(Path(pruned))
    given = ["-c", config, "--model.config", "null", "--model.pretrained"]
    assert main(["export", *given, pruned, "--to", "packed", "--output", packed]) == 0
    layers = read_json(Path(packed) / "config.json")["quantization_config"]["layers"]
    assert {entry["kind"] for name, entry in layers.items() if ".layers." in name} == {"int4"}
    assert main(["export", *given, packed, "--output", dense]) == 0
    before, after = (load_model(folder).state_dict() for folder in (pruned, dense))
    rounded = [name for name in before if ".layers." in name and before[name].dim() == 2]
    assert rounded and all(torch.equal(after[name], before[name]) for name in rounded)


def check_report(folder: Path) -> None:
    """Raise where a folder's pruning.json is not what its schema says."""
    jsonschema.validate(read_json(folder / "pruning.json"), read_json(SCHEMA))


def test_every_part_of_a_report_is_in_the_schema(tmp_path: Path, write_task: Callable[[Path], Path]) -> None:
    plan = {
        **WANDA,
        "allocator": {"class_path": "AlphaPruning"},
        "reconstruction": {"class_path": "Reconstruction", "init_args": {"steps": 2}},
    }
    config, out = write_config(tmp_path, plan=plan), tmp_path / "out"
    tasks = ["--tasks", "[sums]", "--harness.include_path", str(write_task(tmp_path / "tasks")), "--harness.trust=true"]
    assert main(["prune", "-c", config, "--output", str(out), *tasks]) == 0
    check_report(out)
    report = read_json(out / "pruning.json")
    assert len(report["metrics"]) == len(report["layers"]) and len(report["spectra"]) == 2
    assert [sample["prompt"] for sample in report["samples"]] == list(PROMPTS)
    assert report["recipes"][0]["command"].startswith(f"lit-prune prune -c {config}")
    assert yaml.safe_load(report["recipes"][0]["config"])["data"]["seqlen"] == 32
    page = (out / "report.html").read_text()
    for part in ("Samples", "Masks", "eigenvalue of W", "after reconstruction", "Time", "command and configuration"):
        assert part in page, part
    assert "http" not in page.replace("http://www.w3.org/", "").partition("<h2>Details")[0]  # it needs no network
    assert report["calibration"]["text"] == "train text of Python's documentation (embedded)"


def test_print_config_can_be_run_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["prune", "-c", write_config(tmp_path), "--data.seqlen", "16", "--print_config"])
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["data"]["seqlen"] == 16
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(printed))
    out = str(tmp_path / "out")
    assert main(["prune", "-c", str(tmp_path / "again.yaml"), "--output", out]) == 0


def test_help_comes_from_the_docstrings(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["prune", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "Replace the folder if it exists." in text
    assert "Tokens per window, for training, evaluation and calibration." in text


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (
            {"pattern": unstructured(1.2)},
            r"sparsity is 1\.2: it must be .*\[0, 1\)",
        ),
        ({"pattern": unstructured(-0.1)}, r"sparsity is -0\.1"),
        (
            {"pattern": unstructured("abc")},
            r"sparsity: Expected a .*float.* abc",
        ),
        ({"pattern": {"class_path": "NM", "init_args": {"keep": 5, "of": 4}}}, r"N:M is 5:4"),
        ({"scorer": {"class_path": "Wandah"}}, r"plan\.scorer: there is no class 'Wandah'; use .*Wanda"),
        ({"scorer": None}, r"Zero needs a plan\.scorer"),
        ({"include": ["*.nothing"]}, r"plan\.include: '\*\.nothing' matches no linear layer"),
        ({"scorrer": None}, r"scorrer"),
        ({"solver": {"class_path": "SparseGPT", "init_args": {"damping": -1}}}, r"damping is -1"),
        ({"reconstruction": {"class_path": "Reconstruction", "init_args": {"steps": 0}}}, r"reconstruction steps is 0"),
        ({"reconstruction": {"class_path": "Reconstruction", "init_args": {"rat": 1}}}, r"rat"),
        ({"reconstruction": {"class_path": "Reconstructed"}}, r"no class 'Reconstructed'; use Reconstruction"),
    ],
)
def test_a_bad_plan_is_one_line(
    plan: dict[str, object], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path, plan={**WANDA, **plan})
    fails_with(message, capsys, "prune", "-c", config, "--output", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_indivisible_inputs_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = {**WANDA, "pattern": {"class_path": "NM", "init_args": {"keep": 2, "of": 4}}}
    config = write_config(tmp_path, plan=plan)
    Path(config).write_text(Path(config).read_text().replace("intermediate_size: 48", "intermediate_size: 30"))
    message = r"2:4 needs inputs divisible by 4, and model\.layers\.0\.mlp\.down_proj has 30"
    fails_with(message, capsys, "prune", "-c", config, "--output", str(tmp_path / "out"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data.nope", "3"], r"data\.nope"),
        (["--model.pretrained", "{tmp}"], r"no config\.json, so it is not a model"),
        (["--model.pretrained", "nobody/no-such-model"], r"'nobody/no-such-model': it cannot be loaded .*local folder"),
        (["--data.dataset", "wikitext2"], r"'wikitext2' cannot be read .*without a hub in reach"),
        (["--data.seqlen", "10000000"], r"fewer than one sequence of 10000000"),
        (
            ["--data.calibration", "{tmp}/short.txt"],
            r"calibration is .*short\.txt', which has 5 tokens, fewer",
        ),
        (["--trainer.max_steps", "many"], r"trainer\.max_steps: Expected a .*int.* many"),
        (["--trainer.accelerator", "gpu"], r"CUDA|gpu"),
        (["-c", "{tmp}/none.yaml"], r"none\.yaml': there is no such file"),
    ],
)
def test_a_bad_argument_is_one_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if "gpu" in arguments and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    (tmp_path / "short.txt").write_text("short")
    given = [argument.format(tmp=tmp_path) for argument in arguments]
    config = write_config(tmp_path)
    fails_with(message, capsys, "prune", "-c", config, "--output", str(tmp_path / "out"), *given)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model.trainable", "LoRA", "--model.trainable.rank", "0"], r"LoRA\.rank is 0"),
        (
            ["--model.trainable", "LoRA", "--model.trainable.include", '["*.nope"]'],
            r"LoRA\.include: '\*\.nope' matches",
        ),
        (["--model.loss", "Distillation", "--model.loss.teacher", "{tmp}"], r"no config\.json, so it is not a model"),
        (
            ["--model.loss", "Distillation", "--model.loss.teacher", "{tmp}/wide"],
            r"has 300 tokens and the student's 257",
        ),
    ],
)
def test_a_recovery_that_cannot_work_is_one_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wide = {"model_type": "gpt2", "n_embd": 8, "n_layer": 1, "n_head": 2, "vocab_size": 300}
    save_pruned(tmp_path / "wide", load_model("random", config=wide), load_tokenizer("random"), {}, {})
    given = [argument.format(tmp=tmp_path) for argument in arguments]
    fails_with(message, capsys, "fit", "-c", write_config(tmp_path), "--trainer.max_steps", "1", *given)


def test_an_unknown_subcommand_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    fails_with("invalid choice: 'prine'", capsys, "prine")


def test_an_output_folder_is_kept_unless_overwrite(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, out = write_config(tmp_path), tmp_path / "out"
    assert main(["prune", "-c", config, "--output", str(out)]) == 0
    before = (out / "model.safetensors").read_bytes()
    fails_with("it exists and is kept", capsys, "prune", "-c", config, "--output", str(out))
    assert (out / "model.safetensors").read_bytes() == before
    assert main(["prune", "-c", config, "--output", str(out), "--overwrite"]) == 0
    assert main(["prune", "-c", config, "--output", str(out), "--overwrite", "true"]) == 0


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    config = write_config(tmp_path, plan={**WANDA, "pattern": unstructured(1.5)})
    with pytest.raises(Exception, match=r"sparsity is 1\.5"):
        main(["prune", "--debug", "-c", config])


def test_tasks_are_run_before_and_after_pruning_and_on_a_saved_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], write_task: Callable[[Path], Path], few_tasks: None
) -> None:
    config, out, scores = write_config(tmp_path), tmp_path / "out", tmp_path / "scores.json"
    folder = str(write_task(tmp_path / "tasks"))
    harness = ["--tasks", "[sums]", "--harness.include_path", folder, "--harness.trust", "true"]
    assert main(["prune", "-c", config, "--output", str(out), *harness]) == 0
    assert "sums, acc" in capsys.readouterr().out
    tasks = read_json(out / "pruning.json")["evaluation"]["tasks"]
    assert set(tasks) == {"before", "after"} and 0 <= tasks["before"]["sums"]["acc"] <= 1
    assert "sums, acc" in (out / "README.md").read_text() and "sums, acc" in (out / "report.html").read_text()
    evaluate = ["evaluate", "-c", config, "--model.config", "null", "--model.pretrained", str(out)]
    assert main([*evaluate, *harness, "--output", str(scores)]) == 0
    assert re.search(r"sums +│ acc +│ +[01]\.\d+ ± 0\.\d+", capsys.readouterr().out)
    assert read_json(scores)["sums"]["acc"] == tasks["after"]["sums"]["acc"]
    fewer = ["--harness.limit", "3", "--harness.num_fewshot", "1", "--overwrite"]
    assert main([*evaluate, *harness, "--output", str(scores), *fewer]) == 0
    assert read_json(scores)["sums"]["acc"] in (0, pytest.approx(1 / 3), pytest.approx(2 / 3), 1)
    fails_with("tasks are empty", capsys, *evaluate, "--tasks", "[]")
    fails_with("there is no such folder", capsys, *evaluate, *harness[:2], "--harness.include_path", "nowhere")
    fails_with(
        "neither a valid file in harness.include_path .* did you mean .*sums",
        capsys,
        *evaluate,
        "--tasks",
        "[sumz]",
        *harness[2:],
    )
    fails_with("harness.limit is 0", capsys, *evaluate, *harness, "--harness.limit", "0")
    fails_with("may run code.*--harness.trust true", capsys, *evaluate, *harness[:4])


def test_runs_are_compared_on_one_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = []
    for sparsity, seqlen in ((0.5, "32"), (0.7, "16")):
        plan = {"pattern": unstructured(sparsity), "scorer": {"class_path": "Wanda"}}
        runs.append(str(tmp_path / f"at-{sparsity}"))
        config = write_config(tmp_path, plan=plan)
        assert main(["prune", "-c", config, "--data.seqlen", seqlen, "--output", runs[-1]]) == 0
    page = tmp_path / "all.html"
    assert main(["compare", *runs, "--output", str(page)]) == 0
    text = page.read_text()
    assert "at-0.5" in text and "Wanda" in text and text.count("<svg") == 5
    assert "do not compare" in text
    for run in runs:
        report = read_json(Path(run) / "pruning.json")
        assert f"{report['evaluation']['perplexity_after']:,.2f}" in text and f"{report['sparsity']:.2%}" in text
    assert main(["compare", runs[0], runs[0], "--output", str(page), "--overwrite"]) == 0
    assert "do not compare" not in page.read_text()
    fails_with("holds no pruning.json", capsys, "compare", str(tmp_path))
    fails_with("name a file that ends in .html", capsys, "compare", runs[0], "--output", str(tmp_path))
    report = read_json(Path(runs[0]) / "pruning.json")
    (Path(runs[0]) / "pruning.json").write_text(json.dumps({**report, "format": 99}))
    fails_with("format 99, written by lit-prune 0.1.0: this version, 0.1.0, reads format 1", capsys, "compare", runs[0])


def test_quiet_shows_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ["prune", "-c", write_config(tmp_path), "--output", str(tmp_path / "out")]
    assert main(arguments) == 0
    shown = capfd.readouterr().out
    assert "block 2/2: " in shown and "\x1b" not in shown and "wrote" in shown
    assert main([*arguments, "--overwrite", "--quiet"]) == 0
    assert capfd.readouterr().out == ""


def test_tensorboard_shows_sparsity_mask_changes_figures_and_parameters(tmp_path: Path) -> None:
    config = yaml.safe_load(Path(write_config(tmp_path)).read_text())
    (prune,) = config["trainer"]["callbacks"]
    prune["init_args"]["schedule"] = {"class_path": "Step", "init_args": {"every": 1, "times": 2}}
    config["trainer"] |= {
        "logger": True,
        "max_steps": 2,
        "log_every_n_steps": 1,
        "val_check_interval": 1,
        "limit_val_batches": 1,
    }
    config["trainer"]["callbacks"].append({"class_path": "KeepMasks"})
    (tmp_path / "fit.yaml").write_text(yaml.safe_dump(config))
    assert main(["fit", "-c", str(tmp_path / "fit.yaml")]) == 0
    (file,) = (tmp_path / "logs").rglob("events.out.tfevents*")
    events = EventAccumulator(str(file.parent), size_guidance={"images": 0})
    events.Reload()
    tags = events.Tags()
    logged = {"prune/sparsity", "prune_block/sparsity_00", "prune_block/sparsity_01", "prune/mask_change"}
    assert logged | {"train/loss", "train/tokens_per_second", "val/perplexity"} <= set(tags["scalars"])
    assert [event.value for event in events.Scalars("prune/sparsity")] == pytest.approx([0.25, 0.5], abs=0.01)
    (change,) = events.Scalars("prune/mask_change")
    assert 0.2 < change.value < 0.35  # a quarter more goes
    assert {"prune/sparsity", "prune/masks", "prune/output_error"} <= set(tags["images"])
    assert "_hparams_/session_start_info" in events.summary_metadata
    steps = [event.step for event in events.Scalars("val/perplexity")]
    assert steps == [0, 1]  # after the first step and after the second, as Lightning counts
    assert "final/val/perplexity" in tags["scalars"]


def test_speed_times_a_pruned_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, pruned, figures = write_config(tmp_path), tmp_path / "out", tmp_path / "speed.json"
    assert main(["prune", "-c", config, "--output", str(pruned)]) == 0
    speed = ["speed", "-c", config, "--model.config", "null", "--tokens", "[1]"]
    assert main([*speed, "--model.pretrained", str(pruned), "--output", str(figures)]) == 0
    assert "dense ms" in capsys.readouterr().out
    forms = [figure["form"] for figure in read_json(figures)]
    assert forms == ["16 bits", "8 bits", "4 bits"] * 4  # layers of four shapes
    fails_with("masks are asked of", capsys, *speed, "--model.pretrained", str(tmp_path))
    weights = load_file(pruned / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"] += 1
    save_file(weights, pruned / "model.safetensors", {"format": "pt"})
    for command in (speed, ["export", *speed[1:-2], "--output", str(tmp_path / "exported")]):
        changed = r"out'.*up_proj\.weight: \d+ pruned weights are not zero.*; its weights or its masks were changed"
        fails_with(changed, capsys, *command, "--model.pretrained", str(pruned))
