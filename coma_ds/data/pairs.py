"""A user's own pairs: JSONL, CSV or parquet in the columns of :data:`COLUMNS`.

=================== ==================================================================
``query``           text of the query
``query_image``     its image or images: a path below the image root, encoded bytes, a
                    Hugging Face image struct, or a list of these
``target``          text of what the query should find
``target_image``    its image or images
``negatives``       text or list of texts that it should not find (hard negatives)
``negative_images`` image or list, one for each negative; null where one has none
``instruction``     text put before the query
``score``           number; rows below ``min_score`` are left out
``task``            name of the row's task, for a temperature per task; else the file's name
=================== ==================================================================

A query and a target need a text or an image, so at least one of the two columns each; the rest
is optional.  Images stand first, then the instruction, then the text, each after a space,
unless the text says itself where they stand (``<|image_1|>``, ``<|image_2|>``, ...).  In CSV a
cell that starts with ``[`` is a JSON list.  Other columns are ignored, with a warning.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from coma_ds.data.images import as_picture
from coma_ds.data.records import IMAGE_MARK, Pair, Picture, Side, image_mark
from coma_ds.data.tables import ArrowTable, Table, Unused, open_table

COLUMNS = (
    "query", "query_image", "target", "target_image",
    "negatives", "negative_images", "instruction", "score", "task",
)  # fmt: skip
_SIDES = COLUMNS[:4]
_LISTS = ("query_image", "target_image", "negatives", "negative_images")

log = logging.getLogger("coma_ds")


class PairFile:
    """The pairs of one file (or folder of parquet), each made when it is asked for.

    Args:
        path: ``.jsonl``, ``.json``, ``.csv``, ``.parquet`` or a folder of parquet.
        image_root: where image paths start; needed only if images are paths.
        columns: our name to the name in the file, where they differ, as
            ``{"query": "question"}``.
        min_score: leave out the rows whose ``score`` is below it; how many is logged.
        limit: take the first rows only (of those that are left).

    Raises:
        ValueError: no such file, a missing column, an unknown key of ``columns``, or no row
            reaches ``min_score``.  ``self[row]`` raises it for a bad row: no query, no target,
            lists of unequal length, a wrong type, an image mark without its image.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        image_root: str | os.PathLike[str] | None = None,
        columns: Mapping[str, str] | None = None,
        min_score: float | None = None,
        limit: int | None = None,
    ) -> None:
        self.path = os.fspath(path)
        self.image_root = image_root
        names = {name: name for name in COLUMNS}
        for name, actual in (columns or {}).items():
            if name not in names:
                raise ValueError(
                    f"columns: {name!r} is no column of pairs; known are {', '.join(COLUMNS)}"
                )
            names[name] = actual
        self._table = open_table(path)
        self._csv = self.path.endswith(".csv")
        self._names = self._existing(names, columns or {})
        self.left_out = 0
        self._rows = self._scored(min_score)
        if limit is not None:
            self._rows = self._rows[:limit]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: int) -> Pair:
        if not 0 <= row < len(self._rows):
            raise IndexError(f"row {row} of {len(self._rows)}")
        at = int(self._rows[row])
        where = self._table.where(at)
        raw = self._table[at]
        self._unused.warn(raw)
        cells = {name: self._cell(name, raw.get(actual)) for name, actual in self._names.items()}
        instruction = _text(cells, "instruction", where)
        return Pair(
            query=self._side(cells, "query", where, instruction),
            target=self._side(cells, "target", where),
            negatives=self._negatives(cells, where),
            name=where,
            task=_text(cells, "task", where) or os.path.basename(self.path),
        )

    def _existing(self, names: Mapping[str, str], asked: Mapping[str, str]) -> dict[str, str]:
        found = self._table.columns
        optional_may_come_later = not isinstance(self._table, ArrowTable)
        for name, actual in asked.items():
            if actual not in found and not (optional_may_come_later and name not in _SIDES):
                raise ValueError(
                    f"{self.path}: column {actual!r} (given as {name}) is missing; it has "
                    f"{', '.join(found)}"
                )
        for side in ("query", "target"):
            if names[side] not in found and names[f"{side}_image"] not in found:
                raise ValueError(
                    f"{self.path}: column {side!r} (or '{side}_image') is missing; it has "
                    f"{', '.join(found)}; expected are {', '.join(COLUMNS)}, other names go "
                    "into 'columns'"
                )
        self._unused = Unused(self.path, names.values())
        self._unused.warn(found)
        return dict(names)

    def _cell(self, name: str, value: Any) -> Any:
        if self._csv and name in _LISTS and isinstance(value, str) and value.startswith("["):
            try:
                return json.loads(value)
            except ValueError:
                return value  # a text that happens to start with a bracket
        return value

    def _side(self, cells: Mapping[str, Any], name: str, where: str, instruction: str = "") -> Side:
        text = _text(cells, name, where)
        pictures = self._pictures(cells.get(f"{name}_image"), f"{where}, {name}_image")
        if not text.strip() and not pictures:
            raise ValueError(f"{where}: empty {name}; give it a text or an image")
        return compose_side(text, pictures, f"{where}, {name}", instruction)

    def _pictures(self, value: Any, where: str) -> tuple[Picture, ...]:
        values = value if isinstance(value, list) else [value]
        pictures = [as_picture(each, self.image_root, where) for each in values]
        if len(pictures) > 1 and None in pictures:
            raise ValueError(f"{where}: entry {pictures.index(None)} of its image list is empty")
        return tuple(picture for picture in pictures if picture is not None)

    def _negatives(self, cells: Mapping[str, Any], where: str) -> tuple[Side, ...]:
        texts = _as_list(cells.get("negatives"))
        images = _as_list(cells.get("negative_images"))
        if texts and images and len(texts) != len(images):
            raise ValueError(
                f"{where}: {len(texts)} negatives but {len(images)} negative_images; write one "
                "for each, null where a negative has no image"
            )
        sides = []
        for number in range(max(len(texts), len(images))):
            text = texts[number] if texts else ""
            text = "" if text is None else text
            spot = f"{where}, negative {number}"
            if not isinstance(text, str):
                raise ValueError(f"{spot}: expected a text, got {type(text).__name__}")
            pictures = self._pictures(images[number] if images else None, spot)
            if not text.strip() and not pictures:
                raise ValueError(f"{spot}: empty; give it a text or an image, or remove it")
            sides.append(compose_side(text, pictures, spot))
        return tuple(sides)

    def _scored(self, min_score: float | None) -> np.ndarray:
        everything = np.arange(len(self._table))
        if min_score is None:
            return everything
        scores = _scores(self._table, self._names["score"], self.path)
        kept = everything[scores >= min_score]
        self.left_out = len(everything) - len(kept)
        log.info(
            "%s: %d of %d rows are left out, their score is below %g",
            self.path, self.left_out, len(everything), min_score,
        )  # fmt: skip
        if not len(kept):
            raise ValueError(
                f"{self.path}: no row reaches the score {min_score:g} (highest: "
                f"{scores.max():g}); lower min_score"
            )
        return kept


