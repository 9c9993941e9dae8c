"""Bad rows in the middle of a training: another row takes their place, and they are counted.

A row is bad when its reader, one of its images or the collator refuses it with a ``ValueError``.
What takes its place depends on the source and the row alone, so it is the same at any number of
ranks and workers and after a resume, and the other samples of the batch stay what they are.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch

from coma_ds import comm
from coma_ds.batch import Replaced
from coma_ds.data.collate import Collator, Ready
from coma_ds.data.sampler import Sources

log = logging.getLogger("coma_ds")

IN_A_ROW = 16  # rows after a bad one that are tried
ALWAYS_ALLOWED = 10  # replaced rows, whatever the share: a run begins with few rows read
WARNINGS, NAMED = 10, 5  # lines on the screen, and rows in the error


class Rows:
    """The dataset of a training's loader: (source, row) to samples.

    With ``replaces`` a bad row gives the samples of the next good one of its source, in the order
    of the file and from its end on to its start.

    Raises:
        ValueError: a bad row; with ``replaces``, one with ``IN_A_ROW`` bad ones after it.
    """

    def __init__(self, sources: Sources, collator: Collator, *, replaces: bool = False) -> None:
        self.sources, self.collator, self.replaces = sources, collator, replaces

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, index: tuple[int, int]) -> Ready:
        try:
            return self.collator.prepare(self.sources[index])
        except ValueError as error:
            if not self.replaces:
                raise
            return self._another(index, error)

    def _another(self, index: tuple[int, int], first: ValueError) -> Ready:
        last, others = first, self.sources.after(index, IN_A_ROW)
        for later in others:
            try:
                record = self.sources[later]
                ready = self.collator.prepare(record)
            except ValueError as error:
                last = error
                continue
            ready.replaced = Replaced(str(first), kind_of(first), record.name)
            return ready
        raise ValueError(
            f"{first}; no row can take its place: the {len(others)} after it are bad too (the last "
            f"one tried: {last})"
        )


def kind_of(error: BaseException) -> str:
    """Where in the code the first cause of ``error`` was raised: rows bad in one way share it."""
    while error.__context__ is not None:
        error = error.__context__
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    if place is None:
        return type(error).__name__
    return f"{place.tb_frame.f_globals.get('__name__')}:{place.tb_lineno}"


class Replacements:
    """How many rows the ranks have read so far, and how many of them were replaced.

    Args:
        limit: the share of the rows read that may be replaced; 0: none are, such a run ends with
            its first bad row.
    """

    def __init__(self, limit: float) -> None:
        self.limit = limit
        self.rows = self.replaced = 0
        self._first: list[str] = []  # reasons
        self._kinds: list[str] = []  # that were warned of

    def state(self) -> dict[str, Any]:
        """What a resumed run goes on with, in JSON's types; equal on all ranks."""
        return {
            "rows": self.rows,
            "replaced": self.replaced,
            "first": self._first,
            "kinds": self._kinds,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on from ``state()`` of an earlier run; an empty one, from nothing."""
        self.rows, self.replaced = state.get("rows", 0), state.get("replaced", 0)
        self._first, self._kinds = list(state.get("first", [])), list(state.get("kinds", []))

    def add(self, replaced: Sequence[Replaced], rows: int, device: torch.device | str) -> None:
        """Count a step: ``rows`` of its global batch, of which this rank ``replaced`` some.

        Every rank calls this.  One warning is logged for each kind of bad row, ``WARNINGS`` in all.

        Raises:
            ValueError: on every rank, when more than ``ALWAYS_ALLOWED`` rows and more than the
                share ``limit`` of the rows read were replaced.
        """
        self.rows += rows
        if not self.limit:
            return
        if not int(comm.all_sum(torch.tensor([len(replaced)], device=device))):
            return
        for each in (each for own in comm.all_objects(tuple(replaced)) for each in own):
            self._count(each)
        if self.replaced > ALWAYS_ALLOWED and self.replaced > self.limit * self.rows:
            raise ValueError(
                f"{self}, more than data.bad_rows {self.limit:g} allows: the first "
                f"{'; '.join(self._first)}; repair or drop these rows, or raise data.bad_rows"
            )

    def _count(self, each: Replaced) -> None:
        self.replaced += 1
        if len(self._first) < NAMED:
            self._first.append(each.reason)
        if each.kind in self._kinds or len(self._kinds) >= WARNINGS:
            return
        self._kinds.append(each.kind)
        log.warning("%s; replaced by %s (%d so far)", each.reason, each.by, self.replaced)
        if len(self._kinds) == WARNINGS:
            log.warning(
                "further rows are replaced without a word (metric: replaced_rows; coma-ds prepare "
                "lists them all)"
            )

    def __str__(self) -> str:
        share = 100 * self.replaced / max(1, self.rows)
        return f"{self.replaced} of {self.rows} rows were bad and replaced ({share:.2g} %)"
