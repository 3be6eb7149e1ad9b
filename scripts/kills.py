"""Kill ``lit-prune prune`` with SIGKILL at random times, and check that ``--resume auto`` yields the same bits.

One uninterrupted run is timed. Then, for each time drawn at random within its duration, a run is killed, resumed once,
and its weights and masks are compared with those of the uninterrupted run.

    python scripts/kills.py --config recipes/demo --kills 10
"""

from __future__ import annotations

import argparse
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

from lit_prune.checkpoint.files import load_tensors
from lit_prune.checkpoint.masks import load_masks


def state(folder: Path) -> dict[str, torch.Tensor]:
    """Return all tensors of a pruned folder, including masks."""
    files = sorted(folder.glob("model*.safetensors"))
    weights = {name: tensor for file in files for name, tensor in load_tensors(file).items()}
    return weights | {f"mask {name}": mask.bits for name, mask in load_masks(folder).items()}


def main() -> None:
    """Print a line for every kill, and fail if the bits of any run differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=Path("out/kills"), help="folder for what the runs write")
    parser.add_argument("others", nargs=argparse.REMAINDER, help="further options of lit-prune prune, after --")
    options = parser.parse_args()
    shutil.rmtree(options.work, ignore_errors=True)
    others = [option for option in options.others if option != "--"]
    command = [sys.executable, "-m", "lit_prune", "prune", "--config", options.config, "--quiet", *others, "--output"]
    start = time.perf_counter()
    subprocess.run([*command, str(options.work / "straight")], check=True)
    seconds = time.perf_counter() - start
    print(f"a run takes {seconds:.1f} s")
    expected, draw = state(options.work / "straight"), random.Random(options.seed)
    for kill in range(options.kills):
        folder, moment = options.work / str(kill), draw.uniform(0, seconds)
        run = subprocess.Popen([*command, str(folder)])
        try:
            run.wait(moment)
        except subprocess.TimeoutExpired:
            run.kill()
            run.wait()
        finished = len(list((options.work / f".{kill}.journal").glob("block_*.record")))
        where = "after its end" if folder.exists() else f"with {finished} blocks finished"
        subprocess.run([*command, str(folder), "--resume", "auto", "--overwrite"], check=True)
        found = state(folder)
        equal = found.keys() == expected.keys() and all(torch.equal(found[name], t) for name, t in expected.items())
        print(f"killed after {moment:.1f} s, {where}: {'the same bits' if equal else 'DIFFERENT'}", flush=True)
        if not equal:
            sys.exit(1)
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
