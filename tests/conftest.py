"""Settings of every run; fixtures are in ``support/fixtures.py``."""

import os
import sys
from contextlib import ExitStack

import pytest
from hypothesis import settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test never waits for a hub
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run in parallel, on small models
os.environ.setdefault("TRITON_INTERPRET", "1")  # runs Triton's kernels on CPUs, if it is set before any import

# Nothing here is timed; CI tries the same examples each time, a person's runs look for new ones.
settings.register_profile("project", deadline=None, max_examples=50, derandomize=bool(os.environ.get("CI")))
settings.load_profile("project")

pytest.register_assert_rewrite("support")
from support.fork_server import running  # noqa: E402


def pytest_configure(config: pytest.Config) -> None:
    """Start a server for the tests' own processes, and import the fixtures, unless others run the tests.

    The imports take ten seconds.
    """
    first = not hasattr(config, "workerinput")
    if first and sys.platform == "linux":
        server = ExitStack()
        server.enter_context(running())
        config.add_cleanup(server.close)
    if not first or not config.getoption("numprocesses", 0):
        config.pluginmanager.import_plugin("support.fixtures")
