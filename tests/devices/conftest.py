"""The tests of this folder run in one process of their own, which alone has the device: torch would offer it to all.

Fixtures are set up in both processes.
"""

from pathlib import Path

import pytest

from support import in_one_process, mock_device
from support.shared import Shared

_HERE = Path(__file__).parent


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Let the other process call the tests, all that were asked for, and report what became of this one."""
    if mock_device.loaded():
        return None
    shared: Shared = pyfuncitem.funcargs["shared"]
    ours = [item.nodeid for item in pyfuncitem.session.items if item.path.is_relative_to(_HERE)]
    root = pyfuncitem.config.rootpath
    folder = shared.once("devices", lambda folder: in_one_process.run(folder, root, mock_device.load, ours))
    if failed := in_one_process.failure(folder, pyfuncitem.nodeid):
        pytest.fail(failed, pytrace=False)
    return True


@pytest.fixture(autouse=True)
def _shared(shared: Shared) -> None:
    """Results of the other process."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests where the device cannot be made."""
    reason = mock_device.missing()
    for item in items:
        if reason and item.path.is_relative_to(_HERE):
            item.add_marker(pytest.mark.skip(reason=reason))
