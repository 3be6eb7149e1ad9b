"""The command line's arguments: names, defaults, short forms and overrides."""

import json
import os
import runpy
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import yaml

from lit_prune import __main__ as command
from lit_prune.arguments import Prepared, overridden, prepare
from lit_prune.cli import build, main
from lit_prune.cli_errors import PEER_GONE, explain, printable
from lit_prune.errors import InputError
from lit_prune.pruning import PruningPlan
from lit_prune.recipes import shipped
from support.processes import Started, call_with_child, free_group

SCRIPT = Path(__file__).parents[1] / "scripts" / "write_help.py"
PATHS = {item.name: str(item.path) for item in shipped()}
NM = '--plan.pattern={"class_path": "NM", "init_args": {"keep": 2, "of": 4}}'


def plan_of(*arguments: str) -> PruningPlan:
    cli = build(["--model.pretrained", "random", *arguments, "--trainer.accelerator", "cpu"], run=False)
    return cli.trainer.callbacks[0].plan  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("given", "prepared"),
    [
        ("prune", ["prune", "best"]),
        ("prune --sparsity 0.6", ["prune", "best", "--plan.pattern.sparsity=0.6"]),
        ("prune --pattern 2:4", ["prune", "best_nm", NM]),
        ("prune --plan.pattern 2of4", ["prune", "best_nm", NM]),
        ("prune --sparsity=0.6 --plan wanda", ["prune", "--plan=null", "wanda", "--plan.pattern.sparsity=0.6"]),
        ("prune --plan plans/wanda --pattern=2of4", ["prune", "--plan=null", "wanda", NM]),
        ("analyze", ["analyze", "alphapruning"]),
        ("fit", ["fit"]),
        ("fit --plan=admm", ["fit", "--plan=null", "admm"]),
        ("fit --plan null", ["fit", "--plan=null", "--plan=null"]),
        ("prune --overwrite --resume", ["prune", "best", "--overwrite=true", "--resume=auto"]),
        ("prune -c recipes/demo", ["prune", "--config", PATHS["recipes/demo"]]),
        ("prune --config=demo", ["prune", "--config", PATHS["recipes/demo"]]),
        ("prune -c models/smollm2", ["prune", "best", "--config", PATHS["models/smollm2"]]),
        ("test -c recipes/demo", ["test", "--config", PATHS["recipes/demo"]]),
    ],
)
def test_arguments_are_prepared(given: str, prepared: list[str]) -> None:
    expected = [f"--plan={PATHS[f'plans/{word}']}" if f"plans/{word}" in PATHS else word for word in prepared]
    assert prepare(given.split()).arguments == expected


