"""What a run writes about its epochs, in the one process that writes: log.csv, TensorBoard, lines for the terminal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from .logs import CsvLog, EpochRow, EpochTable, TensorBoardLog

LOG = "log.csv"


class Records:
    """The log of these columns, the scalars and the table of a run that goes on after ``epoch``."""

    def __init__(
        self, output: Path, epoch: int, columns: Sequence[str], table: EpochTable, say: Callable[[str], None]
    ) -> None:
        self._log = CsvLog(output / LOG, epoch, columns)
        self._board = TensorBoardLog(output / "tensorboard", epoch)
        self._table, self._say, self._headed = table, say, False
        self._say_note()

    def add(self, row: EpochRow) -> None:
        """Write the row; :meth:`show` prints it once the epoch is saved."""
        self._log.add(row)
        self._board.add(row)
        self._say_note()

    def _say_note(self) -> None:
        if self._board.note:
            self._say(self._board.note)
            self._board.note = None

    def show(self, row: EpochRow, outcome: str | None) -> None:
        """Print the row's line; above the first the heading, and how steps ran."""
        if not self._headed:
            if outcome:
                self._say(outcome)
            self._say(self._table.heading())
            self._headed = True
        self._say(self._table.line(row))

    def close(self) -> None:
        self._board.close()
