"""Dialogues about images, the food of stage 1: LLaVA-style JSONL, JSON and parquet.

A row holds

- ``image`` (or ``images``): a path below the image root, encoded bytes, a Hugging Face image
  struct, or a list of these;
- ``conversations``: turns ``{"from": "human" | "gpt", "value": text}`` in strict alternation,
  a question first; a question may carry ``"kind"``, which groups its answers in tables;
- optionally ``instruction``: text that stands with the images, hidden from the dialogue;
- optionally ``id``, for messages.

LLaVA writes ``<image>`` into the first question.  It is taken out: the images stand before the
compression tokens, where the dialogue cannot see them.  Other columns are ignored, with a warning.
"""

from __future__ import annotations

import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from coma_ds.data.images import as_picture
from coma_ds.data.records import Dialogue, Picture, Turn
from coma_ds.data.tables import Unused, open_table, require_columns

LLAVA_MARK = "<image>"
_VIDEO_MARK = "<video>"
COLUMNS = ("id", "image", "images", "conversations", "instruction")
_ASKS = ("human", "user")
_ANSWERS = ("gpt", "assistant")


class DialogueFile:
    """The dialogues of one file (or folder of parquet), each made when it is asked for.

    Args:
        path: ``.jsonl``, ``.json``, ``.parquet`` or a folder of parquet.
        image_root: where image paths start; needed only if the images are paths.
        limit: take the first rows only.

    Raises:
        ValueError: no such file, or a column is missing.  ``self[row]`` raises it for a row
            that is no dialogue: an odd number of turns, turns out of order, an empty question
            or answer, no image, or two columns of them, LLaVA's mark of a video, or ``<image>``
            in a later turn or in another number than the images.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        image_root: str | os.PathLike[str] | None = None,
        limit: int | None = None,
    ) -> None:
        self.path = os.fspath(path)
        self.image_root = image_root
        self._table = open_table(path, COLUMNS)
        require_columns(self._table, self.path, ("conversations",), "image and conversations")
        if not {"image", "images"} & set(self._table.columns):
            require_columns(self._table, self.path, ("image",), "image and conversations")
        self._unused = Unused(self.path, COLUMNS)
        self._unused.warn((*self._table.columns, *self._table.left_out))
        rows = len(self._table)
        self._rows = rows if limit is None else min(rows, limit)

    def __len__(self) -> int:
        return self._rows

    def __getitem__(self, row: int) -> Dialogue:
        if not 0 <= row < self._rows:
            raise IndexError(f"row {row} of {self._rows}")
        where = self._table.where(row)
        cells = self._table[row]
        self._unused.warn(cells)
        if cells.get("id") not in (None, ""):
            where = f"{where} (id {cells['id']})"
        images = _pictures(cells, self.image_root, where)
        return Dialogue(
            images=images,
            turns=_turns(cells.get("conversations"), len(images), where),
            instruction=_instruction(cells.get("instruction"), where),
            name=where,
        )


def _pictures(
    cells: Mapping[str, Any], image_root: str | os.PathLike[str] | None, where: str
) -> tuple[Picture, ...]:
    if cells.get("image") and cells.get("images"):
        raise ValueError(f"{where}: both 'image' and 'images'; put all into one of them")
    values = cells.get("image") or cells.get("images") or []
    found = []
    for value in values if isinstance(values, list) else [values]:
        picture = as_picture(value, image_root, where)
        if picture is None:
            raise ValueError(f"{where}: an entry of its image list is empty")
        found.append(picture)
    if not found:
        raise ValueError(
            f"{where}: no image; a dialogue of this stage is about at least one image, "
            "so drop the row or give it 'image'"
        )
    return tuple(found)


def _instruction(value: Any, where: str) -> str:
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{where}: instruction must be a text, got {type(value).__name__}")
    return value or ""


def _turns(entries: Any, images: int, where: str) -> tuple[Turn, ...]:
    if not isinstance(entries, list) or not entries:
        raise ValueError(
            f"{where}: 'conversations' must be a list of turns "
            f"{{'from', 'value'}}, got {str(entries)[:60]!r}"
        )
    if len(entries) % 2:
        raise ValueError(
            f"{where}: {len(entries)} turns, an odd number; each question needs one answer"
        )
    texts = [_text(entry, number, where) for number, entry in enumerate(entries)]
    for number, text in enumerate(texts[1:], start=1):
        if LLAVA_MARK in text:
            raise ValueError(
                f"{where}: {LLAVA_MARK} in turn {number}; images stand before the dialogue, "
                "so only the first question may carry the mark"
            )
    if texts[0].startswith(_VIDEO_MARK) or texts[0].endswith(f"\n{_VIDEO_MARK}"):
        raise ValueError(
            f"{where}: {_VIDEO_MARK} in the first question; dialogues are about images alone, so "
            "drop the row"
        )
    texts[0] = _without_marks(texts[0], images, where)
    turns = []
    for number in range(0, len(texts), 2):
        question, answer = texts[number], texts[number + 1]
        for place, text in ((number, question), (number + 1, answer)):
            if not text.strip():
                raise ValueError(f"{where}: turn {place} is an empty text")
        turns.append(Turn(question, answer, str(entries[number].get("kind") or "qa")))
    return tuple(turns)


def _text(entry: Any, number: int, where: str) -> str:
    if not isinstance(entry, dict) or "from" not in entry or "value" not in entry:
        raise ValueError(
            f"{where}: turn {number} must be {{'from', 'value'}}, got {str(entry)[:60]!r}"
        )
    expected = _ANSWERS if number % 2 else _ASKS
    if entry["from"] not in expected:
        raise ValueError(
            f"{where}: turn {number} is from {entry['from']!r}, expected {expected[0]!r}; turns "
            "alternate and a question comes first"
        )
    value = entry["value"]
    if not isinstance(value, str):
        raise ValueError(
            f"{where}: the value of turn {number} must be a text, got {type(value).__name__}"
        )
    return value


def _without_marks(question: str, images: int, where: str) -> str:
    marks = question.count(LLAVA_MARK)
    if marks == 0:
        return question
    if marks != images:
        raise ValueError(
            f"{where}: {marks} {LLAVA_MARK} in the first question but {images} image(s); "
            "write one mark for each image or none"
        )
    for mark in (f"{LLAVA_MARK}\n", f"\n{LLAVA_MARK}", LLAVA_MARK):
        question = question.replace(mark, "")
    return question.strip()


class SingleTurns(Sequence[Dialogue]):
    """Dialogues cut to one turn each, drawn by (seed, row): the single-turn format."""

    def __init__(self, dialogues: Sequence[Dialogue], seed: int = 0) -> None:
        self.dialogues = dialogues
        self.seed = seed

    def __len__(self) -> int:
        return len(self.dialogues)

    def __getitem__(self, row: int) -> Dialogue:  # type: ignore[override]
        dialogue = self.dialogues[row]
        pick = random.Random(f"{self.seed}/{row}").randrange(len(dialogue.turns))
        return replace(dialogue, turns=dialogue.turns[pick : pick + 1])


def questions_of(dialogues: Sequence[Dialogue], per_kind: int) -> list[Dialogue]:
    """Every turn as a dialogue of its own, at most ``per_kind`` of each kind, in order."""
    counts: dict[str, int] = {}
    questions = []
    for row in range(len(dialogues)):
        dialogue = dialogues[row]
        for turn in dialogue.turns:
            if counts.get(turn.kind, 0) < per_kind:
                counts[turn.kind] = counts.get(turn.kind, 0) + 1
                questions.append(replace(dialogue, turns=(turn,)))
    return questions
