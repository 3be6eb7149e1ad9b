import datetime
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from rich.console import Console
from torch import Tensor, nn

from lit_prune.checkpoint.masks import check_masks_hold, load_masks
from lit_prune.checkpoint.save import save_pruned
from lit_prune.errors import InputError
from lit_prune.models.load import load_model
from lit_prune.models.locate import license_of
from lit_prune.models.tokenizer import load_tokenizer
from lit_prune.ops import PackedMask, Unstructured
from lit_prune.pruning import PruningPlan, PruningReport, prune
from lit_prune.pruning.progress import Position, ProgressBar, ProgressLines, progress
from lit_prune.reporting.documents import render, report_figures
from lit_prune.reporting.figures import as_svg, density, scatter
from lit_prune.reporting.outliers import outliers
from lit_prune.reporting.report import LayerReport, Recipe, Sample
from lit_prune.reporting.summary import sparsity_of_model, summary, verdict
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
    head = verdict(report)
    assert head["sparsity of the targets"] == "50.00%"
    assert head["pattern"] == "unstructured" and head["method"] == "Wanda"
    assert head["calibration"] == "6 x 16 tokens" and head["date"] == datetime.date.today().isoformat()
    assert head["perplexity"] == "10.00 → 12.50 (+25%)"
    report.evaluation["perplexity_after"] = float("inf")
    assert verdict(report)["perplexity"] == "10.00 → inf"
    report.identity["plan"]["pattern"] = {"class_path": "NM", "init_args": {"keep": 2, "of": 4}}
    assert verdict(report)["pattern"] == "2:4"
    report.identity["plan"]["pattern"] = {"class_path": "Unstructured", "init_args": {"sparsity": 0.5, "group": "row"}}
    assert verdict(report)["pattern"] == "unstructured, by row"


def test_the_size_is_that_of_the_whole_model(tiny_model: Callable[..., nn.Module], tokens: list[Tensor]) -> None:
    model = tiny_model()  # 3 blocks of 2 x 32 x 32 + 2 x 32 x 16 + 3 x 32 x 48 weights
    report = prune(model, tokens, PruningPlan(Unstructured(0.5), Wanda()))
    targeted = sum(layer.numel for layer in report.layers)
    assert targeted == 3 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48)
    assert report.size is not None
    assert report.size.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert report.size.bytes == 4 * report.size.parameters
    assert report.size.bitmask_bytes == report.size.bytes - 4 * targeted // 2 + targeted // 8
    assert sparsity_of_model(report) == pytest.approx(targeted / 2 / report.size.parameters, rel=1e-12)


def test_the_size_as_bitmask_is_that_of_the_file(tiny_model: Callable[..., nn.Module], tmp_path: Path) -> None:
    model = tiny_model()
    report = prune(model, [], PruningPlan(Unstructured(0.7), Magnitude(), output_error=False))
    save_pruned(tmp_path / "out", model, None, report.masks, {}, to="bitmask")
    file = tmp_path / "out" / "model.bitmask.safetensors"
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    assert report.size is not None and file.stat().st_size - header == report.size.bitmask_bytes


def test_outlying_errors_are_ringed_and_named(report: PruningReport) -> None:
    def layer(block: int, error: float) -> LayerReport:
        mask = PackedMask.pack(torch.ones(2, 3, dtype=torch.bool))
        return LayerReport(f"b.{block}.q", block, (2, 3), 0.0, 0.0, error, 1.0, mask)

    worked = [layer(block, error) for block, error in enumerate((1.0, 2.0, 4.0, 8.0, 1024.0))]
    ((found, ratio),) = outliers(worked)
    assert found is worked[4] and ratio == pytest.approx(256)
    assert not outliers(worked[:4]) and not outliers([layer(0, 1.0)] * 4 + [layer(1, 1.9)])
    assert outliers([layer(0, 1.0)] * 4 + [layer(1, 2.1)])

    report.layers += worked
    page = str(render(report, "tiny")["report.html"])
    assert "b.4.q, with 256.0 times the median error of its kind" in page
    assert page.count('class="outlier"') == 1


