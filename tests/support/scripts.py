"""Scripts run in a process that has imported what takes ten seconds to import."""

import runpy
import sys
from functools import partial
from pathlib import Path

from support.processes import Ended, run


def run_script(log: Path, script: Path, *arguments: str) -> Ended:
    """Run a Python file with the working directory of this process, as ``python script arguments`` does."""
    return run(log, partial(_main, str(script), arguments))


def _main(script: str, arguments: tuple[str, ...]) -> None:
    sys.argv = [script, *arguments]
    sys.path[0] = str(Path(script).parent)
    runpy.run_path(script, run_name="__main__")
