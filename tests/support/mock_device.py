"""A device that is not the CPU, ``torch.device("mock")``, for machines without one; its rules are in the C++ source."""

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

import torch
from huggingface_hub import constants
from packaging.version import Version

MOCK = "mock"
_OLDEST = Version("2.13")  # earlier ones have not been tried: what torch asks of such a device is no stable interface
_SOURCE = Path(__file__).with_suffix(".cpp")
_OURS = (str(Path(__file__).parents[2] / "lit_prune") + os.sep, str(Path(__file__).parents[2] / "callbacks") + os.sep)
_LISTENER = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_char_p)


class HostReads(Counter[str]):
    """How often each line of the project made the host wait for the device, such as ``ops/masks.py:90 item``."""


@cache
def load() -> ctypes.CDLL:
    """Give this process the device, for good: torch then takes it for the machine's accelerator.

    Call it before the first backward pass, for which torch starts a thread for every device that it knows of.
    """
    torch.utils.rename_privateuse1_backend(MOCK)
    torch._register_device_module(MOCK, _module())
    library = ctypes.CDLL(str(_compiled()))
    library.mock_device_register()
    return library


def loaded() -> bool:
    """Whether this process has the device."""
    return bool(load.cache_info().currsize)


def missing() -> str | None:
    """Return what a machine lacks for the device; None = nothing."""
    if sys.platform != "linux":
        return "the mock device is compiled for Linux"
    if Version(torch.__version__) < _OLDEST:
        return f"the mock device is written for torch {_OLDEST} or later"
    return None


@contextmanager
def host_reads(refuse: bool = False) -> Iterator[HostReads]:
    """Count what makes the host wait for the device: items, copies to the host, shapes that depend on values.

    Args:
        refuse: raise ``RuntimeError`` there instead.
    """
    found = HostReads()

    @_LISTENER
    def listen(what: bytes) -> int:
        found[f"{_line(sys._getframe())} {what.decode()}"] += 1
        return int(refuse)

    load().mock_device_listen(listen)
    try:
        yield found
    finally:
        load().mock_device_listen(_LISTENER())


def _line(frame: FrameType | None) -> str:
    """Return the innermost line of the project that a call comes from."""
    while frame:
        file = os.path.realpath(frame.f_code.co_filename)
        for folder in _OURS:
            if file.startswith(folder):
                return f"{file.removeprefix(folder)}:{frame.f_lineno}"
        frame = frame.f_back
    return "elsewhere"


def _module() -> ModuleType:
    """Return what torch, and libraries that ask it, look for in ``torch.cuda`` on another machine."""
    module: Any = ModuleType(f"torch.{MOCK}")
    module.is_available = lambda: True
    module.is_initialized = lambda: True
    module.device_count = lambda: 1
    module.current_device = lambda: 0
    module.set_device = lambda device: None
    module.manual_seed_all = lambda seed: None
    module.get_rng_state = lambda device=None: torch.get_rng_state()
    module.set_rng_state = lambda state, device=None: None
    module.get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]
    module._is_in_bad_fork = lambda: False

    def device(which: object) -> AbstractContextManager[None]:
        return nullcontext()

    module.device = device
    return module


def _compiled() -> Path:
    """Return the path of the library, after compiling it if this source has not been compiled with this torch."""
    compiler = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("c++")
    assert compiler, "the tests need g++"
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    home = Path(torch.__file__).parent
    flags = ["-std=c++20", "-O0", "-fPIC", "-shared", f"-I{home / 'include'}", f"-L{home / 'lib'}"]
    flags += [f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"]
    key = "\0".join((_SOURCE.read_text(), compiler, version, torch.__version__, *flags))
    path = (
        Path(constants.HF_HOME).expanduser() / "lit-prune" / f"mock-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    )
    if path.is_file():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        built = Path(folder) / path.name
        command = [compiler, *flags, str(_SOURCE), "-o", str(built), "-ltorch_cpu", "-lc10"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert not done.returncode, done.stderr
        built.replace(path)  # at once, for other processes that compile it too
    return path
