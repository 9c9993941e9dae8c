"""InfoNCE in plain torch, in chunks of rows: the meaning that the kernels must equal.

Shapes: N own queries, M gathered targets, P gathered queries, H own negatives of a row, D width;
R rows of one chunk, C columns of one block of negatives.

A row's loss is log(1 + sum over its negatives of exp((s - s_pos) / temperature) * exp(a * s)),
s the cosine of a negative, s_pos that of the positive, a the hardness (the last factor without
gradient).  Every block of negatives is one more part of that sum.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.utils.checkpoint import checkpoint

from coma_ds.kernels.info_nce.inputs import FalseNegatives, Problem

DEFAULT_CHUNK = 1024


def _part(ids: torch.Tensor | None, rows: slice) -> torch.Tensor | None:
    return None if ids is None else ids[rows]


def _differ(keep: torch.Tensor, row_R, column) -> torch.Tensor:
    """``keep`` without the places where the row's id is the column's ([C], or [R, H] per row)."""
    if row_R is None or column is None:
        return keep
    return keep & (column != row_R[:, None])


def _elsewhere(own_R: torch.Tensor, count: int) -> torch.Tensor:
    """Boolean [R, C]: every column but the row's own."""
    return torch.arange(count, device=own_R.device)[None, :] != own_R[:, None]


def competitors(
    positive_R: torch.Tensor, count: int, ids: FalseNegatives | None, rows: slice
) -> torch.Tensor:
    """Boolean [R, M]: targets that compete with the positive of each row, itself excluded."""
    keep = _elsewhere(positive_R, count)
    if ids is not None:
        keep = _differ(keep, ids.target_ids_M[positive_R], ids.target_ids_M)
        keep = _differ(keep, _part(ids.query_ids_N, rows), ids.target_query_ids_M)
    return keep


