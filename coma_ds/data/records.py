"""What every reader yields: pairs, dialogues and ranking tasks, free of any model.

An image stands in a text where its mark stands: ``<|image_1|>`` for the first
image of a side, ``<|image_2|>`` for the second (the marks of MMEB).  Readers
guarantee that a side has exactly as many marks as images, in order.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from PIL import Image

IMAGE_MARK = re.compile(r"<\|image_\d+\|>")


def digest_id(content: bytes, *more: bytes) -> int:
    """A signed 64-bit digest: equal bytes, equal id."""
    state = hashlib.blake2b(content, digest_size=8)
    for part in more:
        state.update(part)
    return int.from_bytes(state.digest(), "little", signed=True)


def image_mark(position: int) -> str:
    """The mark of the image at ``position`` (from 0) of its side."""
    return f"<|image_{position + 1}|>"


class Picture(Protocol):
    """A source of one image.

    ``name`` says where it came from (a path, a row) and stands in every error.
    """

    name: str

    def open(self) -> Image.Image:
        """The decoded image, upright RGB; raises ``ValueError`` naming it when it is broken."""

    def digest(self) -> bytes:
        """16 bytes that are equal exactly when the stored content is equal; cheap, no decoding."""


@dataclass(frozen=True, slots=True)
class Side:
    """One side of a pair (a query, a target, a candidate): text with marks, and its images."""

    text: str = ""
    images: tuple[Picture, ...] = ()

    def __post_init__(self) -> None:
        marks = len(IMAGE_MARK.findall(self.text))
        if marks != len(self.images):
            raise ValueError(
                f"a side has {len(self.images)} image(s) but {marks} image mark(s) in its text "
                f"{self.text[:80]!r}; write {image_mark(0)} where the image stands"
            )

    def content_id(self) -> int:
        """A signed 64-bit digest of text and images: equal content has an equal id."""
        return digest_id(self.text.encode(), *(picture.digest() for picture in self.images))


@dataclass(frozen=True, slots=True)
class Pair:
    """A query and its target, with hard negatives where the data has them."""

    query: Side
    target: Side
    negatives: tuple[Side, ...] = ()
    name: str = ""  # file and row, for messages
    task: str = ""  # what a temperature per task goes by: the source, or a column of the file

    def task_id(self) -> int:
        """A signed 64-bit digest of the task's name."""
        return digest_id(self.task.encode())


@dataclass(frozen=True, slots=True)
class Turn:
    """One question and its answer; ``kind`` groups the answers in the bottleneck table."""

    question: str
    answer: str
    kind: str = "qa"


@dataclass(frozen=True, slots=True)
class Dialogue:
    """Images, the text that stands with them (hidden from the dialogue), and the turns."""

    images: tuple[Picture, ...]
    turns: tuple[Turn, ...]
    instruction: str = ""
    name: str = ""


@dataclass(frozen=True)
class RankingTask:
    """One evaluation set: every query ranks its own candidates; the gold one stands first.

    ``candidates[i]`` are indices into ``pool`` (candidates are shared between queries and
    de-duplicated by content), int64, ``candidates[i][0]`` is the gold one.
    """

    name: str
    group: str  # "Cls" | "VQA" | "Ret" | "VG"
    domain: str  # "IND" | "OOD"
    queries: Sequence[Side]
    pool: Sequence[Side]
    candidates: Sequence[np.ndarray] = field(repr=False)
