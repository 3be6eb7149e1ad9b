"""Collect the English prose that Python and installed packages ship, as training, validation and test documents.

The documents are the docstrings and other long texts in the Python files of the standard library and of everything that
``pip install -e .[dev]`` installs, and the licences, READMEs and other texts beside them. Code, tables and repetitions
are dropped. The files of one folder go to the same split, and paragraphs of validation and test documents that share
phrases with a training document are dropped too. The embedded corpus (``pydoc_data``) is left out, so that it can serve
as text that the model has never seen.

    python scripts/second_model/prose.py out/second/text

``--extra`` adds folders with .txt, .md, .html or .gz files, such as those of Debian's documentation packages
(``apt-get install debian-handbook debian-reference-en developers-reference``, then ``--extra /usr/share/doc``).
"""

from __future__ import annotations

import argparse
import ast
import gzip
import html
import inspect
import json
import re
import sysconfig
import warnings
import zlib
from collections.abc import Iterable, Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from typing import NamedTuple

from packaging.requirements import Requirement

ROOT = "lit-prune"
"""Distribution whose requirements are searched, with its extra ``dev``."""
SPLITS = ("train", "validation", "test")
TEXTS = re.compile(r"(?i)\.(md|rst|txt|html)(\.gz)?$|/(licen[sc]e|copying|notice|readme|changelog|metadata)[^/]*$")
SKIPPED = re.compile(r"(?i)(^|/)(tests?|testing|idle_test|lib2to3|pydoc_data|site-packages|encodings|_?vendor(ed)?)/")
COMMON = frozenset(
    re.findall(
        r"\w+",
        "a about all also an and any are as at be been but by can do does each for from has have how if in into is it "
        "its may more most must not of on one only or other our out should so some such than that the their them then "
        "there these they this to two up use used using was we were what when where which while who will with without "
        "you your he she his her had him me my i",
    )
)
"""Words of which English prose has many, and code, names and tables few."""
_NO_PROSE = re.compile(r"^(Args|Returns|Parameters|Attributes|Raises)\b.?:|>>>|= ?= ?=|__|\\n|\{\{|://\S+$")
_MOST_BYTES = 5_000_000
_SHORTEST = 80
_PHRASE = 8
_MOST_SHARED = 0.2


class Document(NamedTuple):
    """Prose of one file."""

    name: str
    """Path relative to its root."""
    paragraphs: list[str]


def requirements(root: str = ROOT, extra: str = "dev") -> list[Distribution]:
    """Return the installed distributions that ``root[extra]`` requires, directly or not, without itself, by name."""
    found: dict[str, Distribution] = {}
    waiting = [(root, frozenset([extra]))]
    asked = set()
    while waiting:
        name, extras = waiting.pop()
        if (name, extras) in asked:
            continue
        asked.add((name, extras))
        try:
            found[name] = distribution(name)
        except PackageNotFoundError:  # a requirement of an extra that is not installed
            continue
        for line in found[name].requires or []:
            requirement = Requirement(line)
            marker = requirement.marker
            if marker is None or any(marker.evaluate({"extra": extra}) for extra in (*extras, "")):
                waiting.append((_canonical(requirement.name), frozenset(requirement.extras)))
    return [found[name] for name in sorted(found) if name != root]


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def files(extra: Iterable[Path] = ()) -> Iterator[tuple[str, Path]]:
    """Yield the name and path of each file that may hold prose, in a fixed order."""
    library = Path(sysconfig.get_paths()["stdlib"])
    yield from _within(library, "python")
    for found in requirements():
        for path in sorted(str(path) for path in found.files or []):
            yield path, Path(str(found.locate_file(path)))
    for folder in extra:
        yield from _within(folder, folder.name)


def _within(folder: Path, name: str) -> Iterator[tuple[str, Path]]:
    for path in sorted(folder.rglob("*")):
        yield f"{name}/{path.relative_to(folder).as_posix()}", path