def _blocks(
    p: Problem, query_RD, target_MD, own_RHD, query_all_PD, rows: slice
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(cosine [R, C], competes [R, C]) of each block of negatives; the first is q-t."""
    ids, positive_R = p.false_negatives, p.positive_N[rows]
    keep = competitors(positive_R, len(target_MD), ids, rows)
    yield query_RD @ target_MD.T, keep
    if p.target_to_target:
        yield target_MD[positive_R] @ target_MD.T, keep
    answer_R = None if ids is None else ids.target_ids_M[positive_R]
    if query_all_PD is not None:
        keep = _elsewhere(p.query_index_N[rows], len(query_all_PD))
        if ids is not None:
            keep = _differ(keep, _part(ids.query_ids_N, rows), ids.query_all_ids_P)
            keep = _differ(keep, answer_R, ids.query_all_target_ids_P)
        yield query_RD @ query_all_PD.T, keep
    if own_RHD is not None:
        keep = torch.ones(own_RHD.shape[:2], dtype=torch.bool, device=own_RHD.device)
        if ids is not None:
            keep = _differ(keep, answer_R, _part(ids.own_negative_ids_NH, rows))
        yield (own_RHD @ query_RD[:, :, None])[..., 0], keep


def _row_losses(
    query_RD, target_MD, temperature, own_RHD, query_all_PD, p: Problem, rows: slice
) -> torch.Tensor:
    wide = torch.float64 if query_RD.dtype == torch.float64 else torch.float32
    query_RD, target_MD = query_RD.to(wide), target_MD.to(wide)
    own_RHD, query_all_PD = (None if x is None else x.to(wide) for x in (own_RHD, query_all_PD))
    temperature = temperature.to(wide)[:, None]
    positive = None
    parts = []
    for cosine, keep in _blocks(p, query_RD, target_MD, own_RHD, query_all_PD, rows):
        if positive is None:
            positive = cosine.gather(1, p.positive_N[rows, None])
            # NaN where it is not finite: neither loss nor gradient must hide that.
            nothing = (positive - positive).detach()
            positive = positive + nothing
        excess = (cosine - positive) / temperature
        if p.hardness:
            excess = excess + p.hardness * cosine.detach()
        if p.margin is not None:
            keep = keep & ~(cosine > positive + p.margin)
        parts.append(excess.masked_fill(~keep, float("-inf")))
    excess = torch.cat(parts, 1) if len(parts) > 1 else parts[0]
    # log1p, and no p - 1 anywhere: the gradient of an easy row keeps its digits.
    top = excess.detach().amax(1, keepdim=True).clamp_min(0)
    total = (excess - top).exp().sum(1, keepdim=True)
    return (top + torch.log1p(total + torch.expm1(-top)) + nothing)[:, 0]


def rounded(x: torch.Tensor | None, dtype: torch.dtype | None) -> torch.Tensor | None:
    """The values of ``x`` in ``dtype``, in the dtype and with the gradient of ``x``."""
    if x is None or dtype is None or x.dtype == dtype:
        return x
    return x + (x.to(dtype).to(x.dtype) - x).detach()


def row_losses(
    p: Problem, *, operand_dtype: torch.dtype | None = None, chunk: int = DEFAULT_CHUNK
) -> torch.Tensor:
    """Losses [N] in float32 (float64 for float64), with gradients by autograd.

    At most ``chunk`` rows of cosines exist at a time; the backward computes them again.  Raises
    ``ValueError`` for an index out of range or a temperature that is not positive.
    """
    p.check_values()
    query_ND, target_MD, own_NHD, query_all_PD = (
        rounded(x, operand_dtype)
        for x in (p.query_ND, p.target_MD, p.own_negative_NHD, p.query_all_PD)
    )
    losses = []
    for start in range(0, p.rows, chunk):
        rows = slice(start, start + chunk)
        temperature = p.temperature if len(p.temperature) == 1 else p.temperature[rows]
        args = (query_ND[rows], target_MD, temperature, _part(own_NHD, rows), query_all_PD)
        if p.rows <= chunk:
            losses.append(_row_losses(*args, p, rows))
        else:
            losses.append(
                checkpoint(
                    _row_losses, *args, p, rows, use_reentrant=False, preserve_rng_state=False
                )
            )
    if losses:
        return torch.cat(losses)
    return query_ND.to(torch.promote_types(query_ND.dtype, torch.float32)).sum(1)


@torch.no_grad()
def retrieval_statistics(
    query_ND: torch.Tensor,
    target_MD: torch.Tensor,
    *,
    positive_index: torch.Tensor,
    false_negatives: FalseNegatives | None = None,
    margin: float | None = None,
    chunk: int = DEFAULT_CHUNK,
) -> dict[str, torch.Tensor]:
    """Sums over the rows for monitoring; same arguments as ``info_nce``, only targets compete.

    Scalars: ``positive`` and ``hardest`` (cosines of the target and of its best competitor, -1
    where none competes), ``accuracy`` (rows whose target beats every competitor), ``masked``
    (targets dropped as false negatives), ``rows`` (their number), all float32 sums on the device
    of the queries.
    """
    names = ("positive", "hardest", "accuracy", "masked", "rows")
    sums = {name: torch.zeros((), device=query_ND.device) for name in names}
    for start in range(0, len(query_ND), chunk):
        rows = slice(start, start + chunk)
        positive_R = positive_index[rows]
        cosine_RM = query_ND[rows].float() @ target_MD.float().T
        positive = cosine_RM.gather(1, positive_R[:, None])
        keep = competitors(positive_R, len(target_MD), false_negatives, rows)
        if margin is not None:
            keep = keep & ~(cosine_RM > positive + margin)
        positive = positive.squeeze(1)
        hardest = cosine_RM.masked_fill(~keep, -1.0).amax(1)
        sums["positive"] += positive.sum()
        sums["hardest"] += hardest.sum()
        sums["accuracy"] += (positive > hardest).sum()
        sums["masked"] += (~keep).sum() - len(positive_R)
        sums["rows"] += len(positive_R)
    return sums
