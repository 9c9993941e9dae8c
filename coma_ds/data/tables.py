"""Rows of a data file by number, read when asked for: JSONL, JSON, CSV, parquet, hub sets.

A row is named in messages as its user finds it: ``line N`` of JSONL counts from 1, ``entry N``
of a JSON list, ``record N`` of CSV (header apart) and ``row N`` of parquet count from 0, as
pandas and ``datasets`` do.  No Python object is made before its row is read, and forked workers
of a data loader share the memory of a table.
"""

from __future__ import annotations

import bisect
import contextlib
import csv
import json
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from typing import Any, ClassVar, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

MAPPED_FROM_BYTES = 2 << 30
"""Parquet of at least this size unpacked is memory-mapped through ``datasets`` (a copy in its
cache) instead of read into memory."""

_READABLE = ".jsonl, .json, .csv or .parquet"

log = logging.getLogger("coma_ds")


class Table(Protocol):
    """Rows as dicts of plain Python values, with the names of their columns."""

    columns: tuple[str, ...]
    left_out: tuple[str, ...]  # further ones of the file, not read

    def __len__(self) -> int: ...

    def __getitem__(self, row: int) -> dict[str, Any]:
        """The row; raises ``ValueError`` naming it when it cannot be read."""

    def where(self, row: int) -> str:
        """File and row, for messages."""


class ArrowTable:
    """A table over Arrow batches; ``parts`` gives (file name, its rows) in order."""

    def __init__(
        self,
        table: pa.Table,
        parts: Sequence[tuple[str, int]],
        word: str,
        left_out: Iterable[str] = (),
    ) -> None:
        self.columns = tuple(table.column_names)
        self.left_out = tuple(left_out)
        self.arrow = table
        self._batches = table.to_batches()
        self._ends = list(accumulate(batch.num_rows for batch in self._batches))
        self._parts = [name for name, _ in parts]
        self._part_ends = list(accumulate(rows for _, rows in parts))
        self._word = word

    def __len__(self) -> int:
        return self.arrow.num_rows

    def __getitem__(self, row: int) -> dict[str, Any]:
        at = _checked(row, len(self))
        index = bisect.bisect_right(self._ends, at)
        batch = self._batches[index]
        start = self._ends[index] - batch.num_rows
        return batch.slice(at - start, 1).to_pylist()[0]

    def where(self, row: int) -> str:
        part = bisect.bisect_right(self._part_ends, row)
        start = self._part_ends[part - 1] if part else 0
        return f"{self._parts[part]} {self._word} {row - start}"

    def select(self, columns: Iterable[str]) -> ArrowTable:
        """The same rows with those of ``columns`` that exist."""
        kept = [name for name in columns if name in self.columns]
        ends = self._part_ends
        rows = [end - start for start, end in zip([0, *ends], ends)]
        left_out = (*self.left_out, *(name for name in self.columns if name not in kept))
        parts = list(zip(self._parts, rows))
        return ArrowTable(self.arrow.select(kept), parts, self._word, left_out)

    def head(self, rows: int) -> ArrowTable:
        """The first ``rows`` rows."""
        parts, left = [], rows
        for name, end, start in zip(self._parts, self._part_ends, [0, *self._part_ends]):
            parts.append((name, min(left, end - start)))
            left -= parts[-1][1]
        return ArrowTable(self.arrow.slice(0, rows), parts, self._word, self.left_out)


class JsonTable:
    """Rows of JSON text, parsed one at a time; ``columns`` are the keys of the first row.

    The text stays in the file (JSONL) or, for a JSON list, in memory.
    """

    left_out = ()

    def __init__(self, path: str) -> None:
        self._path = path
        self._text: bytes | None = None
        self._word, self._first = "line", 1
        if path.endswith(".json"):
            self._text = _json_list(path)
            self._word, self._first = "entry", 0
        self._starts, self._ends, self._lines = _lines(path, self._text)
        self.columns = tuple(self[0]) if len(self) else ()

    def all_columns(self) -> tuple[str, ...]:
        """The keys of all rows, which it parses for that, in the order of their first use."""
        return tuple(dict.fromkeys(key for row in range(len(self)) for key in self[row]))

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, row: int) -> dict[str, Any]:
        at = _checked(row, len(self))
        start, end = int(self._starts[at]), int(self._ends[at])
        if self._text is not None:
            text = self._text[start:end]
        else:
            with open(self._path, "rb") as file:
                file.seek(start)
                text = file.read(end - start)
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:  # bad JSON, bad UTF-8, too deep a nesting
            if isinstance(error, json.JSONDecodeError):  # its own line is that of the text here
                error = f"{error.msg.removesuffix(' at')} at character {error.pos + 1}"
            raise ValueError(
                f"{self.where(at)}: not valid JSON ({error}); each line must hold one JSON object"
            ) from None
        if not isinstance(value, dict):
            raise ValueError(
                f"{self.where(at)}: expected a JSON object with named columns, got "
                f"{type(value).__name__}"
            )
        return value

    def where(self, row: int) -> str:
        return f"{self._path} {self._word} {int(self._lines[row]) + self._first}"


