"""A whole file of texts and images to a file of vectors, part by part.

Shapes: N rows of a part, E embedding width.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from coma_ds import comm
from coma_ds.data.collate import named
from coma_ds.data.images import as_picture
from coma_ds.data.pairs import compose_side
from coma_ds.data.records import Picture, Side
from coma_ds.data.tables import JsonTable, Table, open_table
from coma_ds.embedder import Embedder

BLOCKS = 16  # batches of one part: inputs of similar length are found within it


@dataclass(frozen=True)
class Columns:
    """Names of a file's columns; None where it has none."""

    text: str | None = None
    image: str | None = None
    id: str | None = None


def choose_columns(path: str, table: Table, asked: Columns) -> Columns:
    """The columns asked for, else ``text``, ``image`` and ``id`` where the file has them.

    Raises ``ValueError`` for one asked for that is missing, and for neither text nor image.
    """
    found = table.all_columns() if isinstance(table, JsonTable) else table.columns
    chosen = {}
    for kind in ("text", "image", "id"):
        given = getattr(asked, kind)
        if given is not None and given not in found:
            raise ValueError(
                f"{path}: there is no column {given!r} (--{kind}-column); it has {', '.join(found)}"
            )
        chosen[kind] = given or (kind if kind in found else None)
    if not chosen["text"] and not chosen["image"]:
        raise ValueError(
            f"{path}: there is no column 'text' or 'image'; it has {', '.join(found)}: "
            "name one with --text-column or --image-column"
        )
    return Columns(**chosen)


class InputRows:
    """The rows of a file as inputs and ids; every error names its row."""

    def __init__(self, path: str, asked: Columns = Columns(), image_root: str | None = None):
        self._table = open_table(path)
        self._columns = choose_columns(path, self._table, asked)
        self._root = image_root
        self._csv = path.endswith(".csv")
        self.id_type: type | None = None  # int or str, by the first id; None without ids
        if self._columns.id:
            cells = (self._table[row].get(self._columns.id) for row in range(len(self._table)))
            first = next((cell for cell in cells if cell is not None), None)
            self.id_type = None if first is None else int if isinstance(first, int) else str

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, row: int) -> tuple[Side, str | int | None]:
        where, cells = self._table.where(row), self._table[row]
        text = cells.get(self._columns.text)
        if text is not None and not isinstance(text, str):
            raise ValueError(
                f"{where}: {self._columns.text} must be a text, got {type(text).__name__}"
            )
        pictures = tuple(self._pictures(cells.get(self._columns.image), where))
        if not pictures and not (text or "").strip():
            raise ValueError(f"{where} is empty: it has neither text nor an image")
        return compose_side(text or "", pictures, where), self._id(cells, where)

    def where(self, row: int) -> str:
        """File and row, for messages."""
        return self._table.where(row)

    def _pictures(self, cell: Any, where: str) -> Iterator[Picture]:
        if self._csv and isinstance(cell, str) and cell.startswith("["):
            try:
                cell = json.loads(cell)
            except ValueError:
                pass  # a path that begins with a bracket
        for each in cell if isinstance(cell, list) else [cell]:
            picture = as_picture(each, self._root, where)
            if picture is not None:
                yield _RowPicture(picture, where)

    def _id(self, cells: dict[str, Any], where: str) -> str | int | None:
        if self.id_type is None:
            return None
        value = cells.get(self._columns.id)
        if value is not None and (not isinstance(value, self.id_type) or isinstance(value, bool)):
            kind = "a whole number" if self.id_type is int else "a text"
            raise ValueError(
                f"{where}: {self._columns.id} is {value!r:.40}, expected {kind} as above it"
            )
        return value


class _RowPicture:
    """A picture whose errors name the row as well."""

    def __init__(self, picture: Picture, where: str) -> None:
        self._picture, self._where = picture, where
        self.name = picture.name if where in picture.name else f"{where}: {picture.name}"

    def _named(self, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except ValueError as error:
            if self._where in str(error):
                raise
            raise ValueError(f"{self._where}: {error}") from None

    def open(self) -> Image.Image:
        return self._named(self._picture.open)

    def digest(self) -> bytes:
        return self._named(self._picture.digest)


def encode_file(
    embedder: Embedder,
    rows: InputRows,
    output: Path,
    *,
    batch_size: int,
    workers: int,
    progress: Callable[[int], Any],
) -> None:
    """Write a vector for each row; ``output`` appears when it is complete.

    ``.parquet`` has the columns row, id (where there are ids; null for a row without one) and
    embedding (a list of float32);
    ``.npy`` is float32 [rows, E].  The ranks of a world share the work, rank 0 writes.
    ``progress`` is told how many rows are done since the last call.  Raises ``ValueError`` naming
    the row that cannot be encoded.
    """
    partial = output.with_name(f".{output.name}.partial{output.suffix}")
    writer = None
    try:
        if comm.rank() == 0:
            kind = _Parquet if output.suffix == ".parquet" else _Npy
            writer = kind(partial, len(rows), embedder.width, rows.id_type)
        part = batch_size * BLOCKS
        for start in range(0, len(rows), part):
            stop = min(start + part, len(rows))
            sides, ids = zip(*(rows[row] for row in range(start, stop)))
            for row, side in zip(range(start, stop), sides):
                with named(rows.where(row)):
                    embedder.collator.processing.check_text(side.text)
            emb_NE = embedder.encode_sides(
                sides, batch_size=batch_size, workers=workers, shared=comm.world_size() > 1
            )
            if writer:
                writer.write(start, emb_NE, ids)
            progress(stop - start)
        if writer:
            writer.close()
            partial.replace(output)
    finally:
        if writer:
            partial.unlink(missing_ok=True)


class _Parquet:
    def __init__(self, path: Path, rows: int, width: int, id_type: type | None) -> None:
        fields = [("row", pa.int64())]
        if id_type:
            fields.append(("id", pa.int64() if id_type is int else pa.string()))
        fields.append(("embedding", pa.list_(pa.float32(), width)))
        self._schema, self._width = pa.schema(fields), width
        self._file = pq.ParquetWriter(path, self._schema)

    def write(self, start: int, emb_NE: np.ndarray, ids: tuple) -> None:
        columns = [pa.array(range(start, start + len(ids)), pa.int64())]
        if "id" in self._schema.names:
            columns.append(pa.array(ids, self._schema.field("id").type))
        flat = pa.array(emb_NE.ravel())
        columns.append(pa.FixedSizeListArray.from_arrays(flat, self._width))
        self._file.write_table(pa.table(columns, schema=self._schema))

    def close(self) -> None:
        self._file.close()


class _Npy:
    def __init__(self, path: Path, rows: int, width: int, id_type: type | None) -> None:
        self._file = np.lib.format.open_memmap(path, "w+", np.float32, (rows, width))

    def write(self, start: int, emb_NE: np.ndarray, ids: tuple) -> None:
        self._file[start : start + len(ids)] = emb_NE

    def close(self) -> None:
        self._file.flush()
