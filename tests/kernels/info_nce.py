"""Problems for InfoNCE, and its value and gradients by one implementation or the other."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from coma_ds.kernels.info_nce import FalseNegatives, info_nce

WIDE = torch.float64


@dataclass(frozen=True)
class Case:
    """One problem: sizes, difficulty ("random", "hard", "solved"), temperature, options."""

    rows: int = 33
    targets: int = 70
    width: int = 48
    dtype: torch.dtype = torch.float32
    operand_dtype: torch.dtype | None = None
    difficulty: str = "random"
    temperature: float = 0.05
    per_row: bool = False
    ids: str = ""  # "", "targets" or "queries" (both kinds)
    margin: float | None = None
    hardness: float = 0.0
    own: int = 0
    queries: int = 0
    target_to_target: bool = False
    first: int | None = None  # positives in a row from here, given as a number
    reduction: str = "mean"
    weight: float = 1.0
    share: float = 0.07
    seed: int = 0

    def but(self, **change) -> Case:
        return replace(self, **change)


@contextmanager
def kernels(mode: str) -> Iterator[None]:
    before = os.environ.get("COMA_KERNELS")
    os.environ["COMA_KERNELS"] = mode
    try:
        yield
    finally:
        os.environ.pop("COMA_KERNELS")
        if before is not None:
            os.environ["COMA_KERNELS"] = before


def inputs(case: Case) -> tuple[dict[str, torch.Tensor], dict]:
    """Leaves in float64 whose values the case's dtypes can hold, and the other arguments."""
    noise = torch.Generator().manual_seed(case.seed)

    def unit(*shape: int) -> torch.Tensor:
        return F.normalize(torch.randn(*shape, generator=noise, dtype=WIDE), dim=-1)

    def near(x: torch.Tensor, by: float) -> torch.Tensor:
        return F.normalize(x + by * unit(*x.shape), dim=-1)

    target = unit(case.targets, case.width)
    if case.difficulty == "hard":  # all alike: the positive is one of many
        target = near(unit(1, case.width).expand(case.targets, -1), 0.7)
    if case.first is None:
        positive = torch.randint(0, case.targets, (case.rows,), generator=noise)
    else:
        positive = torch.arange(case.first, case.first + case.rows)
    query = unit(case.rows, case.width)
    if case.difficulty != "random":
        query = near(target[positive], 0.3 if case.difficulty == "solved" else 1.5)
    leaves = {"query": query, "target": target}
    arguments = {
        "positive_index": positive if case.first is None else case.first,
        "margin": case.margin,
        "hardness": case.hardness,
        "target_to_target": case.target_to_target,
        "reduction": case.reduction,
        "weight": case.weight,
    }
    if case.own:
        leaves["own"] = unit(case.rows, case.own, case.width)
    if case.queries:
        leaves["others"] = unit(case.queries, case.width)
        arguments["query_index"] = torch.randint(0, case.queries, (case.rows,), generator=noise)
    low = case.operand_dtype or case.dtype
    leaves = {name: x.to(low).to(WIDE) for name, x in leaves.items()}
    warm = torch.full((case.rows if case.per_row else 1,), case.temperature, dtype=WIDE)
    if case.per_row:
        warm = warm * (1 + torch.rand(case.rows, generator=noise, dtype=WIDE))
    leaves["temperature"] = warm.float().to(WIDE)
    if case.ids:
        arguments["false_negatives"] = contents(case, noise)
    return leaves, arguments


def contents(case: Case, noise: torch.Generator) -> FalseNegatives:
    """Ids of few values: many false negatives.  One lies beyond 32 bits, near another."""

    def some(*shape: int) -> torch.Tensor:
        drawn = torch.randint(0, 9, shape, generator=noise)
        return torch.where(drawn == 8, drawn - 8 + (1 << 32), drawn)

    both = case.ids == "queries"
    return FalseNegatives(
        some(case.targets),
        some(case.rows) if both else None,
        some(case.targets) if both else None,
        some(case.rows, case.own) if case.own else None,
        some(case.queries) if case.queries and both else None,
        some(case.queries) if case.queries else None,
    )


def call(case: Case, leaves: dict, arguments: dict, dtype: torch.dtype, **more):
    """``info_nce`` on leaves in ``dtype`` (the temperature in float32 at least)."""
    names = {"own": "own_negative_NHD", "others": "query_all_PD", "temperature": "temperature"}
    cast = {}
    for name, x in leaves.items():
        kind = dtype if name != "temperature" else torch.promote_types(dtype, torch.float32)
        cast[name] = x.detach().to(kind).clone().requires_grad_()
    named = {names[name]: x for name, x in cast.items() if name in names}
    if dtype != WIDE:
        more = {"operand_dtype": case.operand_dtype, "share": case.share} | more
    return info_nce(cast["query"], cast["target"], **named, **arguments, **more), cast


