"""A report from anyone's folder is taken as it was written, or refused in one line that names the file."""

import json
import math
import re
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lit_prune.checkpoint.files import as_json
from lit_prune.errors import InputError
from lit_prune.ops import PackedMask
from lit_prune.ops.spectrum import PowerLaw
from lit_prune.reporting.documents import read_report, render
from lit_prune.reporting.figures import as_svg, bars, by_block, histogram, mask_pictures, scatter
from lit_prune.reporting.report import (
    Calibration,
    LayerReport,
    ModelSize,
    PruningReport,
    Recipe,
    ReconstructionReport,
    Sample,
    Spectrum,
)
from lit_prune.reporting.summary import summary, verdict
from lit_prune.reporting.tables import blocks_table, summary_table

METHOD = {"class_path": "Wanda", "init_args": {}}
PLAN: dict[str, Any] = {
    **dict.fromkeys(("pattern", "scorer", "allocator", "solver"), METHOD),
    "reconstruction": None,
    "correction": 0.0,
    "include": [],
}
MASK = PackedMask.pack(torch.eye(4, 5, dtype=torch.bool))
MASKS = {"a.q.weight": MASK, "b.q.weight": MASK}


def whole_report() -> PruningReport:
    return PruningReport(
        identity={"plan": dict(PLAN), "model": "m", "data": "d"},
        layers=[LayerReport(f"{block}.q", i, (4, 5), 0.8, 0.8, 0.1, 1.0, MASK) for i, block in enumerate("ab")],
        reconstructions=[ReconstructionReport(0, 0.2, 0.1, 1.0, ["a.norm.weight"])],
        allocation={"a.q": 0.8, "b.q": 0.8},
        metrics={"a.q": 3.0, "b.q": 2.0},
        seconds={"solve": 1.5},
        peak_memory=2**30,
        size=ModelSize(100, 400, 300),
        calibration=Calibration(2, 32, "a text"),
        evaluation={
            "perplexity_before": 10.0,
            "perplexity_after": 12.5,
            "seqlen": 16,
            "text": "a text",
            "tasks": {"before": {"sums": {"acc": 0.5, "acc_stderr": 0.1}}, "after": {"sums": {"acc": 0.25}}},
        },
        spectra={"a.q": Spectrum([1.0, 2.0, 4.0], PowerLaw(2.0, 1.0, 0.1, 3))},
        samples=[Sample("Once", "upon", "a time")],
        recipes=[Recipe("lit-prune prune", "data: {}", "a/b", ["c"])],
        validation={"text": [(1, 12.5)]},
    )


