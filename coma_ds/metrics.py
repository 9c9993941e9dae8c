"""What a run writes down while it trains: metrics.jsonl and TensorBoard, on rank 0."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

log = logging.getLogger("coma_ds")

SPEED = (
    "samples_per_second",
    "tokens_per_second",
    "data_wait_percent",
    "memory_mib",
    "training_seconds",
    "slowest_rank",
    "slowest_rank_seconds",
    "median_rank_seconds",
)


class Monitor:
    """Scalars of every step, and at evaluations tables, pictures and the projector.

    ``resume_step``: steps from there on are written anew (an interrupted run may have written
    some of them).  A monitor that is not ``active`` (other ranks) writes nothing.
    """

    def __init__(
        self, folder: Path, *, active: bool, tensorboard: bool = True, resume_step: int = 0
    ) -> None:
        self.active = active
        self._told = False
        self._file = None
        self._board = None
        if not active:
            return
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "metrics.jsonl"
        keep_before(path, resume_step)
        self._file = path.open("a")
        if tensorboard:
            purge = resume_step or None
            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=purge)

    def scalars(
        self,
        step: int,
        values: dict[str, float],
        group: str = "train",
        tags: dict[str, str] | None = None,
    ) -> None:
        """One line of metrics.jsonl and one point of each curve; values must be numbers.

        ``tags`` names the curves of those values that TensorBoard shows, where it is given; else
        it shows all, those of the machine beside those of the training.
        """
        if not self.active:
            return
        try:
            self._write(step, values, group, tags)
        except OSError as error:  # a full disk must not end a run that can go on
            if not self._told:
                log.warning("step %d is not in the metrics: %s", step, error)
            self._told = True

    def _write(self, step, values, group, tags) -> None:
        values = {name: value for name, value in values.items() if value is not None}
        line = {"step": step, "group": group, "time": round(time.time(), 3)}
        line |= {name: v if math.isfinite(v) else str(v) for name, v in values.items()}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        for name, value in values.items():
            tag = f"{group} speed/{name}" if name in SPEED else f"{group}/{name}"
            if tags is not None:
                tag = tags.get(name)
            if self._board and tag:
                self._board.add_scalar(tag, value, step)

    def text(self, name: str, text: str, step: int = 0) -> None:
        """Markdown under TensorBoard's text tab."""
        if self._board:
            self._board.add_text(name, text, step)

    def table(self, name: str, header: Sequence[str], rows: Sequence[Sequence[Any]], step: int):
        """A markdown table under the text tab."""
        lines = [" | ".join(header), " | ".join("---" for _ in header)]
        lines += [" | ".join(str(cell) for cell in row) for row in rows]
        self.text(name, "\n".join(f"| {line} |" for line in lines), step)

    def image(self, name: str, image_HWC: np.ndarray, step: int) -> None:
        """A picture, uint8 [H, W, 3]."""
        if self._board:
            self._board.add_image(name, image_HWC, step, dataformats="HWC")

    def projector(
        self, name: str, emb_NE: np.ndarray, labels: Sequence[str], thumbs_N3HW, step: int
    ) -> None:
        """Embeddings with labels and thumbnails (float in 0..1, [N, 3, H, W]) for the projector."""
        if self._board:
            import torch

            self._board.add_embedding(
                torch.from_numpy(emb_NE), list(labels), torch.from_numpy(thumbs_N3HW), step, name
            )

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
            self._board.file_writer.add_summary(summary)

    def close(self) -> None:
        """Flush and close both."""
        if self._file:
            self._file.close()
        if self._board:
            self._board.close()


def keep_before(path: Path, step: int) -> None:
    """Drop the lines of ``step`` and later, and a last line that was cut off, of a JSONL file."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] < step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(kept))
    temporary.replace(path)


def flatten(tree: dict, prefix: str = "") -> dict[str, Any]:
    """A nested dict with dotted keys."""
    flat = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        flat |= flatten(value, name + ".") if isinstance(value, dict) else {name: value}
    return flat
