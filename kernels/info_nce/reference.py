"""InfoNCE in plain torch, in chunks of rows: what a kernel must equal.

Shapes: N own queries, M gathered targets, D width, R rows of one chunk.
"""

from __future__ import annotations

import torch
from torch.utils.checkpoint import checkpoint

DEFAULT_CHUNK = 1024


def _check(query_ND, target_MD, positive_index_N, target_ids) -> None:
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
    if target_ids is not None and len(target_ids) != len(target_MD):
        raise ValueError(f"{len(target_ids)} target_ids for {len(target_MD)} targets")


def competitors(
    positive_index_R: torch.Tensor, target_ids_M: torch.Tensor | None, count: int
) -> torch.Tensor:
    """Boolean [R, M]: the targets that compete with the positive of each row, itself excluded.

    A target with the content of the positive never competes, wherever it came from.
    """
    columns = torch.arange(count, device=positive_index_R.device)
    keep = columns[None, :] != positive_index_R[:, None]
    if target_ids_M is not None:
        keep = keep & (target_ids_M[None, :] != target_ids_M[positive_index_R][:, None])
    return keep


def _row_losses(query_RD, target_MD, positive_R, temperature, target_ids_M):
    wide = torch.float64 if query_RD.dtype == torch.float64 else torch.float32
    logits_RM = query_RD.to(wide) @ target_MD.to(wide).T / temperature.to(wide)
    positive_logit = logits_RM.gather(1, positive_R[:, None])
    keep = competitors(positive_R, target_ids_M, len(target_MD))
    # log(1 + sum exp(s - s_pos)): the gradient of an easy row keeps its digits, unlike p - 1.
    excess = (logits_RM - positive_logit).masked_fill(~keep, float("-inf"))
    zero = torch.zeros_like(positive_logit)
    return torch.logsumexp(torch.cat([zero, excess], 1), 1)


def info_nce(
    query_ND: torch.Tensor,
    target_MD: torch.Tensor,
    *,
    positive_index: torch.Tensor,
    temperature: torch.Tensor | float,
    target_ids: torch.Tensor | None = None,
    reduction: str = "mean",
    chunk: int = DEFAULT_CHUNK,
) -> torch.Tensor:
    """Cross-entropy of each query's own target against all targets.

    ``query_ND`` and ``target_MD`` unit vectors, any float dtype, sums in float32 (float64 for
    float64).  ``positive_index`` int64 [N].  ``temperature`` positive, a number or a tensor of one
    element that may need a gradient.  ``target_ids`` int64 [M]: targets with the id of a row's
    positive do not compete with it (false negatives).  ``reduction``: ``mean``, ``sum`` or
    ``none``.  At most ``chunk`` x M logits exist at a time, recomputed in the backward.

    Raises ``ValueError`` for shapes that do not fit, an index out of range, or a temperature that
    is not positive.  Source: van den Oord et al., 2018; the form -log softmax of the positive.
    """
    _check(query_ND, target_MD, positive_index, target_ids)
    if not torch.is_tensor(temperature):
        temperature = torch.tensor([float(temperature)], device=query_ND.device)
    if not bool((temperature > 0).all()):
        raise ValueError(f"temperature {temperature.tolist()}: expected a number above 0")
    rows = []
    for query_RD, positive_R in zip(query_ND.split(chunk), positive_index.split(chunk)):
        args = (query_RD, target_MD, positive_R, temperature, target_ids)
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
    target_ids: torch.Tensor | None = None,
    chunk: int = DEFAULT_CHUNK,
) -> dict[str, torch.Tensor]:
    """Sums over the rows for monitoring; same arguments as ``info_nce``.

    Scalars: ``positive`` and ``hardest`` (cosines of the target and of its best competitor),
    ``accuracy`` (rows whose target beats every competitor), ``masked`` (targets dropped as false
    negatives), ``rows`` (their number), all float32 sums on the device of the queries.
    """
    names = ("positive", "hardest", "accuracy", "masked", "rows")
    sums = {name: torch.zeros((), device=query_ND.device) for name in names}
    for query_RD, positive_R in zip(query_ND.split(chunk), positive_index.split(chunk)):
        cosine_RM = query_RD.float() @ target_MD.float().T
        positive = cosine_RM.gather(1, positive_R[:, None]).squeeze(1)
        keep = competitors(positive_R, target_ids, len(target_MD))
        hardest = cosine_RM.masked_fill(~keep, -1.0).amax(1)
        sums["positive"] += positive.sum()
        sums["hardest"] += hardest.sum()
        sums["accuracy"] += (positive > hardest).sum()
        sums["masked"] += (~keep).sum() - len(positive_R)
        sums["rows"] += len(positive_R)
    return sums