def test_a_picture_of_a_mask_shows_the_fraction_of_kept_weights() -> None:
    keep = torch.zeros(256, 3, dtype=torch.bool)  # 128 pixels of two rows, three columns of one
    keep[0, 0] = keep[2:4, 1] = True
    pixels = density(PackedMask.pack(keep))
    assert pixels.shape == (128, 3) and pixels[0].tolist() == [0.5, 0, 0] and pixels[1].tolist() == [0, 1, 0]
    assert pixels[2:].max() == 0
    uneven = density(PackedMask.pack(torch.ones(130, 200, dtype=torch.bool)))
    assert uneven.shape == (128, 128) and uneven.min() == uneven.max() == 1


def test_a_page_fits_a_phone(report: PruningReport) -> None:
    page = str(render(report, "tiny")["report.html"])
    assert not re.search(r"min-width: *(?:[2-9]\d|1\d\d)rem|white-space: *nowrap", page)
    assert 'name="viewport" content="width=device-width' in page
    assert all(float(width) <= 6 * 72 for width in re.findall(r'<svg [^>]*width="([\d.]+)pt"', page))


def test_names_in_a_page_are_text(report: PruningReport) -> None:
    report.samples = [Sample("<script>", "<b>", "{{ 7 * 7 }}")]
    report.recipes = [Recipe("</pre><script>", "config", license="apache-2.0")]
    documents = render(report, title="<script>alert(1)</script>")
    page = str(documents["report.html"])
    assert "<script" not in page and "{{ 7 * 7 }}" in page
    assert "license: apache-2.0" in str(documents["README.md"])


def test_the_card_tells_how_to_use_the_model(report: PruningReport) -> None:
    report.evaluation["text"] = "a | text"
    card = str(render(report, "tiny")["README.md"])
    assert 'AutoModelForCausalLM.from_pretrained("FOLDER")' in card
    assert r"| perplexity, a \| text, windows of 16 tokens | 10.00 | 12.50 |" in card
    assert "Licence: that of the base model." in card
    assert 'load_model("FOLDER")' in str(render(report, "tiny", to="bitmask")["README.md"])
    assert '"FOLDER/adapter"' in str(render(report, "tiny", adapters=True)["README.md"])


def test_the_licence_is_that_of_the_models_card(tmp_path: Path) -> None:
    def license_in(card: str) -> str | None:
        (tmp_path / "README.md").write_text(card)
        return license_of(str(tmp_path))

    assert license_of(str(tmp_path)) is None
    assert license_in("---\nlicense: apache-2.0\n---\n") == "apache-2.0"
    for unreadable in (
        "",
        "no front matter",
        "---\nlicense: [\n---\n",
        "---\nlicense: 'a\\nb'\n---\n",
        "---\n- a\n---\n",
    ):
        assert license_in(unreadable) is None


def test_equal_curves_are_one(report: PruningReport) -> None:
    def legend(figure: Figure) -> list[str]:
        return [line.get_label() for line in figure.axes[0].get_lines()]

    assert legend(report_figures(report)["sparsity"]) == ["all layers"]
    assert len(legend(report_figures(report)["output_error"])) == 7


def test_a_printed_report_is_its_summary(report: PruningReport) -> None:
    text = str(report)
    assert all(name.split()[0] in text for name, _ in summary(report)) and len(text) < 3000
    assert any("sparsity of the targeted weights" in line and "50.0" in line for line in text.splitlines())
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


@pytest.mark.parametrize(("low", "high"), [(254.33, 254.71), (25.1, 27.9), (0.03, 0.09), (1e-4, 1e4)])
def test_ticks_of_a_logarithmic_axis_are_told_apart(low: float, high: float) -> None:
    svg = as_svg(scatter({"a": (0.5, low), "b": (0.7, high)}, "sparsity", "perplexity"))
    labels = re.findall(r"<text[^>]*>([\d.e-]+)</text>", svg)
    of_values = [label for label in labels if low * 0.9 <= float(label) <= high * 1.1]
    assert len(of_values) > 1 and len(set(labels)) == len(labels)


@pytest.mark.parametrize("name", ["{}", "a run with a rather long name, number {}"])
def test_a_legend_is_no_wider_than_its_figure(name: str) -> None:
    figure = scatter({name.format(k): (0.5 + k / 10, 20.0 + k) for k in range(3)}, "sparsity", "perplexity")
    (axes,) = figure.axes
    as_svg(figure)
    assert axes.get_legend().get_window_extent().width <= axes.get_window_extent().width
