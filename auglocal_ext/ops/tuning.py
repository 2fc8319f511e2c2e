"""The automatic choice measures: at the first call of a form its providers are timed, and the fastest is kept.

A form is an op with a class of shapes, a dtype, a layout and a kind of device. All calls of a form in a process run the
same provider, from the first on. Its decision comes from, in this order: a checkpoint that was loaded, the other
processes of the group, the disk, a measurement.

Nothing is measured where that would disturb or be recorded: under a dispatch mode (fake tensors, a ``MemoryMeter``),
``torch.compile``, ``torch.func``, tracing or CUDA graph capture, in deterministic mode, and in a DataLoader's workers.
A measurement draws no random numbers, records nothing for autograd, and its tensors take no more memory than the call
that it precedes and the call's backward pass, except for ``pooled_cross_entropy`` of 16-bit maps on a CPU.
"""

from __future__ import annotations

import math
import os
import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from datetime import datetime, timezone
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._torch import current_dispatch_mode, default_store, transforms_active
from . import decisions, providers

ENVIRONMENT = "AUGLOCAL_TUNE"

#: Of two providers that differ by less, the fixed order decides.
TIE = 1.05
#: Seconds for each provider, after its first runs.
BUDGET = 3e-3
#: Elements of the feature map that is timed.
LARGEST = {"cpu": 2**20, "cuda": 2**24}


class Trial(NamedTuple):
    """How an op is timed.

    Attributes:
        prepare: ``prepare(kernel, x, beside)`` returns a function that runs forward and backward pass once, and keeps
            nothing. ``kernel(name)`` is a kernel of the provider, ``x`` the first images of the call's feature map,
            ``beside`` what the op gives the choice besides.
        share: the trial takes one of so many images, for its tensors must not need more memory than the call and its
            backward pass. Where a batch has fewer, nothing is timed.
    """

    prepare: Callable[[Callable[[str], Any], Tensor, tuple[Any, ...]], Callable[[], None]]
    share: int


#: Classes of tensors that are sure to have sizes that are numbers; only of these are forms made.
PLAIN = Tensor, torch.nn.Parameter

#: By op; one without a trial keeps the fixed order.
TRIALS: dict[str, Trial] = {}

#: What calls have found, by whatever makes a call differ; forgotten when a decision changes.
lookups: dict[tuple[Any, ...], Any] = {}
#: How often they were forgotten.
generation = 0

_decided: dict[str, str] = {}
_adopted: set[str] = set()  # forms whose decision came from a checkpoint
_lock = threading.RLock()
_orphan = False  # forked within a process group, to which only the parent belongs


def remember(key: tuple[Any, ...], found: Any) -> None:
    """Keep what a call has found; of varying shapes only so many."""
    if len(lookups) >= 4096:
        lookups.clear()
    lookups[key] = found


def forget_lookups() -> None:
    """To be called when a decision has changed."""
    global generation
    lookups.clear()
    generation += 1


def pick(op: str, x: Tensor, requested: str | None, beside: tuple[Any, ...] = ()) -> tuple[str, bool]:
    """The provider that runs ``op`` for x, and whether it is to be remembered for this form.

    Raises as ``providers.choose``.
    """
    fixed = providers.choose(op, x.device, x.dtype, requested)
    if torch.jit.is_tracing():  # sizes are tensors
        return fixed, False
    if type(x) not in PLAIN or providers.by_name(op, x.device, requested) is not None:
        return fixed, True
    rivals = providers.rivals(op, x.device, x.dtype)
    if len(rivals) < 2 or op not in TRIALS or x.dim() < 2 or not x.numel():
        return fixed, True
    with _lock:
        return _decision(form_of(op, x), op, x, fixed, rivals, beside)


def form_of(op: str, x: Tensor) -> str:
    """Name of a form; images, channels and positions each stand for all numbers down to half of it, excluded."""
    sizes = len(x), x.shape[1], x.shape[2:].numel()
    shape = "x".join(str(1 << (size - 1).bit_length()) for size in sizes)
    if x.is_contiguous():
        layout = "contiguous"
    else:
        layout = "channels-last" if x.movedim(1, -1).is_contiguous() else "strided"
    return f"{op} {str(x.dtype).removeprefix('torch.')} {layout} {shape} {x.device.type}"


def decided() -> dict[str, str]:
    """The provider of each form that this process has used, or taken from a checkpoint; for a checkpoint."""
    with _lock:
        return dict(_decided)


def adopt(recorded: Mapping[str, str]) -> bool:
    """Use the decisions of a checkpoint from now on, where their providers are available.

    Returns whether they differ from what was decided: what was captured before is then out of date.

    Raises ValueError for what is no record of decisions.
    """
    if not isinstance(recorded, Mapping) or not all(isinstance(text, str) for row in recorded.items() for text in row):
        raise ValueError(f"expected the provider of each form, by name, got {recorded!r:.60}")
    with _lock:
        changed = any(_decided.get(form, name) != name for form, name in recorded.items())
        _decided.update(recorded)
        _adopted.update(recorded)
        forget_lookups()
    return changed


def forget() -> None:
    """Find decisions anew, except those of a checkpoint: to be called where a process has joined a group."""
    with _lock:
        for form in _decided.keys() - _adopted:
            del _decided[form]
        forget_lookups()


