"""The package's log on the screen, above a progress bar where there is one."""

from __future__ import annotations

import logging
import sys

from tqdm import tqdm

log = logging.getLogger("coma_ds")


class _BesideTheBar(logging.Handler):
    """Bare lines on stderr, above a progress bar where there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


def log_to_stderr(main: bool) -> None:
    """The package's log on stderr, bare lines; of other ranks than ``main`` errors only."""
    log.handlers.clear()
    log.addHandler(_BesideTheBar())
    log.setLevel(logging.INFO if main else logging.ERROR)
    log.propagate = False
