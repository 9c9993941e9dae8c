"""Attention pooling in plain torch: what a kernel must equal.

Shapes: B samples, K compression tokens, D width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def attention_pool(
    rows_BKD: torch.Tensor, query_D: torch.Tensor | None = None, *, eps: float = 1e-12
) -> torch.Tensor:
    """Score the rows with a query, softmax over K, weighted sum, unit norm.

    ``rows_BKD`` in any float dtype; ``query_D`` or None, which is the zero query: the mean.  Sums
    are float32 (float64 for float64 rows); the result has that dtype, [B, D].

    Raises ``ValueError`` for a wrong number of dimensions or widths that differ.
    """
    if rows_BKD.dim() != 3:
        raise ValueError(f"rows have shape {tuple(rows_BKD.shape)}: expected [B, K, D]")
    rows = rows_BKD if rows_BKD.dtype == torch.float64 else rows_BKD.float()
    if query_D is None:
        return F.normalize(rows.mean(1), dim=-1, eps=eps)
    if query_D.shape != rows.shape[-1:]:
        raise ValueError(
            f"the query has shape {tuple(query_D.shape)}: expected [{rows.shape[-1]}], "
            "the width of the rows"
        )
    scores_BK = rows @ query_D.to(rows.dtype) * rows.shape[-1] ** -0.5
    pooled_BD = (torch.softmax(scores_BK, -1)[..., None] * rows).sum(1)
    return F.normalize(pooled_BD, dim=-1, eps=eps)
