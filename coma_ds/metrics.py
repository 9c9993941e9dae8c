"""What a run writes down while it trains: metrics.jsonl and TensorBoard, on rank 0."""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
from tensorboard.summary.writer import event_file_writer
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from coma_ds.manifest import write_atomically

log = logging.getLogger("coma_ds")

LINES, BOARD = "metrics.jsonl", "tensorboard/"
ROOM = 2**20  # bytes: with less the disk is full
RETRY = 60.0  # seconds
SPEED = (
    "samples_per_second",
    "tokens_per_second",
    "tflops_per_second",
    "executed_per_needed",
    "data_wait_percent",
    "memory_mib",
    "training_seconds",
    "slowest_rank",
    "slowest_rank_seconds",
    "median_rank_seconds",
)


class Monitor:
    """Scalars of every step, and at evaluations tables, pictures and the projector.

    ``resume_step``: steps from there on are written anew (an interrupted run may have written some
    of them); with ``ended`` all steps are there, and what was evaluated at the end is written anew
    (TensorBoard forgets points and pictures of the first time, its texts stand twice). A monitor
    that is not ``active`` (other ranks) writes nothing; a full disk costs what could not be
    written, not the run.
    """

    def __init__(
        self,
        folder: Path,
        *,
        active: bool,
        tensorboard: bool = True,
        resume_step: int = 0,
        ended: bool = False,
    ) -> None:
        self.active = active
        self._folder = folder
        self._missing: Counter[str] = Counter()  # writes that failed, since one was told
        self._told: dict[str, tuple[int, set[str]]] = {}  # last step of a group, and its names
        self._died = 0.0  # when TensorBoard's writer did; 0 while it lives
        self._file = None
        self._board = None
        if not active:
            return
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / LINES
        last = resume_step - 1
        kept = keep_before(path, resume_step, last_eval=last - 1 if ended else None)
        self._file = path.open("a")
        if tensorboard:
            purge = (last if ended else resume_step) or None
            self._board = last_writer(folder / "tensorboard", purge)
            for line in kept if ended else ():
                if line["step"] == last:  # it went with the evaluation of its step
                    group = line.pop("group")
                    values = {k: float(v) for k, v in line.items() if k not in ("step", "time")}
                    self._points(last, values, group, None)

    def scalars(
        self,
        step: int,
        values: dict[str, float],
        group: str = "train",
        tags: dict[str, str] | None = None,
    ) -> None:
        """One line of metrics.jsonl and one point of each curve; values must be numbers.

        ``tags`` names the curves of those values that TensorBoard shows, where it is given; else
        it shows all, those of the machine beside those of the training.  What a step has measured
        already is not written again (by a last evaluation of more sets, where the best checkpoint
        was looked for in some).
        """
        if not self.active:
            return
        when, names = self._told.get(group, (step, set()))
        told = names if when == step else set()
        values = {k: v for k, v in values.items() if v is not None and k not in told}
        self._told[group] = step, told | values.keys()
        if not values:
            return
        self._try(step, lambda: self._line(step, values, group))
        self._try(step, lambda: self._points(step, values, group, tags), board=True)

    def _try(self, step: int, call: Callable[[], object], *, board: bool = False) -> None:
        """What cannot be written is left out, and said once; so is when it goes on.

        TensorBoard's writer is a thread that dies of a full disk: it is not given anything then,
        and where it died all the same a new one, with a file of its own, is tried now and then.
        """
        if board and not self._board:
            return
        where = BOARD if board else LINES
        if board and self._died and time.monotonic() < self._died + RETRY:
            self._missing[where] += 1
            return
        try:
            full = board and shutil.disk_usage(self._folder).free < ROOM
        except OSError as error:  # a folder that is gone
            self._miss(where, step, str(error))
            return
        if full:
            self._miss(where, step, os.strerror(errno.ENOSPC))
            return
        try:
            if board and self._died:
                with suppress(OSError):
                    self._board.close()
                self._board = last_writer(Path(self._board.log_dir))
                self._died = 0.0
            call()
        except OSError as error:
            if board:
                self._died = time.monotonic()
            self._miss(where, step, str(error))
            return
        if missing := self._missing.pop(where, 0):
            log.warning(
                "from step %d on %s is written again; missing are %d writes", step, where, missing
            )

    def _miss(self, where: str, step: int, why: str) -> None:
        if not self._missing[where]:
            log.warning("from step %d on %s is not written: %s", step, where, why)
        self._missing[where] += 1

    def _line(self, step: int, values: dict[str, float], group: str) -> None:
        line = {"step": step, "group": group, "time": round(time.time(), 3)}
        line |= {name: v if math.isfinite(v) else str(v) for name, v in values.items()}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def _points(self, step, values, group, tags) -> None:
        for name, value in values.items():
            tag = f"{group} speed/{name}" if name in SPEED else f"{group}/{name}"
            if tags is not None:
                tag = tags.get(name)
            if self._board and tag:
                self._board.add_scalar(tag, value, step)

    def text(self, name: str, text: str, step: int = 0) -> None:
        """Markdown under TensorBoard's text tab."""
        self._try(step, lambda: self._board.add_text(name, text, step), board=True)

    def table(self, name: str, header: Sequence[str], rows: Sequence[Sequence[Any]], step: int):
        """A markdown table under the text tab."""
        lines = [" | ".join(header), " | ".join("---" for _ in header)]
        lines += [" | ".join(str(cell) for cell in row) for row in rows]
        self.text(name, "\n".join(f"| {line} |" for line in lines), step)

    def image(self, name: str, image_HWC: np.ndarray, step: int) -> None:
        """A picture, uint8 [H, W, 3]."""
        self._try(
            step,
            lambda: self._board.add_image(name, image_HWC, step, dataformats="HWC"),
            board=True,
        )

    def projector(
        self, name: str, emb_NE: np.ndarray, labels: Sequence[str], thumbs_N3HW, step: int
    ) -> None:
        """Embeddings with labels and thumbnails (float in 0..1, [N, 3, H, W]) for the projector."""
        if not self._board:
            return
        import torch

        def add() -> None:
            # its folder, should this evaluation be taken again
            shutil.rmtree(Path(self._board.log_dir) / f"{step:05d}" / name, ignore_errors=True)
            self._board.add_embedding(
                torch.from_numpy(emb_NE), list(labels), torch.from_numpy(thumbs_N3HW), step, name
            )

        self._try(step, add, board=True)

    def hparams(self, values: dict[str, Any], tags: Sequence[str]) -> None:
        """The run's flat configuration in the hparams tab, beside the last values of the curves
        ``tags``."""
        if not self._board:
            return
        plain = {
            k: v if isinstance(v, int | float | str | bool) else str(v)
            for k, v in values.items()
            if v is not None
        }
        # add_hparams would write the values a second time, at step 0
        for summary in hparams(plain, dict.fromkeys(tags, 0.0)):
            self._try(
                0, lambda summary=summary: self._board.file_writer.add_summary(summary), board=True
            )

    def close(self) -> None:
        """Flush and close both."""
        for where, missing in self._missing.items():
            log.warning("%s is not whole; missing are %d writes", where, missing)
        if self._file:
            with suppress(OSError):
                self._file.close()
        if self._board:
            with suppress(OSError):  # told when it was met
                self._board.close()


