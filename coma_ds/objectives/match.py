"""Stage 2: InfoNCE from each query to all gathered targets, with what the config adds to it.

Shapes: N own pairs, X own hard negatives, H of one pair at most, M targets of all ranks, P queries
of all ranks, T temperatures, E width.

The scale of the gradient, said once: a rank computes the loss of its own rows against all targets,
weighted W / N_global over W ranks; the gather's backward sums over ranks; surrogates carry no
factor.  DeepSpeed's mean over ranks then gives the gradient of the global mean.
"""

from __future__ import annotations

from typing import Any

import torch

from coma_ds import comm
from coma_ds.batch import Batch
from coma_ds.config import MatchConfig
from coma_ds.data.records import digest_id
from coma_ds.kernels.info_nce import (
    FalseNegatives,
    info_nce,
    matryoshka,
    retrieval_statistics,
    symmetric_info_nce,
)

_DTYPES = {"fp32": None, "bf16": torch.bfloat16}


class Match:
    """Embeddings of a chunk, and the loss over the whole gathered batch."""

    def __init__(self, config: MatchConfig) -> None:
        self.config = config
        tasks = enumerate(config.task_temperature, 1)
        self._places = {digest_id(name.encode()): place for place, name in tasks}

    def encode(self, model, batch: Batch, features_SFD) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Embeddings of the samples [B, E] float32, and the learned temperatures [T] or None."""
        temperature = model.temperature() if model.temperature is not None else None
        return model.embeddings(batch, features_SFD), temperature

    def loss(
        self, emb_SE: torch.Tensor, temperature_T: torch.Tensor | None, batch: Batch
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """The own rows' share of the global mean (scalar, with gradient), and the report.

        ``emb_SE`` are all own samples in the batch's order: queries, targets, negatives.
        ``temperature_T``: that of ``temperature``, then those of ``task_temperature``, where they
        are learned.
        """
        config, device, pairs = self.config, emb_SE.device, batch.pairs
        if temperature_T is None:
            temperature_T = torch.tensor(self.temperatures(config), device=device)
        rows = int(comm.all_sum(torch.tensor([pairs], device=device)))
        weight = comm.world_size() / rows
        query_NE = emb_SE[:pairs]
        target_ME, arguments = self._arguments(emb_SE, batch)
        options = {
            "temperature": self._of_rows(temperature_T, batch),
            "margin": config.false_negative_margin,
            "hardness": config.hardness,
            "operand_dtype": _DTYPES[config.loss_dtype],
            "reduction": "sum",
            "weight": weight,
        }
        call = symmetric_info_nce if config.symmetric else info_nce
        if config.matryoshka:
            widths, weights = all_widths(config, emb_SE.shape[1])
            call = matryoshka(call, widths, weights)
        if call is info_nce:
            loss, sums = info_nce(query_NE, target_ME, **arguments, **options, statistics=True)
        else:
            loss = call(query_NE, target_ME, **arguments, **options)
            first = arguments["positive_index"]
            sums = retrieval_statistics(
                query_NE,
                target_ME,
                positive_index=torch.arange(first, first + pairs, device=device),
                false_negatives=arguments["false_negatives"],
                margin=config.false_negative_margin,
            )
        report = self._report({**sums, "loss": loss.detach() / weight}, rows)
        report["masked_negatives"] /= max(1, len(target_ME) - 1)
        for name, value in zip(("", *config.task_temperature), temperature_T.tolist()):
            report["temperature" + f"/{name}" * bool(name)] = value
        return loss, report

    @staticmethod
    def temperatures(config: MatchConfig) -> list[float]:
        """The T temperatures as configured: the common one first."""
        return [config.temperature, *config.task_temperature.values()]

    def _of_rows(self, temperature_T: torch.Tensor, batch: Batch) -> torch.Tensor:
        """[1], or [N] where tasks have temperatures of their own."""
        if not self._places or batch.task_ids_N is None:
            return temperature_T[:1]
        places = [self._places.get(task, 0) for task in batch.task_ids_N.tolist()]
        return temperature_T[torch.tensor(places, dtype=torch.int64, device=temperature_T.device)]

    def _arguments(self, emb_SE: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, dict[str, Any]]:
        """The gathered targets, and what else the loss takes of this batch."""
        config, pairs = self.config, batch.pairs
        device, ids_B = emb_SE.device, batch.content_ids_B.to(emb_SE.device)
        own = config.hard_negatives == "own"
        stop = 2 * pairs if own else len(emb_SE)
        counts = comm.row_counts(stop - pairs, device)
        target_ME = comm.gather_rows(emb_SE[pairs:stop], counts)
        first = sum(counts[: comm.rank()])
        arguments: dict[str, Any] = {"positive_index": first}
        ids: dict[str, torch.Tensor] = {}
        if config.mask_false_negatives:
            # A hard negative was asked by nobody: its own content stands for its query.
            asked = torch.cat([ids_B[:pairs], ids_B[2 * pairs : stop]])
            ids = {
                "target_ids_M": comm.gather_rows(ids_B[pairs:stop], counts),
                "query_ids_N": ids_B[:pairs],
                "target_query_ids_M": comm.gather_rows(asked, counts),
            }
        if config.query_negatives or config.symmetric:
            counts = comm.row_counts(pairs, device)
            arguments["query_all_PD"] = comm.gather_rows(emb_SE[:pairs], counts)
            arguments["query_index"] = sum(counts[: comm.rank()])
            if ids:
                ids["query_all_ids_P"] = comm.gather_rows(ids_B[:pairs], counts)
                ids["query_all_target_ids_P"] = comm.gather_rows(ids_B[pairs : 2 * pairs], counts)
        if config.symmetric:
            arguments["own_target_ND"] = emb_SE[pairs : 2 * pairs]
        else:
            arguments["target_to_target"] = config.target_negatives
        if own and len(emb_SE) > stop:
            place, shape = _slots(batch.negative_counts_N.to(device))
            negatives = emb_SE.new_zeros((*shape, emb_SE.shape[1]))
            arguments["own_negative_NHD"] = negatives.index_put(place, emb_SE[stop:])
            if not ids:  # ids for the empty places alone: every target its own, no negative any
                ids = {"target_ids_M": torch.arange(len(target_ME), device=device)}
                contents = torch.full_like(ids_B[stop:], -1)
                own_ids = torch.arange(first, first + pairs, device=device)
            else:
                contents, own_ids = ids_B[stop:], ids_B[pairs:stop]
            # An empty place has the content of the positive, which never competes.
            filled = own_ids[:, None].expand(shape).clone()
            ids["own_negative_ids_NH"] = filled.index_put(place, contents)
        arguments["false_negatives"] = FalseNegatives(**ids) if ids else None
        return target_ME, arguments

    @staticmethod
    def _report(sums: dict[str, torch.Tensor], rows: int) -> dict[str, float]:
        """Means over the rows of all ranks."""
        names = list(sums)
        means = (comm.all_sum(torch.stack([sums[n].float() for n in names])) / rows).tolist()
        of = dict(zip(names, means))
        return {
            "loss": of["loss"],
            "positive_similarity": of["positive"],
            "hardest_negative_similarity": of["hardest"],
            "margin": of["positive"] - of["hardest"],
            "masked_negatives": of["masked"],
            "in_batch_accuracy": of["accuracy"],
        }


def all_widths(config: MatchConfig, full: int) -> tuple[list[int], list[float]]:
    """The widths that are trained, with their weights: those of the config, and the full one.

    Where the config does not list the full width, that counts once.
    """
    widths, weights = [*config.matryoshka], [*config.matryoshka_weights]
    weights = weights or [1.0] * len(widths)
    if not widths or widths[-1] != full:
        widths, weights = [*widths, full], [*weights, 1.0]
    return widths, weights


def _slots(counts_N: torch.Tensor) -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[int, int]]:
    """Where the negatives stand in [N, H]: (pair, place) of each of the X, and that shape."""
    pair = torch.arange(len(counts_N), device=counts_N.device).repeat_interleave(counts_N)
    first = counts_N.cumsum(0) - counts_N
    place = torch.arange(len(pair), device=pair.device) - first[pair]
    return (pair, place), (len(counts_N), int(counts_N.max()))
