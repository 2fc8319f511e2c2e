"""A stand-in for a CUDA graph on the CPU: operators are recorded once and repeated on the same tensors.

As with the real one, Python does not run again at a replay, recording changes nothing, and a value read on the host
makes recording fail. What it does not show is memory reuse and the order of streams.
"""

from __future__ import annotations

import os
import traceback
from contextlib import contextmanager
from typing import ClassVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

HOST_READ = torch.ops.aten._local_scalar_dense.default


class _Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.tape = []
        self.made = set()  # storages made while recording
        self.before = {}  # those that existed, with their contents

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is HOST_READ:
            raise RuntimeError("operation not permitted when stream is capturing")
        inputs = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)]
        for tensor in inputs:
            key = tensor.untyped_storage()._cdata
            if key not in self.made and key not in self.before:
                self.before[key] = (tensor, tensor.untyped_storage().clone())
        out = func(*args, **kwargs)
        known = {t.untyped_storage()._cdata for t in inputs}
        fresh = [t for t in tree_flatten(out)[0] if isinstance(t, Tensor) and t.untyped_storage()._cdata not in known]
        self.made.update(t.untyped_storage()._cdata for t in fresh)
        self.tape.append((func, args, kwargs, fresh))
        return out

    def undo(self):
        for tensor, contents in self.before.values():
            tensor.untyped_storage().copy_(contents)


class _Watch(TorchDispatchMode):
    def __init__(self, note):
        super().__init__()
        self.note = note

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is HOST_READ:
            here = [frame for frame in traceback.extract_stack() if frame.filename not in (__file__, torch.__file__)]
            user = [frame for frame in here if not frame.filename.startswith(os.path.dirname(torch.__file__))]
            self.note(f"{user[-1].filename}:{user[-1].lineno}")
        return func(*args, **(kwargs or {}))


@contextmanager
def watch_for_reads(note):
    """In place of ``auglocal_ext.step.capture.watch_for_waits``: what waits for a GPU reads a value on the CPU."""
    with _Watch(note):
        yield


class OperatorTape:
    """Has the interface of ``auglocal_ext.step.capture.CapturedGraph``; counts ``made`` ones, keeps their ``streams``.

    ``recording`` tells whether one is being made, for what goes wrong then alone.
    """

    made = 0
    streams: ClassVar[list] = []
    recording = False

    def __init__(self, run, pool, stream):
        OperatorTape.made += 1
        OperatorTape.streams.append(stream)
        recorder = _Recorder()
        OperatorTape.recording = True
        try:
            with recorder:
                self._outputs = run()
        finally:
            OperatorTape.recording = False
            recorder.undo()
        self._tape = recorder.tape

    def replay(self):
        with torch.no_grad():
            for func, args, kwargs, fresh in self._tape:
                out = func(*args, **kwargs)
                known = {t.untyped_storage()._cdata for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)}
                again = [
                    t for t in tree_flatten(out)[0] if isinstance(t, Tensor) and t.untyped_storage()._cdata not in known
                ]
                for old, new in zip(fresh, again, strict=True):
                    old.copy_(new)
        return self._outputs