def test_a_plan_is_not_added_to_one_in_a_configuration(tmp_path: Path) -> None:
    for name, content in {
        "a.yaml": {"plan": "wanda"},
        "b.yaml": {"trainer": {"callbacks": [{"class_path": "lit_prune.callbacks.Prune"}]}},
        "c.yaml": {"trainer": {"callbacks": ["Prune"]}},
    }.items():
        (tmp_path / name).write_text(yaml.safe_dump(content))
        arguments = ["prune", "--config", str(tmp_path / name)]
        assert prepare(arguments).arguments == arguments


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("prune --plan wandq", r"--plan is 'wandq': .* did you mean plans/wanda\?"),
        ("prune -c recipes/recovr", r"--config is 'recipes/recovr': .* did you mean recipes/recover "),
        ("prune -c plans/wanda", r"--config is 'plans/wanda': .* no configuration of that name"),
        ("prune --plan 7#", "lit-prune recipes lists the names"),
        ("prune -c", "-c has no value"),
        ("fit --sparsity 0.5", r"--plan\.pattern\.sparsity changes a plan, and none is given: name one with --plan"),
        ("fit --plan.solver ADMM", r"--plan\.solver changes a plan, and none is given: .* such as admm"),
        ("prune --trainer.callbacks.plan.pattern.sparsity 0.5", r"an option of its own by now: --plan\.pattern\.spars"),
        ("prune --trainer.callbacks.init_args.plan.solver=ADMM", r"an option of its own by now: --plan\.solver$"),
        ("prune --trainer.callbacks+=Prune --plan.solver ADMM", r"--plan\.solver changes an option that is not there"),
    ],
)
def test_a_mistake_is_one_line(given: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        prepare(given.split())


def test_options_of_a_prune_that_the_command_line_adds_are_its_own() -> None:
    arguments = ["fit", "--trainer.callbacks+=Prune", "--trainer.callbacks.plan.pattern=NM"]
    assert prepare(arguments) == Prepared(arguments)


def test_arguments_of_a_callback_that_the_command_line_adds_follow_it() -> None:
    """Export has a required one, which the parser wants with the class."""
    added = ["--trainer.callbacks+=Export", "--trainer.callbacks+=lit_prune.callbacks.EarlyStopping"]
    options = ["--trainer.callbacks.Export.output", "here", "--trainer.callbacks.EarlyStopping.monitor=val/loss"]
    options += ["--trainer.callbacks.Export.overwrite=true"]
    names = ["Export.output=here", "Export.overwrite=true", "EarlyStopping.monitor=val/loss"]
    first, second, third = (f"--trainer.callbacks.{name.partition('.')[2]}" for name in names)
    assert prepare(["fit", *added, *options]) == Prepared(["fit", added[0], first, second, added[1], third])
    cli = build(["--model.pretrained", "random", "--trainer.accelerator", "cpu", added[0], *options[:2]], run=False)
    assert cli.trainer.callbacks[0].output == "here"  # type: ignore[attr-defined]


def test_a_named_plan_stands_for_itself(tmp_path: Path) -> None:
    """Nothing of the plan of a configuration stays, but what comes after it changes it."""
    (tmp_path / "c.yaml").write_text("plan: {pattern: {class_path: NM, init_args: {keep: 1, of: 4}}, exclude: [a]}")
    plan = plan_of("-c", str(tmp_path / "c.yaml"), "--plan", "wanda", "--plan.correction", "0.2")
    assert repr(plan.pattern) == "Unstructured(sparsity=0.5, group=None)" and plan.correction == 0.2
    assert list(plan.exclude) == []


def test_a_configuration_names_a_plan_that_ships_and_a_later_one_changes_it(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("plan: wanda\n")
    (tmp_path / "b.yaml").write_text("plan: {exclude: ['*.down_proj']}\n")
    plan = plan_of("-c", str(tmp_path / "a.yaml"), "-c", str(tmp_path / "b.yaml"), "--sparsity", "0.7")
    assert type(plan.scorer).__name__ == "Wanda" and list(plan.exclude) == ["*.down_proj"]
    assert plan.pattern.sparsity == 0.7


def test_a_plan_of_ones_own_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("pattern: {class_path: NM, init_args: {keep: 2, of: 4}}\nsolver: SparseGPT\n")
    plan = plan_of("--plan", str(tmp_path / "mine.yaml"))
    assert type(plan.solver).__name__ == "SparseGPT" and plan.pattern.sparsity == 0.5


@pytest.mark.parametrize(
    ("option", "text"),
    [
        ("--plan", "{pattern: 2of4, solver: SparseGPT}"),
        ("--plan", "{pattern: '2:4', solver: SparseGPT}"),
        ("-c", "plan: {pattern: 2of4, solver: SparseGPT}"),
    ],
)
def test_a_pattern_in_a_file_is_written_in_short(option: str, text: str, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    plan = plan_of(option, str(tmp_path / "mine.yaml"))
    assert repr(plan.pattern) == "NM(keep=2, of=4)"


def test_a_pattern_that_yaml_takes_for_a_number_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.yaml").write_text("pattern: 2:4\nsolver: SparseGPT\n")
    assert main(["prune", "--model.pretrained", "random", "--plan", str(tmp_path / "mine.yaml")]) == 2
    assert "pattern is 124: write N:M as 2of4, or in quotes, as '2:4'" in capsys.readouterr().err


CALLBACKS = ["--model.pretrained", "random", "--trainer.accelerator", "cpu", "-c", "recipes/recover"]


def test_an_override_addresses_a_callback_by_its_class() -> None:
    options = ["--trainer.callbacks.Export.output", "here", "--trainer.callbacks.EarlyStopping.patience=7"]
    cli = build([*CALLBACKS, *options], run=False)
    callbacks = {type(callback).__name__: callback for callback in cli.trainer.callbacks}  # type: ignore[attr-defined]
    assert callbacks["Export"].output == "here" and callbacks["Export"].best is True
    assert callbacks["EarlyStopping"].patience == 7
    assert next(iter(callbacks)) == "Prune"


def test_an_override_reaches_into_a_part_of_a_callback() -> None:
    callbacks = [{"class_path": "a.Prune", "init_args": {"plan": {"solver": {"class_path": "ADMM"}}}}]
    changed = overridden(callbacks, [("Prune", "plan.solver.iterations", "3")])
    assert changed[0]["init_args"]["plan"]["solver"] == {"class_path": "ADMM", "init_args": {"iterations": 3}}


def test_an_override_of_a_callback_that_is_not_there_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", *CALLBACKS, "--trainer.callbacks.Exports.output", "here"]) == 2
    message = capsys.readouterr().err
    assert "trainer.callbacks has no Exports, only KeepMasks, ValidateAtStart" in message
    assert "--trainer.callbacks+=Exports" in message


def test_dropped_callbacks_are_named() -> None:
    notes = prepare(["fit", "-c", "recipes/recover", "-c", "recipes/gradual"]).notes
    assert len(notes) == 1
    assert notes[0].endswith(": ValidateAtStart, StopOnDivergence, EarlyStopping, ModelCheckpoint dropped")
    assert not prepare(["fit", "-c", "recipes/recover", "-c", "strategies/zero3"]).notes


PRUNE = {"class_path": "Prune", "init_args": {"plan": {"pattern": {"class_path": "Unstructured", "init_args": {
    "sparsity": 0.5}}, "solver": {"class_path": "SparseGPT"}}}}  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--plan", "wanda", "--trainer.callbacks", json.dumps([PRUNE])],
            "plan is given, and trainer.callbacks has a P",
        ),
        (["--schedule", "OneShot"], "schedule is given without a plan"),
    ],
)
def test_a_plan_beside_a_prune_and_a_schedule_alone_are_refused(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", "--model.pretrained", "random", "--trainer.accelerator", "cpu", *options]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_the_overview_names_every_command(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(arguments) == 0
    shown = capsys.readouterr().out
    assert all(f"\n  {name} " in shown for name in command.COMMANDS)


def test_recipes_lists_what_ships(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["recipes"]) == 0
    shown = capsys.readouterr().out
    assert all(item.name in shown and item.summary in shown and str(item.path) in shown for item in shipped())


def test_summaries_are_those_of_the_commands_themselves() -> None:
    from lit_prune.trainer import PruningTrainer

    for name, summary in command.COMMANDS.items():
        if name not in ("compare", "recipes"):
            assert (getattr(PruningTrainer, name).__doc__ or "").startswith(summary), name


def test_what_needs_no_model_loads_no_torch() -> None:
    program = """
import json, sys
from lit_prune.__main__ import main
for arguments in ([], ["--help"], ["--version"], ["recipes"]):
    assert main(arguments) == 0
import lit_prune
heavy = {"torch", "lightning", "transformers", "datasets", "jsonargparse", "numpy"} & set(sys.modules)
print(json.dumps(sorted(heavy)))
"""
    result = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert json.loads(result.stdout.splitlines()[-1]) == []


def test_help_is_shown_at_once_and_is_that_of_the_parser() -> None:
    """The written help is what the parser says, with the versions that it was written with."""
    first = command.written_help("prune")
    assert first and first.startswith("usage: lit-prune prune [-c CONFIG ...]") and "\n  --plan PLAN " in first
    with (SCRIPT.parents[1] / "lit_prune" / "help" / "prune.txt").open() as file:
        if file.readline().strip() != runpy.run_path(str(SCRIPT))["made_with"]():
            pytest.skip("written with other versions")
    # In a fresh process: the parser names every subclass that is imported.
    result = subprocess.run([sys.executable, str(SCRIPT), "--check"], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device of Linux that is always full")
@pytest.mark.parametrize("request_", ["--help", "--version", "recipes"])
def test_a_full_disk_is_one_line(request_: str) -> None:
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "lit_prune", request_]
        ended = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert ended.returncode == 1
    assert ended.stderr == "lit-prune: error: the output cannot be written (No space left on device)\n"


def test_control_characters_of_a_file_do_not_reach_the_terminal() -> None:
    assert printable("no \x1b[31mweight\n of ö") == "no \\x1b[31mweight\\n of ö"


def test_one_process_of_several_says_what_all_meet(tmp_path: Path) -> None:
    """Both refuse the same folder."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    fit = "fit -c recipes/demo -c strategies/ddp --data.dataset embedded --trainer.max_steps 1 --trainer.logger false"
    small = "--model.pretrained random --model.config.model_type gpt2 --trainer.callbacks+=Export"
    command = [*fit.split(), *small.split(), "--trainer.callbacks.Export.output", "out"]
    assert (
        Started(tmp_path / "log", partial(call_with_child, partial(main, command)), tmp_path, **free_group(2))
        .wait()
        .code
        == 2
    )
    end = time.monotonic() + 60
    while not (tmp_path / "child").exists() and time.monotonic() < end:
        time.sleep(0.05)
    said = (tmp_path / "log").read_text()
    assert (tmp_path / "child").read_text() == "2" and said.count("Initializing distributed") == 2, said
    assert said.count("lit-prune: error: output is 'out'") == 1 and "Traceback" not in said, said


def test_a_process_without_the_other_one_names_no_error_of_its_own() -> None:
    assert explain(RuntimeError("[pair.cc:553] Connection closed by peer [127.0.0.1]:1234")) == (PEER_GONE, 2)
    for other in (ConnectionResetError("Connection reset by peer"), RuntimeError("Broken pipe")):  # of a hub, a worker
        assert explain(other)[0] != PEER_GONE


def test_a_closed_pipe_ends_the_command_without_a_word() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "lit_prune", "recipes"]
    ended = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert ended.returncode == 141 and ended.stderr == ""
