"""InfoNCE, forward and backward together: ours, plain torch, rivals, and the matrix products alone.

Shapes: N queries, M targets, D width.  The positive of row i is target i.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from coma_ds.kernels.bench.measure import Budget, Candidate, Result, compare, row
from coma_ds.kernels.bench.rivals import Rival
from coma_ds.kernels.info_nce import FalseNegatives, info_nce, symmetric_info_nce

TEMPERATURE = 0.03
WIDTHS = (1024, 2048, 3584)
SQUARES = (8192, 32768, 65536)
STRIPS = ((128, 1024), (1024, 1024), (128, 65536), (1024, 65536))
SAMPLED = 64  # rows and columns whose gradients are compared with float64
SYMMETRIC_AND_OPTIONS = 32768  # rows of the shapes that also run these


@dataclass(frozen=True)
class Shape:
    """One comparison."""

    rows: int
    columns: int
    width: int


def shapes(quick: bool) -> list[Shape]:
    """What is compared, the headline first: a run that is cut short has it."""
    if quick:
        return [Shape(32768, 32768, 2048), Shape(8192, 8192, 2048), Shape(128, 1024, 2048)]
    squares = [Shape(n, n, d) for n in (32768, 8192, 65536) for d in (2048, 3584, 1024)]
    strips = [Shape(n, m, d) for n, m in STRIPS for d in WIDTHS]
    return squares[:6] + strips + squares[6:]


def inputs(shape: Shape, dtype: torch.dtype, device: torch.device, difficulty: str = "hard"):
    """Unit vectors; ``difficulty`` is how close a query is to its target: ``random``, ``hard``
    (cosine near 0.4) or ``solved`` (near 0.9)."""
    noise = torch.Generator(device).manual_seed(shape.rows + shape.columns + shape.width)
    target = torch.randn(shape.columns, shape.width, generator=noise, device=device)
    target = F.normalize(target, dim=-1)
    query = torch.randn(shape.rows, shape.width, generator=noise, device=device)
    pull = {"random": 0.0, "hard": 0.45, "solved": 2.0}[difficulty]
    query = F.normalize(F.normalize(query, dim=-1) + pull * target[: shape.rows], dim=-1)
    return query.to(dtype).requires_grad_(), target.to(dtype).requires_grad_()


class _WideProduct(torch.autograd.Function):
    """Float32 logits of low-precision embeddings; gradients multiplied in that precision."""

    @staticmethod
    def forward(ctx, query_ND, target_MD):
        ctx.save_for_backward(query_ND, target_MD)
        if query_ND.is_cuda and query_ND.dtype != torch.float32:
            return torch.mm(query_ND, target_MD.T, out_dtype=torch.float32)
        return query_ND.float() @ target_MD.float().T

    @staticmethod
    def backward(ctx, grad_NM):
        query_ND, target_MD = ctx.saved_tensors
        grad_NM = grad_NM.to(query_ND.dtype)
        return grad_NM @ target_MD, grad_NM.T @ query_ND


def torch_loss(query_ND, target_MD, temperature: float) -> torch.Tensor:
    """Plain torch: float32 logits, all of them in memory."""
    logits_NM = _WideProduct.apply(query_ND, target_MD) / temperature
    return F.cross_entropy(logits_NM, torch.arange(len(query_ND), device=query_ND.device))


def narrow_loss(query_ND, target_MD, temperature: float) -> torch.Tensor:
    """Plain torch as it is often written: the product is rounded, then made float32."""
    logits_NM = (query_ND @ target_MD.T).float() / temperature
    return F.cross_entropy(logits_NM, torch.arange(len(query_ND), device=query_ND.device))


def our_loss(query_ND, target_MD, temperature: float) -> torch.Tensor:
    """The kernel, no options."""
    return info_nce(query_ND, target_MD, positive_index=0, temperature=temperature)


def our_symmetric_loss(query_ND, target_MD, temperature: float) -> torch.Tensor:
    """The kernel, both directions."""
    return symmetric_info_nce(
        query_ND,
        target_MD,
        own_target_ND=target_MD,
        query_all_PD=query_ND,
        positive_index=0,
        query_index=0,
        temperature=temperature,
    )


def our_loss_with_options(query_ND, target_MD, temperature: float) -> torch.Tensor:
    """The kernel with everything that its epilogue carries for these inputs."""
    count = len(target_MD)
    ids = torch.arange(count, device=query_ND.device) // 2  # every target has a twin
    return info_nce(
        query_ND,
        target_MD,
        positive_index=0,
        temperature=torch.full((len(query_ND),), temperature, device=query_ND.device),
        false_negatives=FalseNegatives(ids),
        margin=0.1,
        hardness=1.0,
    )


@torch.no_grad()
def sampled_gradients(query_ND, target_MD, temperature: float, count: int = SAMPLED):
    """Float64 gradients of ``count`` queries and ``count`` targets, spread over all, and where."""
    rows = torch.linspace(0, len(query_ND) - 1, min(count, len(query_ND))).long()
    columns = torch.linspace(0, len(target_MD) - 1, min(count, len(target_MD))).long()
    rows, columns = rows.to(query_ND.device), columns.to(query_ND.device)
    query, target = query_ND.double(), target_MD.double()
    grad_query = torch.zeros(len(rows), query.shape[1], dtype=torch.float64, device=query.device)
    grad_target = torch.zeros(len(columns), *grad_query.shape[1:]).to(grad_query)
    step = max(1, 2**26 // len(target))
    for start in range(0, len(query), step):
        part = query[start : start + step]
        own = torch.arange(start, start + len(part), device=query.device)
        share = part @ target.T / temperature
        share -= share.gather(1, own[:, None])
        share = share.exp_().scatter_(1, own[:, None], 0.0)
        share /= 1 + share.sum(1, keepdim=True)
        share.scatter_(1, own[:, None], -share.sum(1, keepdim=True))
        mine = (rows >= start) & (rows < start + len(part))
        grad_query[mine] = share[rows[mine] - start] @ target
        grad_target += share[:, columns].T @ part
    scale = 1 / (temperature * len(query))
    return (rows, grad_query * scale), (columns, grad_target * scale)


def gradient_error(outputs, exact) -> float:
    """The larger relative error of both gradients, where they are known."""
    errors = [
        float((found[where].double() - wanted).norm() / wanted.norm())
        for found, (where, wanted) in zip(outputs, exact)
    ]
    return float("nan") if any(e != e for e in errors) else max(errors)


def products(query_ND, target_MD) -> list[Candidate]:
    """The three matrix products of the loss at the same shapes, through the vendor's library."""
    query, target = query_ND.detach(), target_MD.detach()
    panel = torch.randn(len(query), len(target), dtype=query.dtype, device=query.device)
    out = [torch.empty_like(x) for x in (panel, query, target)]

    def cosines(_):
        return [torch.mm(query, target.T, out=out[0])]

    def to_query(_):
        return [torch.mm(panel, target, out=out[1])]

    def to_target(_):
        return [torch.mm(panel.T, query, out=out[2])]

    return [Candidate(f.__name__, f) for f in (cosines, to_query, to_target)]