def texts(name: str, path: Path) -> list[str]:
    """Return the texts in a file: the long strings of a Python file, or a whole text file; none if it is unreadable."""
    is_python = name.endswith(".py")
    if SKIPPED.search(name) or not (is_python or TEXTS.search(name)) or not path.is_file():
        return []
    content = path.read_bytes()[:_MOST_BYTES]
    if name.endswith(".gz"):
        content = gzip.decompress(path.read_bytes())[:_MOST_BYTES]
    try:
        text = content.decode()
    except UnicodeDecodeError:  # not UTF-8: hardly English prose
        return []
    if is_python:
        return _strings(text)
    if re.search(r"\.html(\.gz)?$", name):
        text = html.unescape(re.sub(r"<[^>]*>", "", re.sub(r"</?(p|li|h\d|pre|div|dd|dt)\b[^>]*>", "\n\n", text)))
    if name.endswith("METADATA"):
        text = text.partition("\n\n")[2]
    return [text]


def _strings(source: str) -> list[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes
        try:
            tree = ast.parse(source)
        except (SyntaxError, ValueError, RecursionError):  # a template, or for another version of Python
            return []
    found = [
        (node.lineno, node.col_offset, node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and len(node.value) >= _SHORTEST
    ]
    return [inspect.cleandoc(text) for _, _, text in sorted(found)]


def paragraphs(text: str) -> list[str]:
    """Return the paragraphs of a text that are prose, each on one line."""
    found = re.split(r"\n[\s#*>]*\n|\n(?=\s*(?:[-*] |:\w+|\.\. ))", text)
    return [paragraph for paragraph in (" ".join(part.split()) for part in found) if is_prose(paragraph)]


def is_prose(paragraph: str) -> bool:
    """Return whether a paragraph is English prose: of words, a quarter of them common ones, with few other signs."""
    if len(paragraph) < _SHORTEST or not paragraph.isascii() or _NO_PROSE.search(paragraph):
        return False
    words = _words(paragraph)
    letters = sum(character.isalpha() or character in " ,.'" for character in paragraph)
    common = sum(word in COMMON for word in words)
    return letters >= 0.92 * len(paragraph) and len(words) >= 12 and common >= 0.25 * len(words)


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z]+", text.lower())


def split_of(name: str) -> str:
    """Return the split of a file, the same for all files of a folder: in thirtieths, 28 train, 1 validation, 1 test."""
    share = zlib.crc32(name.rpartition("/")[0].encode()) % 30
    return {0: "test", 1: "validation"}.get(share, "train")


def collect(extra: Iterable[Path] = ()) -> dict[str, list[Document]]:
    """Return the documents of each split, without paragraphs that repeat."""
    seen: set[str] = set()
    splits: dict[str, list[Document]] = {split: [] for split in SPLITS}
    for name, path in files(extra):
        kept = []
        for paragraph in (paragraph for text in texts(name, path) for paragraph in paragraphs(text)):
            key = "".join(_words(paragraph))
            if key not in seen:
                seen.add(key)
                kept.append(paragraph)
        if kept:
            splits[split_of(name)].append(Document(name, kept))
    return splits


def held_out(documents: list[Document], phrases: set[int]) -> list[Document]:
    """Return the documents without paragraphs of which a fifth or more of the phrases are among ``phrases``."""
    found = []
    for document in documents:
        kept = []
        for paragraph in document.paragraphs:
            own = phrases_of(paragraph)
            if len(own & phrases) < _MOST_SHARED * len(own):
                kept.append(paragraph)
        if kept:
            found.append(Document(document.name, kept))
    return found


def phrases_of(paragraph: str) -> set[int]:
    """Return the hashes of all runs of eight words."""
    words = _words(paragraph)
    return {zlib.crc32(" ".join(words[i : i + _PHRASE]).encode()) for i in range(max(1, len(words) - _PHRASE + 1))}


def main() -> None:
    """Write train.jsonl, validation.jsonl and test.jsonl, a document per row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="folder to write to")
    parser.add_argument("--extra", type=Path, nargs="+", default=[], help="further folders with texts")
    options = parser.parse_args()
    splits = collect(options.extra)
    phrases: set[int] = set()
    for split in SPLITS:
        splits[split] = held_out(splits[split], phrases) if split != "train" else splits[split]
        for document in splits[split]:
            for paragraph in document.paragraphs:
                phrases |= phrases_of(paragraph)
    options.output.mkdir(parents=True, exist_ok=True)
    for split, documents in splits.items():
        rows = ({"name": document.name, "text": "\n\n".join(document.paragraphs)} for document in documents)
        (options.output / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        size = sum(len(paragraph) for document in documents for paragraph in document.paragraphs)
        print(f"{split}: {len(documents):,} documents, {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
