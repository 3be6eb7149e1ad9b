"""Where text comes from: the embedded corpus, hub sets and local files, as documents."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from pydoc_data.topics import topics
from typing import Literal

import datasets

from lit_prune.errors import InputError, first_line
from lit_prune.models.io import quiet_hub

Split = Literal["train", "validation", "test"]
EMBEDDED = "embedded"
"""About 460 kB of English prose that comes with Python: its language reference, by topic."""
_TEXT_SUFFIXES = (".txt", ".raw", ".md")
_TABLES = {".jsonl": "json", ".parquet": "parquet"}


@dataclass(frozen=True)
class _HubSet:
    name: str
    config: str | None = None
    streaming: bool = False
    """Too large to download: read as it arrives."""
    splits: tuple[Split, Split, Split] = ("train", "validation", "test")
    """Which of the set's splits serve as train, validation and test."""


_KNOWN = {
    "wikitext2": _HubSet("Salesforce/wikitext", "wikitext-2-raw-v1"),
    "c4": _HubSet("allenai/c4", "en", streaming=True, splits=("train", "validation", "validation")),
}


def hub_name(source: str) -> str | None:
    """Return the name of a source on the hub, or None for the embedded corpus and files."""
    if source == EMBEDDED or Path(source).expanduser().is_file():
        return None
    return _KNOWN[source].name if source in _KNOWN else source.partition(":")[0]


def read_documents(source: str, split: Split, column: str, limit: int) -> list[str]:
    """Return the documents of a source.

    Args:
        source: ``embedded``, ``wikitext2``, ``c4``, a hub set as ``name`` or ``name:config``, or the path of a
            .txt, .raw, .md (one document), .jsonl or .parquet file (a document per row).
        split: of the embedded corpus or the hub set; a file is read whole, whatever the split.
        column: of a table, where the text is.
        limit: how many documents of a streamed set are read.

    Raises:
        InputError: where there is no such source, or the hub cannot be reached.
    """
    path = Path(source).expanduser()
    if source == EMBEDDED:
        return _embedded(split)
    if path.is_file():
        return _read_file(path, column)
    if path.is_dir() or path.suffix in (*_TEXT_SUFFIXES, *_TABLES):
        raise InputError(f"the text source is {source!r}: there is no such file")
    return _read_hub(source, split, column, limit)


def _embedded(split: Split) -> list[str]:
    """Deal the topics out by length: of every ten, eight are for training, one for validation and one for the test."""
    share = {"train": range(8), "validation": range(8, 9), "test": range(9, 10)}[split]
    by_length = sorted(topics.values(), key=lambda text: (len(text), text))
    return [text for index, text in enumerate(by_length) if index % 10 in share]


def _read_file(path: Path, column: str) -> list[str]:
    if path.suffix in _TEXT_SUFFIXES:
        return [_read_text(path)]
    if path.suffix not in _TABLES:
        raise InputError(f"the text source is {str(path)!r}: it must end in {', '.join([*_TEXT_SUFFIXES, *_TABLES])}")
    with _explained(str(path)):
        table = datasets.load_dataset(_TABLES[path.suffix], data_files=str(path), split="train")
    documents = list(_column(table, column, str(path)))
    if not documents:
        raise InputError(f"the text source {str(path)!r} has no rows")
    return documents


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"the text source {str(path)!r} is not UTF-8 ({error.reason} at byte {error.start}): convert it, for "
            "example with iconv"
        ) from error
    except OSError as error:
        raise InputError(f"the text source {str(path)!r} cannot be read ({error.strerror})") from error


def _read_hub(source: str, split: Split, column: str, limit: int) -> list[str]:
    name, _, config = source.partition(":")
    known = _KNOWN.get(source, _HubSet(name, config or None))
    hub_split = known.splits[("train", "validation", "test").index(split)]
    with _explained(source), quiet_hub():
        rows = datasets.load_dataset(known.name, known.config, split=hub_split, streaming=known.streaming)
        return list(islice(_column(rows, column, source), limit if known.streaming else None))


def _column(rows: Iterable[dict[str, str]], column: str, source: str) -> Iterator[str]:
    for number, row in enumerate(rows):
        if column not in row:
            raise InputError(
                f"{source!r} has no column {column!r}, only {sorted(row)}: name one with --data.text_column"
            )
        if not isinstance(row[column], str):
            raise InputError(
                f"{source!r} has no text in row {number}, column {column!r}, but {row[column]!r}: give every row text"
            )
        yield row[column]


@contextmanager
def _explained(source: str) -> Iterator[None]:
    """Turn what datasets raises for a source that it cannot read into one line that says what to do."""
    try:
        yield
    except InputError:
        raise
    except (OSError, ValueError, StopIteration, datasets.exceptions.DatasetsError) as error:
        raise InputError(
            f"the text source {source!r} cannot be read ({first_line(error)}); without a hub in reach, give the path "
            "of a .txt, .jsonl or .parquet file, or 'embedded'"
        ) from error
