"""The error of a process whose exchange with other processes fails."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def waiting_for(failed: str, where: str, through: tuple[type[RuntimeError], ...] = ()) -> Iterator[None]:
    """Name a failed exchange with other replicas: torch's own error names neither what failed nor when.

    Args:
        failed: what has not happened, a clause.
        where: this process, as in ``"rank 1, batch 7"``; its rank if empty.
        through: errors that say enough themselves.
    """
    try:
        yield
    except through:
        raise
    except RuntimeError as error:
        where = where or f"rank {torch.distributed.get_rank()}"
        raise RuntimeError(
            f"{failed} (this is {where}): another replica has ended, or works on another step for longer than the "
            f"time-out of the process group. {error}"
        ) from error
