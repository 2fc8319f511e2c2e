"""A bar on standard error while something is counted."""

from __future__ import annotations

from typing import Any


def progress_bar(
    total: int | None, description: str, unit: str, show: bool, initial: int = 0, layout: str | None = None
) -> Any:
    """A tqdm bar on standard error, which stays silent where that is no terminal, or unless ``show``.

    ``layout`` is tqdm's ``bar_format``.
    """
    from tqdm import tqdm

    return tqdm(
        total=total,
        initial=initial,
        desc=description,
        unit=unit,
        unit_scale=True,
        disable=None if show else True,
        dynamic_ncols=True,
        leave=False,
        bar_format=layout,
    )
