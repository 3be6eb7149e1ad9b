import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lit_prune.errors import InputError
from lit_prune.models.tokenizer import load_tokenizer
from lit_prune.training import TextDataModule
from lit_prune.training.parts import part_of
from lit_prune.training.text_sources import read_documents


@pytest.fixture
def text_file(tmp_path: Path) -> str:
    path = tmp_path / "text.txt"
    path.write_text("".join(f"line {k}\n" for k in range(200)))
    return str(path)


def module(**options: object) -> TextDataModule:
    return TextDataModule(tokenizer="random", **{"dataset": "embedded", "seqlen": 32, "sequences": 6, **options})  # type: ignore[arg-type]


def test_windows_are_the_whole_text_without_overlap(text_file: str) -> None:
    data = module(test=text_file, batch_size=3)
    windows = torch.cat([batch["input_ids"] for batch in data.test_dataloader()])
    tokens = torch.tensor(load_tokenizer("random")(Path(text_file).read_text())["input_ids"])
    assert torch.equal(windows.flatten(), tokens[: len(tokens) // 32 * 32])
    assert len(module(test=text_file, max_windows=2).test_dataloader().dataset) == 2  # type: ignore[arg-type]


def test_the_embedded_splits_share_no_document() -> None:
    parts = [set(read_documents("embedded", split, "text", 1)) for split in ("train", "validation", "test")]
    assert not parts[0] & parts[1] and not parts[0] & parts[2] and not parts[1] & parts[2]
    sizes = [sum(map(len, part)) for part in parts]
    assert sum(sizes) > 300_000
    assert all(0.05 < size / sum(sizes) < 0.2 for size in sizes[1:])


def test_calibration_is_a_seeded_sample_of_the_training_text() -> None:
    batches = module(calibration_batch_size=4).calibration_batches()
    assert [tuple(batch.shape) for batch in batches] == [(4, 32), (2, 32)]
    assert batches[0].dtype == torch.int64
    again, other = module().calibration_batches(), module(seed=1).calibration_batches()
    assert torch.equal(torch.cat(batches), torch.cat(again))
    assert not torch.equal(torch.cat(batches), torch.cat(other))
    documents = read_documents("embedded", "train", "text", 1)
    tokens = load_tokenizer("random")("\n\n".join(documents))["input_ids"]
    training = ",".join(map(str, tokens))
    for window in torch.cat(batches):
        assert ",".join(map(str, window.tolist())) in training


def test_calibration_texts_share_the_sequences_by_weight(tmp_path: Path) -> None:
    """Of 10 sequences, weights 5, 2 and 1 give 6.25, 2.5 and 1.25: 6, 3 and 1."""
    files = {letter: tmp_path / f"{letter}.txt" for letter in "abc"}
    for letter, path in files.items():
        path.write_text(letter * 500)
    weights = {str(files["a"]): 5, str(files["b"]): 2, str(files["c"]): 1}
    data = module(calibration=weights, sequences=10)
    assert list(data.calibration.values()) == [6, 3, 1]
    shares = [f"all of {files[letter]} ({count} of 10)" for letter, count in (("a", 6), ("b", 3), ("c", 1))]
    assert data.calibration_text == ", ".join(shares)
    sample = load_tokenizer("random").batch_decode(torch.cat(data.calibration_batches()))
    assert sorted(sample) == ["a" * 32] * 6 + ["b" * 32] * 3 + ["c" * 32]
    assert sample != sorted(sample)  # every process gets some of each text
    equal = module(calibration=list(weights), sequences=6)
    assert list(equal.calibration.values()) == [2, 2, 2]
    alone = module(calibration=[str(files["a"])]).calibration_batches()
    assert torch.equal(torch.cat(alone), torch.cat(module(calibration=str(files["a"])).calibration_batches()))


def test_the_data_set_can_be_one_of_the_calibration_texts(tmp_path: Path) -> None:
    """The list stays right if another option replaces the data set, even by a text of the list."""
    path = tmp_path / "mine.txt"
    path.write_text("a" * 500)
    mixture = {"dataset": 2, "embedded": 1}
    assert module(dataset=str(path), calibration=mixture, sequences=6).calibration == {str(path): 4, "embedded": 2}
    assert module(dataset="embedded", calibration=mixture, sequences=6).calibration == {"embedded": 6}
    assert module(dataset=str(path), calibration="dataset").calibration == module(dataset=str(path)).calibration
    with pytest.raises(InputError, match=r"data\.dataset is '\S+mine\.txt', of which the first eight tenths"):
        module(dataset=str(path), calibration=["dataset"], seqlen=450).calibration_batches()


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        ([], r"data\.calibration is \[\]: name each text once"),
        (["embedded", "embedded"], "name each text once"),
        ({"embedded": 0.0}, "gives 'embedded' the weight 0.0: it must be positive"),
        ({"embedded": float("nan")}, "the weight nan"),
        ({"embedded": 1.0, "c4": 1e-3}, "leaves none of the 6 sequences to 'c4': raise --data.sequences or its weight"),
        (["embedded", " "], "data.calibration is ' ': name a text source"),
    ],
)
def test_calibration_texts_without_a_share_are_refused(calibration: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        module(calibration=calibration)


def test_training_windows_are_shuffled_with_the_seed() -> None:
    first, again = (torch.cat([b["input_ids"] for b in module().train_dataloader()]) for _ in range(2))
    other = torch.cat([b["input_ids"] for b in module(seed=1).train_dataloader()])
    assert torch.equal(first, again) and not torch.equal(first, other)


def write_jsonl(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_parquet(path: Path, rows: list[dict[str, str]]) -> None:
    datasets.Dataset.from_list(rows).to_parquet(path)


@pytest.mark.parametrize(("suffix", "write"), [(".jsonl", write_jsonl), (".parquet", write_parquet)])
def test_tables_are_read_by_column(
    suffix: str, write: Callable[[Path, list[dict[str, str]]], None], tmp_path: Path
) -> None:
    path = tmp_path / f"rows{suffix}"
    write(path, [{"body": "one"}, {"body": "two"}])
    assert read_documents(str(path), "train", "body", 10) == ["one", "two"]
    with pytest.raises(InputError, match=r"has no column 'text', only \['body'\]"):
        read_documents(str(path), "train", "text", 10)


def test_long_documents_are_looked_for_within_bounds(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    write_jsonl(path, [{"text": "short"}] * 20 + [{"text": "long " * 20}] * 4)
    data = module(calibration=str(path), documents="long", sequences=4)
    assert torch.cat(data.calibration_batches()).shape == (4, 32)
    with pytest.raises(InputError, match=r"of 24 documents, 4 are longer than 32 tokens and 5 are needed"):
        module(calibration=str(path), documents="long", sequences=5).calibration_batches()
    with pytest.raises(InputError, match=r"of 2 documents, "):
        module(calibration=str(path), documents="long", search_limit=2).calibration_batches()


@pytest.mark.parametrize("use", ["test_dataloader", "calibration_batches", "train_dataloader"])
def test_a_text_shorter_than_one_sequence_is_refused(use: str, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("too short")
    with pytest.raises(InputError, match=r"a\.txt', which has 9 tokens, fewer than one sequence of 32"):
        getattr(module(**{{"test_": "test", "calib": "calibration", "train": "train"}[use[:5]]: str(path)}), use)()
    with pytest.raises(InputError, match=r"^data\.dataset is .* of which .* tenths?, for (train|test), has \d tokens"):
        getattr(module(dataset=str(path)), use)()


def test_a_text_of_exactly_one_sequence_will_do(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x" * 32)
    assert len(module(test=str(tmp_path / "a.txt")).test_dataloader()) == 1
    data = module(calibration=str(tmp_path / "a.txt"))
    assert torch.cat(data.calibration_batches()).shape == (6, 32)


def tokens_of(data: TextDataModule, use: str) -> list[int]:
    loader = getattr(data, f"{use}_dataloader")()
    loader = loader[0] if use == "val" else loader
    return sorted(torch.cat([batch["input_ids"] for batch in loader]).flatten().tolist())


def test_a_file_that_serves_for_all_purposes_is_divided(tmp_path: Path) -> None:
    """Every character is used for one purpose: the text has 2,000 lines, of which the tenths are 1,600, 200 and 200."""
    path = tmp_path / "a.txt"
    lines = [f"{number:06}\n" for number in range(2000)]
    path.write_text("".join(lines))
    parts = {split: "".join(part_of(lines, split)) for split in ("train", "validation", "test")}  # type: ignore[arg-type]
    assert "".join(parts.values()) == "".join(lines)
    assert [len(part) for part in parts.values()] == [1600 * 7, 200 * 7, 200 * 7]
    data = module(dataset=str(path), seqlen=7)
    for use, split in (("train", "train"), ("test", "test"), ("val", "validation")):
        assert tokens_of(data, use) == sorted(load_tokenizer("random")(parts[split])["input_ids"])
    assert torch.cat(data.calibration_batches())[:, 0].shape == (6,)
    calibration = load_tokenizer("random").batch_decode(torch.cat(data.calibration_batches()))
    assert all(window in parts["train"] for window in calibration)
    assert data.test_text == f"last tenth of {path}"


def test_a_file_for_one_purpose_is_read_whole_under_any_name(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("x" * 1000)
    assert module(test=str(path)).test_text == f"all of {path}"
    assert len(tokens_of(module(test=str(path)), "test")) == 992
    (tmp_path / "b.txt").symlink_to(path)
    assert len(tokens_of(module(test=str(path), calibration=str(tmp_path / "b.txt")), "test")) == 96
    assert module().test_text == "test text of Python's documentation (embedded)"
    assert module().calibration_text == "train text of Python's documentation (embedded)"
    assert module(dataset="wikitext2").test_text == "test text of Salesforce/wikitext, wikitext-2-raw-v1"


@given(st.lists(st.text("ab \n", min_size=1, max_size=40), min_size=1, max_size=30))
def test_parts_are_the_whole_text_once_and_in_order(documents: list[str]) -> None:
    parts = [part_of(documents, split) for split in ("train", "validation", "test")]  # type: ignore[arg-type]
    total = len("".join(documents))
    assert "".join(text for part in parts for text in part) == "".join(documents)
    assert all(document for part in parts for document in part)
    # A part begins at most 1/50 of the text before its mark; the mark itself is rounded down.
    assert total * 8 / 10 - total / 50 - 1 <= sum(map(len, parts[0])) <= total * 8 / 10
    assert total / 10 - 1 <= sum(map(len, parts[2])) <= total / 10 + total / 50 + 1


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "é".encode("latin-1"), r"not UTF-8 \(byte 0xE9 at 0\): convert it, such as with iconv -f LATIN1"),
        ("a.txt", "text".encode("utf-16-le"), "holds NUL characters, as binary files and UTF-16 do"),
        ("a.txt", b" \n", "is empty"),
        ("a.jsonl", b"", "is empty"),
        ("a.jsonl", b'{"text": "a"}\n{"text": null}\n', "row 2 of .* has None in column 'text'"),
        ("a.jsonl", b'{"text": 7}\n', "row 1 of .* has 7 in column 'text'"),
        ("a.jsonl", b'{"text": "a"}\n{"text"\n', "line 2 of .* is not JSON"),
        ("a.jsonl", b"[1]\n", "line 1 of .* is not a JSON object"),
        ("a.jsonl", b"[" * 100_000, "line 1 of .* is not JSON"),
        ("a.parquet", b"PAR1 no", "cannot be read"),
    ],
)
def test_a_file_that_holds_no_text_is_refused_with_the_place(
    name: str, content: bytes, message: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_documents(str(tmp_path / name), "train", "text", 10)


@pytest.mark.parametrize("source", ["wikitext2", "c4", "nobody/no-such-set:config"])
def test_a_hub_set_without_a_hub_says_what_to_do(source: str) -> None:
    with pytest.raises(
        InputError, match=rf"'{source}' cannot be read .*\.txt, \.jsonl or \.parquet file, or 'embedded'"
    ):
        read_documents(source, "train", "text", 10)


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="a folder: name one of its files"):
        read_documents(str(tmp_path), "train", "text", 10)


@pytest.mark.parametrize("source", ["none.txt", "none.parquet"])
def test_a_missing_file_is_named(source: str) -> None:
    with pytest.raises(InputError, match="there is no such file"):
        read_documents(source, "train", "text", 10)


def test_an_unknown_kind_of_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.docx").touch()
    with pytest.raises(InputError, match=r"it must end in \.txt"):
        read_documents(str(tmp_path / "a.docx"), "train", "text", 10)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("seqlen", 1),
        ("sequences", 0),
        ("batch_size", 0),
        ("calibration_batch_size", 0),
        ("search_limit", 0),
        ("max_windows", 0),
    ],
)
def test_impossible_counts_are_refused(option: str, value: int) -> None:
    with pytest.raises(InputError, match=rf"data\.{option} is {value}"):
        module(**{option: value})


def test_a_tokenizer_is_needed() -> None:
    with pytest.raises(InputError, match=r"data\.tokenizer is null"):
        TextDataModule(dataset="embedded").test_dataloader()


@pytest.mark.parametrize(
    ("other_val", "message"),
    [(" ", "name a text source"), (["a/text.txt", "b/text.txt"], "two texts have one name")],
)
def test_other_validation_texts_need_names_of_their_own(other_val: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        TextDataModule("random", other_val=other_val)
