"""Who asks a run to save or to stop, and how all ranks agree on it at the same step.

Signals to any rank, files that rank 0 looks for, and the loss of the folder to a newer start.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable
from enum import IntEnum
from pathlib import Path
from types import FrameType

import torch

from coma_ds import comm
from coma_ds.disk import room
from coma_ds.manifest import write_atomically
from coma_ds.rank_report import CONTROL

log = logging.getLogger("coma_ds")

LEAD = "COMA_DS_LEAD_SECONDS"
MARGIN = 30.0  # seconds that a job needs to end after the hard timer
SWITCHES = "control"  # the folder of the run where people put files


class Request(IntEnum):
    """What is asked; of several, the highest counts."""

    NOTHING = 0
    SAVE = 1
    STOP = 2  # save, and end so that a job script starts the run again
    HOLD = 3  # save, and end for good
    YIELD = 4  # end without a word to the folder: a newer start owns it


EXIT_CODES = {Request.STOP: 85, Request.HOLD: 87, Request.YIELD: 86}


class Stopped(SystemExit):
    """The run ends because it was asked to; ``message`` says how to go on."""

    def __init__(self, request: Request, message: str) -> None:
        super().__init__(EXIT_CODES[request])
        self.message = message


class Finished(SystemExit):
    """There is nothing left to do in this folder."""

    def __init__(self, folder: Path, step: int) -> None:
        super().__init__(0)
        self.message = (
            f"{folder} is finished, {step} steps: nothing to do (coma-ds evaluate measures it "
            "again, checkpoint.resume=none trains it again)"
        )


class Requests:
    """Looks at every source of a request; one object a process.

    ``folder`` is that of the run, ``owned`` says whether it still is.  The job's folder and the
    seconds before its end come from the environment (COMA_DS_CONTROL, COMA_DS_LEAD_SECONDS).
    """

    def __init__(self, folder: Path, owned: Callable[[], bool]) -> None:
        self._switches, self._owned = folder / SWITCHES, owned
        job = os.environ.get(CONTROL)
        self._job = Path(job) if job else None
        self._lead = float(os.environ.get(LEAD, 0))
        self._signalled = self._stuck = False
        self._timer: threading.Timer | None = None

    def take_signals(self, terminate: bool = True) -> None:
        """From now on SIGUSR1 asks to stop, and with ``terminate`` SIGTERM does; the second SIGTERM
        ends this process."""
        signal.signal(signal.SIGUSR1, self._hear)
        if terminate:
            signal.signal(signal.SIGTERM, self._hear)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self._signalled = True
        if number == signal.SIGTERM:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def agree(self, device: torch.device) -> Request:
        """What is asked of the run now, the same on every rank; each calls it after each step."""
        own = Request.STOP if self._signalled else Request.NOTHING
        if comm.rank() == 0:
            own = max(own, self._look())
        request = Request(comm.all_max(int(own), device))
        if request >= Request.STOP and self._lead and self._timer is None:
            limit = max(self._lead - MARGIN, self._lead / 2)
            self._timer = threading.Timer(limit, _end_hard, (limit,))
            self._timer.daemon = True
            self._timer.start()
        if request == Request.SAVE and comm.rank() == 0:
            self._take_save()
        return request

    def _take_save(self) -> None:
        switch = self._switches / "save"
        try:
            switch.rmdir() if switch.is_dir() else switch.unlink(missing_ok=True)
        except OSError as error:
            self._stuck = True
            log.warning("%s cannot be removed (%s): it is obeyed this once", switch, error.strerror)

    def _look(self) -> Request:
        if not self._owned():
            return Request.YIELD
        if (self._switches / "stop").exists():
            return Request.HOLD
        if self._job and (self._job / "stop").exists():
            return Request.STOP
        if not self._stuck and (self._switches / "save").exists():
            return Request.SAVE
        return Request.NOTHING

    def announce(self, step: int, *, gained: bool = True) -> None:
        """Tell the job script which step is published, and whether this start has ``gained`` it; a
        job without such a folder is not told, nor is one whose disk is full."""
        if not self._job or not self._job.is_dir():
            return
        try:
            if gained:
                with (self._job / "gained").open("a") as file:
                    file.write(f"{os.environ.get('SLURM_RESTART_COUNT', 0)}\n")
            write_atomically(self._job / "published", f"{step}\n")
        except OSError as error:
            log.warning("the job is not told of step %d: %s, %s", step, error, room(self._job))


def check_not_held(folder: Path) -> None:
    """Raise ``ValueError`` when someone wants the run in ``folder`` to stay stopped."""
    switch = folder / SWITCHES / "stop"
    if switch.exists():
        raise ValueError(f"{switch} holds this run: remove the file to go on")


def _end_hard(limit: float) -> None:
    log.error("error: the run did not stop within %.0f s of being asked to: it is ended", limit)
    os._exit(1)
