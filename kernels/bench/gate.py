"""Is everything right on this card?  No time is reported where it is not.

Both operations against float64, forward and gradients, odd shapes, memory full of NaN, the same
bits twice; gradients of the loss beside those of plain torch with float32 logits.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from coma_ds.kernels.attention_pool import attention_pool_at
from coma_ds.kernels.bench.info_nce import Shape, inputs, torch_loss
from coma_ds.kernels.info_nce import FalseNegatives, info_nce

# How many times smaller than plain torch's the error of the gradients must be, by temperature: with
# MANY targets, whose rounding errors average out, and with fewer.  What terms and scaled operands
# in bfloat16 allow, emulated in float64: 34 and 2.7 at 0.03 and 0.01 with 4,097; 5 and 1.7 with 65.
BETTER = {0.1: (10, 3), 0.03: (10, 3), 0.01: (2.5, 1.2)}
MANY = 4096
LOSS_SHAPES = ((1, 65, 64), (63, 65, 896), (257, 4097, 1152), (1000, 4097, 896))
POOL_SHAPES = ((1, 1, 64), (63, 7, 896), (257, 33, 1152), (5, 128, 3584), (300, 32, 2560))
OPTIONS = ("none", "false negatives", "margin", "hardness", "temperature per row", "own negatives",
           "all queries", "target to target", "all")  # fmt: skip


@contextmanager
def on(mode: str):
    """``COMA_KERNELS`` for a while."""
    before = os.environ.get("COMA_KERNELS")
    os.environ["COMA_KERNELS"] = mode
    try:
        yield
    finally:
        if before is None:
            del os.environ["COMA_KERNELS"]
        else:
            os.environ["COMA_KERNELS"] = before


def poison(device: torch.device, size: int = 2**28) -> None:
    """Leave NaN in the memory that the next tensors get."""
    sizes = [size] + [2**n for n in range(9, 22)] * 4
    kept = [torch.full((n // 4,), float("nan"), device=device) for n in sizes]
    del kept


def relative(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Relative error; absolute where the exact numbers are zero."""
    size = float(exact.double().norm())
    return float((found.double() - exact.double()).norm()) / (size if size > 1e-9 else 1.0)


