"""One function for each launch of a kernel of InfoNCE.

Shapes: N own queries, M gathered targets, R rows of a panel, C columns of a block of negatives,
T column tiles of all blocks, D width, H own negatives of a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from coma_ds.kernels.info_nce import jit, rows
from coma_ds.kernels.info_nce.inputs import Problem
from coma_ds.kernels.info_nce.tiles import Tile, choose_tile

PRECISION = {torch.float32: "tf32x3"}  # 16-bit products are exact in any case


@dataclass
class Block:
    """Negatives that share a matrix of columns, and who does not compete there."""

    kind: str  # "q-t", "t-t" (the rows are the positives) or "q-q"
    columns: torch.Tensor  # [C, D] operands of the cosines
    multiplied: torch.Tensor  # the same for the gradients
    own_N: torch.Tensor  # int64: the column that does not compete
    ids: tuple  # two pairs of int64 ids, of rows [N] and of columns [C], or of None
    grad: torch.Tensor | None  # [C, D] float32; blocks with the same columns share it
    panel: torch.Tensor | None = None

    @property
    def from_target(self) -> bool:
        """Whether the rows are the positives."""
        return self.kind == "t-t"


@dataclass(frozen=True)
class Settings:
    """What all launches of a call have in common."""

    hardness: float  # times log2(e)
    margin: float | None
    temperatures: int  # 1, or one a row
    own: int  # H
    width: int  # D
    processors: int
    capability: int  # 8, 9, 10: the first number of the card's
    interpreted: bool

    @property
    def block_d(self) -> int:
        """Width that one program of the row kernels takes at a time."""
        return min(4096, triton.next_power_of_2(self.width))

    @property
    def block_r(self) -> int:
        """Rows that one program of the row kernels takes."""
        return 32 if self.interpreted else max(1, 2048 // self.block_d)


@dataclass
class Sums:
    """Numbers of each row and column tile [T, R] float32, and which row tiles went too high."""

    sums: torch.Tensor
    peaks: torch.Tensor
    slopes: torch.Tensor | None
    drops: torch.Tensor | None
    flags: torch.Tensor

    @classmethod
    def make(
        cls, tiles: int, height: int, tile: Tile, device, *, slopes: bool, drops: bool
    ) -> Sums:
        """Empty ones for R = ``height`` rows."""
        shape = (2 + slopes + drops, tiles, height)
        numbers = torch.empty(shape, dtype=torch.float32, device=device)
        flags = torch.zeros(triton.cdiv(height, tile.rows), dtype=torch.int32, device=device)
        sums, peaks = numbers[:2]
        return cls(
            sums, peaks, numbers[2] if slopes else None, numbers[-1] if drops else None, flags
        )


def aligned(height: int, width: int, dtype: torch.dtype, device) -> torch.Tensor:
    """Empty [height, width] whose rows begin at multiples of 16 bytes, as descriptors need it."""
    unit = 16 // dtype.itemsize
    wide = triton.cdiv(width, unit) * unit
    return torch.empty((height, wide), dtype=dtype, device=device)[:, :width]


def operand(x: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """``x`` in ``dtype`` with rows at multiples of 16 bytes: itself where it is so already."""
    if x is None:
        return None
    x = x.detach().to(dtype)
    if x.dim() == 3:
        return x.contiguous()
    row_bytes = x.stride(0) * x.itemsize
    if x.stride(1) == 1 and row_bytes % 16 == 0 and x.data_ptr() % 16 == 0 and row_bytes:
        return x
    return aligned(*x.shape, dtype, x.device).copy_(x)


def contents_of(ids_M: torch.Tensor, index_N: torch.Tensor) -> torch.Tensor:
    """ids_M[index_N], 0 for an index out of range."""
    out = torch.empty_like(index_N)
    grid = (triton.cdiv(len(out), 256),)
    rows.gather[grid](ids_M, index_N, out, len(out), len(ids_M), BLOCK=256)
    return out


def cosines(
    p: Problem,
    operands: tuple,
    index_N: torch.Tensor,
    temperature: torch.Tensor,
    vectors: dict[str, torch.Tensor],
    scores_NH: torch.Tensor | None,
    settings: Settings,
) -> None:
    """Cosines of positives and of own negatives, and what the temperature does to them."""
    query, target, own = operands
    ids = p.false_negatives
    own_ids = ids.own_negative_ids_NH if ids is not None else None
    rows.cosines[(triton.cdiv(p.rows, settings.block_r),)](
        query,
        target,
        own,
        index_N,
        temperature,
        None if own_ids is None else ids.target_ids_M.contiguous(),
        None if own_ids is None else own_ids.contiguous(),
        vectors["positive"],
        vectors["scale"],
        vectors["reference"],
        scores_NH,
        p.rows,
        len(target),
        settings.width,
        query.stride(0),
        target.stride(0),
        settings.hardness,
        settings.margin or 0.0,
        TEMPERATURES=settings.temperatures,
        OWN=settings.own,
        MARGIN=settings.margin is not None,
        BLOCK_R=settings.block_r,
        BLOCK_D=settings.block_d,
    )


def finish(
    sums: Sums,
    vectors: dict[str, torch.Tensor],
    temperature: torch.Tensor,
    weight: torch.Tensor | float,
    scores_RH: torch.Tensor | None,
    own_push_RH: torch.Tensor | None,
    hardest_R: torch.Tensor | None,
    masked_R: torch.Tensor | None,
    target_tiles: int,
    settings: Settings,
) -> None:
    """Losses of R rows, and the factors of everything in their gradients."""
    tiles, height = sums.sums.shape
    by_row = torch.is_tensor(weight)
    rows.finish[(triton.cdiv(height, 32),)](
        sums.sums,
        sums.slopes,
        sums.peaks,
        sums.drops,
        vectors["positive"],
        vectors["scale"],
        vectors["reference"],
        temperature,
        weight if by_row else None,
        scores_RH,
        vectors["losses"],
        vectors["push"],
        vectors["pull"],
        vectors["heat"],
        own_push_RH,
        hardest_R,
        masked_R,
        height,
        tiles,
        target_tiles,
        1.0 if by_row else weight,
        settings.hardness,
        TEMPERATURES=settings.temperatures,
        OWN=settings.own,
        BLOCK_R=32,
        BLOCK_T=16,
    )


def spread(
    operands: tuple,
    index_R: torch.Tensor,
    vectors: dict[str, torch.Tensor],
    own_push_RH: torch.Tensor | None,
    totals: tuple,
    scaled: dict[bool, torch.Tensor | None],
    own_grad_RHD: torch.Tensor | None,
    settings: Settings,
) -> None:
    """What R rows and their own vectors give to gradients; totals (q-t, q-q, t-t) in place."""
    query, target, own = operands
    strided = [x for x in scaled.values() if x is not None]
    if not strided and own_grad_RHD is None and all(x is None for x in totals):
        return
    rows.spread[(triton.cdiv(len(index_R), settings.block_r),)](
        query,
        target,
        own,
        index_R,
        vectors["push"],
        vectors["pull"],
        own_push_RH,
        *totals,
        scaled[False],
        scaled[True],
        own_grad_RHD,
        len(index_R),
        len(target),
        settings.width,
        query.stride(0),
        target.stride(0),
        settings.width,
        strided[0].stride(0) if strided else 0,
        OWN=settings.own,
        BLOCK_R=settings.block_r,
        BLOCK_D=settings.block_d,
        INTERPRETED=settings.interpreted,
    )


def terms(
    block: Block,
    row_RD: torch.Tensor,
    part: slice,
    vectors: dict[str, torch.Tensor],
    sums: Sums,
    settings: Settings,
    tile: Tile,
    *,
    columns: slice,
    first_tile: int,
    gated: bool,
    panel: torch.Tensor | None,
) -> None:
    """Terms of ``row_RD``, the rows ``part``, and the ``columns`` of a block."""
    count = columns.stop - columns.start
    (row_a, column_a), (row_b, column_b) = (
        (None, None) if ids[0] is None else (ids[0][part], ids[1][columns]) for ids in block.ids
    )
    column_CD = block.columns[columns]
    height = len(row_RD)
    part_columns = tile.columns // tile.split
    jit.terms[(triton.cdiv(height, tile.rows) * triton.cdiv(count, tile.columns),)](
        TensorDescriptor.from_tensor(row_RD, [tile.rows, tile.depth]),
        TensorDescriptor.from_tensor(column_CD, [tile.columns, tile.depth]),
        None if panel is None else TensorDescriptor.from_tensor(panel, [tile.rows, part_columns]),
        sums.sums,
        sums.slopes,
        sums.peaks,
        sums.drops,
        sums.flags,
        vectors["positive"][part],
        vectors["scale"][part],
        vectors["reference"][part],
        block.own_N[part],
        row_a,
        column_a,
        row_b,
        column_b,
        height,
        count,
        settings.width,
        columns.start,
        first_tile,
        len(sums.sums),
        settings.hardness,
        settings.margin or 0.0,
        HARDNESS=settings.hardness > 0,
        MARGIN=settings.margin is not None,
        GATED=gated,
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        BLOCK_D=tile.depth,
        SPLIT=tile.split,
        GROUP=tile.group,
        STAGES=tile.stages,
        PRECISION=PRECISION.get(row_RD.dtype, "tf32"),
        INTERPRETED=settings.interpreted,
        num_warps=tile.warps,
    )


def multiply(panel_RC: torch.Tensor, column_CD: torch.Tensor, out_RD: torch.Tensor) -> None:
    """out = panel @ columns, a plain product with a float32 result."""
    if panel_RC.dtype == torch.float32:
        torch.mm(panel_RC, column_CD, out=out_RD)
    elif panel_RC.is_cuda:
        torch.mm(panel_RC, column_CD, out_dtype=torch.float32, out=out_RD)
    else:
        torch.mm(panel_RC.float(), column_CD.float(), out=out_RD)


def accumulate(
    panel: torch.Tensor,
    row_KD: torch.Tensor,
    out_MD: torch.Tensor,
    settings: Settings,
    *,
    transposed: bool,
    add: bool,
) -> None:
    """out (+)= panel^T @ rows where ``transposed``, else panel @ rows."""
    if panel.dtype == torch.float32:
        left = panel.T if transposed else panel
        torch.addmm(out_MD, left, row_KD, beta=1 if add else 0, out=out_MD)
        return
    (height, width), depth = out_MD.shape, len(row_KD)
    tile = choose_tile("accumulate", height, width, panel.dtype, settings)
    block = [tile.depth, tile.rows] if transposed else [tile.rows, tile.depth]
    jit.accumulate[(triton.cdiv(height, tile.rows) * triton.cdiv(width, tile.columns),)](
        TensorDescriptor.from_tensor(panel, block),
        TensorDescriptor.from_tensor(row_KD, [tile.depth, tile.columns]),
        out_MD,
        height,
        depth,
        width,
        out_MD.stride(0),
        TRANSPOSED=transposed,
        ADD=add,
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        BLOCK_K=tile.depth,
        SPLIT=tile.split,
        GROUP=tile.group,
        STAGES=tile.stages,
        PRECISION="tf32",
        INTERPRETED=settings.interpreted,
        num_warps=tile.warps,
    )


def collect(
    index_R: torch.Tensor,
    distinct: bool,
    query_RD: torch.Tensor,
    pull_R: torch.Tensor,
    sum_RD: torch.Tensor | None,
    grad_MD: torch.Tensor,
    settings: Settings,
) -> None:
    """Add to each positive's gradient what its rows give it, in the order of the rows."""
    if distinct:
        places, order = index_R, torch.arange(len(index_R), device=index_R.device)
    else:
        places, order = torch.sort(index_R, stable=True)
    rows.collect[(triton.cdiv(len(index_R), settings.block_r),)](
        places,
        order,
        query_RD,
        pull_R,
        sum_RD,
        grad_MD,
        len(index_R),
        len(grad_MD),
        settings.width,
        query_RD.stride(0),
        grad_MD.stride(0),
        BLOCK_R=settings.block_r,
        BLOCK_D=settings.block_d,
    )


def rescale(grad: torch.Tensor, factor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``grad`` (float32, ours) times a number, in ``dtype``; in place for float32."""
    if dtype != torch.float32:
        return torch.mul(grad, factor, out=torch.empty_like(grad, dtype=dtype))
    grid = (triton.cdiv(grad.numel(), 4096),)
    if grad.numel():
        rows.rescale[grid](grad, factor, grad.numel(), BLOCK=4096)
    return grad
