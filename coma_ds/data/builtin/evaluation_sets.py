"""The built-in evaluation sets, written in the on-disk format of MMEB-eval.

``ROOT/<task>/<seen|unseen>/test-00000-of-00001.parquet`` with the columns ``qry_text,
qry_img_path, tgt_text (list), tgt_img_path (list)``, gold first; image paths are relative to
``ROOT/images`` and empty where there is no image.  ``ROOT/sets.json`` lists name, group and
domain.  All pictures asked about are in the test style; ``seen`` (IND) asks for concepts that
training shows in other styles, ``unseen`` (OOD) for held-out ones.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from coma_ds.data.builtin.evaluation_rows import TASKS, EvaluationRows, Row
from coma_ds.data.records import Picture, Side

log = logging.getLogger("coma_ds")

FILE = "test-00000-of-00001.parquet"
INDEX = "sets.json"
STAMP = "made_from.txt"  # what the files were made from, to know those of another version
IMAGES = "images"
HALVES = {"seen": "IND", "unseen": "OOD"}


class _ImageFiles:
    """Writes every picture once, as a PNG named by its content."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._written: set[str] = set()

    def path(self, side: Side) -> str:
        """The path of a side's picture relative to the image root, "" when it has none."""
        if not side.images:
            return ""
        (picture,) = side.images
        name = picture.digest().hex()
        path = f"{name[:2]}/{name[2:18]}.png"
        if path not in self._written:
            self._written.add(path)
            self._write(picture, self._folder / path)
        return path

    @staticmethod
    def _write(picture: Picture, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        picture.open().save(file, "PNG", compress_level=1)


def _candidate_lists(rows: Sequence[Row]) -> tuple[list[Side], np.ndarray, np.ndarray]:
    """The distinct candidates of a set, and the lists as flat positions with their offsets.

    Gold first; then the other candidates in their order, without those equal to the gold one
    in content.  Positions are int64 [sum of lengths], offsets int32 [rows + 1].
    """
    pool: dict[int, Side] = {}
    place: dict[int, int] = {}
    ids: dict[int, np.ndarray] = {}  # by identity of the list, which rows share

    def position(side: Side) -> int:
        content = side.content_id()
        if content not in place:
            place[content] = len(pool)
            pool[content] = side
        return place[content]

    flat = []
    for _, gold, candidates in rows:
        if id(candidates) not in ids:
            ids[id(candidates)] = np.unique([position(side) for side in candidates])
        all_of_them = ids[id(candidates)]
        first = position(gold)
        flat.append(np.concatenate(([first], all_of_them[all_of_them != first])))
    offsets = np.cumsum([0, *map(len, flat)]).astype(np.int32)
    return list(pool.values()), np.concatenate(flat), offsets


def _table(rows: Sequence[Row], images: _ImageFiles) -> pa.Table:
    pool, flat, offsets = _candidate_lists(rows)
    texts = pa.array([side.text for side in pool]).take(pa.array(flat))
    paths = pa.array([images.path(side) for side in pool]).take(pa.array(flat))
    return pa.table(
        {
            "qry_text": [query.text for query, _, _ in rows],
            "qry_img_path": [images.path(query) for query, _, _ in rows],
            "tgt_text": pa.ListArray.from_arrays(pa.array(offsets), texts),
            "tgt_img_path": pa.ListArray.from_arrays(pa.array(offsets), paths),
        }
    )


def check_place(root: Path) -> None:
    """Raise ``ValueError`` for a ``root`` that is there and is not a folder of these sets."""
    if root.exists() and not all((root / name).is_file() for name in (INDEX, STAMP)):
        raise ValueError(
            f"{root} exists but holds no {INDEX} and {STAMP}; give an empty place or remove it"
        )


def write_mmeb_eval(root: Path) -> list[str]:
    """Write all evaluation sets below ``root`` and return their names, like ``name_t2i/seen``.

    A finished ``root`` of this version is left as it is, one of another version is replaced; a
    folder that is not ours is a ``ValueError``.  The files are written to a temporary folder
    beside it and moved in one step, so ``root`` is never half written; the same data give the same
    files.
    """
    root = Path(root)
    stamp = _stamp()
    check_place(root)
    if root.exists():
        if (root / STAMP).read_text() == stamp:
            return _names(root)
        log.info("%s is of another version: written again", root)
        shutil.rmtree(root)
    root.parent.mkdir(parents=True, exist_ok=True)
    partial = root.with_name(f".{root.name}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        _write(partial)
        try:
            partial.rename(root)
        except OSError:
            if not (root / INDEX).is_file():  # unless another process was faster
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return _names(root)


def _names(root: Path) -> list[str]:
    return [entry["name"] for entry in json.loads((root / INDEX).read_text())]


def _write(folder: Path) -> None:
    images = _ImageFiles(folder / IMAGES)
    index = []
    for half, domain in HALVES.items():
        sets = EvaluationRows(held_out=half == "unseen")
        for task, group in TASKS.items():
            name = f"{task}/{half}"
            table = _table(sets.rows(task), images)
            file = folder / name / FILE
            file.parent.mkdir(parents=True)
            pq.write_table(table, file, compression="zstd")
            index.append({"name": name, "group": group, "domain": domain})
    (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n")
    (folder / STAMP).write_text(_stamp())


@cache
def _stamp() -> str:
    """A digest of the pictures and of the code that makes sets of them."""
    state = hashlib.blake2b(digest_size=16)
    here = Path(__file__).parent
    for file in (*sorted(here.glob("*.parquet")), *sorted(here.glob("*.py"))):
        state.update(file.read_bytes())
    return state.hexdigest() + "\n"