def _loss_options(name: str, rows: int, columns: int, width: int, device: torch.device) -> dict:
    noise = torch.Generator(device).manual_seed(rows)

    def unit(*shape: int) -> torch.Tensor:
        x = torch.randn(shape, generator=noise, device=device)
        return torch.nn.functional.normalize(x, dim=-1)

    ids = torch.randint(0, max(2, columns // 3), (columns,), generator=noise, device=device)
    every = {
        "false negatives": {"false_negatives": FalseNegatives(ids)},
        "margin": {"margin": 0.05},
        "hardness": {"hardness": 3.0},
        "temperature per row": {
            "temperature": torch.linspace(0.02, 0.2, rows, device=device).requires_grad_()
        },
        "own negatives": {"own_negative_NHD": unit(rows, 3, width)},
        "all queries": {"query_all_PD": unit(rows + 5, width), "query_index": 2},
        "target to target": {"target_to_target": True},
    }
    if name == "all":
        return {key: value for option in every.values() for key, value in option.items()}
    return every.get(name, {})


def _loss_and_gradients(query, target, temperature, options, dtype, **more):
    """Loss and every gradient, of embeddings in ``dtype`` (float64: the reference's)."""
    kept = dict(options)
    names = [n for n, v in kept.items() if torch.is_tensor(v) and v.is_floating_point()]
    for name in names:
        value = kept[name].detach()
        if name != "temperature":
            value = value.to(query.dtype).to(dtype)
        elif dtype == torch.float64:
            value = value.double()
        kept[name] = value.requires_grad_()
    leaves = [x.detach().to(dtype).requires_grad_() for x in (query, target)]
    arguments = {"positive_index": 0, "temperature": temperature} | kept | more
    loss = info_nce(*leaves, **arguments)
    return [loss.detach(), *torch.autograd.grad(loss, leaves + [kept[n] for n in names])]


def check_loss(device: torch.device, shapes=LOSS_SHAPES, dtype=torch.bfloat16) -> Iterator[str]:
    """A line for each failure."""
    for rows, columns, width in shapes:
        shape = Shape(rows, columns, width)
        for difficulty in ("random", "hard", "solved"):
            query, target = inputs(shape, dtype, device, difficulty)
            for temperature, (many, few) in BETTER.items():
                factor = many if columns >= MANY else few
                where = f"info_nce {rows} x {columns} x {width} {difficulty} at {temperature}"
                yield from _check_one(query, target, temperature, factor, where)
        query, target = inputs(shape, dtype, device)
        for option in OPTIONS:
            options = _loss_options(option, rows, columns, width, device)
            with on("torch"):
                exact = _loss_and_gradients(query, target, 0.05, options, torch.float64)
            poison(device)
            with on("triton"):
                found = _loss_and_gradients(query, target, 0.05, options, dtype)
            errors = [relative(a, b) for a, b in zip(found, exact)]
            if not max(errors) < 2 * float(torch.finfo(dtype).eps):
                yield f"info_nce {rows} x {columns} x {width}, {option}: errors {errors}"


def _check_one(query, target, temperature: float, factor: float, where: str) -> Iterator[str]:
    """Float32 gradients of the rounded embeddings beside those of plain torch."""
    with on("torch"):
        exact = _loss_and_gradients(query, target, temperature, {}, torch.float64)
    runs = []
    for _ in range(2):
        poison(query.device)
        with on("triton"):
            runs.append(
                _loss_and_gradients(
                    query, target, temperature, {}, torch.float32, operand_dtype=query.dtype
                )
            )
    if not all(torch.equal(a, b) for a, b in zip(*runs)):
        yield f"{where}: other bits the second time"
    if not relative(runs[0][0], exact[0]) < 1e-5:
        yield f"{where}: loss {float(runs[0][0])}, exactly {float(exact[0])}"
    leaves = [x.detach().requires_grad_() for x in (query, target)]
    plain = torch.autograd.grad(torch_loss(*leaves, temperature), leaves)
    for name, mine, other, wanted in zip("qt", runs[0][1:], plain, exact[1:]):
        error, limit = relative(mine, wanted), max(relative(other, wanted) / factor, 1e-6)
        if not error <= limit:
            yield f"{where}: error of d{name} {error:.2e}, above {limit:.2e}"


def check_pooling(device: torch.device, shapes=POOL_SHAPES) -> Iterator[str]:
    """A line for each failure."""
    for samples, count, width in shapes:
        for dtype in (torch.bfloat16, torch.float32):
            for heads, asked, padded in ((1, True, 0), (1, False, 0), (2, True, 9), (1, True, 300)):
                noise = torch.Generator(device).manual_seed(samples + count)

                def normal(*shape: int, noise=noise) -> torch.Tensor:
                    return torch.randn(shape, generator=noise, device=device)

                length = count + padded
                rows = normal(samples, length, width).to(dtype)
                query = 0.5 * normal(width) if asked else None
                weight = normal(samples, width)
                valid = torch.arange(samples, device=device) % count + 1
                places = normal(samples, length).argsort(1)[:, :count].sort(1).values
                tensors = (rows, query, weight)
                found = {}
                for mode in ("torch", "triton", "again"):
                    wide = mode == "torch"
                    poison(device)
                    with on("torch" if wide else "triton"):
                        found[mode] = _pooled(tensors, places, valid, heads, wide)
                where = f"attention_pool {samples} x {count} x {width} {dtype} {heads} {length}"
                pairs = list(zip(found["triton"], found["torch"], found["again"]))
                if not all(torch.equal(a, c) for a, _, c in pairs):
                    yield f"{where}: other bits the second time"
                errors = [relative(a, b) for a, b, _ in pairs]
                limits = [2e-6, max(2e-6, float(torch.finfo(dtype).eps)), 2e-5]
                if not all(error <= limit for error, limit in zip(errors, limits)):
                    yield f"{where}: errors {errors}"


def _pooled(tensors, places, valid, heads, wide):
    rows, query, weight = tensors
    rows = (rows.double() if wide else rows.clone()).requires_grad_()
    leaves = [rows]
    if query is not None:
        query = (query.double() if wide else query.clone()).requires_grad_()
        leaves.append(query)
    emb = attention_pool_at(rows, places, query, valid=valid, heads=heads)
    return [emb.detach(), *torch.autograd.grad((emb * weight).sum(), leaves)]


def check_launches(device: torch.device) -> Iterator[str]:
    """Pooling is one launch each way."""
    from torch.profiler import ProfilerActivity, profile

    rows = torch.randn(9, 4, 256, device=device, dtype=torch.bfloat16).requires_grad_()
    query = torch.randn(256, device=device, requires_grad=True)
    places, weight = torch.arange(4, device=device).repeat(9, 1), torch.randn(9, 256, device=device)

    def forward():
        return attention_pool_at(rows, places, query)

    emb = forward()
    steps = {
        "forward": forward,
        "backward": lambda: torch.autograd.grad(emb, (rows, query), weight),
    }
    torch.autograd.grad(forward(), (rows, query), weight)
    for name, step in steps.items():
        torch.cuda.synchronize(device)
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            step()
            torch.cuda.synchronize(device)
        names = [e.name for e in seen.events() if e.device_type == torch.autograd.DeviceType.CUDA]
        if len(names) != 1:
            yield f"attention_pool {name}: {len(names)} launches {names}"