def gradients(case: Case, loss: torch.Tensor, cast: dict) -> dict[str, torch.Tensor]:
    """Loss and gradients in float64, for an incoming gradient that is not one."""
    factor = 1.7
    if case.reduction == "none":
        factor = torch.linspace(0.5, 2.0, case.rows).to(loss.dtype)
    found = torch.autograd.grad((loss * factor).sum(), list(cast.values()))
    return {"loss": loss.detach().to(WIDE)} | {n: g.to(WIDE) for n, g in zip(cast, found)}


def exact(case: Case) -> dict[str, torch.Tensor]:
    """By the reference, in float64."""
    with kernels("torch"):
        loss, cast = call(case, *inputs(case), WIDE)
        return gradients(case, loss, cast)


def by_kernel(case: Case) -> dict[str, torch.Tensor]:
    """By the kernels, in the case's dtype."""
    with kernels("triton"):
        loss, cast = call(case, *inputs(case), case.dtype)
        assert loss.dtype == torch.float32
        return gradients(case, loss, cast)


def by_reference(case: Case) -> dict[str, torch.Tensor]:
    """By the reference, in the case's dtype."""
    with kernels("torch"):
        loss, cast = call(case, *inputs(case), case.dtype)
        return gradients(case, loss, cast)


def errors(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> dict[str, float]:
    """Norm of the difference over the norm of what is exact."""
    assert found.keys() == wanted.keys()
    return {
        name: float((found[name] - x).norm() / x.norm().clamp_min(1e-30))
        for name, x in wanted.items()
    }


def definition(case: Case) -> dict[str, torch.Tensor]:
    """In float64 by a loop over rows: every term of a row's sum, written down one by one."""
    leaves, arguments = inputs(case)
    leaves = {name: x.requires_grad_() for name, x in leaves.items()}
    query, target, warm = leaves["query"], leaves["target"], leaves["temperature"]
    positive = arguments["positive_index"]
    if isinstance(positive, int):
        positive = torch.arange(positive, positive + case.rows)
    ids = arguments.get("false_negatives")
    nothing = sum(x.sum() for x in leaves.values()) * 0  # gradients also where no negative is
    losses = []
    for row, place in enumerate(positive.tolist()):
        own = query[row] @ target[place]
        answer = None if ids is None else ids.target_ids_M[place]
        asked = None if ids is None or ids.query_ids_N is None else ids.query_ids_N[row]
        cosines = []
        others = [j for j in range(case.targets) if j != place]
        if ids is not None:
            others = [j for j in others if ids.target_ids_M[j] != answer]
        if asked is not None:
            others = [j for j in others if ids.target_query_ids_M[j] != asked]
        cosines += [query[row] @ target[j] for j in others]
        if case.target_to_target:
            cosines += [target[place] @ target[j] for j in others]
        if case.queries:
            others = [k for k in range(case.queries) if k != arguments["query_index"][row]]
            if ids is not None:
                others = [k for k in others if ids.query_all_target_ids_P[k] != answer]
            if asked is not None:
                others = [k for k in others if ids.query_all_ids_P[k] != asked]
            cosines += [query[row] @ leaves["others"][k] for k in others]
        for h in range(case.own):
            if ids is None or ids.own_negative_ids_NH[row, h] != answer:
                cosines.append(query[row] @ leaves["own"][row, h])
        total = nothing
        for s in cosines:
            if case.margin is None or s <= own + case.margin:
                weight = torch.exp(case.hardness * s.detach())
                total = total + weight * torch.exp((s - own) / warm[row if case.per_row else 0])
        losses.append(torch.log1p(total))
    losses = torch.stack(losses) * case.weight
    if case.reduction != "none":
        losses = losses.mean() if case.reduction == "mean" else losses.sum()
    return gradients(case, losses, leaves)


def plain_torch(case: Case) -> dict[str, torch.Tensor]:
    """Torch with float32 logits and bfloat16 gradients: what autograd makes of a product whose
    operands are bfloat16 and whose result is float32."""
    leaves, arguments = inputs(case)
    query, target = leaves["query"].float(), leaves["target"].float()
    positive = arguments["positive_index"]
    if isinstance(positive, int):
        positive = torch.arange(positive, positive + case.rows)
    logits = (query @ target.T / case.temperature).requires_grad_()
    (F.cross_entropy(logits, positive) * 1.7).backward()
    share = (logits.grad / case.temperature).to(torch.bfloat16).float()
    found = {"query": share @ target, "target": share.T @ query}
    return {name: x.to(torch.bfloat16).to(WIDE) for name, x in found.items()}
