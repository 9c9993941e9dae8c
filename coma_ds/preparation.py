"""Everything that a run will read, looked at before it takes a GPU: images, texts, lengths.

Each image is decoded once, whatever the number of rows that show it; then each row is made into
samples, with the sizes of its images in the place of their pixels.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from torch.utils.data import DataLoader, Dataset

from coma_ds.batch import IGNORE
from coma_ds.data.collate import Collator
from coma_ds.data.images import FilePicture
from coma_ds.data.lengths import LENGTHS, NUMBERS, Settings
from coma_ds.data.processing import Processing
from coma_ds.data.records import Dialogue, Pair, Picture, RankingTask, Side
from coma_ds.data.resized import Grid, begin_resized, keep_resized

AT_A_TIME = 32  # rows or images that a worker hands back together
ROWS_NAMED = 3  # of those that show a bad image
BAD, SUMMARY = "bad.jsonl", "summary.json"
KINDS = ("dialogue", "query", "target", "negative", "side")
MISSING, BROKEN = "missing", "broken"

Record = Pair | Dialogue | Side


@dataclass
class BadImage:
    """One that cannot be used: why, and the rows that show it."""

    image: str
    kind: str
    why: str
    rows: list[str] = field(default_factory=list)
    count: int = 0


@dataclass
class Prepared:
    """What was found in one source.  ``lengths`` are rows of (row, kind, ``NUMBERS``)."""

    name: str
    rows: int
    images: int = 0  # as often as rows show them
    unique: int = 0
    bad: dict[str, BadImage] = field(default_factory=dict)
    bad_rows: dict[int, str] = field(default_factory=dict)
    lengths: list[tuple[int, ...]] = field(default_factory=list)
    truncated: int = 0

    def summary(self) -> dict[str, float]:
        """As JSON values; lengths in tokens, of a sample."""
        sizes = np.array([row[2] for row in self.lengths] or [0])
        of_images = np.array([row[3] for row in self.lengths] or [0])
        kinds = [bad.kind for bad in self.bad.values()]
        return {
            "rows": self.rows,
            "images": self.images,
            "unique_images": self.unique,
            MISSING: kinds.count(MISSING),
            BROKEN: kinds.count(BROKEN),
            "bad_rows": len(self.bad_rows),
            "truncated": self.truncated,
            "samples": len(self.lengths),
            "tokens_mean": round(float(sizes.mean()), 1),
            "tokens_p99": float(np.percentile(sizes, 99)),
            "tokens_most": int(sizes.max()),
            "image_tokens_mean": round(float(of_images.mean()), 1),
        }


def sides_of(task: RankingTask) -> list[Side]:
    """All that an evaluation set embeds."""
    return [*task.queries, *task.pool]


def pictures(record: Record) -> list[Picture]:
    """The images of a record, in order."""
    if isinstance(record, Pair):
        return [p for side in (record.query, record.target, *record.negatives) for p in side.images]
    return list(record.images)


class Images(Dataset):
    """(name, grid or why not, kind of fault) of images, each given by a row that shows it."""

    def __init__(
        self,
        records: Sequence[Record],
        first: list[tuple[int, int]],
        processing: Processing,
        resized: Path | None,
    ) -> None:
        self.records, self.first = records, first
        self.processing, self.resized = processing, resized

    def __len__(self) -> int:
        return len(self.first)

    def __getitem__(self, index: int) -> tuple[str, Grid | str, str]:
        row, place = self.first[index]
        picture = pictures(self.records[row])[place]
        kind = MISSING
        try:
            if isinstance(picture, FilePicture):
                picture.check_exists()
            kind = BROKEN
            _, grid = self.processing.pixels(picture)
        except ValueError as error:
            return picture.name, str(error), kind
        if self.resized and isinstance(picture, FilePicture):
            keep_resized(picture, self.resized, grid, self.processing)
        return picture.name, grid, ""


@dataclass(frozen=True)
class Known:
    """A picture of which the size is known, or why it cannot be used."""

    name: str

    def digest(self) -> bytes:
        """Equal names, equal digests: contents do not matter here."""
        return self.name.encode()


class Sized:
    """A ``Processing`` that gives grids without pixels."""

    def __init__(self, processing: Processing, grids: dict[str, Grid | str]) -> None:
        self._processing, self._grids = processing, grids

    def __getattr__(self, name: str):
        return getattr(self.__dict__["_processing"], name)

    def pixels(self, picture: Picture) -> tuple[np.ndarray, Grid]:
        """An empty array and the grid.  Raises ``ValueError`` for a bad image."""
        grid = self._grids[picture.name]
        if isinstance(grid, str):
            raise ValueError(grid)
        return np.empty((0, 0), np.float32), grid


class Lengths(Dataset):
    """(row, [(kind, ``NUMBERS``)], truncated samples, why it is bad) of rows."""

    def __init__(
        self, records: Sequence[Record], processing: Processing, grids: dict[str, Grid | str]
    ) -> None:
        self.records = records
        self.collator = Collator(Sized(processing, grids))
        self.merge = processing.merge

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, row: int):
        record = known(self.records[row])
        try:
            if isinstance(record, Side):
                samples, kinds = [self.collator.side(record)], ["side"]
            else:
                samples = self.collator.prepare(record).samples
                kinds = ["dialogue"]
                if isinstance(record, Pair):
                    kinds = ["query", "target", *["negative"] * len(record.negatives)]
        except ValueError as error:
            return row, [], 0, str(error)
        found = []
        for kind, sample in zip(kinds, samples):
            tokens = len(sample.context) + len(sample.tokens) + len(sample.dialogue)
            of_images = sum(t * h * w for t, h, w in sample.grids) // self.merge
            answers = sum(label != IGNORE for label in sample.labels)
            numbers = (tokens, of_images, len(sample.dialogue), answers)
            found.append((KINDS.index(kind), *numbers))
        return row, found, sum(sample.truncated for sample in samples), ""


def known(record: Record) -> Record:
    """The record with names in the place of images."""

    def bare(side: Side) -> Side:
        return replace(side, images=tuple(Known(p.name) for p in side.images))

    if isinstance(record, Pair):
        sides = {"query": bare(record.query), "target": bare(record.target)}
        return replace(record, **sides, negatives=tuple(map(bare, record.negatives)))
    return replace(record, images=tuple(Known(p.name) for p in record.images))


def prepare(
    name: str,
    records: Sequence[Record],
    processing: Processing,
    *,
    workers: int,
    resized: Path | None = None,
    progress: Callable[[int], object] = lambda count: None,
) -> Prepared:
    """Look at every image and every row of one source.

    ``resized``: a folder for the images as large as they are used.  ``progress`` is told of images
    and rows that were looked at.  Raises ``ValueError`` for ``resized`` of other settings.
    """
    if resized:
        begin_resized(resized, processing)
    found = Prepared(name, len(records))
    first: dict[str, tuple[int, int]] = {}
    shown: dict[str, list[int]] = {}
    unreadable: dict[int, str] = {}
    for row in range(len(records)):
        try:
            for place, picture in enumerate(pictures(records[row])):
                found.images += 1
                first.setdefault(picture.name, (row, place))
                shown.setdefault(picture.name, []).append(row)
        except ValueError as error:
            unreadable[row] = str(error)
    found.unique = len(first)
    grids: dict[str, Grid | str] = {}
    images = Images(records, list(first.values()), processing, resized)
    for image, grid, kind in _in_workers(images, workers, progress):
        grids[image] = grid
        if isinstance(grid, str):
            rows = shown[image]
            named = [str(row) for row in rows[:ROWS_NAMED]]
            found.bad[image] = BadImage(image, kind, grid, named, len(rows))
    good = [row for row in range(len(records)) if row not in unreadable]
    found.bad_rows |= unreadable
    lengths = Lengths(_Picked(records, good), processing, grids)
    for place, sizes, truncated, why in _in_workers(lengths, workers, progress):
        row = good[place]
        if why:
            found.bad_rows[row] = why
        found.truncated += truncated
        found.lengths += [(row, *size) for size in sizes]
    return found


class _Picked(Sequence):
    def __init__(self, records: Sequence, rows: list[int]) -> None:
        self.records, self.rows = records, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int):
        return self.records[self.rows[place]]


def _in_workers(dataset: Dataset, workers: int, progress: Callable[[int], object]) -> Iterator:
    if not len(dataset):
        return
    loader = DataLoader(dataset, AT_A_TIME, num_workers=workers, collate_fn=list)
    for part in loader:
        yield from part
        progress(len(part))


def write(folder: Path, sources: Iterable[Prepared], settings: Settings) -> None:
    """``lengths.parquet`` (source, row, kind, ``NUMBERS``, and what they were measured with),
    ``bad.jsonl`` (images, then rows) and ``summary.json`` in ``folder``, each as a whole."""
    sources = list(sources)
    with _whole(folder / LENGTHS) as path:
        kinds = np.array(KINDS)
        wide = 2 + len(NUMBERS)
        parts = [(s, np.array(s.lengths, dtype=np.int64).reshape(-1, wide)) for s in sources]
        columns = {
            "source": np.concatenate([np.full(len(rows), s.name) for s, rows in parts]),
            "row": np.concatenate([rows[:, 0] for _, rows in parts]),
            "kind": np.concatenate([kinds[rows[:, 1]] for _, rows in parts]),
        }
        for place, name in enumerate(NUMBERS, 2):
            columns[name] = np.concatenate([rows[:, place] for _, rows in parts]).astype(np.int32)
        pq.write_table(pa.table(columns, metadata=settings.metadata()), path)
    with _whole(folder / BAD) as path, path.open("w") as file:
        for source in sources:
            for bad in source.bad.values():
                file.write(json.dumps({"source": source.name, **vars(bad)}) + "\n")
            for row, why in sorted(source.bad_rows.items()):
                file.write(json.dumps({"source": source.name, "row": row, "why": why}) + "\n")
    with _whole(folder / SUMMARY) as path:
        path.write_text(json.dumps({s.name: s.summary() for s in sources}, indent=1) + "\n")


@contextlib.contextmanager
def _whole(target: Path) -> Iterator[Path]:
    partial = target.with_name(f".{target.name}")
    yield partial
    partial.replace(target)


def table(sources: Iterable[Prepared]) -> str:
    """For a screen: a line for each source."""
    names = {
        "rows": "rows", "unique_images": "images", MISSING: "missing", BROKEN: "broken",
        "bad_rows": "bad rows", "truncated": "cut", "tokens_mean": "tokens", "tokens_p99": "99 %",
        "tokens_most": "most", "image_tokens_mean": "of images",
    }  # fmt: skip
    lines = [["source", *names.values()]]
    lines += [[source.name, *(f"{source.summary()[key]:g}" for key in names)] for source in sources]
    widths = [max(map(len, column)) for column in zip(*lines)]
    shown = []
    for cells in lines:
        head = cells[0].ljust(widths[0])
        shown.append("  ".join([head, *(c.rjust(w) for c, w in zip(cells[1:], widths[1:]))]))
    return "\n".join(shown) + "\n"
