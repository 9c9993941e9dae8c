"""Attention pooling: ours, plain torch, torch.compile, and a large copy.

Forward and backward apart, in two forms: rows already gathered [B, K, D], and taken from a padded
sequence [B, L, D], whose gradient includes the zeros.  Inputs are rotated past the L2.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from coma_ds.kernels.attention_pool import (
    attention_pool,
    attention_pool_at,
    cost,
    launch,
    reference,
)
from coma_ds.kernels.bench.measure import Budget, Candidate, Result, compare, elapsed, row

WIDTHS = (3584, 2048, 1024)
COUNTS = (32, 16, 64)
SAMPLES = (4096, 128)
PADDED = 4  # positions of the padded sequence, as a multiple of K
PAST_L2 = 2**28  # bytes of all input sets together


@dataclass(frozen=True)
class Shape:
    """``length`` is None for gathered rows."""

    samples: int
    count: int
    width: int
    length: int | None = None


def shapes(quick: bool) -> list[Shape]:
    """What is compared, the headline first."""
    if quick:
        plain = [Shape(b, 32, 3584) for b in SAMPLES]
    else:
        plain = [Shape(b, k, d) for k in COUNTS for d in WIDTHS for b in SAMPLES]
    padded = [Shape(s.samples, s.count, s.width, PADDED * s.count) for s in plain]
    # in the padded form one width is enough
    return [x for pair in zip(plain, padded) for x in pair if not x.length or x.width == 3584]


def copy_bandwidth(device: torch.device, size: int = 2**30) -> float:
    """Bytes a millisecond, read and written, of the best of ten large copies."""
    source = torch.randint(0, 100, (size,), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    times = [elapsed(lambda: target.copy_(source), device) for _ in range(12)]
    return 2 * size / min(times[2:])


@dataclass
class Inputs:
    """One set: rows or hidden states, the positions, the query, the incoming gradient."""

    rows: torch.Tensor
    positions: torch.Tensor | None
    query: torch.Tensor
    weight: torch.Tensor

    @classmethod
    def make(cls, shape: Shape, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
        """Random rows; the positions are the last ones of the sequence, as the tokens stand."""
        noise = torch.Generator(device).manual_seed(seed)

        def normal(*size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.randn(size, generator=noise, device=device, dtype=dtype)

        length = shape.length or shape.count
        positions = None
        if shape.length:
            places = torch.arange(length - shape.count, length, device=device)
            positions = places.repeat(shape.samples, 1)
        return cls(
            normal(shape.samples, length, shape.width, dtype=dtype).requires_grad_(),
            positions,
            normal(shape.width).requires_grad_(),
            normal(shape.samples, shape.width),
        )


def ours(one: Inputs) -> torch.Tensor:
    """The kernel."""
    if one.positions is None:
        return attention_pool(one.rows, one.query)
    return attention_pool_at(one.rows, one.positions, one.query)


def plain(rows, positions, query) -> torch.Tensor:
    """Plain torch: the reference, in float32."""
    if positions is None:
        return reference.attention_pool(rows, query)
    return reference.attention_pool_at(rows, positions, query)


def methods(device: torch.device) -> dict:
    """Name to function of one set of inputs."""
    named = {"coma": ours, "torch": lambda one: plain(one.rows, one.positions, one.query)}
    if device.type == "cuda":
        compiled = torch.compile(plain)
        named["torch.compile"] = lambda one: compiled(one.rows, one.positions, one.query)
    return named


def counted(shape: Shape, dtype: torch.dtype, device: torch.device) -> tuple[int, int]:
    """Bytes of a forward and of a backward, from the formulas."""
    config = launch.choose(shape.width, 1, shape.count, backward=True)
    common = (shape.samples, shape.count, shape.width)
    there = cost.forward(*common, itemsize=dtype.itemsize)
    back = cost.backward(
        *common,
        itemsize=dtype.itemsize,
        length=shape.length,
        programs=launch.programs(shape.samples, device, config),
    )
    return there.bytes, back.bytes


def exact_gradients(one: Inputs, samples: int = 16):
    """Float64 result and gradient of the rows, of the first samples."""
    rows = one.rows[:samples].detach().double().requires_grad_()
    places = None if one.positions is None else one.positions[:samples]
    emb = plain(rows, places, one.query.detach().double())
    (grad,) = torch.autograd.grad((emb * one.weight[:samples]).sum(), rows)
    return emb.detach(), grad


def _relative(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.detach()[: len(exact)].double() - exact).norm() / exact.norm())


def bench(
    device: torch.device,
    budget: Budget,
    wanted: list[Shape],
    dtype: torch.dtype = torch.bfloat16,
    past: int = PAST_L2,
    copied: int = 2**30,
) -> Iterator[dict]:
    """Rows of the report, shape by shape, until the budget is spent."""
    speed = copy_bandwidth(device, copied)
    yield row("attention_pool", "ceiling: copy", Result(2 * copied / speed), None,
              options={"gb_per_s": round(speed / 1e6, 1)})  # fmt: skip
    named = methods(device)
    for shape in wanted:
        if budget.spent:
            return
        size = shape.samples * (shape.length or shape.count) * shape.width * dtype.itemsize
        number = max(2, -(-past // size))
        sets = [Inputs.make(shape, dtype, device, seed) for seed in range(min(number, 64))]
        exact = exact_gradients(sets[0])
        inner = 8 if shape.samples <= 512 else 1
        fields = {"N": shape.samples, "M": shape.length, "D": shape.width, "K": shape.count,
                  "dtype": str(dtype).removeprefix("torch.")}  # fmt: skip
        form = "rows" if shape.length is None else "padded"
        there, back = (bytes_ / speed for bytes_ in counted(shape, dtype, device))

        def forward(number, sets=sets):
            return sets[number % len(sets)]

        mine = [
            Candidate(name, lambda one, pool=pool: [pool(one)], forward)
            for name, pool in named.items()
        ]
        found = compare(
            mine, device, budget, inner=inner, judge=lambda out, e=exact: _relative(out[0], e[0])
        )
        for name, result in found.items():
            yield row("attention_pool", name, result, there, **fields,
                      options={"form": form, "pass": "forward"})  # fmt: skip

        def graph(number, pool, sets=sets):
            one = sets[number % len(sets)]
            return pool(one), one

        def backward(state):
            emb, one = state
            return torch.autograd.grad(emb, (one.rows, one.query), one.weight)

        mine = [
            Candidate(name, backward, lambda number, pool=pool: graph(number, pool))
            for name, pool in named.items()
        ]
        found = compare(
            mine, device, budget, inner=inner, judge=lambda out, e=exact: _relative(out[0], e[1])
        )
        for name, result in found.items():
            yield row("attention_pool", name, result, back, **fields,
                      options={"form": form, "pass": "backward"})  # fmt: skip
        del sets, mine, exact
