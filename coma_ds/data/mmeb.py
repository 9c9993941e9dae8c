"""MMEB in its real columns and layout: training pairs and evaluation sets.

Layout: ``<root>/<set>/<split>-00000-of-00001.parquet`` with image paths relative to one image
root, or the hub name (``TIGER-Lab/MMEB-train``, ``TIGER-Lab/MMEB-eval``) through ``datasets``.
Train: ``qry, qry_image_path, pos_text, pos_image_path`` and optionally ``neg_text,
neg_image_path``.  Eval: ``qry_text, qry_img_path, tgt_text`` (list), ``tgt_img_path`` (list),
of which the first is gold; the harness of MMEB-V2 adds ``qry_inst, tgt_inst``.  A set of one's
own in these columns is made known by ``<root>/sets.json``, a list of
``{"name", "group", "domain"}``.  Names may contain ``/``.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from coma_ds.data.images import FilePicture
from coma_ds.data.mmeb_layout import (
    EVAL_COLUMNS,
    TRAIN_COLUMNS,
    array_column,
    group_and_domain,
    open_set,
    text_column,
)
from coma_ds.data.records import IMAGE_MARK, Pair, RankingTask, Side, image_mark
from coma_ds.data.tables import ArrowTable, Unused, require_columns

log = logging.getLogger("coma_ds")

_MARK = image_mark(0)
_SUSPECT_PATH = r"^/|(^|[/\\])\.\.([/\\]|$)|^[A-Za-z][A-Za-z0-9+.-]*:"


class MMEBTrain:
    """The pairs of one set of MMEB-train; texts stay in Arrow memory until a row is asked for.

    The whole set is checked at the start, without opening images; without ``check_all`` each row
    when it is asked for.

    Args:
        root_or_hub: folder of set folders, or the name of a hub repository.
        image_root: where image paths start.
        subset: name of the set, as ``ImageNet_1K``.
        split: ``"original"`` or ``"diverse_instruction"``.
        limit: take the first rows only.
        leave_out_empty: leave out rows whose query or target is empty, as the reference does,
            and log how many, instead of an error.
        check_all: False where bad rows are to be replaced.

    Raises:
        ValueError: no such set or split, a missing column, or, with file and row: an empty
            query or target, an image mark without a path, a path that leaves the image root.
    """

    def __init__(
        self,
        root_or_hub: str,
        image_root: str | os.PathLike[str] | None,
        subset: str,
        split: str = "original",
        limit: int | None = None,
        leave_out_empty: bool = False,
        check_all: bool = True,
    ) -> None:
        table = open_set(root_or_hub, subset, split, TRAIN_COLUMNS)
        require_columns(
            table, f"{root_or_hub}/{subset}", ("qry", "pos_text"), ", ".join(TRAIN_COLUMNS)
        )
        sides = {"qry_image_path": "query", "pos_image_path": "target"}
        _say_what_columns_mean(table, f"{root_or_hub}/{subset}", sides)
        self._table = table = table if limit is None else table.head(limit)
        self._image_root, self._task = image_root, subset
        self._columns = [text_column(table, name) for name in TRAIN_COLUMNS]
        self._rows = np.arange(len(table))
        if leave_out_empty:
            self._leave_out_empty(f"{root_or_hub}/{subset}")
        for at, name in enumerate(("query", "target", "negative")):
            texts, paths = self._columns[2 * at : 2 * at + 2]
            if check_all:
                _check_sides(texts, paths, image_root, self._where, name, may_be_empty=at == 2)
            else:
                _check_image_root(paths, image_root, self._where, name)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: int) -> Pair:
        if not 0 <= row < len(self._rows):
            raise IndexError(f"row {row} of {len(self._rows)}")
        cells = [column[row].as_py() for column in self._columns]
        try:
            query, target, negative = (
                _side(mark_image(text, path), path, self._image_root)
                for text, path in zip(cells[::2], cells[1::2])
            )
        except ValueError as error:  # where not all rows were checked
            raise ValueError(f"{self._where(row)}: {error}") from None
        return Pair(
            query=query,
            target=target,
            negatives=(negative,) if negative.text.strip() else (),
            name=self._where(row),
            task=self._task,
        )

    def _where(self, row: int) -> str:
        return self._table.where(int(self._rows[row]))

    def _leave_out_empty(self, path: str) -> None:
        query, target = (_empty(*self._columns[at : at + 2]) for at in (0, 2))
        self._rows = np.flatnonzero(~(query | target))
        self._columns = [column.take(pa.array(self._rows)) for column in self._columns]
        left_out = len(query) - len(self._rows)
        if left_out:
            log.warning("%s: %d of %d rows are empty and left out", path, left_out, len(query))
        if not len(self._rows):
            raise ValueError(f"{path}: every row has an empty query or target")


def mmeb_eval(
    root_or_hub: str,
    image_root: str | os.PathLike[str] | None,
    subset: str,
    limit: int | None = None,
) -> RankingTask:
    """One set of MMEB-eval as a ranking task.

    Candidates are de-duplicated by (text, path): over all queries into one pool, and within
    each query's own list, where the first copy stays, so the gold one keeps place 0.

    Args:
        root_or_hub: folder of set folders, or the name of a hub repository.
        image_root: where image paths start.
        subset: name of the set, as ``ImageNet-1K``.
        limit: take the first queries only.

    Raises:
        ValueError: no such set, unknown group and no ``sets.json``, a missing column, or, with
            file and row: an empty query, no candidates, lists of unequal length, an image mark
            without a path, a path that leaves the image root.
    """
    table = open_set(root_or_hub, subset, "test", EVAL_COLUMNS)
    group, domain = group_and_domain(root_or_hub, subset)
    require_columns(
        table, f"{root_or_hub}/{subset}", ("qry_text", "tgt_text"), ", ".join(EVAL_COLUMNS)
    )
    sides = {"qry_img_path": "query", "tgt_img_path": "candidate"}
    _say_what_columns_mean(table, f"{root_or_hub}/{subset}", sides)
    table = table if limit is None else table.head(limit)
    texts, paths, counts = _flat_candidates(table)
    rows = np.repeat(np.arange(len(table)), counts)
    insts = text_column(table, "tgt_inst") if "tgt_inst" in table.columns else None

    first, inverse = _distinct(texts, paths, None if insts is None else insts.take(pa.array(rows)))
    pool_texts, pool_paths = texts.take(pa.array(first)), paths.take(pa.array(first))

    def candidate_where(at: int) -> str:
        row = int(rows[first[at]])
        return f"{table.where(row)}, candidate {int(first[at] - (counts[:row]).sum())}"

    _check_sides(pool_texts, pool_paths, image_root, candidate_where, "candidate")
    with_images = pc.not_equal(paths, "").to_numpy(zero_copy_only=False)
    targets_show = np.bincount(rows, weights=with_images, minlength=len(table)) > 0
    queries = _queries(table, image_root, subset, group, targets_show)
    show_query = [bool(query.images) for query in queries]
    query_shown = np.asarray(show_query)[rows[first]]
    pool_insts = None if insts is None else insts.take(pa.array(rows[first]))
    return RankingTask(
        name=subset,
        group=group,
        domain=domain,
        queries=queries,
        pool=_Pool(pool_texts, pool_paths, pool_insts, query_shown, image_root),
        candidates=[_keep_first(part) for part in np.split(inverse, np.cumsum(counts)[:-1])],
    )


# The text quirks of the reference harness (VLM2Vec, MMEB-V2), all in the next three functions.


def mark_image(text: str, path: str) -> str:
    """Texts carry their image mark themselves; where one with an image does not, it goes first."""
    if not path or IMAGE_MARK.search(text):
        return text
    return f"{_MARK} {text}" if text else _MARK


def instructed_query(
    instruction: str, text: str, has_image: bool, break_line: bool, extra_line: bool
) -> str:
    r"""The text of a query that comes with ``qry_inst``.

    With an image: mark, space, instruction without its own mark, space, text; " \n" becomes
    "\n"; "\n" at the end.  VQA, grounding and image-to-image sets (``break_line``) strip the
    instruction and put "\n" between image and instruction.  Without an image: instruction,
    space, text, "\n", and one more "\n" in VisDial (``extra_line``).
    """
    if not has_image:
        return f"{instruction} {text}\n" + ("\n" if extra_line else "")
    instruction = instruction.replace(_MARK, "")
    if break_line:
        instruction = "\n" + instruction.strip()
    whole = f"{_MARK} {instruction} {text}" if text else f"{_MARK} {instruction}"
    return whole.replace(" \n", "\n") + "\n"


def instructed_candidate(instruction: str, text: str, query_has_image: bool) -> str:
    r"""The text of a candidate image that comes with ``tgt_inst``.

    Mark, space, instruction without its own mark, space, text; " \n" becomes "\n"; "\n" at the
    end, which a candidate without a text has only when the queries are texts.  A candidate
    without an image keeps its bare text.
    """
    instruction = instruction.replace(_MARK, "")
    if text.strip():
        return f"{_MARK} {instruction} {text}".replace(" \n", "\n") + "\n"
    whole = f"{_MARK} {instruction}".replace(" \n", "\n")
    return whole if query_has_image else whole + "\n"


class _Pool(Sequence[Side]):
    """The distinct candidates, each made when it is asked for: there can be a million."""

    def __init__(
        self,
        texts: pa.Array,
        paths: pa.Array,
        insts: pa.Array | None,
        query_shown: np.ndarray,
        image_root: str | os.PathLike[str] | None,
    ) -> None:
        self._texts, self._paths, self._insts = texts, paths, insts
        self._query_shown, self._image_root = query_shown, image_root

    def __len__(self) -> int:
        return len(self._texts)

    def __getitem__(self, at: int) -> Side:  # type: ignore[override]
        if not 0 <= at < len(self):
            raise IndexError(f"candidate {at} of {len(self)}")
        text, path = self._texts[at].as_py(), self._paths[at].as_py()
        if path and self._insts is not None:
            shown = bool(self._query_shown[at])
            text = instructed_candidate(self._insts[at].as_py(), text, shown)
        return _side(mark_image(text, path), path, self._image_root)


def _queries(
    table: ArrowTable,
    image_root: str | os.PathLike[str] | None,
    subset: str,
    group: str,
    targets_show: np.ndarray,
) -> list[Side]:
    texts, paths = text_column(table, "qry_text"), text_column(table, "qry_img_path")
    instructed = "qry_inst" in table.columns
    insts = text_column(table, "qry_inst")
    _check_sides(texts, paths, image_root, table.where, "query")
    queries = []
    for row in range(len(table)):
        text, path = texts[row].as_py(), paths[row].as_py()
        if instructed:
            break_line = group in ("VQA", "VG") or bool(targets_show[row])
            text = instructed_query(
                insts[row].as_py(), text, bool(path), break_line, subset == "VisDial"
            )
        try:
            queries.append(_side(mark_image(text, path), path, image_root))
        except ValueError as error:
            raise ValueError(f"{table.where(row)}, query: {error}") from None
    return queries


def _flat_candidates(table: ArrowTable) -> tuple[pa.Array, pa.Array, np.ndarray]:
    """Texts and paths of all candidates in a row ("" where there is none), and counts [Q]."""
    flat = {}
    for name in ("tgt_text", "tgt_img_path"):
        column = array_column(table, name, pa.list_(pa.string()), "a list of texts")
        lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False)
        flat[name] = pc.fill_null(pc.list_flatten(column), ""), lengths.astype(np.int64)
    (texts, text_counts), (paths, path_counts) = flat["tgt_text"], flat["tgt_img_path"]
    counts = np.maximum(text_counts, path_counts)
    uneven = (text_counts != path_counts) & (text_counts > 0) & (path_counts > 0)
    for wrong, reason in (
        (counts == 0, "no candidates; tgt_text or tgt_img_path must list them, the gold one first"),
        (uneven, "tgt_text and tgt_img_path list different numbers of candidates"),
    ):
        if wrong.any():
            row = int(wrong.argmax())
            raise ValueError(
                f"{table.where(row)}: {reason} ({text_counts[row]} and {path_counts[row]})"
            )
    return _spread(texts, text_counts, counts), _spread(paths, path_counts, counts), counts


def _spread(values: pa.Array, have: np.ndarray, want: np.ndarray) -> pa.Array:
    """``values`` with "" for each candidate of a row that lists none."""
    at = np.full(int(want.sum()), -1, dtype=np.int64)
    listed = np.repeat(have > 0, want)
    at[listed] = np.arange(len(values))
    return pc.fill_null(values.take(pa.array(at, mask=~listed)), "")


def _say_what_columns_mean(table: ArrowTable, where: str, sides: dict[str, str]) -> None:
    for name, side in sides.items():
        if name not in table.columns:
            log.info("%s has no column %s: every %s is text", where, name, side)
    Unused(where, ()).warn(table.left_out)


def _distinct(*columns: pa.Array | None) -> tuple[np.ndarray, np.ndarray]:
    """First place of each distinct row of ``columns``, in order, and for each row its number."""
    key = np.zeros(len(columns[0]), dtype=np.int64)  # type: ignore[arg-type]
    for column in columns:
        if column is not None:
            codes = column.dictionary_encode()
            key = key * len(codes.dictionary) + codes.indices.to_numpy()
            key = np.unique(key, return_inverse=True)[1]
    _, first, inverse = np.unique(key, return_index=True, return_inverse=True)
    order = np.argsort(first)
    number = np.empty_like(order)
    number[order] = np.arange(len(order))
    return first[order], number[inverse]


def _keep_first(candidates: np.ndarray) -> np.ndarray:
    _, first = np.unique(candidates, return_index=True)
    return candidates if len(first) == len(candidates) else candidates[np.sort(first)]


def _side(text: str, path: str, image_root: str | os.PathLike[str] | None) -> Side:
    return Side(text, (FilePicture(image_root, path),) if path else ())  # type: ignore[arg-type]


def _empty(texts: pa.Array, paths: pa.Array) -> np.ndarray:
    blank = pc.and_(pc.equal(pc.utf8_trim_whitespace(texts), ""), pc.equal(paths, ""))
    return blank.to_numpy(zero_copy_only=False)


def _check_sides(
    texts: pa.Array,
    paths: pa.Array,
    image_root: str | os.PathLike[str] | None,
    where: Callable[[int], str],
    what: str,
    may_be_empty: bool = False,
) -> None:
    """Raise ``ValueError`` for the first side that cannot be right, whole columns at a time."""
    shown = pc.not_equal(paths, "").to_numpy(zero_copy_only=False)
    marks = pc.count_substring_regex(texts, IMAGE_MARK.pattern).to_numpy()
    empty = _empty(texts, paths)
    suspect = pc.match_substring_regex(paths, _SUSPECT_PATH).to_numpy(zero_copy_only=False)
    if empty.any() and not may_be_empty:
        raise ValueError(
            f"{where(int(empty.argmax()))}: empty {what}, neither text nor image "
            f"({int(empty.sum())} such rows); give it one of them or leave the rows out"
        )
    _check_image_root(paths, image_root, where, what)
    wrong = marks > shown
    if wrong.any():
        row = int(wrong.argmax())
        raise ValueError(
            f"{where(row)}: the {what} has {marks[row]} image mark(s) in its text but "
            f"{'one image path' if shown[row] else 'no image path'}: {texts[row].as_py()[:80]!r}"
        )
    for row in np.flatnonzero(suspect).tolist():
        try:
            FilePicture(image_root, paths[row].as_py())  # type: ignore[arg-type]
        except ValueError as error:
            raise ValueError(f"{where(row)}, {what}: {error}") from None


def _check_image_root(
    paths: pa.Array,
    image_root: str | os.PathLike[str] | None,
    where: Callable[[int], str],
    what: str,
) -> None:
    """Raise ``ValueError`` for images without a place where their paths start."""
    shown = pc.not_equal(paths, "").to_numpy(zero_copy_only=False)
    if shown.any() and image_root is None:
        row = int(shown.argmax())
        raise ValueError(
            f"{where(row)}: the {what} has the image {paths[row].as_py()!r} but no image root "
            "is set: name the folder where the paths start (data.image_root, eval.image_root or "
            "--image-root)"
        )