def write(folder: Path, content: Any) -> Path:
    (folder / "pruning.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return folder / "pruning.json"


def replaced(content: Any, path: str, value: Any) -> Any:
    """Return plain data with another value at a path, such as ``layers.0.block``; without it if it is ``...``."""
    changed = deepcopy(content)
    *parents, last = [int(step) if step.isdigit() else step for step in path.split(".")]
    inner = changed
    for step in parents:
        inner = inner[step]
    if value is ...:
        del inner[last]
    else:
        inner[last] = value
    return changed


TAIL = {"alpha": 2.0, "lambda_min": 1.0, "distance": 0.1, "tail": 3}
DAMAGES = [
    ("layers", ..., "layers is missing"),
    ("layers", {}, "layers is {}: a list is needed"),
    ("layers", "many", "layers is 'many': a list is needed"),
    ("layers", [1], r"layers\[0\] is 1: an object is needed"),
    ("layers", [], "layers lacks 'a.q', which has a mask"),
    ("layers.1", ..., "layers lacks 'b.q', which has a mask"),
    ("layers.1.name", "a.q", "layers has a name twice"),
    ("layers.0.name", "another", r"layers\[0\]\.name is 'another', which has no mask"),
    ("layers.0.name", ["a"], r"layers\[0\]\.name is \['a'\], which has no mask"),
    ("layers.0.block", -1, r"layers\[0\]\.block is -1: it must be from 0 to 99,999"),
    ("layers.0.block", 10**30, r"layers\[0\]\.block is 10+: a whole number is needed"),
    ("layers.0.block", "first", r"layers\[0\]\.block is 'first': a whole number is needed"),
    ("layers.0.block", True, r"layers\[0\]\.block is True: a whole number"),
    ("layers.0.asked", 7, r"layers\[0\]\.asked is 7\.0: it must be in \[0, 1\]"),
    ("layers.0.asked", None, r"layers\[0\]\.asked is nan: it must be in \[0, 1\]"),
    ("layers.0.asked", ..., r"layers\[0\]\.asked is missing"),
    ("layers.0.shape", [1, 2, 3], r"layers\[0\]\.shape is \[1, 2, 3\]: a list is needed"),
    ("layers.0.shape", [4, 7], r"layers\[0\]\.shape is \[4, 7\], and its mask has \[4, 5\]"),
    ("layers.0.colour", "red", r"layers\[0\]\.colour is unknown"),
    ("plan", [], r"plan is \[\]: an object is needed"),
    ("plan.solver", ..., r"plan\.solver is missing"),
    ("plan.solver", None, r"plan\.solver is None: an object is needed"),
    ("plan.scorer", "Wanda", r"plan\.scorer is 'Wanda': an object is needed"),
    ("plan.allocator.class_path", 3, r"plan\.allocator\.class_path is 3: a string is needed"),
    ("plan.quantize", 4, r"plan\.quantize is 4: an object is needed"),
    (
        "plan.quantize",
        {"class_path": "Quantize", "init_args": {}},
        r"plan\.quantize has None bits: 8 or 4 are possible",
    ),
    ("plan.correction", "much", r"plan\.correction is 'much': a number is needed"),
    ("evaluation", [], r"evaluation is \[\]: an object is needed"),
    ("evaluation.text", ..., "evaluation lacks 'text'"),
    ("evaluation.seqlen", "16", r"evaluation\.seqlen is '16': a whole number"),
    ("evaluation.perplexity_after", "low", r"evaluation\.perplexity_after is 'low': a number"),
    ("evaluation.perplexity_after", 10**400, r"evaluation\.perplexity_after is 10+: a number"),
    ("evaluation.tasks.after", ..., r"evaluation\.tasks\.after is missing"),
    ("evaluation.tasks.after.sums", 0.5, r"evaluation\.tasks\.after\.sums is 0\.5: an object"),
    ("versions", [], r"versions is \[\]: an object is needed"),
    ("format", 99, "in format 99, written by lit-prune .*: this version, .*, reads format 1"),
    ("metrics", {"a.q": 3.0}, "metrics lacks 'b.q', which has a mask"),
    ("spectra", {"a.q": {}}, r"spectra\.a\.q\.eigenvalues is missing"),
    ("spectra", {"a.q": {"eigenvalues": [], "tail": TAIL}}, r"spectra\.a\.q has eigenvalues that are not above 0"),
    ("spectra", {"a.q": {"eigenvalues": [0], "tail": TAIL}}, r"spectra\.a\.q has eigenvalues that are not above 0"),
    ("validation.text", [[1]], r"validation\.text\[0\] is \[1\]: a list"),
    ("seconds", {"solve": "long"}, r"seconds\.solve is 'long': a number is needed"),
    ("peak_memory", 1.5, r"peak_memory is 1\.5: a whole number is needed"),
    ("size", {}, r"size\.parameters is missing"),
    ("size.parameters", 1, "size.parameters is 1, and the layers have 40"),
    ("size.bytes", 0, "each number must be at least 1"),
    ("calibration.sequences", 0, "there must be a sequence, and a token in each"),
    ("calibration.tokens", "many", r"calibration\.tokens is 'many': a whole number"),
    ("date", 7, "date is 7: a string is needed"),
    ("samples.0", {}, r"samples\[0\]\.prompt is missing"),
    ("banana", 1, "banana is unknown"),
    ("layers.0.reached", 0.99, r"layers\[0\]\.reached is 0\.99, and its mask prunes 0\.800000"),
    ("layers.0.output_error", -1.0, r"layers\[0\]\.output_error has -1\.0: it must be a number of at least 0"),
    ("layers.0.seconds", math.inf, r"layers\[0\]\.seconds has inf: it must be a number"),
    ("allocation", {"a.q": 9.0, "b.q": 0.8}, r"sparsity or allocation has a value outside of \[0, 1\]"),
    ("sparsity", 7.0, r"sparsity or allocation has a value outside of \[0, 1\]"),
    ("seconds", {"solve": -1e300}, "seconds or peak_memory has -1e"),
    ("peak_memory", -5, "seconds or peak_memory has -5: it must be a number of at least 0"),
    ("reconstructions.0.after", -0.5, r"reconstructions has -0\.5"),
    ("validation.text", [[1, -1.0]], r"validation has -1\.0"),
    ("evaluation.perplexity_after", 0.5, r"evaluation has 0\.5: it must be a number of at least 1"),
    ("evaluation.seqlen", -1, "evaluation has -1: it must be a number of at least 1"),
    ("recipes.0.base_model", "a/b](http://c)", r"recipes has 'a/b\]\(http://c\)', which is not a name on the hub"),
    ("recipes.0.license", "<script>", "recipes has '<script>', which is not a name on the hub"),
    ("recipes.0.datasets", ["a\n---"], "recipes has .*, which is not a name on the hub"),
]


@pytest.mark.parametrize(("path", "value", "said"), DAMAGES)
def test_a_damaged_report_is_refused_in_one_line(path: str, value: Any, said: str, tmp_path: Path) -> None:
    file = write(tmp_path, replaced(json.loads(as_json(whole_report().as_dict())), path, value))
    with pytest.raises(InputError, match=said) as raised:
        read_report(tmp_path, MASKS)
    assert str(raised.value).startswith(repr(str(file))) and "\n" not in str(raised.value)


def test_names_of_a_report_are_text_in_the_model_card() -> None:
    report = whole_report()
    report.identity["plan"]["solver"] = {
        "class_path": "<script>`x`\n---\n# a title",
        "init_args": {"x": "```\n<script>"},
    }
    report.evaluation["text"] = "a | b\n\x1b[31m<script>"
    card = str(render(report, "<script>\n---")["README.md"])
    assert "\x1b" not in card
    _, _, body = card.split("---\n", 2)
    body, _, plan = body.partition("<details>")
    assert not re.search(r"(?<!\\)<script|^---|^# a title", body, re.MULTILINE), body
    assert plan.count("````") == 2  # a fence longer than the one inside


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "cannot be read as JSON"),
        ('{"format": 1', "cannot be read as JSON"),
        ("[" * 100_000, "cannot be read as JSON"),
        ("[]", "holds no report, but a list"),
        ("3", "holds no report, but a int"),
        ('{"versions": []}', "is in format None, written by another program"),
        ('{"versions": {"lit-prune": "a\\nb"}}', "is in format None, written by lit-prune"),
    ],
)
def test_what_is_no_report_is_refused_in_one_line(content: str, said: str, tmp_path: Path) -> None:
    file = write(tmp_path, content)
    with pytest.raises(InputError, match=said) as raised:
        read_report(tmp_path, MASKS)
    assert str(raised.value).startswith(repr(str(file))) and "\n" not in str(raised.value)


