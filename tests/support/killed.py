"""Prunings that are stopped on their way."""

from lit_prune.pruning.progress import OnProgress, Position


class KilledError(Exception):
    """Stands for the end of the process."""


def kill_at(block: int, stage: str | None = None) -> OnProgress:
    """Return an ``on_progress`` that raises ``KilledError`` at a stage of a block, or at its first one."""

    def kill(position: Position) -> None:
        if position.block == block and stage in (None, position.stage):
            raise KilledError

    return kill
