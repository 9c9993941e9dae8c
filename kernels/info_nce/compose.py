"""Losses made of InfoNCE: both directions, and prefixes of the embedding.

Shapes: N own pairs, M gathered targets, P gathered queries, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise

import torch
import torch.nn.functional as F

from coma_ds.kernels.info_nce.api import info_nce
from coma_ds.kernels.info_nce.inputs import FalseNegatives

# Arguments that are embeddings, by name: what ``matryoshka`` cuts besides the first two.
EMBEDDINGS = ("own_negative_NHD", "query_all_PD", "own_target_ND")


def _swapped(ids: FalseNegatives, positive_index: torch.Tensor | int, rows: int) -> FalseNegatives:
    """The same contents seen from the targets: queries are the candidates."""
    if ids.query_all_ids_P is None or ids.query_all_target_ids_P is None:
        raise ValueError(
            "symmetric_info_nce with false negatives: give query_all_ids and query_all_target_ids"
        )
    if isinstance(positive_index, int):
        positive_index = torch.arange(
            positive_index, positive_index + rows, device=ids.target_ids_M.device
        )
    return FalseNegatives(
        target_ids_M=ids.query_all_ids_P,
        query_ids_N=ids.target_ids_M[positive_index],
        target_query_ids_M=ids.query_all_target_ids_P,
    )


def symmetric_info_nce(
    query_ND: torch.Tensor,
    target_MD: torch.Tensor,
    *,
    own_target_ND: torch.Tensor,
    query_all_PD: torch.Tensor,
    positive_index: torch.Tensor | int,
    query_index: torch.Tensor | int,
    temperature: torch.Tensor | float,
    false_negatives: FalseNegatives | None = None,
    **options,
) -> torch.Tensor:
    """Mean of both directions: own queries against all targets, own targets against all queries.

    ``own_target_ND`` are the positives of the own queries before they were gathered, and
    ``query_all_PD`` the gathered queries; each rank does its own rows of both directions, and the
    gathers carry the gradients of the rest.  ``positive_index`` places the own targets among the
    targets, ``query_index`` the own queries among the queries.  ``false_negatives`` needs
    ``query_all_ids_P`` and ``query_all_target_ids_P``.  ``options``: of ``info_nce`` (``margin``,
    ``hardness``, ``reduction``, ``weight``, ``operand_dtype``, ``share``, ``chunk``).

    Raises ``ValueError`` like ``info_nce``.  Source: Radford et al., 2021 (CLIP).
    """
    allowed = {"margin", "hardness", "reduction", "weight", "operand_dtype", "share", "chunk"}
    if unknown := sorted(set(options) - allowed):
        raise ValueError(f"symmetric_info_nce: {unknown[0]} is not an option of both directions")
    one_way = {"temperature": temperature, **options}
    back = None
    if false_negatives is not None:
        back = _swapped(false_negatives, positive_index, len(query_ND))
        false_negatives = replace(
            false_negatives,
            own_negative_ids_NH=None,
            query_all_ids_P=None,
            query_all_target_ids_P=None,
        )
    there = info_nce(
        query_ND,
        target_MD,
        positive_index=positive_index,
        false_negatives=false_negatives,
        **one_way,
    )
    back_again = info_nce(
        own_target_ND,
        query_all_PD,
        positive_index=query_index,
        false_negatives=back,
        **one_way,
    )
    return (there + back_again) / 2


def prefix(emb: torch.Tensor, width: int) -> torch.Tensor:
    """The first ``width`` numbers of each embedding, with unit norm again, in its dtype."""
    if width == emb.shape[-1]:
        return emb
    part = emb[..., :width]
    if emb.dtype != torch.float64:
        part = part.float()
    return F.normalize(part, dim=-1).to(emb.dtype)


def matryoshka(
    loss: Callable[..., torch.Tensor],
    dims: Sequence[int],
    weights: Sequence[float] | None = None,
) -> Callable[..., torch.Tensor]:
    """``loss`` as the weighted sum of itself over prefixes of the embeddings.

    ``dims``: widths, increasing; ``weights``: one for each, 1 where not given.  The result is
    called like ``loss`` (queries, targets, named arguments); all embeddings among the arguments
    are cut and normalised, everything else is passed on.

    Raises ``ValueError`` for dims that do not increase, weights that do not fit, and, when called,
    for a width above that of the embeddings.  Source: Kusupati et al., 2022.
    """
    dims = tuple(dims)
    if not dims or dims[0] < 1 or any(a >= b for a, b in pairwise(dims)):
        raise ValueError(f"dims {list(dims)}: expected increasing widths above 0")
    factors = (1.0,) * len(dims) if weights is None else tuple(weights)
    if len(factors) != len(dims) or not all(w > 0 for w in factors):
        raise ValueError(f"weights {list(factors)}: expected {len(dims)} numbers above 0")

    def nested(query: torch.Tensor, target: torch.Tensor, **arguments) -> torch.Tensor:
        if dims[-1] > query.shape[-1]:
            raise ValueError(f"dims {list(dims)}: the embeddings have width {query.shape[-1]}")
        parts = []
        for width, factor in zip(dims, factors):
            cut = {
                name: prefix(x, width) if name in EMBEDDINGS and x is not None else x
                for name, x in arguments.items()
            }
            parts.append(factor * loss(prefix(query, width), prefix(target, width), **cut))
        return torch.stack(parts).sum(0)

    return nested
