"""Ranking evaluation as MMEB does it, for any model that turns sides into vectors.

Precision@1 over each query's own candidates.  A tie counts against the model: a candidate that
scores as high as the gold one stands before it.  (The reference takes the argmax with the gold
one first, so there a model that maps everything to one point scores 100 %.)

Letters: Q queries, P candidates of the pool, E embedding size.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from coma_ds.data.images import FilePicture
from coma_ds.data.mmeb_layout import DOMAINS, GROUPS
from coma_ds.data.records import RankingTask, Side

RECALLS = (5, 10)
COLUMNS = (*GROUPS, *DOMAINS, "All")

Encode = Callable[[Sequence[Side]], Tensor | np.ndarray]
"""Sides to float32 [N, E], unit rows, in order; the same on every rank."""

_QUERY_BLOCK = 256

log = logging.getLogger("coma_ds")


def rank_gold(
    query_emb_QE: Tensor, pool_emb_PE: Tensor, candidates: Sequence[np.ndarray]
) -> tuple[Tensor, Tensor]:
    """How many candidates stand before the gold one of each query.

    Scores are dot products of the float32 embeddings, summed in float64 and rounded to float32,
    so equal embeddings have equal scores wherever they stand.

    Args:
        query_emb_QE: float32 on the CPU.
        pool_emb_PE: float32 on the CPU.
        candidates: per query, indices into the pool, the gold one first; an index that is
            listed again counts once.

    Returns:
        rank, int64 [Q]: others that score at least as high as the gold one (0 is a hit);
        tied, bool [Q]: the best other scores exactly as the gold one, so only the tie decides.

    Raises:
        ValueError: shapes that do not fit, a value that is not finite, or no candidates.
    """
    rank_Q = torch.zeros(len(candidates), dtype=torch.int64)
    tied_Q = torch.zeros(len(candidates), dtype=torch.bool)
    for at, _, scores in _scores(query_emb_QE, pool_emb_PE, candidates):
        others = scores[1:]
        rank_Q[at] = (others >= scores[0]).sum()
        tied_Q[at] = bool(len(others)) and bool(others.max() == scores[0])
    return rank_Q, tied_Q


def precision_at_1(
    query_emb_QE: Tensor, pool_emb_PE: Tensor, candidates: Sequence[np.ndarray]
) -> tuple[Tensor, int]:
    """Hits, bool [Q], and the number of queries that only a tie decided (they are no hits).

    Arguments and errors as :func:`rank_gold`.
    """
    rank_Q, tied_Q = rank_gold(query_emb_QE, pool_emb_PE, candidates)
    return rank_Q == 0, int(tied_Q.sum())


def neighbours(
    query_emb_QE: Tensor, pool_emb_PE: Tensor, candidates: Sequence[np.ndarray], k: int
) -> list[np.ndarray]:
    """The best ``k`` candidates of each query as pool indices, int64; gold last among equals.

    Arguments and errors as :func:`rank_gold`.
    """
    found = []
    for _, places, scores in _scores(query_emb_QE, pool_emb_PE, candidates):
        is_gold = np.arange(len(places)) == 0
        found.append(places[np.lexsort((is_gold, -scores))[:k]])
    return found


def evaluate(
    tasks: Sequence[RankingTask],
    encode: Encode,
    watch: Callable[[RankingTask, Tensor, Tensor], None] | None = None,
    widths: Sequence[int] = (),
) -> dict[str, Any]:
    """Rank every task and sum up.

    Sides are encoded task by task, each distinct one once, also across tasks: ``encode`` is
    called in the same order with the same sides on every rank, and is not called where a task
    brings nothing new.

    Args:
        tasks: names must differ.
        encode: what the model does; see :data:`Encode`.
        watch: called after each task with query_emb_QE and pool_emb_PE, for displays.
        widths: of Matryoshka embeddings: the first so many numbers, normalised again, rank too.

    Returns:
        ``{"sets": {name: {...}}, "groups": {...}}``.  A set has ``p@1, recall@5, recall@10``,
        ``queries``, ``candidates`` (mean number a query), ``chance`` (mean of one over that
        number), ``ties``, ``group`` and ``domain``.  A group is the mean of ``p@1`` over its
        sets: Cls, VQA, Ret, VG, IND, OOD, All; one without sets is absent.  Values in 0..1.
        With widths a set has ``widths``, ``p@1`` by width, and so have the results, groups by
        width (as text, JSON's keys).

    Raises:
        ValueError: two tasks of one name, ``encode`` returns something else than asked for, or a
            width above that of the embeddings.
    """
    names = [task.name for task in tasks]
    if len(set(names)) != len(names):
        raise ValueError(f"two evaluation sets have the same name: {', '.join(names)}")
    keys = [np.array([_key(side) for side in _sides(task)], dtype=np.int64) for task in tasks]
    known = _Known()
    sets: dict[str, dict[str, Any]] = {}
    for number, task in enumerate(tasks):
        later = np.concatenate([*keys[number + 1 :], np.empty(0, dtype=np.int64)])
        emb_NE = known.embed(task, keys[number], encode, later)
        query_emb_QE, pool_emb_PE = emb_NE[: len(task.queries)], emb_NE[len(task.queries) :]
        try:
            rank_Q, tied_Q = rank_gold(query_emb_QE, pool_emb_PE, task.candidates)
            sets[task.name] = _summary(task, rank_Q, tied_Q)
            if widths:
                sets[task.name]["widths"] = {
                    str(width): _precision_of(width, query_emb_QE, pool_emb_PE, task.candidates)
                    for width in widths
                }
        except ValueError as error:
            raise ValueError(f"evaluation set {task.name}: {error}") from None
        log.info("%s: P@1 %.4f", task.name, sets[task.name]["p@1"])
        if watch is not None:
            watch(task, query_emb_QE, pool_emb_PE)
    return summed_up(sets)


def summed_up(sets: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The results of these sets, as :func:`evaluate`: a width counts where every set has it."""
    results: dict[str, Any] = {"sets": sets, "groups": group_means(sets)}
    known = [list(row.get("widths", ())) for row in sets.values()]
    if shared := [width for width in known[0] if all(width in k for k in known)] if known else []:
        results["widths"] = {
            width: _means(sets, lambda row, width=width: row["widths"][width]) for width in shared
        }
    return results


def group_means(sets: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Mean ``p@1`` over the sets of each group, of each domain and of all, as :func:`evaluate`."""
    return _means(sets, lambda row: row["p@1"])


def _means(sets: dict[str, dict[str, Any]], value: Callable[[dict], float]) -> dict[str, float]:
    columns = {column: [value(row) for row in _column(sets, column)] for column in COLUMNS}
    return {column: sum(found) / len(found) for column, found in columns.items() if found}


def _column(sets: dict[str, dict[str, Any]], column: str) -> list[dict[str, Any]]:
    return [row for row in sets.values() if column in (row["group"], row["domain"], "All")]


def _precision_of(width: int, query_emb_QE: Tensor, pool_emb_PE: Tensor, candidates) -> float:
    if not 0 < width <= query_emb_QE.shape[1]:
        raise ValueError(f"width {width}: the embeddings have {query_emb_QE.shape[1]} numbers")
    shorter = [shortened(emb, width) for emb in (query_emb_QE, pool_emb_PE)]
    hits_Q, _ = precision_at_1(*shorter, candidates)
    return float(hits_Q.double().mean())


def shortened(emb_NE: Tensor, width: int) -> Tensor:
    """The first ``width`` numbers of each embedding, of unit length again."""
    return torch.nn.functional.normalize(emb_NE[:, :width], dim=1)


def format_table(results: dict[str, Any]) -> str:
    """The table of the paper in percent, with the sets behind each mean, then a line a set."""
    means = {"mean": results["groups"]}
    means |= {f"width {width}": groups for width, groups in results.get("widths", {}).items()}
    figures = [
        [name, *(f"{100 * groups[c]:.1f}" if c in groups else "-" for c in COLUMNS)]
        for name, groups in means.items()
    ]
    counts = [str(len(_column(results["sets"], column))) for column in COLUMNS]
    head = _aligned([["P@1 in %", *COLUMNS], *figures, ["sets", *counts]])
    lines = [["set", "group", "domain", "P@1", "R@5", "R@10", "chance", "ties", "queries", "cand."]]
    for name, values in results["sets"].items():
        lines.append([
            name, values["group"], values["domain"], f"{100 * values['p@1']:.1f}",
            *(f"{100 * values[f'recall@{k}']:.1f}" for k in RECALLS),
            f"{100 * values['chance']:.2f}", str(values["ties"]), str(values["queries"]),
            f"{values['candidates']:g}",
        ])  # fmt: skip
    return f"{head}\n\n{_aligned(lines, left=3)}\n"


def write_results(path: str | os.PathLike[str], results: dict[str, Any]) -> None:
    """Write ``results`` as JSON so that a reader sees the old file or the new one, never a part.

    Raises:
        ValueError: a value that is not finite.
    """
    path = os.fspath(path)
    text = json.dumps(results, indent=2, allow_nan=False) + "\n"
    staged = f"{path}.{os.getpid()}.tmp"
    with open(staged, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(staged, path)


def split_blocks(n: int, block: int, rank: int, world: int) -> list[range]:
    """The blocks of ``range(n)`` that one rank encodes; round ``i`` of rank ``r`` is block
    ``i * world + r``.

    What stands in a block does not depend on ``world``, so neither do the embeddings.  Every
    rank has equally many blocks, empty ones where there is none left, since all ranks must make
    the same calls under ZeRO-3.

    Raises:
        ValueError: ``block`` below 1, or no such rank.
    """
    if block < 1 or n < 0 or not 0 <= rank < world:
        raise ValueError(
            f"cannot split {n} samples into blocks of {block} for rank {rank} of {world}"
        )
    rounds = -(-n // (block * world))
    starts = [min(n, (i * world + rank) * block) for i in range(rounds)]
    return [range(start, min(n, start + block)) for start in starts]


class _Known:
    """Embeddings of sides that a later task asks for again."""

    def __init__(self) -> None:
        self._keys = np.empty(0, dtype=np.int64)
        self._emb_NE = torch.empty(0, 0)

    def embed(
        self, task: RankingTask, keys_N: np.ndarray, encode: Encode, later: np.ndarray
    ) -> Tensor:
        """float32 [N, E] for the queries, then the pool, of ``task``."""
        distinct, first = np.unique(keys_N, return_index=True)
        fresh = np.sort(first[~np.isin(distinct, self._keys)])
        sides = _Chosen(task, fresh)
        if len(sides):
            emb_NE = _checked(encode(sides), len(sides), self._emb_NE.shape, task.name)
            self._emb_NE = torch.cat((self._emb_NE, emb_NE)) if len(self._keys) else emb_NE
            self._keys = np.concatenate((self._keys, keys_N[fresh]))
        order = np.argsort(self._keys)
        places = order[np.searchsorted(self._keys, keys_N, sorter=order)]
        result = self._emb_NE[torch.from_numpy(places)]
        keep = np.isin(self._keys, later)
        self._emb_NE = self._emb_NE[torch.from_numpy(keep)]
        self._keys = self._keys[keep]
        return result


class _Chosen(Sequence[Side]):
    """Some of the sides of a task (queries, then pool), each made when it is asked for."""

    def __init__(self, task: RankingTask, places: np.ndarray) -> None:
        self._task, self._places = task, places

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, at: Any) -> Any:
        if isinstance(at, slice):
            return [self[i] for i in range(*at.indices(len(self)))]
        place, queries = int(self._places[at]), len(self._task.queries)
        return self._task.queries[place] if place < queries else self._task.pool[place - queries]


def _checked(emb_NE: Tensor | np.ndarray, rows: int, before: torch.Size, name: str) -> Tensor:
    if emb_NE.ndim != 2 or len(emb_NE) != rows or (before[1] and emb_NE.shape[1] != before[1]):
        raise ValueError(
            f"evaluation set {name}: encode returned shape {list(emb_NE.shape)} for {rows} sides; "
            f"expected [{rows}, {before[1] or 'embedding size'}]"
        )
    return torch.as_tensor(emb_NE).detach().to("cpu", torch.float32)


def _scores(
    query_emb_QE: Tensor, pool_emb_PE: Tensor, candidates: Sequence[np.ndarray]
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Per query: its number, its distinct candidates, their scores float32, gold first."""
    if len(query_emb_QE) != len(candidates):
        raise ValueError(f"{len(query_emb_QE)} query embeddings for {len(candidates)} queries")
    for name, emb in (("query", query_emb_QE), ("candidate", pool_emb_PE)):
        bad = ~torch.isfinite(emb).all(dim=1)
        if bad.any():
            raise ValueError(
                f"{int(bad.sum())} of {len(emb)} {name} embeddings are not finite, the first is "
                f"number {int(bad.int().argmax())}"
            )
    candidates = [_distinct(places) for places in candidates]
    sizes = [len(places) for places in candidates]
    if 0 in sizes:
        raise ValueError(f"query {sizes.index(0)} has no candidates")
    shared = sum(sizes) * 4 >= len(pool_emb_PE) * len(sizes)
    if shared:
        pool_emb_PE = pool_emb_PE.double()
    for start in range(0, len(candidates), _QUERY_BLOCK):
        block_BE = query_emb_QE[start : start + _QUERY_BLOCK].double()
        block_BP = (block_BE @ pool_emb_PE.T).float().numpy() if shared else None
        for row, places in enumerate(candidates[start : start + _QUERY_BLOCK]):
            if block_BP is not None:
                scores = block_BP[row, places]
            else:
                own_CE = pool_emb_PE[torch.from_numpy(places)].double()
                scores = (own_CE @ block_BE[row]).float().numpy()
            yield start + row, places, scores


def _distinct(places: np.ndarray) -> np.ndarray:
    _, first = np.unique(places, return_index=True)
    return places if len(first) == len(places) else places[np.sort(first)]


def _summary(task: RankingTask, rank_Q: Tensor, tied_Q: Tensor) -> dict[str, Any]:
    counts_Q = np.array([len(_distinct(places)) for places in task.candidates], dtype=np.float64)
    mean = float(counts_Q.mean())
    return {
        "p@1": float((rank_Q == 0).double().mean()),
        **{f"recall@{k}": float((rank_Q < k).double().mean()) for k in RECALLS},
        "queries": len(counts_Q),
        "candidates": int(mean) if mean.is_integer() else mean,
        "chance": float((1 / counts_Q).mean()),
        "ties": int(tied_Q.sum()),
        "group": task.group,
        "domain": task.domain,
    }


def _sides(task: RankingTask) -> Iterator[Side]:
    yield from task.queries
    yield from task.pool


def _key(side: Side) -> int:
    """A 64-bit key that equal sides share.  A file is known by its path: its content is read
    once, to be encoded, and not a second time to be hashed."""
    state = hashlib.blake2b(side.text.encode(), digest_size=8)
    for picture in side.images:
        if isinstance(picture, FilePicture):
            state.update(b"\0" + os.fsencode(picture.name))
        else:
            state.update(b"\1" + picture.digest())
    return int.from_bytes(state.digest(), "little", signed=True)


def _aligned(rows: list[list[str]], left: int = 1) -> str:
    """Columns of equal width; the first ``left`` ones flush left, figures flush right."""
    widths = [max(len(row[at]) for row in rows) for at in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if at < left else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(row, widths))
        ).rstrip()
        for row in rows
    )
