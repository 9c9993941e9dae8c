"""How the kernels cut the matrix of terms, and what a call costs: counted before it is measured.

Shapes: N own queries, M gathered targets, P gathered queries, H own negatives of a row, D width,
C columns of all blocks of negatives together (M, twice M with t-t, plus P with q-q).

The terms E [N, C] are never whole.  Two cuts are known:

- **rows**: panels of R rows and all columns, each seen once: 6 N C D operations.  The targets'
  gradient [C, D] float32 is read and written once a panel, so R wants to be large.
- **columns**: all rows and a part of the columns, in two sweeps (sums first, then terms and
  gradients): 8 N C D operations, but the targets' gradient is written once.  For few rows and many
  columns, where the first cut would spend its time on that traffic.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

TILE_ROWS, TILE_COLUMNS = 128, 256
SHARE = 0.07  # of the dense float32 terms, N * C * 4 bytes
FLOOR = 8 << 20  # bytes that a panel may have in any case
VECTORS = 12 * 4  # bytes of the numbers kept for each row
# Multiply-adds of the tensor cores in the time of one byte of device memory (H100: 400e12 / 3e12),
# and the part of an accumulated gradient's traffic that arithmetic does not hide.  Estimates.
MACS_PER_BYTE = 133
EXPOSED = 0.5
SPLIT = 0.8  # efficiency of a product with fewer tiles than processors


@dataclass(frozen=True)
class Plan:
    """``rows`` x ``columns`` terms of a panel at most; ``columns`` is None where all are taken."""

    rows: int
    columns: int | None
    seconds: float  # by the model, on 400e12 multiply-adds a second: for comparing plans only

    @property
    def sweeps(self) -> int:
        """How often the terms are computed."""
        return 1 if self.columns is None else 2


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def _product(rows: int, columns: int, depth: int, processors: int) -> float:
    """Multiply-adds that a product [rows, columns] over ``depth`` takes the time of, in waves."""
    tiles = _ceil(rows, TILE_ROWS) * _ceil(columns, TILE_COLUMNS)
    if tiles < processors:
        return rows * columns * depth / SPLIT
    return _ceil(tiles, processors) * processors * TILE_ROWS * TILE_COLUMNS * depth


def _row_panel(rows: int, columns: int, width: int, processors: int, first: bool) -> float:
    traffic = (4 if first else 8) * columns * width * MACS_PER_BYTE * EXPOSED
    return (
        _product(rows, columns, width, processors)
        + _product(rows, width, columns, processors)
        + _product(columns, width, rows, processors)
        + traffic
    )


def _column_panel(rows: int, columns: int, width: int, processors: int) -> float:
    traffic = (4 * columns + 8 * rows) * width * MACS_PER_BYTE * EXPOSED
    return (
        2 * _product(rows, columns, width, processors)
        + _product(rows, width, columns, processors)
        + _product(columns, width, rows, processors)
        + traffic
    )


def _sums_bytes(columns: int) -> int:
    """Of one row: four float32 numbers a tile."""
    return _ceil(columns, TILE_COLUMNS) * 16


def _row_bytes(columns: int, width: int, item: int, buffers: int) -> int:
    """Of one row of a panel: terms, sums of its tiles, scaled operands and buffers."""
    return (columns + 8) * item + _sums_bytes(columns) + width * (item + buffers)


@lru_cache(maxsize=256)
def make_plan(
    rows: int,
    columns: int,
    width: int,
    *,
    item: int = 2,
    buffers: int = 0,
    processors: int = 132,
    share: float = SHARE,
) -> Plan:
    """The cut of N ``rows`` x C ``columns`` that the model says is fastest within the memory bound.

    ``item``: bytes of a term; ``buffers``: bytes per row and unit of width of further buffers.
    The bound is ``share`` of the dense float32 terms, or ``FLOOR`` bytes if that is more; a panel
    has one tile of rows at least.
    """
    bound = max(share * rows * columns * 4, FLOOR) - rows * VECTORS
    per_row = _row_bytes(columns, width, item, buffers)
    best = None
    most = min(rows, max(TILE_ROWS, int(bound // per_row)))
    heights = {*range(TILE_ROWS, most + 1, TILE_ROWS), *([rows] if most == rows else [])}
    for tall in sorted(heights):
        whole, rest = divmod(rows, tall)
        macs = _row_panel(tall, columns, width, processors, True) if whole else 0
        macs += max(0, whole - 1) * _row_panel(tall, columns, width, processors, False)
        macs += _row_panel(rest, columns, width, processors, not whole) if rest else 0
        if best is None or macs / 400e12 < best.seconds:
            best = Plan(tall, None, macs / 400e12)
    fixed = rows * (_sums_bytes(columns) + width * (item + buffers))
    wide = int((bound - fixed) // (rows * item + 1)) // TILE_COLUMNS * TILE_COLUMNS
    if best.rows < rows and wide >= TILE_COLUMNS:
        wide = min(wide, _ceil(columns, TILE_COLUMNS) * TILE_COLUMNS)
        whole, rest = divmod(columns, wide)
        macs = whole * _column_panel(rows, wide, width, processors)
        macs += _column_panel(rows, rest, width, processors) if rest else 0
        if macs / 400e12 < best.seconds:
            best = Plan(rows, wide, macs / 400e12)
    return best


def extra_bytes(
    plan: Plan, rows: int, columns: int, width: int, *, item: int = 2, buffers: int = 0
) -> int:
    """Device memory beyond inputs, gradients and copies of operands, for ``plan``."""
    vectors = rows * VECTORS
    if plan.columns is None:
        return vectors + min(plan.rows, rows) * _row_bytes(columns, width, item, buffers)
    panel = rows * min(plan.columns, columns) * item
    return vectors + panel + rows * (_sums_bytes(columns) + width * (item + buffers))


def cost(
    N: int,
    M: int,
    D: int,
    *,
    H: int = 0,
    P: int = 0,
    target_to_target: bool = False,
    item: int = 2,
    operand_item: int | None = None,
    world: int = 1,
    processors: int = 132,
) -> dict[str, float]:
    """What one forward and backward of ``info_nce`` costs a rank, by formula.

    ``item``: bytes of an input element; ``operand_item``: bytes of the elements that are
    multiplied, where they differ (float32 inputs with ``operand_dtype``); ``world``: ranks that
    share the M targets (and the P queries) equally.  Result, in operations and bytes:

    - ``flops``: of the matrix products (2 a multiply-add), ``products``: how many N x C x D there
      are, 3 or 4 (see the module), ``bytes``: the fewest that device memory must move (each input
      read once, each float32 gradient written once);
    - ``extra``: memory beyond inputs, float32 gradients and operand copies; ``share``: of the dense
      float32 terms; ``copies``: operand copies, 0 for bfloat16 inputs; ``gradients``: float32;
    - ``exchanged``: bytes that a rank receives: gathered embeddings in the input's dtype and the
      reduced gradient in float32; ``flops_per_exchanged_byte``.
    """
    operand = operand_item or item
    columns = M * (1 + target_to_target) + P
    buffers = (operand + 4 if target_to_target else 0) + (4 if P else 0)
    plan = make_plan(N, columns, D, item=operand, buffers=buffers, processors=processors)
    products = 2 + plan.sweeps
    flops = 2 * N * columns * D * products + 6 * N * (H + 1) * D
    elements = (N + M + N * H + P) * D
    extra = extra_bytes(plan, N, columns, D, item=operand, buffers=buffers)
    received = (M + P) * D * (item + 4) * (world - 1) / world
    return {
        "flops": flops,
        "products": products,
        "bytes": elements * (item + 4),
        "extra": extra,
        "share": extra / max(1, N * columns * 4),
        "copies": elements * operand if operand != item else 0,
        "gradients": elements * 4,
        "exchanged": received,
        "flops_per_exchanged_byte": flops / received if received else float("inf"),
    }
