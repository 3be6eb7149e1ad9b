"""What the tests of reports need."""

import pytest
from matplotlib.figure import Figure

from support import figures


@pytest.fixture(autouse=True)
def _every_figure_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Figure, "savefig", figures.savefig)
