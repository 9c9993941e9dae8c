"""What InfoNCE is given, checked once for the reference and the kernels alike.

Shapes: N own queries, M gathered targets, P gathered queries, H own negatives of a row, D width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@dataclass(frozen=True)
class FalseNegatives:
    """What must not compete with a row's positive, by identity, wherever it came from.

    ``target_ids_M`` int64: a target with the content of the positive.  ``query_ids_N`` and
    ``target_query_ids_M`` int64, both or none: the target of a query with the row's content (the
    same caption of two pictures: each is a right answer).  A hard negative has no query; give it
    an id that no query has, its own content for example.

    For the further negatives, where they are used: ``own_negative_ids_NH`` are contents of the
    row's own negatives; ``query_all_ids_P`` contents of the gathered queries, needed as soon as
    ``query_ids_N`` is given; ``query_all_target_ids_P`` contents of their targets (two queries
    with one right answer do not compete).
    """

    target_ids_M: torch.Tensor
    query_ids_N: torch.Tensor | None = None
    target_query_ids_M: torch.Tensor | None = None
    own_negative_ids_NH: torch.Tensor | None = None
    query_all_ids_P: torch.Tensor | None = None
    query_all_target_ids_P: torch.Tensor | None = None

    def check(self, rows: int, targets: int, own: int = 0, queries: int | None = None) -> None:
        """Raise ``ValueError`` for lengths that do not fit N rows, M targets, H own, P queries."""
        if (self.query_ids_N is None) != (self.target_query_ids_M is None):
            raise ValueError("query_ids and target_query_ids go together: give both or none")
        if queries is not None and self.query_ids_N is not None and self.query_all_ids_P is None:
            raise ValueError("query_ids with query_all: give query_all_ids too")
        for name, ids, wanted in (
            ("target_ids", self.target_ids_M, (targets,)),
            ("query_ids", self.query_ids_N, (rows,)),
            ("target_query_ids", self.target_query_ids_M, (targets,)),
            ("own_negative_ids", self.own_negative_ids_NH, (rows, own)),
            ("query_all_ids", self.query_all_ids_P, (queries or 0,)),
            ("query_all_target_ids", self.query_all_target_ids_P, (queries or 0,)),
        ):
            if ids is None:
                continue
            if ids.shape != wanted:
                expected = ", ".join(map(str, wanted))
                raise ValueError(f"{name} has shape {tuple(ids.shape)}: expected [{expected}]")
            if ids.dtype != torch.int64:
                raise ValueError(f"{name} has dtype {ids.dtype}: expected torch.int64")

    def tensors(self) -> list[torch.Tensor | None]:
        """All ids."""
        return list(vars(self).values())


@dataclass(frozen=True)
class Problem:
    """One call, checked; the tensors that may need a gradient are fields of their own."""

    query_ND: torch.Tensor
    target_MD: torch.Tensor
    temperature: torch.Tensor  # [1] or [N]
    own_negative_NHD: torch.Tensor | None
    query_all_PD: torch.Tensor | None
    positive_N: torch.Tensor  # int64
    query_index_N: torch.Tensor | None  # int64, where query_all_PD is given
    false_negatives: FalseNegatives | None
    margin: float | None
    hardness: float
    target_to_target: bool
    distinct: bool  # no target is the positive of two rows, known without a look at the values

    @property
    def rows(self) -> int:
        """N."""
        return len(self.query_ND)

    def tensors(self) -> list[torch.Tensor | None]:
        """All tensors, to see that they share a device."""
        ids = self.false_negatives.tensors() if self.false_negatives else []
        indices = [self.positive_N, self.query_index_N, self.temperature]
        return [self.query_ND, self.target_MD, self.own_negative_NHD, self.query_all_PD] + (
            indices + ids
        )

    def check_values(self) -> None:
        """Raise ``ValueError`` for an index out of range or a temperature that is not positive.

        It looks at the values: on a GPU it waits for them.
        """
        _check_range("positive_index", self.positive_N, len(self.target_MD))
        if self.query_all_PD is not None:
            _check_range("query_index", self.query_index_N, len(self.query_all_PD))
        if not bool((self.temperature > 0).all()):
            values = self.temperature.detach().flatten()
            bad = values[~(values > 0)][:4].tolist()
            raise ValueError(f"temperature {bad}: expected a number above 0")


def _check_range(name: str, index: torch.Tensor, count: int) -> None:
    if not len(index):
        return
    low, high = int(index.min()), int(index.max())
    if low < 0 or high >= count:
        raise ValueError(f"{name} spans {low}..{high}: expected 0..{count - 1}")


def _index(name: str, index: torch.Tensor | int, like: torch.Tensor, count: int) -> torch.Tensor:
    """``index`` as int64 [N]; a number is the place of the first row, the others follow it."""
    rows = len(like)
    if isinstance(index, int):
        if index < 0 or index + rows > count:
            raise ValueError(f"{name} spans {index}..{index + rows - 1}: expected 0..{count - 1}")
        return torch.arange(index, index + rows, device=like.device)
    if index.shape != (rows,):
        raise ValueError(
            f"{name} has shape {tuple(index.shape)}: expected [{rows}], one place for each query"
        )
    if index.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"{name} has dtype {index.dtype}: expected torch.int64")
    return index.long()


def _number(name: str, value: float, low: float) -> float:
    if not (math.isfinite(value) and value >= low):
        raise ValueError(f"{name} {value}: expected a finite number" + " >= 0" * (low == 0))
    return float(value)


def _check_embeddings(query_ND, target_MD, own_negative_NHD, query_all_PD) -> None:
    if query_ND.dim() != 2 or target_MD.dim() != 2 or query_ND.shape[1] != target_MD.shape[1]:
        raise ValueError(
            f"queries {tuple(query_ND.shape)} and targets {tuple(target_MD.shape)}: "
            "expected [N, D] and [M, D]"
        )
    rows, width = query_ND.shape
    if own_negative_NHD is not None and (
        own_negative_NHD.dim() != 3
        or own_negative_NHD.shape[0] != rows
        or own_negative_NHD.shape[2] != width
    ):
        raise ValueError(
            f"own negatives have shape {tuple(own_negative_NHD.shape)}: "
            f"expected [{rows}, H, {width}]"
        )
    if query_all_PD is not None and (query_all_PD.dim() != 2 or query_all_PD.shape[1] != width):
        raise ValueError(f"query_all has shape {tuple(query_all_PD.shape)}: expected [P, {width}]")
    for name, x in (
        ("queries", query_ND),
        ("targets", target_MD),
        ("own negatives", own_negative_NHD),
        ("query_all", query_all_PD),
    ):
        if x is None:
            continue
        if x.dtype not in FLOATS:
            raise ValueError(f"{name} have dtype {x.dtype}: expected a float dtype")
        if x.dtype != query_ND.dtype:
            raise ValueError(f"{name} have dtype {x.dtype}, the queries {query_ND.dtype}: cast one")


def make_problem(
    query_ND: torch.Tensor,
    target_MD: torch.Tensor,
    *,
    positive_index: torch.Tensor | int,
    temperature: torch.Tensor | float,
    false_negatives: FalseNegatives | None = None,
    margin: float | None = None,
    hardness: float = 0.0,
    own_negative_NHD: torch.Tensor | None = None,
    query_all_PD: torch.Tensor | None = None,
    query_index: torch.Tensor | int | None = None,
    target_to_target: bool = False,
) -> Problem:
    """Check shapes, dtypes and numbers, and give the call one form.

    Raises ``ValueError``; values inside tensors are looked at by ``Problem.check_values`` alone.
    """
    _check_embeddings(query_ND, target_MD, own_negative_NHD, query_all_PD)
    rows, targets = len(query_ND), len(target_MD)
    positive_N = _index("positive_index", positive_index, query_ND, targets)
    if own_negative_NHD is not None and not own_negative_NHD.shape[1]:
        own_negative_NHD = None
    index_N = None
    if query_all_PD is not None:
        if query_index is None:
            raise ValueError("query_all without query_index: say where the own queries are in it")
        index_N = _index("query_index", query_index, query_ND, len(query_all_PD))
    elif query_index is not None:
        raise ValueError("query_index without query_all: give both or none")
    if not torch.is_tensor(temperature):
        value = float(temperature)
        if not value > 0 or math.isinf(value):
            raise ValueError(f"temperature [{value}]: expected a number above 0")
        temperature = torch.full((1,), value, dtype=torch.float64, device=query_ND.device)
    elif not temperature.is_floating_point() or (
        temperature.numel() != 1 and temperature.shape != (rows,)
    ):
        raise ValueError(
            f"temperature has shape {tuple(temperature.shape)} and dtype {temperature.dtype}: "
            f"expected one number, or [{rows}] floats, one for each query"
        )
    if false_negatives is not None:
        own = 0 if own_negative_NHD is None else own_negative_NHD.shape[1]
        queries = None if query_all_PD is None else len(query_all_PD)
        false_negatives.check(rows, targets, own, queries)
    return Problem(
        query_ND=query_ND,
        target_MD=target_MD,
        temperature=temperature.reshape(-1),
        own_negative_NHD=own_negative_NHD,
        query_all_PD=query_all_PD,
        positive_N=positive_N,
        query_index_N=index_N,
        false_negatives=false_negatives,
        margin=None if margin is None else _number("margin", margin, -math.inf),
        hardness=_number("hardness", hardness, 0.0),
        target_to_target=bool(target_to_target),
        distinct=isinstance(positive_index, int),
    )
