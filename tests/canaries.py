"""What the canaries of ``auglocal_ext/_torch.py`` share."""

from __future__ import annotations

from auglocal_ext import _torch as private

#: Names in ``_torch.py`` that have a canary.
GUARDED: set[str] = set()


def canary(*names):
    """Marks a test as the canary of ``names``."""

    def mark(test):
        GUARDED.update(names)
        return test

    return mark


class Writes(private.TorchDispatchMode):
    """Notes the operators that run, and those among them that write to an argument."""

    def __init__(self):
        super().__init__()
        self.names, self.written = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(private.schema(func).name)
        if any(each.alias_info is not None and each.alias_info.is_write for each in private.schema(func).arguments):
            self.written.append(private.schema(func).name)
        assert bool(self.written[-1:] == self.names[-1:]) == private.schema(func).is_mutable
        return func(*args, **(kwargs or {}))