def _decision(
    form: str, op: str, x: Tensor, fixed: str, rivals: Sequence[str], beside: tuple[Any, ...]
) -> tuple[str, bool]:
    known = _decided.get(form)
    if _switched_off() and (known is None or form in _adopted):
        return _settled(form, fixed)
    if known is not None and known in rivals:
        return _settled(form, known)
    if torch.are_deterministic_algorithms_enabled():
        return _settled(form, fixed)
    where = decisions.environment(x.device)
    found = decisions.read(form, where)
    if found is not None and found.seconds.keys() == set(rivals):
        return _settled(form, _agreed(form, found.provider, rivals, fixed))
    images = _images(x, TRIALS[op].share)
    if not images or torch.utils.data.get_worker_info() is not None:  # whose process loads data, and is waited for
        return _settled(form, _agreed(form, fixed, rivals, fixed))
    if not _may_measure(x):
        return fixed, False
    seconds = _measured(op, x.detach()[:images], rivals, beside)
    name = _agreed(form, winner(seconds), rivals, fixed)
    if name == winner(seconds) and math.isfinite(max(seconds.values())):
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        decisions.write(decisions.Decision(form, name, seconds, now), where)
    return _settled(form, name)


def _switched_off() -> bool:
    value = os.environ.get(ENVIRONMENT, "")
    if value not in ("", "0", "1"):
        raise ValueError(f"{ENVIRONMENT}={value!r}: expected 0, with which nothing is timed, or 1")
    return value == "0"


def _settled(form: str, name: str) -> tuple[str, bool]:
    _decided[form] = name
    return name, True


def _agreed(form: str, found: str, rivals: Sequence[str], fixed: str) -> str:
    """What all processes of a group use: what the first of them has found, which need not be rank 0.

    No process waits for another. In a pipeline they run other forms, so one that waited could wait for ever.
    """
    if _orphan or not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return found
    if torch.distributed.get_world_size() == 1:
        return found
    store = default_store()
    if store is None:  # MPI's processes have none
        return fixed
    try:
        agreed = str(store.compare_set(f"auglocal_ext: provider of {form}", "", found).decode())
    except NotImplementedError:  # a group without other processes behind it, as torch's "fake" one
        return fixed
    except torch.distributed.DistError as error:
        warnings.warn(
            f"the process that knows the provider of {form!r} cannot be reached ({error}); {fixed!r} is used here, "
            "where others may use another, whose last bits may differ",
            stacklevel=2,
        )
        return fixed
    return agreed if agreed in rivals else fixed


def _may_measure(x: Tensor) -> bool:
    """Whether work of our own may run now, beside the call."""
    if x.device.type not in LARGEST or current_dispatch_mode() is not None or transforms_active():
        return False
    if x.device.type == "cpu":
        return True
    with torch.cuda.device(x.device):
        return not torch.cuda.is_current_stream_capturing()


def _images(x: Tensor, share: int) -> int:
    """How many images are timed; 0 where even one would take too much memory."""
    return min(len(x) // share, max(LARGEST[x.device.type] * len(x) // x.numel(), 1))


def _measured(op: str, x: Tensor, rivals: Sequence[str], beside: tuple[Any, ...]) -> dict[str, float]:
    """Seconds of each provider, in the fixed order; infinite for one that fails."""
    runs = {}
    on = torch.cuda.device(x.device) if x.is_cuda else nullcontext()
    with on, torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        for name in rivals:
            try:
                run = TRIALS[op].prepare(partial(_kernel, name), x, beside)
                run()  # the first run may compile, and makes what libraries keep
                runs[name] = run
            except Exception as error:
                warnings.warn(
                    f"{op}: provider {name!r} is left out of the automatic choice, because it failed when it was timed "
                    f"({type(error).__name__}: {error})",
                    stacklevel=2,
                )
        return dict.fromkeys(rivals, math.inf) | (race(runs, x.device) if runs else {})


def race(runs: Mapping[str, Callable[[], None]], device: torch.device) -> dict[str, float]:
    """Seconds of each run, the least of several; they take turns, in both orders."""
    least = {name: seconds_of(run, device) for name, run in runs.items()}
    turns = min(max(int(BUDGET / max(least.values())), 3), 25)
    for turn in range(turns):
        for name in [*runs][:: 1 if turn % 2 else -1]:
            least[name] = min(least[name], seconds_of(runs[name], device))
    return least


def seconds_of(run: Callable[[], None], device: torch.device) -> float:
    """Time of one call; on CUDA the host waits for it."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3
    begun = time.perf_counter()
    run()
    return time.perf_counter() - begun


def winner(seconds: Mapping[str, float]) -> str:
    """The fastest provider; of those within a tie of it, the first."""
    least = min(seconds.values())
    return next(name for name, each in seconds.items() if each <= TIE * least)


def _kernel(provider: str, name: str) -> Any:
    return getattr(getattr(torch.ops.auglocal_ext, name), provider)


def _note_fork() -> None:
    global _orphan, _lock
    _lock = threading.RLock()
    _orphan = torch.distributed.is_available() and torch.distributed.is_initialized()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_note_fork)
