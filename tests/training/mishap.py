"""The command line, with a mishap in one step of one of its processes: ``MISHAP=rank:step:what``."""

from __future__ import annotations

import os
import signal
import sys

from auglocal_ext.cli import main
from auglocal_ext.training.run.local_learner import LocalLearner

rank, at, what = os.environ["MISHAP"].split(":")
plain, steps = LocalLearner.step, 0


def step(self, images, labels):
    global steps
    steps += 1
    if steps == int(at) and os.environ["RANK"] == rank and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        if what == "error":
            raise KeyError("a mishap")
        if what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        # As a terminal or a scheduler does it: torchrun hands both on to all of its processes; or to this one alone.
        number = signal.SIGTERM if what == "sigterm" else signal.SIGINT
        os.kill(os.getpid() if what == "interrupt" else os.getppid(), number)
    return plain(self, images, labels)


LocalLearner.step = step
if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
