"""Rows of a comparison, each measured in a separate process and saved to a JSONL file, so that it can be resumed."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from lit_prune.malloc import keep_freed_memory

Record = dict[str, Any]


def parser(description: str | None, results: str) -> argparse.ArgumentParser:
    """Return a parser with the options common to all comparisons."""
    options = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        conflict_handler="resolve",  # a comparison may define an option anew
    )
    options.add_argument("--model", default="out/smollm2-135m", help="Hugging Face folder or hub name")
    options.add_argument("--seqlen", type=int, default=512)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--test", default="wikitext2", help="text source of the test set")
    options.add_argument("--max-windows", type=int, default=None, help="evaluate on the first windows only")
    options.add_argument("--results", type=Path, default=Path(results))
    options.add_argument(
        "--match", nargs="+", default=["*"], help="shell patterns of the names to run, such as '* 50%%'"
    )
    options.add_argument("--jobs", type=int, default=1, help="rows at a time; they share the cores")
    options.add_argument("--write", type=Path, help="Markdown file whose tables are replaced, in place of printing")
    options.add_argument("--list", action="store_true", help="print the names, and run nothing")
    options.add_argument("--only", help="run this row in this process")
    return options


def read(results: Path) -> list[Record]:
    """Return the records measured so far."""
    return [json.loads(line) for line in results.read_text().splitlines()] if results.is_file() else []


def append(results: Path, record: Mapping[str, Any]) -> None:
    """Append a record to the results."""
    results.parent.mkdir(parents=True, exist_ok=True)
    with results.open("a") as file:
        file.write(json.dumps(record) + "\n")


def show(text: str, document: Path | None) -> None:
    """Print Markdown, or insert it into a document between the markers of the running script."""
    if document is None:
        print(text)
        return
    script = f"scripts/bench/{Path(sys.argv[0]).name}"
    begin, end = f"<!-- written by {script} -->", f"<!-- end of what {script} writes -->"
    before, _, rest = document.read_text().partition(begin)
    after = rest.partition(end)[2]
    if not after:
        sys.exit(f"{document} lacks the lines {begin} and {end}, between which the table goes")
    document.write_text(f"{before}{begin}\n{text}\n{end}{after}")


def measure(
    names: Sequence[str], run: Callable[[str], Record], options: argparse.Namespace, keep_freed: bool = True
) -> list[Record]:
    """Run the missing rows, each in a separate process, and return all records; exit with ``--only`` or ``--list``.

    Args:
        names: names of all rows.
        run: function that measures and returns one row.
        options: command-line options.
        keep_freed: whether the rows' processes keep freed memory, as the command line does.
    """
    if options.only:
        if keep_freed:
            keep_freed_memory()
        append(options.results, {"name": options.only, "seed": options.seed, **run(options.only)})
        sys.exit()
    names = [name for name in names if any(fnmatchcase(name, match) for match in options.match)]
    if not names:
        sys.exit(f"no row matches {options.match}: see --list")
    if options.list:
        print("\n".join(names))
        sys.exit()
    done = {(record["name"], record["seed"]) for record in read(options.results)}
    environment = {**os.environ, "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // options.jobs))}

    def start(name: str) -> None:
        print(f"running {name}", flush=True)
        subprocess.run([sys.executable, *sys.argv, "--only", name], check=True, env=environment)

    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(start, (name for name in names if (name, options.seed) not in done)))
    return read(options.results)