def candidates(query, target, compiled: dict, rivals: list[Rival], symmetric: bool):
    """Name to loss function for one shape."""
    square = len(query) == len(target)
    if symmetric:
        named = {"coma": our_symmetric_loss}
    else:
        named = {"coma": our_loss, "torch": torch_loss, **compiled}
    for rival in rivals:
        fits = square and query.shape[1] % rival.multiple == 0
        if rival.symmetric == symmetric and fits:
            named[rival.name] = rival.loss
    for name, loss in named.items():

        def run(_, loss=loss):
            return torch.autograd.grad(loss(query, target, TEMPERATURE), (query, target))

        yield Candidate(name, run)


def compiled_losses(device: torch.device) -> dict:
    """torch.compile of the two plain forms, as a user would call it."""
    if device.type != "cuda":
        return {}
    return {
        "torch.compile": torch.compile(torch_loss),
        "torch.compile bf16 logits": torch.compile(narrow_loss),
    }


def bench(
    device: torch.device,
    budget: Budget,
    rivals: list[Rival],
    wanted: list[Shape],
    dtype: torch.dtype = torch.bfloat16,
    extended: int = SYMMETRIC_AND_OPTIONS,
) -> Iterator[dict]:
    """Rows of the report, shape by shape, until the budget is spent."""
    compiled = compiled_losses(device)
    for shape in wanted:
        if budget.spent:
            return
        query, target = inputs(shape, dtype, device)
        fields = {"N": shape.rows, "M": shape.columns, "D": shape.width,
                  "dtype": str(dtype).removeprefix("torch.")}  # fmt: skip
        short = shape.rows * shape.columns * shape.width < 2**34
        times = compare(products(query, target), device, budget, inner=8 if short else 1)
        parts = [r.ms for r in times.values()]
        ceiling = None if None in parts else sum(parts)
        options = {"temperature": TEMPERATURE}
        yield row("info_nce", "ceiling: 3 products", Result(ceiling), ceiling, **fields)
        exact = sampled_gradients(query, target, TEMPERATURE)
        mine = list(candidates(query, target, compiled, rivals, False))

        def judge(outputs, exact=exact) -> float:
            return gradient_error(outputs, exact)

        found = compare(mine, device, budget, inner=4 if short else 1, judge=judge)
        for name, result in found.items():
            yield row("info_nce", name, result, ceiling, **fields, options=options)
        if shape.rows != shape.columns or shape.rows != extended or budget.spent:
            continue
        four = None if ceiling is None else ceiling + parts[0]
        mine = list(candidates(query, target, {}, rivals, True))
        for name, result in compare(mine, device, budget).items():
            yield row("info_nce", name, result, four, **fields,
                      options=options | {"symmetric": True})  # fmt: skip

        def run(_, query=query, target=target):
            loss = our_loss_with_options(query, target, TEMPERATURE)
            return torch.autograd.grad(loss, (query, target))

        (result,) = compare([Candidate("coma", run)], device, budget).values()
        every = {"false_negatives": True, "margin": 0.1, "hardness": 1.0, "temperature": "per row"}
        yield row("info_nce", "coma", result, ceiling, **fields, options=every)