class Unused:
    """Says which columns of a file are not used, each once a process."""

    _said: ClassVar[set[tuple[str, str]]] = set()

    def __init__(self, path: str, known: Iterable[str]) -> None:
        self._path, self._known = path, set(known)

    def warn(self, names: Iterable[str]) -> None:
        """Log those of ``names`` that are not known and were not named before."""
        unused = [n for n in names if n not in self._known and (self._path, n) not in self._said]
        if unused:
            log.warning("%s: columns %s are not used", self._path, ", ".join(unused))
            self._said.update((self._path, name) for name in unused)


def open_table(path: str | os.PathLike[str], columns: Iterable[str] | None = None) -> Table:
    """The table at ``path``: a file, or a folder whose parquet files are its parts.

    Args:
        path: ``.jsonl``, ``.json`` (one list of objects), ``.csv``, ``.parquet`` or a folder.
        columns: parquet columns worth reading; others are left on disk.

    Raises:
        ValueError: missing, of another kind, empty or unreadable.
    """
    path = os.fspath(path)
    if os.path.isdir(path):
        files = sorted(name for name in os.listdir(path) if name.endswith(".parquet"))
        if not files:
            raise ValueError(f"{path}: a folder without .parquet files; give a {_READABLE} file")
        return read_parquet([os.path.join(path, name) for name in files], columns)
    if not os.path.exists(path):
        raise ValueError(f"{path}: no such file; give a {_READABLE} file or a folder of parquet")
    if path.endswith(".parquet"):
        return read_parquet([path], columns)
    if path.endswith(".csv"):
        table: Table = _read_csv(path)
    elif path.endswith((".jsonl", ".json")):
        table = JsonTable(path)
    else:
        raise ValueError(f"{path}: cannot tell its format by its name; use {_READABLE}")
    if not len(table):
        raise ValueError(f"{path}: the file holds no rows")
    return table


def read_parquet(files: Sequence[str], columns: Iterable[str] | None = None) -> ArrowTable:
    """Parquet ``files`` as one table, in the order given; only ``columns`` that exist are read.

    Raises:
        ValueError: a file that is no parquet, columns of one name with types that do not fit
            together, or no rows at all.
    """
    wanted = None if columns is None else set(columns)
    size, rows, tables = 0, [], []
    left_out: dict[str, None] = {}  # in their order
    for file in files:
        try:
            metadata = pa.parquet.read_metadata(file)
        except (pa.ArrowException, OSError) as error:
            raise ValueError(
                f"{file}: not a readable parquet file ({_first_line(error)})"
            ) from None
        groups = range(metadata.num_row_groups)
        size += sum(metadata.row_group(i).total_byte_size for i in groups)
        rows.append((file, metadata.num_rows))
    if not sum(count for _, count in rows):
        raise ValueError(f"{files[0]}: the file holds no rows")
    for file, count in rows:
        names = pa.parquet.read_schema(file).names
        _refuse_twins(file, names)
        if wanted is not None:
            left_out |= dict.fromkeys(name for name in names if name not in wanted)
        kept = None if wanted is None else [name for name in names if name in wanted]
        try:
            large = size >= MAPPED_FROM_BYTES and count and kept != []
            tables.append(_mapped(file, kept) if large else _in_memory(file, kept))
        except (pa.ArrowException, OSError) as error:
            raise ValueError(
                f"{file}: not a readable parquet file ({_first_line(error)})"
            ) from None
    try:
        table = pa.concat_tables(tables, promote_options="permissive")
    except pa.ArrowException as error:
        raise ValueError(
            f"{files[0]} and its sister files have columns that do not fit together "
            f"({_first_line(error)})"
        ) from None
    return ArrowTable(table, rows, "row", left_out)


