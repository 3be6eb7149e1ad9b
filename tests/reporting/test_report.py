import json
from collections.abc import Callable
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from rich.console import Console
from torch import Tensor, nn

from lit_prune.checkpoint.masks import check_masks_hold, load_masks
from lit_prune.errors import InputError
from lit_prune.models.load import load_model
from lit_prune.models.tokenizer import load_tokenizer
from lit_prune.ops import Unstructured
from lit_prune.pruning import PruningPlan, PruningReport, prune
from lit_prune.pruning.progress import Position, ProgressBar, ProgressLines, progress
from lit_prune.reporting.documents import render, report_figures
from lit_prune.reporting.tables import blocks_table, summary_table
from lit_prune.scorers import Magnitude, Wanda


@pytest.fixture
def report(tiny_model: Callable[..., nn.Module], tokens: list[Tensor]) -> PruningReport:
    report = prune(tiny_model(), tokens, PruningPlan(Unstructured(0.5), Wanda()))
    report.evaluation = {"perplexity_before": 10.0, "perplexity_after": 12.5, "seqlen": 16, "text": "a <text>"}
    return report


def test_the_report_survives_a_round_trip_through_json(report: PruningReport) -> None:
    content = json.loads(json.dumps(report.as_dict()))
    again = PruningReport.from_dict(content, {layer.name: layer.mask for layer in report.layers})
    assert again.as_dict() == report.as_dict()
    assert content["plan"]["scorer"] == {"class_path": "Wanda", "init_args": {}}
    assert len(content["layers"]) == 21
    assert {"name", "shape", "asked", "reached", "output_error", "seconds"} <= set(content["layers"][0])


def test_the_documents_tell_what_happened(report: PruningReport) -> None:
    documents = render(report, title="tiny")
    assert set(documents) == {"pruning.json", "report.html", "README.md", "sparsity.png", "output_error.png"}
    assert str(documents["sparsity.png"][:4]) == str(b"\x89PNG")
    page = str(documents["report.html"])
    assert "model.layers.2.mlp.down_proj" in page and "12.50 after" in page and "a &lt;text&gt;" in page
    assert "data:image/png;base64," in page
    assert str(documents["README.md"]).startswith("---\nlibrary_name: transformers")
    assert "10.00 before, 12.50 after" in str(documents["README.md"])


def test_an_error_that_was_not_measured_is_not_plotted(tiny_model: Callable[..., nn.Module]) -> None:
    report = prune(tiny_model(), [], PruningPlan(Unstructured(0.5), Magnitude(), output_error=False))
    assert "output_error.png" not in render(report, title="tiny")
    console = Console(record=True, width=120)
    console.print(blocks_table(report))
    assert "not measured" in console.export_text()


def test_the_tables_show_blocks_and_summary(report: PruningReport) -> None:
    console = Console(record=True, width=120)
    console.print(blocks_table(report), summary_table(report))
    text = console.export_text()
    assert "50.00%" in text
    assert "windows of 16 tokens" in text and "10.00 before, 12.50 after" in text


def test_the_head_is_a_verdict(report: PruningReport) -> None:
    head = report.headline()
    assert head["sparsity"] == "50.00%" and head["pattern"] == "unstructured" and head["method"] == "Wanda"
    assert head["perplexity"] == "10.00 → 12.50 (+25%)"
    report.evaluation["perplexity_after"] = float("inf")
    assert report.headline()["perplexity"] == "10.00 → inf"
    report.identity["plan"]["pattern"] = {"class_path": "NM", "init_args": {"keep": 2, "of": 4}}
    assert report.headline()["pattern"] == "2:4"
    report.identity["plan"]["pattern"] = {"class_path": "Unstructured", "init_args": {"sparsity": 0.5, "group": "row"}}
    assert report.headline()["pattern"] == "unstructured, by row"


def test_equal_curves_are_one(report: PruningReport) -> None:
    def legend(figure: Figure) -> list[str]:
        return [line.get_label() for line in figure.axes[0].get_lines()]

    assert legend(report_figures(report)["sparsity"]) == ["all layers"]
    assert len(legend(report_figures(report)["output_error"])) == 7


def test_a_printed_report_is_its_summary(report: PruningReport) -> None:
    lines = str(report).splitlines()
    assert len(lines) == len(report.summary()) + 3  # a title and two rules
    assert any("sparsity of the targeted weights" in line and "50.0" in line for line in lines)
    assert "<td>50.0" in report._repr_html_()


def test_a_report_saves_the_folder_that_the_command_writes(
    tiny_model: Callable[..., nn.Module], tokens: list[Tensor], tmp_path: Path
) -> None:
    model = tiny_model()
    report = prune(model, tokens, PruningPlan(Unstructured(0.5), Wanda()))
    folder = report.save(tmp_path / "out", model, load_tokenizer("random"))
    written = {file.name for file in folder.iterdir()}
    assert {"config.json", "model.safetensors", "masks.safetensors", "tokenizer.json", "pruning.json"} <= written
    assert {"report.html", "README.md", "sparsity.png"} <= written
    check_masks_hold(load_model(str(folder)), load_masks(folder))
    with pytest.raises(InputError, match="it exists and is kept"):
        report.save(tmp_path / "out", model)


def test_progress_is_shown_by_the_block(
    tiny_model: Callable[..., nn.Module], tokens: list[Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[Position] = []
    prune(tiny_model(), tokens, PruningPlan(Unstructured(0.5), Wanda()), progress=True, on_progress=seen.append)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["block 1/3", "block 2/3", "block 3/3"]
    assert {position.stage for position in seen} >= {"calibrate", "solve"}
    prune(tiny_model(), tokens, PruningPlan(Unstructured(0.5), Wanda()))
    assert not capsys.readouterr().out


def test_the_bar_shows_block_stage_and_time(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressBar() as show:
        show(Position(0, 3, "calibrate", None))
        show(Position(2, 3, "solve", 65.0))
    assert "block 3/3 done" in capsys.readouterr().out


def test_in_a_file_every_block_has_one_plain_line(capsys: pytest.CaptureFixture[str]) -> None:
    display = progress()
    assert isinstance(display, ProgressLines)  # what pytest captures is no terminal
    with display as show:
        for block, stage, left in (
            (0, "calibrate", None),
            (0, "solve", None),
            (1, "calibrate", 65.0),
            (1, "solve", 60.0),
        ):
            show(Position(block, 2, stage, left))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("block 1/2: calibrate 0.0 s, solve 0.0 s; ") and lines[0].endswith("blocks a minute")
    assert lines[1].startswith("block 2/2: calibrate 0.0 s, ") and lines[1].endswith("blocks a minute; 0:01:00 left")
    assert isinstance(progress(shown=False), ProgressBar)