def compose_side(
    text: str, pictures: tuple[Picture, ...], where: str, instruction: str = ""
) -> Side:
    """Images first, then instruction and text, unless the text places the images itself.

    Raises ``ValueError``, beginning with ``where``, for image marks that do not fit the images.
    """
    if IMAGE_MARK.search(instruction):
        raise ValueError(
            f"{where}: the instruction {instruction[:80]!r} has an image mark; only the text "
            "itself may say where its images stand"
        )
    marks = [image_mark(i) for i in range(len(pictures))]
    placed = IMAGE_MARK.findall(text)
    if placed and placed != marks:
        marks_text = " ".join(marks)
        raise ValueError(
            f"{where}: the text has the image marks {' '.join(placed)} but {len(pictures)} "
            f"image(s); expected {f'{marks_text}, in this order' if marks else 'no mark'}"
        )
    parts = (instruction, text) if placed else (*marks, instruction, text)
    return Side(" ".join(part for part in parts if part), pictures)


def _text(cells: Mapping[str, Any], name: str, where: str) -> str:
    value = cells.get(name)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ValueError(f"{where}: {name} must be a text, got {type(value).__name__} {value!r}")
    return value


def _as_list(value: Any) -> list[Any]:
    if value is None or value == "":
        return []
    return value if isinstance(value, list) else [value]


def _scores(table: Table, name: str, path: str) -> np.ndarray:
    if isinstance(table, ArrowTable):
        if name not in table.columns:
            raise ValueError(
                f"{path}: min_score is set but there is no column {name!r}; it has "
                f"{', '.join(table.columns)}"
            )
        table = table.select((name,))
    scores = np.empty(len(table))
    for row in range(len(table)):
        value = table[row].get(name)
        try:
            scores[row] = float(value)
        except (TypeError, ValueError):
            scores[row] = math.nan
        if math.isnan(scores[row]):
            raise ValueError(
                f"{table.where(row)}: {name} must be a number to compare with min_score, "
                f"got {value!r}"
            )
    return scores
