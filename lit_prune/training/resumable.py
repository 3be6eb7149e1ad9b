"""A data loader that goes on, in the middle of an epoch, with the batch at which a checkpoint was written."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader, Dataset, DistributedSampler


class _Order(DistributedSampler[Any]):
    """The order of one process's windows in an epoch; a new one for each, the same for any number of restarts."""

    skip = 0
    """Windows to leave out at the beginning of the next epoch."""

    def __iter__(self) -> Iterator[Any]:
        """Return the indices that are left."""
        indices = list(super().__iter__())
        return iter(indices[self.skip :])


class ResumableLoader(DataLoader[Any]):
    """Loads shuffled batches, each process its share, and knows how many of an epoch's batches it has given out.

    Lightning saves ``state_dict`` with its loops, and so resumes a run in the middle of an epoch.
    """

    def __init__(
        self, dataset: Dataset[Any], batch_size: int, seed: int, processes: int, rank: int, num_workers: int
    ) -> None:
        """Prepare the order of the windows.

        Args:
            dataset: what to load from.
            batch_size: items per batch.
            seed: of the order; the epoch is added to it.
            processes: number of processes that share the items out.
            rank: of this one.
            num_workers: processes that load batches.
        """
        order = _Order(dataset, processes, rank, shuffle=True, seed=seed)
        super().__init__(dataset, batch_size, sampler=order, num_workers=num_workers)
        self._order = order
        self._start = 0
        self._given = 0

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Yield the batches of an epoch, or those that are left of it after ``load_state_dict``."""
        self._given, self._start = self._start, 0
        self._order.skip = self._given * (self.batch_size or 1)
        for batch in super().__iter__():
            self._given += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Return how many batches of this epoch have been given out; 0 at its end."""
        return {"given": self._given % len(self)}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Go on after the batches that have been given out."""
        self._start = state_dict["given"]
