"""Stage 2's loss over all ranks, written down from its definition, in one process.

Shapes: N all pairs, M all targets, E width.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F

from coma_ds.batch import Batch
from coma_ds.config import MatchConfig
from coma_ds.data.records import digest_id


def whole_loss(
    sides: list[torch.Tensor],
    batches: list[Batch],
    config: MatchConfig,
    temperature_T: torch.Tensor | None,
) -> torch.Tensor:
    """The mean over all rows of all ranks; ``sides`` are each rank's embeddings in its order."""
    if temperature_T is None:
        temperature_T = torch.tensor([config.temperature, *config.task_temperature.values()])
    places = {digest_id(name.encode()): i for i, name in enumerate(config.task_temperature, 1)}
    tau_N = torch.stack(
        [temperature_T[places.get(task, 0)] for b in batches for task in b.task_ids_N.tolist()]
    )
    weighted = dict(zip(config.matryoshka, config.matryoshka_weights or [1.0] * 99))
    weighted.setdefault(sides[0].shape[1], 1.0)  # the whole embedding is always trained
    total = 0.0
    for width, weight in weighted.items():
        cut = [F.normalize(rows[:, :width], dim=-1) for rows in sides]
        loss = _one_way(cut, batches, config, tau_N).mean()
        if config.symmetric:
            turned = [_turned(rows, batch) for rows, batch in zip(cut, batches)]
            back = _one_way(*zip(*turned), config, tau_N).mean()
            loss = (loss + back) / 2
        total = total + weight * loss
    return total


def _turned(rows: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, Batch]:
    """Targets as queries and queries as targets, without the hard negatives."""
    n = batch.pairs
    order = torch.cat([torch.arange(n, 2 * n), torch.arange(n)])
    return rows[order], replace(batch, content_ids_B=batch.content_ids_B[order])


def _one_way(sides, batches, config: MatchConfig, tau_N: torch.Tensor) -> torch.Tensor:
    """-log softmax of each row's positive [N]; a term that does not count is left out."""
    own = config.hard_negatives == "own"
    query = torch.cat([rows[: b.pairs] for rows, b in zip(sides, batches)])
    query_id = torch.cat([b.content_ids_B[: b.pairs] for b in batches])
    columns, ids, asked, positive, owner, at, row = [], [], [], [], [], 0, 0
    for rows, b in zip(sides, batches):
        n = b.pairs
        columns.append(rows[n:])
        ids.append(b.content_ids_B[n:])
        asked.append(torch.cat([b.content_ids_B[:n], b.content_ids_B[2 * n :]]))
        positive.append(torch.arange(at, at + n))
        everyone = torch.full((len(rows) - n,), -1)
        if own and len(rows) > 2 * n:
            everyone[n:] = torch.arange(row, row + n).repeat_interleave(b.negative_counts_N)
        owner.append(everyone)
        at, row = at + len(rows) - n, row + n
    target, ids, asked, owner = map(torch.cat, (columns, ids, asked, owner))
    positive = torch.cat(positive)
    n = len(query)
    positive_id = ids[positive]
    s = query @ target.T
    s_pos = s[torch.arange(n), positive]
    reachable = (owner[None] == -1) | (owner[None] == torch.arange(n)[:, None])
    other = torch.arange(len(target))[None] != positive[:, None]
    same = (ids[None] == positive_id[:, None]) | (asked[None] == query_id[:, None])
    masked = config.mask_false_negatives
    blocks = [(s, other & reachable & ~(same & masked))]
    if config.query_negatives:
        same = (query_id[None] == query_id[:, None]) | (positive_id[None] == positive_id[:, None])
        blocks.append((query @ query.T, ~torch.eye(n, dtype=torch.bool) & ~(same & masked)))
    if config.target_negatives:
        shared = owner[None] == -1
        same = (ids[None] == positive_id[:, None]) | (asked[None] == query_id[:, None])
        blocks.append((target[positive] @ target.T, other & shared & ~(same & masked)))
    total = torch.zeros(n)
    for cosine, keep in blocks:
        if config.false_negative_margin is not None:
            keep = keep & (cosine <= s_pos[:, None] + config.false_negative_margin)
        logit = (cosine - s_pos[:, None]) / tau_N[:, None] + config.hardness * cosine.detach()
        total = total + torch.where(keep, logit.exp(), 0.0).sum(1)
    return torch.log1p(total)
