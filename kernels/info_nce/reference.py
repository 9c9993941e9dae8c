"""InfoNCE in plain torch, in chunks of rows: what a kernel must equal.

Shapes: N own queries, M gathered targets, D width, R rows of one chunk.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.utils.checkpoint import checkpoint

DEFAULT_CHUNK = 1024


@dataclass(frozen=True)
class FalseNegatives:
    """What must not compete with a row's positive, by identity, wherever it came from.

    ``target_ids_M`` int64: a target with the content of the positive.  ``query_ids_N`` and
    ``target_query_ids_M`` int64, both or none: the target of a query with the row's content (the
    same caption of two pictures: each is a right answer).  A hard negative has no query; give it
    an id that no query has, its own content for example.
    """

    target_ids_M: torch.Tensor
    query_ids_N: torch.Tensor | None = None
    target_query_ids_M: torch.Tensor | None = None

    def check(self, rows: int, targets: int) -> None:
        """Raise ``ValueError`` for lengths that do not fit N rows and M targets."""
        if (self.query_ids_N is None) != (self.target_query_ids_M is None):
            raise ValueError("query_ids and target_query_ids go together: give both or none")
        for name, ids, wanted in (
            ("target_ids", self.target_ids_M, targets),
            ("query_ids", self.query_ids_N, rows),
            ("target_query_ids", self.target_query_ids_M, targets),
        ):
            if ids is not None and ids.shape != (wanted,):
                raise ValueError(f"{name} has shape {tuple(ids.shape)}: expected [{wanted}]")

    def rows(self, start: int, stop: int) -> FalseNegatives:
        """The part for the rows ``start .. stop - 1``."""
        queries = None if self.query_ids_N is None else self.query_ids_N[start:stop]
        return FalseNegatives(self.target_ids_M, queries, self.target_query_ids_M)


def _check(query_ND, target_MD, positive_index_N, false_negatives) -> None:
    if query_ND.dim() != 2 or target_MD.dim() != 2 or query_ND.shape[1] != target_MD.shape[1]:
        raise ValueError(
            f"queries {tuple(query_ND.shape)} and targets {tuple(target_MD.shape)}: "
            "expected [N, D] and [M, D]"
        )
    if positive_index_N.shape != query_ND.shape[:1]:
        raise ValueError(
            f"positive_index has shape {tuple(positive_index_N.shape)}: "
            f"expected [{len(query_ND)}], one target for each query"
        )
    if len(positive_index_N):
        low, high = int(positive_index_N.min()), int(positive_index_N.max())
        if low < 0 or high >= len(target_MD):
            raise ValueError(
                f"positive_index spans {low}..{high}: expected 0..{len(target_MD) - 1}"
            )
    if false_negatives is not None:
        false_negatives.check(len(query_ND), len(target_MD))


def competitors(
    positive_R: torch.Tensor, count: int, false_negatives: FalseNegatives | None
) -> torch.Tensor:
    """Boolean [R, M]: the targets that compete with the positive of each row, itself excluded."""
    columns = torch.arange(count, device=positive_R.device)
    keep = columns[None, :] != positive_R[:, None]
    if false_negatives is None:
        return keep
    ids_M = false_negatives.target_ids_M
    keep = keep & (ids_M[None, :] != ids_M[positive_R][:, None])
    if false_negatives.query_ids_N is not None:
        asked_M = false_negatives.target_query_ids_M
        keep = keep & (asked_M[None, :] != false_negatives.query_ids_N[:, None])
    return keep


def _row_losses(query_RD, target_MD, positive_R, temperature, false_negatives):
    wide = torch.float64 if query_RD.dtype == torch.float64 else torch.float32
    logits_RM = query_RD.to(wide) @ target_MD.to(wide).T / temperature.to(wide)
    positive_logit = logits_RM.gather(1, positive_R[:, None])
    keep = competitors(positive_R, len(target_MD), false_negatives)
    # log(1 + sum exp(s - s_pos)): the gradient of an easy row keeps its digits, unlike p - 1.
    excess = (logits_RM - positive_logit).masked_fill(~keep, float("-inf"))
    # NaN for a positive that is not finite: a row without a competitor must not hide it.
    zero = (positive_logit - positive_logit).detach()
    return torch.logsumexp(torch.cat([zero, excess], 1), 1)


def info_nce(
    query_ND: torch.Tensor,
    target_MD: torch.Tensor,
    *,
    positive_index: torch.Tensor,
    temperature: torch.Tensor | float,
    false_negatives: FalseNegatives | None = None,
    reduction: str = "mean",
    chunk: int = DEFAULT_CHUNK,
) -> torch.Tensor:
    """Cross-entropy of each query's own target against all targets.

    ``query_ND`` and ``target_MD`` unit vectors, any float dtype, sums in float32 (float64 for
    float64).  ``positive_index`` int64 [N].  ``temperature`` positive, a number or a tensor of one
    element that may need a gradient.  ``false_negatives``: who does not compete with whom.
    ``reduction``: ``mean``, ``sum`` or ``none``.  At most ``chunk`` x M logits exist at a time,
    recomputed in the backward.

    Raises ``ValueError`` for shapes that do not fit, an index out of range, or a temperature that
    is not positive.  Source: van den Oord et al., 2018; the form -log softmax of the positive.
    """
    _check(query_ND, target_MD, positive_index, false_negatives)
    if not torch.is_tensor(temperature):
        temperature = torch.tensor([float(temperature)], device=query_ND.device)
    if not bool((temperature > 0).all()):
        raise ValueError(f"temperature {temperature.tolist()}: expected a number above 0")
    rows = []
    for start in range(0, len(query_ND), chunk):
        end = start + chunk
        query_RD, positive_R = query_ND[start:end], positive_index[start:end]
        masked = false_negatives and false_negatives.rows(start, end)
        args = (query_RD, target_MD, positive_R, temperature, masked)
        whole = len(query_ND) <= chunk
        rows.append(
            _row_losses(*args) if whole else checkpoint(_row_losses, *args, use_reentrant=False)
        )
    losses_N = torch.cat(rows) if rows else query_ND.float().sum(1)
    if reduction == "none":
        return losses_N
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction {reduction!r}: expected 'mean', 'sum' or 'none'")
    return losses_N.mean() if reduction == "mean" else losses_N.sum()


@torch.no_grad()
def retrieval_statistics(
    query_ND: torch.Tensor,
    target_MD: torch.Tensor,
    *,
    positive_index: torch.Tensor,
    false_negatives: FalseNegatives | None = None,
    chunk: int = DEFAULT_CHUNK,
) -> dict[str, torch.Tensor]:
    """Sums over the rows for monitoring; same arguments as ``info_nce``.

    Scalars: ``positive`` and ``hardest`` (cosines of the target and of its best competitor),
    ``accuracy`` (rows whose target beats every competitor), ``masked`` (targets dropped as false
    negatives), ``rows`` (their number), all float32 sums on the device of the queries.
    """
    names = ("positive", "hardest", "accuracy", "masked", "rows")
    sums = {name: torch.zeros((), device=query_ND.device) for name in names}
    for start in range(0, len(query_ND), chunk):
        end = start + chunk
        query_RD, positive_R = query_ND[start:end], positive_index[start:end]
        masked = false_negatives and false_negatives.rows(start, end)
        cosine_RM = query_RD.float() @ target_MD.float().T
        positive = cosine_RM.gather(1, positive_R[:, None]).squeeze(1)
        keep = competitors(positive_R, len(target_MD), masked)
        hardest = cosine_RM.masked_fill(~keep, -1.0).amax(1)
        sums["positive"] += positive.sum()
        sums["hardest"] += hardest.sum()
        sums["accuracy"] += (positive > hardest).sum()
        sums["masked"] += (~keep).sum() - len(positive_R)
        sums["rows"] += len(positive_R)
    return sums
