"""``log.csv`` as it lies in a run folder, which a crash may have cut short and other programs may have edited."""

from __future__ import annotations

import csv
from pathlib import Path

from ..errors import CheckpointError


def read_rows(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Names of the columns, and the rows; a last row that was cut short is left out.

    Raises:
        CheckpointError: naming the line, if it holds no numbers, more or fewer of them than the others, or an epoch
            that does not come after the one above.
    """
    number = 1
    try:
        text = path.read_text(encoding="utf-8")
        header, *lines = text[: text.rfind("\n") + 1].splitlines() or [""]
        names = next(csv.reader([header]), [])
        rows: list[dict[str, str]] = []
        for number, line in enumerate(lines, 2):  # noqa: B007
            cells = next(csv.reader([line]), [])
            if len(cells) != len(names):
                raise ValueError(f"expected {len(names)} columns, found {len(cells)}")
            row = dict(zip(names, cells, strict=True))
            _check(row, rows[-1] if rows else {})
            rows.append(row)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, csv.Error) as error:
        raise CheckpointError(
            f"{path}, line {number}: damaged ({error}); move it away to go on without the epochs in it"
        ) from error
    return names, rows


def _check(row: dict[str, str], above: dict[str, str]) -> None:
    """ValueError for a row that no run has written below the one above."""
    for name, text in row.items():
        numbers = [float(part) for part in text.split()]
        expected = len(above[name].split()) if above else max(1, len(numbers))
        if len(numbers) != expected:
            raise ValueError(f"expected {expected} numbers as {name}, found {len(numbers)}")
    if "epoch" in row and int(row["epoch"]) <= int(above.get("epoch", 0)):
        raise ValueError(f"epoch {row['epoch']} after {above.get('epoch', 'none')}")
