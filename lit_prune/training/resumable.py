"""A data loader that goes on, in the middle of an epoch, with the batch at which a checkpoint was written."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

from torch.utils.data import DataLoader


class ResumableLoader(DataLoader[Any]):
    """Knows how many batches of an epoch it has yielded, and can leave as many out.

    Lightning saves ``state_dict`` with its loops, and so resumes a run in the middle of an epoch. The order of an epoch
    is the sampler's: it must be the same whenever the epoch begins anew, as that of a ``DistributedSampler`` is. The
    batches that are left out are loaded and dropped, which is only cheap for a dataset in memory.
    """

    def __init__(self, *args: Any, limit: float = 1.0, **kwargs: Any) -> None:
        """Take the arguments of a ``DataLoader``, with which Lightning can build it anew around another sampler.

        Args:
            args: of a ``DataLoader``.
            limit: Lightning's ``limit_train_batches``: how many batches (int), or which share of them (float), make an
                epoch.
            kwargs: of a ``DataLoader``.
        """
        super().__init__(*args, **kwargs)
        self.limit = limit
        self._start = 0
        self._given = 0

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Yield the batches of an epoch, or those that are left of it after ``load_state_dict``."""
        self._given, self._start = self._start, 0
        for batch in islice(super().__iter__(), self._given, None):
            self._given += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Return how many batches of this epoch have been yielded; 0 at its end."""
        epoch = min(len(self), self.limit) if isinstance(self.limit, int) else int(len(self) * self.limit)
        return {"given": self._given % max(epoch, 1)}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Go on after the batches that have been yielded."""
        self._start = state_dict["given"]
