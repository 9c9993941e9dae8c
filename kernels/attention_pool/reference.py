"""Attention pooling in plain torch: what a kernel must equal.

Shapes: B samples, K compression tokens, L positions of a padded sequence, D width, H heads,
E = D / H width of a head.
"""

from __future__ import annotations

import torch

EPS = 1e-12


def attention_pool(
    rows_BKD: torch.Tensor,
    query_D: torch.Tensor | None = None,
    *,
    valid: torch.Tensor | None = None,
    heads: int = 1,
    eps: float = EPS,
) -> torch.Tensor:
    """The meaning of ``coma_ds.kernels.attention_pool.attention_pool``; looks at no value."""
    wide = torch.float64 if rows_BKD.dtype == torch.float64 else torch.float32
    count, width = rows_BKD.shape[1:]
    keep_BK = None
    if valid is not None:
        valid = valid.to(rows_BKD.device)
        keep_BK = torch.arange(count, device=rows_BKD.device) < valid[:, None]
        rows_BKD = rows_BKD.masked_fill(~keep_BK[..., None], 0)
    rows_BKHE = rows_BKD.to(wide).unflatten(-1, (heads, width // heads))
    if query_D is None:
        total_BHE = rows_BKHE.sum(1)
        pooled_BHE = total_BHE / (count if valid is None else valid[:, None, None])
    else:
        query_HE = query_D.to(wide).view(heads, width // heads)
        scores_BKH = (rows_BKHE * query_HE).sum(-1) * (width // heads) ** -0.5
        if keep_BK is not None:
            scores_BKH = scores_BKH.masked_fill(~keep_BK[..., None], float("-inf"))
        pooled_BHE = (torch.softmax(scores_BKH, 1)[..., None] * rows_BKHE).sum(1)
    pooled_BD = pooled_BHE.flatten(1)
    norm_B1 = pooled_BD.norm(dim=-1, keepdim=True)
    wrong_B1 = ~torch.isfinite(norm_B1)
    if valid is not None:
        wrong_B1 = wrong_B1 | ((valid < 1) | (valid > count))[:, None]
    return pooled_BD / norm_B1.clamp_min(eps).masked_fill(wrong_B1, float("nan"))


def attention_pool_at(
    hidden_BLD: torch.Tensor,
    positions_BK: torch.Tensor,
    query_D: torch.Tensor | None = None,
    *,
    valid: torch.Tensor | None = None,
    heads: int = 1,
    eps: float = EPS,
) -> torch.Tensor:
    """The meaning of ``coma_ds.kernels.attention_pool.attention_pool_at``; looks at no value."""
    length, count = hidden_BLD.shape[1], positions_BK.shape[1]
    positions_BK = positions_BK.to(hidden_BLD.device)
    used_BK = torch.ones_like(positions_BK, dtype=torch.bool)
    if valid is not None:
        used_BK = torch.arange(count, device=used_BK.device) < valid.to(used_BK.device)[:, None]
    wrong_BK = (positions_BK < 0) | (positions_BK >= length)
    wrong_BK[:, 1:] |= positions_BK[:, 1:] <= positions_BK[:, :-1]
    index_BK = positions_BK.clamp(0, length - 1)
    rows_BKD = hidden_BLD.gather(
        1, index_BK[..., None].expand(-1, -1, hidden_BLD.shape[-1]).to(torch.int64)
    )
    emb_BD = attention_pool(rows_BKD, query_D, valid=valid, heads=heads, eps=eps)
    return emb_BD.masked_fill((wrong_BK & used_BK).any(1, keepdim=True), float("nan"))
