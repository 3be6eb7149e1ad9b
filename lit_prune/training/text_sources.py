"""Text sources: the embedded corpus, hub data sets and local files, as documents."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from pydoc_data.topics import topics

import datasets

from lit_prune.errors import InputError, first_line
from lit_prune.models.quiet import quiet_hub
from lit_prune.training.parts import Split, part_of
from lit_prune.training.text_files import SUFFIXES, read_file, texts_of

EMBEDDED = "embedded"
"""Name of the embedded corpus: about 460 kB of English prose that comes with Python, its language reference by
topic."""
GENERATED = "generated"
"""Name of the text that the dense model writes itself; see ``generated_text``."""


@dataclass(frozen=True)
class _HubSet:
    name: str
    config: str | None = None
    streaming: bool = False
    """Whether the data set is streamed, because it is too large to download."""
    splits: tuple[Split, Split, Split] = ("train", "validation", "test")
    """Names of the data set's splits to use for training, validation and test."""


_KNOWN = {
    "wikitext2": _HubSet("Salesforce/wikitext", "wikitext-2-raw-v1"),
    "c4": _HubSet("allenai/c4", "en", streaming=True, splits=("train", "validation", "validation")),
}


def local_path(source: str) -> Path | None:
    """Return the path of a source that exists as a file or folder; None for sources with a name and hub data sets."""
    if source in (EMBEDDED, GENERATED) or source in _KNOWN:
        return None
    try:
        path = Path(source).expanduser()
        return path if path.exists() else None
    except (OSError, RuntimeError):  # not a valid file name, or "~user" of an unknown user
        return None


def hub_name(source: str) -> str | None:
    """Return the name of a source on the hub; None for the embedded corpus, generated text and files."""
    if source in (EMBEDDED, GENERATED) or local_path(source):
        return None
    return _KNOWN[source].name if source in _KNOWN else source.partition(":")[0]


def name_of(source: str) -> str:
    """Return the public name of a source, for reports."""
    if source == EMBEDDED:
        return "Python's documentation (embedded)"
    if source == GENERATED:
        return "text that the model generated"
    if source in _KNOWN:
        return ", ".join(filter(None, (_KNOWN[source].name, _KNOWN[source].config)))
    return source


def read_documents(source: str, split: Split, column: str, limit: int, divided: bool = False) -> list[str]:
    """Return the documents of a source.

    Args:
        source: ``embedded``, ``wikitext2``, ``c4``, a hub data set as ``name`` or ``name:config``, or the path of a
            .txt, .raw, .md (one document), .jsonl or .parquet file (a document per row).
        split: split of the embedded corpus, of the hub data set, or of a file that is ``divided``.
        column: name of the text column of a table.
        limit: maximum number of documents to read from a streamed data set.
        divided: read only the split's part of a file (see ``part_of``) instead of all of it.

    Raises:
        InputError: if the source does not exist or cannot be read, or the hub cannot be reached.
    """
    if source == EMBEDDED:
        return _embedded(split)
    path = local_path(source)
    if path is None and Path(source).suffix in SUFFIXES:
        raise InputError(f"the text is {source!r}: there is no such file")
    if path is None:
        return _read_hub(source, split, column, limit)
    if path.is_dir():
        raise InputError(f"the text is {source!r}, a folder: name one of its files")
    documents = read_file(path, column)
    return part_of(documents, split) if divided else documents


def _embedded(split: Split) -> list[str]:
    """Split the topics, sorted by length: of every ten, eight for training, one for validation and one for the test."""
    share = {"train": range(8), "validation": range(8, 9), "test": range(9, 10)}[split]
    by_length = sorted(topics.values(), key=lambda text: (len(text), text))
    return [text for index, text in enumerate(by_length) if index % 10 in share]


def _read_hub(source: str, split: Split, column: str, limit: int) -> list[str]:
    name, _, config = source.partition(":")
    known = _KNOWN.get(source, _HubSet(name, config or None))
    hub_split = known.splits[("train", "validation", "test").index(split)]
    with _explained(source), quiet_hub():
        rows = datasets.load_dataset(known.name, known.config, split=hub_split, streaming=known.streaming)
        return list(islice(texts_of(rows, column, source), limit if known.streaming else None))


@contextmanager
def _explained(source: str) -> Iterator[None]:
    """Convert errors of datasets and the hub client into a one-line ``InputError`` that suggests a remedy."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"the text {source!r} cannot be read ({first_line(error)}); without a hub in reach, give the path "
            "of a .txt, .jsonl or .parquet file, or 'embedded'"
        ) from error
