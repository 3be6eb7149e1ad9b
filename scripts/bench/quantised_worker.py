"""Make GGUF files, or measure one, with llama-cpp-python; started by hand and by quantised.py.

python scripts/bench/quantised_worker.py convert model.gguf out/q8_0.gguf Q8_0
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import llama_cpp  # type: ignore[import-not-found]  # in an environment of its own
import numpy as np


def convert(source: str, target: str, kind: str) -> None:
    """Write the model in another type of values; quantised ones are dequantised first."""
    how = llama_cpp.llama_model_quantize_default_params()
    how.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    how.allow_requantize = True
    if llama_cpp.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(how)):
        sys.exit(f"{source} cannot be converted to {kind}")


def measure(file: str, start: str, generated: str, prompt: str, rounds: str) -> None:
    """Print perplexity on the windows of tokens in standard input, speeds, and peak memory as JSON."""
    windows = np.array(json.load(sys.stdin))
    count, length = int(generated), windows.shape[1]
    options = {"model_path": file, "n_threads": os.cpu_count(), "n_threads_batch": os.cpu_count(), "verbose": False}
    model = llama_cpp.Llama(**options, n_ctx=int(prompt), n_batch=int(prompt))

    def generate() -> None:
        model.reset()
        model.eval(list(range(int(start))))
        for _ in range(count):
            logits = llama_cpp.llama_get_logits_ith(model.ctx, -1)
            model.eval([int(np.ctypeslib.as_array(logits, (model.n_vocab(),)).argmax())])

    def read() -> None:
        model.reset()
        model.eval(list(range(int(prompt))))

    found = {
        "generation": count / seconds(generate, int(rounds)),
        "prompt": int(prompt) / seconds(read, int(rounds)),
        "memory": peak(),
    }
    del model
    model = llama_cpp.Llama(**options, n_ctx=length, n_batch=length, logits_all=True)
    losses = []
    for window in windows:
        model.reset()
        model.eval(window.tolist())
        logits = np.asarray(model.scores[: length - 1], dtype=np.float64)
        peaks = logits.max(1, keepdims=True)
        normaliser = peaks[:, 0] + np.log(np.exp(logits - peaks).sum(1))
        losses.append(np.mean(normaliser - logits[np.arange(length - 1), window[1:]]))
    print(json.dumps({**found, "perplexity": float(np.exp(np.mean(losses)))}))


def seconds(work: Callable[[], None], rounds: int) -> float:
    """Return the median duration, after one run that is not counted."""
    found = []
    for _ in range(rounds + 1):
        begin = time.perf_counter()
        work()
        found.append(time.perf_counter() - begin)
    return median(found[1:])


def peak() -> int:
    """Return the peak memory of this process in bytes."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))


if __name__ == "__main__":
    work = convert if sys.argv[1] == "convert" else measure
    work(*sys.argv[2:])
