"""Host side of the pooling kernels: tile shapes, buffers, launches.

Shapes: B samples, K compression tokens, L positions, D width, H heads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch

COUNTERS = 64  # tickets of the backward: one for all groups, one a group


@dataclass(frozen=True)
class Config:
    """One tile: ``rows`` tokens x the padded width; ``per_sm`` programs of the backward."""

    rows: int
    warps: int
    stages: int
    per_sm: int = 2
    registers: int | None = None  # of a thread, at most

    @property
    def options(self) -> dict[str, int | None]:
        """What the compiler is told."""
        return {"num_warps": self.warps, "maxnreg": self.registers}


@dataclass(frozen=True)
class Saved:
    """What the forward leaves for the backward."""

    emb_BD: torch.Tensor
    divisor_B: torch.Tensor
    scores_BHK: torch.Tensor | None
    softmax_BH2: torch.Tensor | None
    counters_C: torch.Tensor | None


def power(number: int) -> int:
    """The next power of two."""
    return 1 << (number - 1).bit_length()


def tile(width: int, heads: int) -> tuple[int, int]:
    """``BLOCK_H``, ``BLOCK_E``: the padded heads and the padded width of one."""
    return power(heads), power(width // heads)


def choose(width: int, heads: int, count: int, *, backward: bool) -> Config:
    """The shipped configuration: nothing spills, two or more programs on a multiprocessor, 56 KB
    or more of loads in flight on Hopper (by the compiler's report, Triton 3.6 and 3.7)."""
    block = math.prod(tile(width, heads))
    if backward:
        rows = 4 if block <= 1024 else 2
    else:
        rows = 8 if block <= 512 else 4
    if block > 4096:
        rows //= 2
    if heads > 1 and block > 1024:  # a score for each head: more registers
        rows = max(1, rows // 2)
    warps = 4 if block <= 2048 else 8 if block <= 4096 else 16
    per_sm = 4 if block <= 2048 else 2 if block <= 4096 else 1
    registers = 128 if warps == 8 and heads == 1 else None
    return Config(min(rows, power(count)), warps, 3, per_sm, registers)


@cache
def processors(device: torch.device) -> int:
    """Multiprocessors of the card; 2 in the interpreter."""
    if device.type != "cuda":
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count


def programs(samples: int, device: torch.device, config: Config) -> int:
    """Programs of a backward that sums the query's gradient."""
    return min(samples, processors(device) * config.per_sm, (COUNTERS - 1) ** 2)


def forward(
    hidden_BLD: torch.Tensor,
    positions_BK: torch.Tensor | None,
    query_D: torch.Tensor | None,
    valid_B: torch.Tensor | None,
    *,
    heads: int,
    eps: float,
    train_query: bool,
    config: Config | None = None,
) -> Saved:
    """One launch; ``hidden_BLD`` with a contiguous last axis, ``positions_BK`` contiguous."""
    from coma_ds.kernels.attention_pool.jit import pool_forward

    samples, length, width = hidden_BLD.shape
    count = length if positions_BK is None else positions_BK.shape[1]
    config = config or choose(width, heads, count, backward=False)

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=hidden_BLD.device)

    asked = query_D is not None
    saved = Saved(
        emb_BD=empty(samples, width),
        divisor_B=empty(samples),
        scores_BHK=empty(samples, heads, count) if asked else None,
        softmax_BH2=empty(samples, heads, 2) if asked else None,
        counters_C=empty(COUNTERS, dtype=torch.int32) if train_query else None,
    )
    block_h, block_e = tile(width, heads)
    if samples:
        pool_forward[(samples,)](
            hidden_BLD,
            positions_BK,
            query_D,
            valid_B,
            saved.emb_BD,
            saved.scores_BHK,
            saved.softmax_BH2,
            saved.divisor_B,
            saved.counters_C,
            count,
            length,
            hidden_BLD.stride(0),
            hidden_BLD.stride(1),
            (width // heads) ** -0.5,
            eps,
            COUNTERS=COUNTERS,
            HEADS=heads,
            WIDTH=width // heads,
            BLOCK_K=config.rows,
            BLOCK_T=power(count),
            BLOCK_H=block_h,
            BLOCK_E=block_e,
            STAGES=config.stages,
            **config.options,
        )
    return saved


def backward(
    grad_emb_BD: torch.Tensor,
    hidden_BLD: torch.Tensor | None,
    positions_BK: torch.Tensor | None,
    query_D: torch.Tensor | None,
    valid_B: torch.Tensor | None,
    saved: Saved,
    *,
    length: int,
    dtype: torch.dtype,
    heads: int,
    eps: float,
    wanted: tuple[bool, bool],
    config: Config | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """One launch; gradients of the sequence [B, L, D] in ``dtype`` and of the query, where
    ``wanted``.  Without a query ``hidden_BLD`` is not read."""
    from coma_ds.kernels.attention_pool.jit import pool_backward

    samples, width = saved.emb_BD.shape
    count = length if positions_BK is None else positions_BK.shape[1]
    config = config or choose(width, heads, count, backward=True)
    device = grad_emb_BD.device
    strides = (0, 0) if query_D is None else hidden_BLD.stride()[:2]
    grad_hidden = grad_query = partial = None
    number = samples
    if wanted[0]:
        grad_hidden = torch.empty((samples, length, width), dtype=dtype, device=device)
    if wanted[1]:
        grad_query = torch.empty_like(query_D, memory_format=torch.contiguous_format)
        number = programs(samples, device, config)
    if not samples:
        return grad_hidden, None if grad_query is None else grad_query.zero_()
    per_group = math.isqrt(number - 1) + 1
    if wanted[1]:
        groups = -(-number // per_group)
        partial = torch.empty((number + groups, width), dtype=torch.float32, device=device)
    block_h, block_e = tile(width, heads)
    pool_backward[(number,)](
        None if query_D is None else hidden_BLD,
        positions_BK,
        query_D,
        valid_B,
        saved.emb_BD,
        saved.scores_BHK,
        saved.softmax_BH2,
        saved.divisor_B,
        grad_emb_BD,
        grad_hidden,
        grad_query,
        partial,
        saved.counters_C if wanted[1] else None,
        samples,
        per_group,
        count,
        length,
        *strides,
        (width // heads) ** -0.5,
        eps,
        HEADS=heads,
        WIDTH=width // heads,
        BLOCK_K=config.rows,
        BLOCK_T=power(count),
        BLOCK_H=block_h,
        BLOCK_E=block_e,
        STAGES=config.stages,
        **config.options,
    )
    return grad_hidden, grad_query
