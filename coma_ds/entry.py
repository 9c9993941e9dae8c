"""How a rank begins and ends: its exit code, and its error as the last thing on the screen."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

import torch.distributed as dist

from coma_ds import comm, rank_report

# DeepSpeed's launcher speaks of its own after the error of a rank, and its parent, which the user
# started, ends a moment later.  This waits for the launcher's end, a minute at most.
LAUNCHER = "deepspeed.launcher.launch"
REPEAT = """
import os, select, sys
launcher = os.pidfd_open(int(sys.argv[1]))
if select.select([launcher], [], [], 60)[0]:
    os.write(2, sys.argv[2].encode() + b"\\n")
"""
KILLED_WORKER = re.compile(r"DataLoader worker \(pid.*\) (is killed by signal|exited unexpectedly)")
NO_ANSWER = re.compile("Timed out waiting|Application timeout|Watchdog caught collective")
ECHO_WAIT, TURN_WAIT = 20.0, 5.0  # seconds


def entry_point(main: Callable[[list[str]], None], argv: list[str]) -> NoReturn:
    """Run ``main`` and end this rank with its code: 0, 2 for a user's error, else 1.

    A user's error is one sentence, without a trace.  An error is said once and by the rank that
    knows why: the launcher ends all ranks on the exit of the first one, so rank 0 goes first, and
    a rank that only lost its connection to another one goes last.
    """
    code, message = 0, ""
    rank = int(os.environ.get("RANK", 0))
    rank_report.reserve()
    try:
        main(argv)
    except KeyboardInterrupt:
        code = 130
    except SystemExit as stop:
        code, message = _code_of(stop)
    except BaseException as error:
        trace = traceback.format_exc()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # whoever ends us now need not wait
        if is_echo(error):
            time.sleep(ECHO_WAIT)
        elif rank:
            time.sleep(TURN_WAIT)
        code = 2 if is_users(error) else 1
        cause = killed_worker(error)
        if code == 1 and not cause:
            _say(trace)
        where = f" on rank {rank}" if rank or code == 1 else ""
        kind = f"{type(error).__name__}: " if code == 1 else ""
        message = f"error{where}: {cause or no_answer(error) or f'{kind}{error}'}"
    try:
        if message:
            _say(f"\n{message}\n")
            repeat_at_the_end(message)
        reported = rank_report.write_report(code, message)
        # The code of a stop is read there; to a launcher, which would report it, all is well.
        comm.leave(0 if reported and code in rank_report.AS_ASKED else code)
    finally:  # the interpreter's own end waits for the loader's workers, which may hear no signal
        os._exit(code or 1)


def _say(text: str) -> None:
    """On stderr, where somebody still reads it: that process may be gone."""
    with suppress(OSError):
        sys.stderr.write(text)
        sys.stderr.flush()


def _code_of(stop: SystemExit) -> tuple[int, str]:
    """What ``sys.exit`` was given, as a code and a message."""
    if stop.code is None or isinstance(stop.code, int):
        said = getattr(stop, "message", "") if comm.rank() == 0 else ""
        return stop.code or 0, said
    return 1, str(stop.code)


def is_users(error: BaseException) -> bool:
    """True for a ``ValueError`` that our own code raised: something to change in what it was given.

    One from inside a library is a fault to look into, with its trace.
    """
    if not isinstance(error, ValueError):
        return False
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    module = place.tb_frame.f_globals.get("__name__", "") if place is not None else ""
    return module == "__main__" or module.partition(".")[0] == "coma_ds"


def is_echo(error: BaseException) -> bool:
    """True for what a rank meets when another one has gone."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and "gloo" in str(error)
    )


def no_answer(error: BaseException) -> str:
    """What to tell of another rank that hangs; empty for any other error."""
    text = " ".join(str(error).split())
    if not isinstance(error, RuntimeError) or not NO_ANSWER.search(text):
        return ""
    return (
        f"another rank {rank_report.NO_ANSWER} in time, so it or its node hangs "
        f"({text.rpartition('] ')[2].rstrip('. ')}; DEEPSPEED_TIMEOUT=MINUTES says how long is "
        "waited)"
    )


def killed_worker(error: BaseException) -> str:
    """What to tell of a worker of the data loader that was killed; empty for any other error.

    torch raises it wherever the rank stands at that moment, so that its trace says nothing.
    """
    text = " ".join(str(error).split())
    if not isinstance(error, RuntimeError) or not KILLED_WORKER.search(text):
        return ""
    if "Terminated" in text:  # TERM reaches the whole group of processes
        return "a worker of the data loader was ended by TERM, as where a launcher ends all ranks"
    return (
        f"a worker of the data loader was killed ({text.rstrip('. ')}): most likely the machine's "
        "memory was full; take fewer workers (data.workers) or smaller images "
        "(model.max_vision_tokens) and start the run again"
    )


def launcher_pid() -> int | None:
    """The process id of DeepSpeed's launcher of this rank; None without one, or not on Linux."""
    parent = os.getppid()
    try:
        words = Path(f"/proc/{parent}/cmdline").read_text(errors="replace").split("\0")
    except OSError:
        return None
    return parent if LAUNCHER in words and hasattr(os, "pidfd_open") else None


def repeat_at_the_end(message: str) -> None:
    """See to it that ``message`` stands last on the screen: launchers add lines of their own.

    torchrun prints what it finds in a file; after DeepSpeed's launcher a small process says it
    again.  Whoever asked for reports of the ranks (``coma-ds train``) says it itself.
    """
    if os.environ.get(rank_report.FOLDER):
        return
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        with suppress(OSError):  # a full disk
            Path(file).write_text(json.dumps({"message": message, "timestamp": int(time.time())}))
    launcher = launcher_pid()
    if launcher is not None:
        command = [sys.executable, "-I", "-S", "-c", REPEAT, str(launcher), message]
        subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
