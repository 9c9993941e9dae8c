"""InfoNCE over ranks on gloo: own rows on each, the gather's backward sums; against one process."""

from __future__ import annotations

import pytest
import torch

from coma_ds import comm
from coma_ds.kernels.info_nce import FalseNegatives, info_nce, symmetric_info_nce
from tests.distributed.harness import run_world
from tests.kernels.info_nce import kernels

D, TEMPERATURE = 12, 0.05
ROWS = {1: [9], 2: [2, 7], 4: [3, 1, 4, 1]}


def everything() -> tuple[torch.Tensor, ...]:
    """Queries, targets, own negatives (two a row) and ids of 9 pairs, the same on every rank."""
    noise = torch.Generator().manual_seed(5)

    def unit(*shape: int) -> torch.Tensor:
        x = torch.randn(*shape, generator=noise, dtype=torch.float64)
        return torch.nn.functional.normalize(x, dim=-1)

    ids = [torch.randint(0, 4, (9,), generator=noise) for _ in range(2)]
    return unit(9, D), unit(9, D), unit(9, 2, D), *ids


def contents(answers: torch.Tensor, asked: torch.Tensor, own: slice) -> FalseNegatives:
    return FalseNegatives(
        answers, asked[own], asked, query_all_ids_P=asked, query_all_target_ids_P=answers
    )


def loss_of(symmetric: bool, query, target, negative, gathered, place: int, ids) -> torch.Tensor:
    """Sum over own rows; ``gathered`` are all queries and all targets."""
    queries, targets = gathered
    shared = {"temperature": TEMPERATURE, "false_negatives": ids, "reduction": "sum"}
    places = {"positive_index": place, "query_index": place, "query_all_PD": queries}
    if symmetric:
        return symmetric_info_nce(query, targets, own_target_ND=target, **places, **shared)
    further = {"own_negative_NHD": negative, "target_to_target": True, "margin": 0.3}
    return info_nce(query, targets, **places, **further, **shared, hardness=1.0)


def own_rows(forms: list) -> list:
    """For each (mode, symmetric, dtype): loss and gradients of this rank's rows.

    The gradients are those of the sum over all ranks' rows: the gathers' backward sums.
    """
    query, target, negative, answers, asked = everything()
    counts = ROWS[comm.world_size()]
    first = sum(counts[: comm.rank()])
    own = slice(first, first + counts[comm.rank()])
    found = []
    for mode, symmetric, dtype in forms:
        kind = getattr(torch, dtype)
        mine = [x[own].to(kind).requires_grad_() for x in (query, target, negative)]
        gathered = [comm.gather_rows(x, counts) for x in mine[:2]]
        ids = contents(
            comm.gather_rows(answers[own], counts), comm.gather_rows(asked[own], counts), own
        )
        with kernels(mode):
            total = loss_of(symmetric, *mine, gathered, first, ids)
        grads = torch.autograd.grad(total / 9, mine[: 2 if symmetric else 3])
        loss = float(comm.all_sum(total.detach())) / 9
        found.append([loss, *(g.double().tolist() for g in grads)])
    return found


EXACT = [("torch", False, "float64"), ("torch", True, "float64")]


@pytest.mark.parametrize(
    ("world", "forms"),
    [(1, EXACT), (2, [*EXACT, ("triton", False, "float32")]), (4, EXACT)],
)
def test_ranks_equal_one_process(world, forms) -> None:
    place = "tests.kernels.test_info_nce_ranks:own_rows"
    ranks = [own_rows(forms)] if world == 1 else run_world(world, place, forms=forms)
    query, target, negative, answers, asked = everything()
    for form, (_, symmetric, dtype) in enumerate(forms):
        leaves = [x.detach().clone().requires_grad_() for x in (query, target, negative)]
        ids = contents(answers, asked, slice(0, 9))
        loss = loss_of(symmetric, *leaves, leaves[:2], 0, ids) / 9
        wanted = torch.autograd.grad(loss, leaves[: 2 if symmetric else 3])
        limit = 1e-12 if dtype == "float64" else 1e-5
        assert all(abs(rank[form][0] - loss.item()) < limit for rank in ranks)
        for i, x in enumerate(wanted):
            parts = [torch.tensor(r[form][1 + i], dtype=torch.float64) for r in ranks]
            assert float((torch.cat(parts) - x).norm() / x.norm()) < limit
