"""Whether a run folder can be made and written."""

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
