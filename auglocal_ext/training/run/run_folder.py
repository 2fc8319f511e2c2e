"""Whether a run folder can be made and written, where its files are no data."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from ..errors import SettingsError
from .run_lock import unusable


def refuse_unusable(output: Path) -> None:
    """SettingsError if a run folder cannot be made there or written; nothing is made."""
    if output.parts[:1] and output.parts[0].startswith("~"):
        raise SettingsError(f"--output {output}: there is no user {output.parts[0][1:]}; choose another")
    for place in (output, *output.parents):
        try:
            is_folder = stat.S_ISDIR(os.stat(place).st_mode)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except (OSError, ValueError) as error:  # such as too long a name
            raise SettingsError(unusable(output, "cannot be made", error)) from error
        how = "cannot be written" if place == output and is_folder else "cannot be made"
        if not is_folder:
            raise SettingsError(unusable(output, how, f"{place} is no folder"))
        if not os.access(place, os.W_OK | os.X_OK):
            raise SettingsError(unusable(output, how, f"{place} is read-only"))
        return


def refuse_among_data(output: Path, data: Path, *, text: bool) -> None:
    """SettingsError for a run folder whose pictures, or samples of text, this run or the next would read as data."""
    folder = output.resolve()
    for place in (data,) if text else (data / "train", data / "test"):
        whole = place.resolve()
        if not place.is_dir() or not folder.is_relative_to(whole):
            continue
        if text and any(part.startswith(".") for part in folder.relative_to(whole).parts):  # left out of a text
            continue
        what = "samples of text" if text else "pictures"
        raise SettingsError(
            f"--output {output} lies in {place}, where the {what} that a run writes would be read as data: choose a "
            "folder outside of it"
        )
