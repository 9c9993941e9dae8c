"""From the K final states of a sample to one vector of unit length.

Shapes: B samples, K compression tokens, D width.
"""

from __future__ import annotations

import torch
from torch import nn

from coma_ds.kernels.attention_pool import attention_pool


class Pooling(nn.Module):
    """``rows_BKD`` -> ``emb_BD``, float32, unit norm.

    ``mean`` is the paper's; ``attention`` scores the rows with one learned query that starts at
    zero, where it equals the mean (``heads`` parts of it, each with its own weights of the rows);
    ``last`` takes the last row.
    """

    def __init__(self, kind: str, width: int, heads: int = 1) -> None:
        super().__init__()
        if kind not in ("mean", "attention", "last"):
            raise ValueError(f"pooling {kind!r}: expected 'mean', 'attention' or 'last'")
        if width % heads:
            raise ValueError(f"model.pooling_heads {heads} does not divide the width {width}")
        self.kind, self.heads = kind, heads
        self.query = nn.Parameter(torch.zeros(width)) if kind == "attention" else None

    def forward(self, rows_BKD: torch.Tensor) -> torch.Tensor:
        if self.kind == "last":
            return nn.functional.normalize(rows_BKD[:, -1].float(), dim=-1)
        return attention_pool(rows_BKD, self.query, heads=self.heads)
