"""What a run that is resumed takes from its checkpoint before it loads anything, and what it refuses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..config.train_config import TrainConfig, differences, to_dict
from ..errors import CheckpointError, TrainingError
from . import saving
from .processes import Alone
from .run_lock import RunLock
from .stored import taken_from
from .writing import remove_partial

#: Settings that follow from the number of epochs where they are not given.
LAID_OUT = ("warmup", "schedule")


def settings(path: Path, state: Mapping[str, Any], config: TrainConfig, left_open: set[str]) -> TrainConfig:
    """The resolved ``config`` with what it leaves to the checkpoint.

    Args:
        state: of the checkpoint.
        left_open: those of ``LAID_OUT`` that were not given.

    Raises:
        CheckpointError: if ``config`` has other settings than the checkpoint; ``epochs`` may be other ones, if no more
            have begun.
    """
    before = state["settings"]
    # The checkpoint has the weights, the settings where they came from.
    known = {"network_weights": before.get("network_weights")} if config.network_weights is None else {}
    known |= {name: before[name] for name in left_open & before.keys()}
    with taken_from(path, "settings"):
        config = replace(config, **known)
        changed = differences(before, to_dict(config))
    if changed:
        raise CheckpointError(f"{path} belongs to a run with other settings:\n  " + "\n  ".join(changed))
    begun = state["progress"]["epochs"] + (state["epoch_sums"]["steps"] > 0)
    if config.recipe_values.epochs < begun:
        raise CheckpointError(f"{path} is in epoch {begun}: --epochs {config.epochs} is less than that")
    return config


def refuse_other_data(path: Path, before: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    """CheckpointError if the images are not those of the checkpoint."""
    with taken_from(path, "facts about the images"):
        changed = [f"data: {k} was {v!r}, now {facts.get(k)!r}" for k, v in before.items() if facts.get(k) != v]
    if changed:
        raise CheckpointError(f"{path} belongs to a run with other settings:\n  " + "\n  ".join(changed))


def refuse_other_tokens(output: Path, checksum: str) -> None:
    """CheckpointError if a run folder holds a run on other data than those of ``checksum``, whose tokens are kept."""
    if (path := saving.find(output)) is not None:
        before = saving.read(path)["data"].get("checksum")
        refuse_other_data(path, {"checksum": before}, {"checksum": checksum})


@contextmanager
def own_folder(output: Path, stands_on: tuple[Any, ...] | None, team: Alone) -> Iterator[None]:
    """A run folder in which no other run writes meanwhile, without what killed runs have left half-written.

    Args:
        stands_on: stamp of the checkpoint that the run goes on from; None for a new run.

    Raises:
        TrainingError: in all processes of ``team``; see ``Trainer.fit``.
    """
    with ExitStack() as stack:
        refused: TrainingError | None = None
        if team.first:
            try:
                stack.enter_context(RunLock(output))
                if stands_on is None:
                    saving.refuse_earlier_run(output)
                elif saving.stamp(output) != stands_on:
                    raise CheckpointError(f"{output}: another process went on with this run; resume it again")
                remove_partial(output)
            except TrainingError as error:
                refused = error
        if (found := team.some(refused)) is not None:
            raise found
        yield
