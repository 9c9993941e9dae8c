"""The products with our own epilogue: terms of the loss, and accumulated gradients.

Shapes: R rows of a panel, C columns of one block of negatives, D width; T column tiles of all
blocks.  Cosines, sums and gradients are float32; terms are bfloat16 (float32 for float32 operands).

A term is 2**y with y = (s - s_pos) * scale + hardness * s + SHIFT - reference, where scale is
log2(e) / temperature and ``reference`` is 0 unless a term would be above 2**LIMIT: then it is the
row's maximum.  SHIFT moves the middle of float32's range to where easy negatives are.
"""

from __future__ import annotations

import triton
import triton.language as tl

SHIFT: tl.constexpr = tl.constexpr(32.0)
LIMIT: tl.constexpr = tl.constexpr(80.0)
NEVER: tl.constexpr = tl.constexpr(float("-inf"))


@triton.jit
def narrow(x, dtype: tl.constexpr, INTERPRETED: tl.constexpr):
    """Float32 to ``dtype``, nearest even; Triton 3.7's interpreter alone cuts bfloat16 off."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        nearest = bits + 0x7FFF + ((bits >> 16) & 1)
        bits = tl.where(x == x, nearest, bits | 0x400000) & 0xFFFF0000
        x = bits.to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def halves(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The left and the right half of the columns: registers are renamed, nothing moves."""
    pair = tl.permute(tl.reshape(x, (ROWS, 2, COLUMNS // 2)), (0, 2, 1))
    left, right = tl.split(pair)
    return left, right


@triton.jit
def slices(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SPLIT: tl.constexpr):
    """``SPLIT`` (1, 2, 4 or 8) equal parts of the columns, for epilogues that would spill."""
    if SPLIT == 1:
        parts = (x,)
    else:
        left, right = halves(x, ROWS, COLUMNS)
        a = slices(left, ROWS, COLUMNS // 2, SPLIT // 2)
        b = slices(right, ROWS, COLUMNS // 2, SPLIT // 2)
        parts = a + b
    return parts


@triton.jit
def tile_of(number, row_tiles, column_tiles, GROUP: tl.constexpr):
    """Row and column tile of a program: GROUP row tiles share the columns that pass the L2."""
    across = GROUP * column_tiles
    first = (number // across) * GROUP
    tall = tl.minimum(row_tiles - first, GROUP)
    inside = number % across
    return first + inside % tall, inside // tall


@triton.jit
def terms(
    row,  # descriptor of [R, D] operands, blocks [ROWS, BLOCK_D]
    column,  # descriptor of [C, D] operands, blocks [COLUMNS, BLOCK_D]
    panel,  # out: descriptor of [R, C] terms, blocks [ROWS, COLUMNS / SPLIT]; None: sums alone
    sums,  # out [T, R] float32: of a tile's terms
    slopes,  # out [T, R]: of term * (s - s_pos) * scale, or None
    peaks,  # out [T, R]: the largest y, before it is cut off; in when GATED
    drops,  # out [T, R]: false negatives, or None
    flags,  # [row tiles] int32: 1 where a tile met a term above the limit; in when GATED
    positive,  # [R] float32: s_pos
    scale,  # [R] float32
    reference,  # [R] float32
    own,  # [R] int64: the column that does not compete
    row_a,  # [R] int64, or None: a column of the same id does not compete
    column_a,  # [C]
    row_b,  # a second pair of ids
    column_b,
    rows,
    columns,
    width,
    first_column,  # of the block, for ``own``
    first_tile,  # of T
    tiles,  # T
    hardness,  # times log2(e)
    margin,
    HARDNESS: tl.constexpr,
    MARGIN: tl.constexpr,
    GATED: tl.constexpr,  # again, with the maximum as reference, where the flag says so
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SPLIT: tl.constexpr,
    GROUP: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """One tile of terms a program: a product, and the whole mathematics of a term behind it."""
    row_tile, column_tile = tile_of(
        tl.program_id(0), tl.cdiv(rows, ROWS), tl.cdiv(columns, COLUMNS), GROUP
    )
    if GATED:
        if tl.load(flags + row_tile) == 0:
            return
    first_r = row_tile * ROWS
    first_c = column_tile * COLUMNS
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in tl.range(0, width, BLOCK_D, num_stages=STAGES):
        a = row.load([first_r, start])
        b = column.load([first_c, start])
        if INTERPRETED:  # it multiplies the bits of bfloat16 as if they were integers
            acc = tl.dot(a.to(tl.float32), b.to(tl.float32).T, acc, input_precision="ieee")
        else:
            acc = tl.dot(a, b.T, acc, input_precision=PRECISION)

    r = first_r + tl.arange(0, ROWS)
    inside_r = r < rows
    base = tl.load(positive + r, mask=inside_r, other=0.0)
    steep = tl.load(scale + r, mask=inside_r, other=0.0)
    lift = -tl.load(reference + r, mask=inside_r, other=0.0) + SHIFT
    if GATED:
        top = tl.full([ROWS], float("-inf"), tl.float32)
        for tile in range(0, tiles):
            top = tl.maximum(top, tl.load(peaks + tile * rows + r, mask=inside_r, other=0.0))
        lift = tl.where(top > LIMIT, lift - (top - SHIFT), lift)
    # places relative to the tile are int32, and near constants for the compiler
    here = tl.load(own + r, mask=inside_r, other=-1) - (first_column + first_c)
    here = tl.where((here >= 0) & (here < COLUMNS), here, COLUMNS).to(tl.int32)
    left = columns - first_c
    if row_a is not None:
        mine_a = tl.load(row_a + r, mask=inside_r, other=0)
    if row_b is not None:
        mine_b = tl.load(row_b + r, mask=inside_r, other=0)
    total = tl.zeros([ROWS], tl.float32)
    slope = tl.zeros([ROWS], tl.float32)
    dropped = tl.zeros([ROWS], tl.float32)
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    PART: tl.constexpr = COLUMNS // SPLIT
    parts = slices(acc, ROWS, COLUMNS, SPLIT)
    for i in tl.static_range(SPLIT):
        s = parts[i]
        local = i * PART + tl.arange(0, PART)
        c = first_c + local
        inside_c = local < left
        x = (s - base[:, None]) * steep[:, None]
        y = x + lift[:, None]
        if HARDNESS:
            y += hardness * s
        # what does not compete is -inf: one test after the other, each on y, or registers spill
        if row_a is not None:
            other_a = tl.load(column_a + c, mask=inside_c, other=0)
            y = tl.where(mine_a[:, None] != other_a[None, :], y, NEVER)
        if row_b is not None:
            other_b = tl.load(column_b + c, mask=inside_c, other=0)
            y = tl.where(mine_b[:, None] != other_b[None, :], y, NEVER)
        if MARGIN:
            y = tl.where(s > (base + margin)[:, None], NEVER, y)
        keep = inside_r[:, None] & inside_c[None, :] & (here[:, None] != local[None, :])
        if drops is not None:
            dropped += tl.sum(tl.where(keep & (y == NEVER), 1.0, 0.0), 1)
        y = tl.where(keep, y, NEVER)
        if not GATED:
            peak = tl.maximum(peak, tl.max(y, 1))
        # no minimum and no maximum of NaN: comparisons keep it
        term = tl.exp2(tl.where(y > LIMIT, LIMIT, y))
        if panel is not None:
            narrowed = narrow(term, panel.dtype, INTERPRETED)
            panel.store([first_r, first_c + i * PART], narrowed)
        total += tl.sum(term, 1)
        if slopes is not None:
            slope += tl.sum(tl.where(y == NEVER, 0.0, term * x), 1)
    place = (first_tile + column_tile) * rows + r
    tl.store(sums + place, total, mask=inside_r)
    if slopes is not None:
        tl.store(slopes + place, slope, mask=inside_r)
    if not GATED:
        tl.store(peaks + place, peak, mask=inside_r)
        tl.store(flags + row_tile + r * 0, 1, mask=inside_r & (peak > LIMIT))
        if drops is not None:
            tl.store(drops + place, dropped, mask=inside_r)


@triton.jit
def accumulate(
    panel,  # descriptor of terms: [K, M], blocks [BLOCK_K, ROWS], where TRANSPOSED; else [M, K]
    row,  # descriptor of [K, D] operands, blocks [BLOCK_K, COLUMNS]
    out,  # [M, D] float32
    height,  # M
    depth,  # K
    width,  # D
    stride_out,
    TRANSPOSED: tl.constexpr,
    ADD: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr,
    GROUP: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """out (+)= terms @ rows, or terms^T @ rows: torch has no float32 sum of bfloat16 products."""
    row_tile, column_tile = tile_of(
        tl.program_id(0), tl.cdiv(height, ROWS), tl.cdiv(width, COLUMNS), GROUP
    )
    first_m = row_tile * ROWS
    first_n = column_tile * COLUMNS
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in tl.range(0, depth, BLOCK_K, num_stages=STAGES):
        b = row.load([start, first_n])
        if TRANSPOSED:
            a = panel.load([start, first_m]).T
        else:
            a = panel.load([first_m, start])
        if INTERPRETED:
            acc = tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
        else:
            acc = tl.dot(a, b, acc, input_precision=PRECISION)
    m = first_m + tl.arange(0, ROWS)
    out_m = out + m.to(tl.int64)[:, None] * stride_out
    PART: tl.constexpr = COLUMNS // SPLIT
    parts = slices(acc, ROWS, COLUMNS, SPLIT)
    for i in tl.static_range(SPLIT):
        n = first_n + i * PART + tl.arange(0, PART)
        inside = (m < height)[:, None] & (n < width)[None, :]
        part = parts[i]
        if ADD:
            part += tl.load(out_m + n[None, :], mask=inside, other=0.0)
        tl.store(out_m + n[None, :], part, mask=inside)
