"""Without a GPU: the chunked reference of the loss beside the dense form, on the CPU."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from coma_ds.kernels.bench.info_nce import (
    TEMPERATURE,
    Shape,
    gradient_error,
    inputs,
    sampled_gradients,
    torch_loss,
)
from coma_ds.kernels.bench.measure import Budget, Candidate, compare, row
from coma_ds.kernels.info_nce import info_nce

SHAPES = (Shape(2048, 2048, 512), Shape(4096, 4096, 512), Shape(256, 8192, 1024))
QUICK = (Shape(1024, 1024, 256),)
CHUNK = 256


def chunked_loss(query_ND, target_MD, temperature: float) -> torch.Tensor:
    """The reference, ``CHUNK`` rows of logits at a time, recomputed in the backward."""
    return info_nce(query_ND, target_MD, positive_index=0, temperature=temperature, chunk=CHUNK)


def bench(budget: Budget, quick: bool) -> Iterator[dict]:
    """Rows of the report; the dense form is the ceiling."""
    device = torch.device("cpu")
    for shape in QUICK if quick else SHAPES:
        if budget.spent:
            return
        query, target = inputs(shape, torch.float32, device)
        exact = sampled_gradients(query, target, TEMPERATURE)

        def judge(outputs, exact=exact) -> float:
            return gradient_error(outputs, exact)

        mine = []
        for name, loss in (("torch dense", torch_loss), ("coma chunked reference", chunked_loss)):

            def run(_, loss=loss, query=query, target=target):
                return torch.autograd.grad(loss(query, target, TEMPERATURE), (query, target))

            mine.append(Candidate(name, run))
        found = compare(mine, device, budget, judge=judge)
        dense = found["torch dense"].ms
        for name, result in found.items():
            chunk = {"chunk": CHUNK} if "chunked" in name else {}
            yield row(
                "info_nce", name, result, dense, N=shape.rows, M=shape.columns, D=shape.width,
                dtype="float32", options={"temperature": TEMPERATURE, "device": "cpu", **chunk},
            )  # fmt: skip
