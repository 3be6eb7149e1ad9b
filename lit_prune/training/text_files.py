"""Documents from local files: a text, or a table with one text per row."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import datasets

from lit_prune.errors import InputError, first_line

_TEXTS = (".txt", ".raw", ".md")
SUFFIXES = (*_TEXTS, ".jsonl", ".parquet")
"""Suffixes of supported files."""


def read_file(path: Path, column: str) -> list[str]:
    """Return the documents of a file.

    Args:
        path: a .txt, .raw or .md file (one document), or a .jsonl or .parquet file (a document per row), in UTF-8.
        column: name of the text column of a table.

    Raises:
        InputError: if the file cannot be read, or contains no text.
    """
    if path.suffix not in SUFFIXES:
        raise InputError(f"the text is {str(path)!r}: it must end in {', '.join(SUFFIXES)}")
    if path.suffix in _TEXTS:
        documents = [_decoded(path)]
    else:
        rows = _jsonl_rows(path) if path.suffix == ".jsonl" else _parquet_rows(path)
        documents = list(texts_of(rows, column, str(path)))
    if not any(document.strip() for document in documents):
        raise InputError(f"the text {str(path)!r} is empty: give a file that holds text")
    return documents


def texts_of(rows: Iterable[dict[str, Any]], column: str, source: str) -> Iterator[str]:
    """Yield the text of each row; raise ``InputError`` at the first row without text."""
    for number, row in enumerate(rows, 1):
        if column not in row:
            raise InputError(
                f"row {number} of {source!r} has no column {column!r}, only {sorted(row)}: name one with "
                "--data.text_column"
            )
        if not isinstance(row[column], str):
            raise InputError(
                f"row {number} of {source!r} has {reprlib.repr(row[column])} in column {column!r}, which is not text: "
                "leave the row out, or name another column with --data.text_column"
            )
        yield row[column]


def _decoded(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"the text {str(path)!r} is not UTF-8 (byte 0x{error.object[error.start]:02X} at {error.start}): "
            "convert it, such as with iconv -f LATIN1 -t UTF-8 (or -f UTF-16)"
        ) from error
    except OSError as error:
        raise _unreadable(path, error) from error
    if "\0" in text:
        raise InputError(
            f"the text {str(path)!r} holds NUL characters, as binary files and UTF-16 do: give a text in UTF-8"
        )
    return text


def _jsonl_rows(path: Path) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(_decoded(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"line {number} of {str(path)!r} is not JSON ({first_line(error)})") from error
        if not isinstance(row, dict):
            raise InputError(f'line {number} of {str(path)!r} is not a JSON object, such as {{"text": "..."}}')
        yield row


def _parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    try:  # streamed, so that no copy is left in a cache
        yield from datasets.load_dataset("parquet", data_files=str(path), split="train", streaming=True)
    except InputError:
        raise
    except Exception as error:  # datasets and pyarrow raise various types for a damaged file
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> InputError:
    reason = getattr(error, "strerror", None) or first_line(error)
    return InputError(f"the text {str(path)!r} cannot be read ({reason})")
