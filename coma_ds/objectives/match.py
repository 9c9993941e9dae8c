"""Stage 2: InfoNCE from each query to all gathered targets.

Shapes: N own pairs, M targets of all ranks (own negatives included), E width, W ranks.

The scale of the gradient, said once: a rank computes the loss of its own rows against all targets,
weighted W / N_global; the gather's backward sums over ranks; surrogates carry no factor.
DeepSpeed's mean over ranks then gives the gradient of the global mean.
"""

from __future__ import annotations

import torch

from coma_ds import comm
from coma_ds.batch import Batch
from coma_ds.config import MatchConfig
from coma_ds.kernels.info_nce import FalseNegatives, info_nce, retrieval_statistics


class Match:
    """Embeddings of a chunk, and the loss over the whole gathered batch."""

    def __init__(self, config: MatchConfig) -> None:
        self.config = config

    def encode(self, model, batch: Batch, features_SFD) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Embeddings of the samples [B, E] float32, and the learned temperature [1] or None."""
        temperature = model.temperature() if model.temperature is not None else None
        return model.embeddings(batch, features_SFD), temperature

    def loss(
        self, emb_SE: torch.Tensor, temperature: torch.Tensor | None, batch: Batch
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """The own rows' share of the global mean (scalar, with gradient), and the report.

        ``emb_SE`` are all own samples in the batch's order: queries, targets, negatives.
        """
        pairs = batch.pairs
        query_NE, target_NE = emb_SE[:pairs], emb_SE[pairs:]
        device = emb_SE.device
        counts = comm.row_counts(len(target_NE), device)
        target_ME = comm.gather_rows(target_NE, counts)
        first = sum(counts[: comm.rank()])
        positive_N = torch.arange(first, first + pairs, device=device)
        masked = None
        if self.config.mask_false_negatives:
            masked = self._false_negatives(batch.content_ids_B.to(device), pairs, counts)
        if temperature is None:
            temperature = torch.tensor([self.config.temperature], device=device)
        shared = {"positive_index": positive_N, "false_negatives": masked}
        total = info_nce(query_NE, target_ME, temperature=temperature, reduction="sum", **shared)
        rows = int(comm.all_sum(torch.tensor([pairs], device=device)))
        loss = total * (comm.world_size() / rows)
        sums = retrieval_statistics(query_NE, target_ME, **shared)
        sums["loss"] = total.detach()
        names = list(sums)
        means = (comm.all_sum(torch.stack([sums[n].float() for n in names])) / rows).tolist()
        report = dict(zip(names, means))
        candidates = max(1, len(target_ME) - 1)
        return loss, {
            "loss": report["loss"],
            "temperature": float(temperature.detach()),
            "positive_similarity": report["positive"],
            "hardest_negative_similarity": report["hardest"],
            "margin": report["positive"] - report["hardest"],
            "masked_negatives": report["masked"] / candidates,
            "in_batch_accuracy": report["accuracy"],
        }

    @staticmethod
    def _false_negatives(ids_B: torch.Tensor, pairs: int, counts: list[int]) -> FalseNegatives:
        """Targets with the content of the own target, and targets of the same query, of all ranks.

        A hard negative was asked by nobody: its own content stands for its query.
        """
        asked = torch.cat([ids_B[:pairs], ids_B[2 * pairs :]])
        return FalseNegatives(
            target_ids_M=comm.gather_rows(ids_B[pairs:], counts),
            query_ids_N=ids_B[:pairs],
            target_query_ids_M=comm.gather_rows(asked, counts),
        )
