"""What can be wrong with a training run, each with a message for the person at the terminal."""

from __future__ import annotations


class TrainingError(Exception):
    """Base of every error the training room raises about its input; the message says what to do."""


class DataError(TrainingError):
    """Images are missing, unreadable or not laid out as expected."""


class WorkerError(DataError):
    """A process that reads images has ended before its work was done."""


class SettingsError(TrainingError):
    """A setting has a value it cannot have, or does not go with another one."""


class RecipeError(SettingsError):
    """A recipe file cannot be read, or says what it cannot: names are those of the file, without dashes."""


class CheckpointError(TrainingError):
    """A checkpoint is missing, damaged, or belongs to another run."""


class OutputError(TrainingError):
    """A file of the run folder cannot be written."""


class DivergedError(TrainingError):
    """The loss is no longer finite."""


class Interrupted(TrainingError):
    """The run was stopped by Ctrl-C or SIGTERM after its state had been written to a checkpoint.

    Attributes:
        signal: number of the signal.
    """

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.signal = signal