def read_hub(name: str, subset: str, split: str) -> ArrowTable:
    """A set of the Hugging Face hub through ``datasets``, memory-mapped from its cache.

    Raises:
        ValueError: the hub, the subset or the split cannot be had; the reason is quoted.
    """
    import datasets

    try:
        with _quiet_datasets():
            data = datasets.load_dataset(name, subset, split=split)
    except Exception as error:  # the hub client raises many kinds
        raise ValueError(
            f"{name} is no folder here and could not be loaded from the hub as set {subset!r}, "
            f"split {split!r} ({type(error).__name__}: {_first_line(error)})"
        ) from error
    return ArrowTable(data.data.table, [(f"{name}/{subset}/{split}", len(data))], "row")


def require_columns(table: Table, path: str, required: Iterable[str], optional: str = "") -> None:
    """Raise ``ValueError`` naming the first missing column, and those that exist."""
    for name in required:
        if name not in table.columns:
            raise ValueError(
                f"{path}: column {name!r} is missing; it has {', '.join(table.columns) or 'none'}"
                + (f" (expected {optional})" if optional else "")
            )


def _in_memory(file: str, columns: list[str] | None) -> pa.Table:
    return pa.parquet.read_table(file, columns=columns, partitioning=None)


def _mapped(file: str, columns: list[str] | None) -> pa.Table:
    import datasets

    try:
        with _quiet_datasets():
            return datasets.Dataset.from_parquet(file, columns=columns).data.table
    except datasets.exceptions.DatasetsError as error:
        raise OSError(_first_line(error.__cause__ or error)) from error


@contextlib.contextmanager
def _quiet_datasets() -> Iterator[None]:
    """No progress bars of ``datasets``: every rank would draw its own."""
    import datasets

    shown = datasets.utils.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


def _read_csv(path: str) -> ArrowTable:
    bad: list[str] = []

    def refuse(row: pa.csv.InvalidRow) -> str:
        bad.append(
            f"record {(row.number or 2) - 2} has {row.actual_columns} cells, expected "
            f"{row.expected_columns}: {row.text[:60]!r}"
        )
        return "error"

    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            names = next(csv.reader(file), [])
        _refuse_twins(path, names)
        table = pa.csv.read_csv(
            path,
            read_options=pa.csv.ReadOptions(use_threads=False),
            parse_options=pa.csv.ParseOptions(newlines_in_values=True, invalid_row_handler=refuse),
            convert_options=pa.csv.ConvertOptions(
                column_types={name: pa.string() for name in names}, strings_can_be_null=False
            ),
        )
    except (pa.ArrowException, OSError, UnicodeError, csv.Error) as error:
        reason = bad[0] if bad else _first_line(error)
        hint = "; save it as UTF-8" if "utf-8" in reason.lower() else ""
        raise ValueError(f"{path}: not readable as CSV ({reason}){hint}") from None
    return ArrowTable(table, [(path, table.num_rows)], "record")


def _refuse_twins(path: str, names: Sequence[str]) -> None:
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{path}: two columns are named {name!r}: rename or drop one")


def _json_list(path: str) -> bytes:
    """The entries of a JSON list, each re-written on a line of its own."""
    try:
        with open(path, "rb") as file:
            entries = json.load(file)
    except (ValueError, OSError) as error:
        raise ValueError(
            f"{path}: not valid JSON ({error}); a file of one object a line is named .jsonl"
        ) from None
    if not isinstance(entries, list):
        raise ValueError(f"{path}: expected a JSON list of objects, got {type(entries).__name__}")
    return b"\n".join(json.dumps(entry).encode() for entry in entries)


def _lines(path: str, text: bytes | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Start and end in bytes, and number from 0, of every line that is not blank."""
    starts, ends, numbers, at = [], [], [], 0
    lines: Iterable[bytes]
    if text is not None:
        lines = text.split(b"\n") if text else []
        for number, line in enumerate(lines):
            starts.append(at)
            ends.append(at + len(line))
            numbers.append(number)
            at += len(line) + 1
    else:
        with open(path, "rb") as file:
            for number, line in enumerate(file):
                if line.strip():
                    starts.append(at)
                    ends.append(at + len(line))
                    numbers.append(number)
                at += len(line)
    return tuple(np.asarray(values, dtype=np.int64) for values in (starts, ends, numbers))  # type: ignore[return-value]


def _checked(row: int, rows: int) -> int:
    if not 0 <= row < rows:
        raise IndexError(f"row {row} of {rows}")
    return row


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0][:200]
