"""Products of matrices whose memory ends at a page that nobody may touch, so that a read past their end is a crash."""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import traceback
import warnings
from collections.abc import Callable

import torch
from torch import Tensor


def fenced(like: Tensor) -> Tensor:
    """The same values, contiguous, right before a page without access."""
    size = like.numel() * like.element_size()
    room = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, room + mmap.PAGESIZE)
    fence = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + room
    assert ctypes.CDLL(None, use_errno=True).mprotect(ctypes.c_void_p(fence), mmap.PAGESIZE, 0) == 0
    found = torch.frombuffer(memory, dtype=like.dtype, count=like.numel(), offset=room - size).view(like.shape)
    return found.copy_(like)


def survives(run: Callable[[], None]) -> None:
    """``run`` passes in a forked process, in which every product of two matrices on the CPU is fenced."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside threads, none of which run needs
        child = os.fork()
    if child == 0:
        status = 1
        try:
            signal.alarm(300)
            warnings.simplefilter("ignore", UserWarning)  # of a kernel of torch that is replaced
            torch.set_num_threads(1)
            library = torch.library.Library("aten", "IMPL")
            library.impl("mm", lambda a, b: fenced(torch.bmm(a[None], b[None])[0]), "CPU")
            run()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status >= 0, f"ended by {signal.Signals(-status).name}: memory past the end of a product was touched"
    assert status == 0, "failed: see its traceback on stderr"
