"""Steps that go wrong: gradients that are not finite, losses that jump."""

from __future__ import annotations

import json
import logging
import math
import statistics
from collections import deque
from pathlib import Path
from typing import Any

from coma_ds.config import GuardConfig

log = logging.getLogger("coma_ds")

WINDOW, ENOUGH = 64, 16  # losses that a jump is measured against, and how many it takes
SKIPPED_FILE = "skipped.jsonl"


class Guard:
    """Judges every step; the same on every rank, as it sees reduced values only."""

    def __init__(self, config: GuardConfig, folder: Path | None) -> None:
        self.config = config
        self.skipped = 0  # in all
        self.in_a_row = 0  # skipped, the last one included
        self._losses: deque[float] = deque(maxlen=WINDOW)
        self._folder = folder  # None: nothing is written

    def jumps(self, loss: float) -> bool:
        """True for a loss far above those of the last steps, in robust deviations."""
        if not self.config.spike or len(self._losses) < ENOUGH or not math.isfinite(loss):
            return False
        middle = statistics.median(self._losses)
        spread = 1.4826 * statistics.median(abs(x - middle) for x in self._losses)
        return loss > middle + self.config.spike * max(spread, 0.01 * abs(middle))

    def after(
        self, done: int, loss: float, *, applied: bool, jumped: bool, samples: list[list]
    ) -> None:
        """Count a step.  ``samples`` of its global batch are written down when it was skipped.

        Raises ``ValueError`` after too many skipped steps in a row.
        """
        if jumped:
            log.warning(
                "step %d: its loss %.4g is far above the last ones (median %.4g)%s",
                done, loss, statistics.median(self._losses),
                "; the step is left out" if self.config.skip_spikes else "",
            )  # fmt: skip
        if applied:
            self.in_a_row = 0
            if not jumped:
                self._losses.append(loss)
            return
        self.skipped += 1
        self.in_a_row += 1
        reason = "loss spike" if jumped else "gradient not finite"
        if not jumped:
            log.warning("step %d was skipped on every rank: its gradient is not finite", done)
        if self._folder is not None:
            line = {"step": done, "reason": reason, "loss": _plain(loss), "samples": samples}
            try:
                with (self._folder / SKIPPED_FILE).open("a") as file:
                    file.write(json.dumps(line) + "\n")
            except OSError as error:
                log.warning("step %d is not in %s: %s", done, SKIPPED_FILE, error)
        if self.in_a_row >= self.config.skips_in_a_row:
            raise ValueError(
                f"{self.in_a_row} steps in a row were skipped, the last is {done} ({reason}): "
                f"lower optim.lr, look at the samples in {SKIPPED_FILE}, or go on from an earlier "
                "checkpoint (guard.skips_in_a_row is the limit)"
            )

    def state(self) -> dict[str, Any]:
        """What a resumed run needs to judge as this one would."""
        row = {"skipped": self.skipped, "in_a_row": self.in_a_row}
        return row | {"losses": list(self._losses)}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from ``state``."""
        self.skipped, self.in_a_row = state["skipped"], state["in_a_row"]
        self._losses = deque(state["losses"], maxlen=WINDOW)


def _plain(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)
