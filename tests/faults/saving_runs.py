"""Trainings in a spawned world to which something happens at a given step."""

from __future__ import annotations

import gc
import logging
import os
import signal
from pathlib import Path
from unittest.mock import patch

from coma_ds import comm, train
from coma_ds.engine import Engine
from coma_ds.ownership import take, this_start
from coma_ds.run import Run
from tests.distributed.training import SMALL, left_behind


def happen(what: str, folder: Path, guard) -> None:
    """One event, on every rank; most are for one of them."""
    name, _, argument = what.partition(" ")
    main = comm.rank() == 0
    if name == "signal" and comm.rank() == 1:
        os.kill(os.getpid(), signal.SIGUSR1)
    elif name == "touch" and main:
        file = folder / argument
        file.parent.mkdir(exist_ok=True)
        file.touch()
    elif name == "take-over" and main:
        take(folder, this_start(folder))
    elif name == "fill" and main:
        with (folder / "filler").open("wb") as file:
            block = b"x" * 65536
            try:
                while True:
                    file.write(block)
                    file.flush()
            except OSError:
                pass
    elif name == "free" and main:
        (folder / "filler").unlink()
    elif name == "low":  # what comes next is a jump
        guard._losses.extend([float(argument)] * 20)


def run_once(output: str, arguments: list[str], events: dict[str, str] | None = None) -> dict:
    """One run; ``events`` by the step after which they happen, 0 for before the run;
    ``nan`` happens before its step instead."""
    events, folder, said = dict(events or {}), Path(output), []
    log_step, backward = Run.log, Engine.forward_backward
    at, code = [0], 0

    def log_and_more(self, step, *rest):
        log_step(self, step, *rest)
        at[0] = step + 1
        happen(events.get(str(step + 1), ""), folder, self.guard)

    def broken_backward(self, call, *, last):
        def broken(model):
            loss, result = call(model)
            return loss * float("nan"), result

        bad = events.get(str(at[0] + 1), "") == "nan" and comm.rank() == 1
        return backward(self, broken if bad else call, last=last)

    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    log = logging.getLogger("coma_ds")

    def listen(main):
        log.handlers = [handler]
        log.setLevel(logging.INFO)

    changes = (
        patch.object(Run, "log", log_and_more),
        patch.object(Engine, "forward_backward", broken_backward),
        patch("coma_ds.run.log_to_stderr", listen),
    )
    happen(events.get("0", ""), folder, None)
    before = {n: signal.getsignal(n) for n in (signal.SIGUSR1, signal.SIGTERM)}
    with changes[0], changes[1], changes[2]:
        try:
            train.main([*SMALL, f"output={output}", *arguments])
        except SystemExit as stop:
            code = stop.code
            said.append(stop.message)
        except ValueError as error:
            code = 2
            said.append(f"error: {error}")
    for number, how in before.items():
        signal.signal(number, how)
    gc.collect()
    comm.barrier()
    return {"said": said, "code": code, **left_behind(folder)}


def run_each(runs: list[dict]) -> list[dict]:
    """``run_once`` of each in turn, in this world."""
    return [run_once(**run) for run in runs]
