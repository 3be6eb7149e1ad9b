"""A data loader that resumes in the middle of an epoch, after the last batch before a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

from torch.utils.data import DataLoader


class ResumableLoader(DataLoader[Any]):
    """Counts the batches of an epoch that it has yielded, and skips as many after resuming.

    Lightning saves ``state_dict`` with the state of its loops, and so resumes a run in the middle of an epoch. The
    sampler must return the same order every time an epoch is started, as ``DistributedSampler`` does. Skipped batches
    are loaded and dropped, which is cheap only for a dataset in memory.
    """

    def __init__(self, *args: Any, limit: float = 1.0, **kwargs: Any) -> None:
        """Accept the arguments of ``DataLoader``, so that Lightning can re-create the loader with another sampler.

        Args:
            args: positional arguments of ``DataLoader``.
            limit: Lightning's ``limit_train_batches``: number (int) or fraction (float) of the batches in an epoch.
            kwargs: keyword arguments of ``DataLoader``.
        """
        super().__init__(*args, **kwargs)
        self.limit = limit
        self._start = 0
        self._given = 0

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Yield the batches of an epoch, or its remaining batches after ``load_state_dict``."""
        self._given, self._start = self._start, 0
        for batch in islice(super().__iter__(), self._given, None):
            self._given += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Return the number of batches yielded in this epoch; 0 at its end."""
        epoch = min(len(self), self.limit) if isinstance(self.limit, int) else int(len(self) * self.limit)
        return {"given": self._given % max(epoch, 1)}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Continue after the batches that had been yielded."""
        self._start = state_dict["given"]