def last_writer(folder: Path, purge_step: int | None = None) -> SummaryWriter:
    """A writer whose file sorts after those that are there, which is how TensorBoard reads them.

    Its name is made of the time, and the clock of this node may be behind that of an earlier start.
    """
    names = [path.name.split(".")[3] for path in folder.glob("events.out.tfevents.*")]
    newest = max((int(name) for name in names if name.isdecimal()), default=0)
    if newest < int(time.time()):
        return SummaryWriter(str(folder), purge_step=purge_step)
    ahead = SimpleNamespace(**vars(time) | {"time": lambda: float(newest + 1)})
    with patch.object(event_file_writer, "time", ahead):
        return SummaryWriter(str(folder), purge_step=purge_step)


def keep_before(path: Path, step: int, *, last_eval: int | None = None) -> list[dict[str, Any]]:
    """Drop the lines of ``step`` and later, and a last line that was cut off, of a JSONL file.

    Evaluations after the step ``last_eval`` are dropped as well.  Returns the lines that stay.
    """
    if not path.is_file():
        return []
    kept = []
    for text in path.read_text().splitlines():
        try:
            line = json.loads(text)
            again = last_eval is not None and line.get("group") == "eval"
            if line["step"] < step and not (again and line["step"] > last_eval):
                kept.append(line)
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
    write_atomically(path, "".join(json.dumps(line) + "\n" for line in kept))
    return kept


def lacks(path: Path, step: int, group: str) -> bool:
    """True for a file of metrics that has lines, but none of that step and group."""
    found = [json.loads(text) for text in path.read_text().splitlines()] if path.is_file() else []
    return bool(found) and not any((x["step"], x["group"]) == (step, group) for x in found)


def flatten(tree: dict, prefix: str = "") -> dict[str, Any]:
    """A nested dict with dotted keys."""
    flat = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        flat |= flatten(value, name + ".") if isinstance(value, dict) else {name: value}
    return flat