def test_a_report_is_read_as_it_was_written(tmp_path: Path) -> None:
    report = whole_report()
    write(tmp_path, as_json(report.as_dict()))
    again = read_report(tmp_path, MASKS)
    assert again == report
    assert read_report(tmp_path / "elsewhere", MASKS) is None


def test_a_report_of_an_older_version_is_read(tmp_path: Path) -> None:
    content = whole_report().as_dict()
    for later in ("size", "calibration", "date", "cached"):
        del content[later]
    del content["recipes"][0]["license"]
    write(tmp_path, as_json(content))
    report = read_report(tmp_path, MASKS)
    assert report is not None and report.size is None and report.calibration is None and report.date == ""
    assert "whole model" not in render(report, "tiny")["report.html"]


def test_a_file_never_holds_nan(tmp_path: Path) -> None:
    report = whole_report()
    report.evaluation |= {"perplexity_after": math.inf}
    report.metrics["a.q"] = math.nan
    report.validation["text"].append((2, -math.inf))
    documents = render(report, "tiny")
    text = documents["pruning.json"]
    assert isinstance(text, str)
    content = json.loads(text, parse_constant=pytest.fail)
    assert content["evaluation"]["perplexity_after"] is content["metrics"]["a.q"] is None
    write(tmp_path, text)
    again = read_report(tmp_path, MASKS)
    assert again is not None and math.isnan(again.evaluation["perplexity_after"])
    assert render(again, "tiny")["pruning.json"] == text
    assert ".nan" not in str(documents["README.md"]) and ".inf" not in str(documents["README.md"])


HOSTILE = [None, -1, 0, 10**30, 10**400, math.nan, math.inf, True, "", "$\\frac{x}$", "\0", "\udcff", [], {}, [1], [[]]]


def paths_of(content: Any, path: str = "") -> list[str]:
    """Return the paths of all that is in plain data, except below names with dots."""
    pairs = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    steps = [(f"{path}.{key}".lstrip("."), value) for key, value in pairs if "." not in str(key)]
    return [found for step, value in steps for found in (step, *paths_of(value, step))]


def test_whatever_is_read_can_be_told() -> None:
    content = json.loads(as_json(whole_report().as_dict()))
    masks = {name.removesuffix(".weight"): mask for name, mask in MASKS.items()}
    accepted = 0
    for path in paths_of(content):
        for value in (*HOSTILE, ...):
            try:
                report = PruningReport.from_dict(replaced(content, path, value), masks)
            except InputError:
                continue
            accepted += 1
            verdict(report), summary(report), blocks_table(report), summary_table(report)
            as_json(report.as_dict()).encode()
    assert accepted > 100


@pytest.mark.parametrize("name", [r"$\frac{$", r"$\undefined{x}$", "$", "_hidden", "\udcff", "\0", "", "x" * 5000])
@pytest.mark.filterwarnings("error:No artists")
def test_any_name_can_be_drawn(name: str) -> None:
    for figure in (
        by_block({name: [(0, 1.0)]}, "value"),
        scatter({name: (1.0, 2.0)}, "sparsity", "perplexity"),
        bars({name: 1.0}, "seconds"),
        histogram(name, np.array([1.0, 2.0]), PowerLaw(2.0, 1.0, 0.1, 2)),
        mask_pictures({name: MASK}),
    ):
        assert (name if name in ("$", "_hidden") else "") in as_svg(figure)
