"""Private names of torch.distributed."""

from __future__ import annotations

from typing import Any

from torch.distributed import distributed_c10d


def default_store() -> Any:
    """Return the key-value store of the default process group, which has no public name."""
    return distributed_c10d._get_default_store()
