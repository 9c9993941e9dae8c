"""Sizes of tiles for the two products, by card, dtype and size of the problem."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Tile:
    """Rows, columns and depth of a tile; parts of its columns that an epilogue takes one after
    the other; row tiles that share the L2; warps; stages of the pipeline."""

    rows: int
    columns: int
    depth: int
    split: int
    group: int
    warps: int
    stages: int


INTERPRETED = Tile(64, 64, 64, 1, 2, 4, 1)

# (large, small) by kernel and first number of the card's capability.  Found by compiling with
# Triton 3.6 and 3.7: no spills, shared memory within the chip's.  None of it has been timed yet.
SHIPPED = {
    ("terms", 8): (Tile(64, 128, 64, 4, 8, 8, 3), Tile(64, 64, 64, 1, 8, 8, 3)),
    ("terms", 9): (Tile(128, 256, 64, 4, 8, 8, 3), Tile(64, 64, 64, 1, 8, 4, 4)),
    ("terms", 10): (Tile(128, 128, 64, 4, 8, 8, 3), Tile(64, 64, 64, 1, 8, 4, 4)),
    ("terms with options", 8): (Tile(64, 128, 64, 4, 8, 8, 3), Tile(64, 64, 64, 1, 8, 8, 3)),
    ("terms with options", 9): (Tile(128, 128, 64, 4, 8, 8, 3), Tile(64, 64, 64, 1, 8, 4, 4)),
    ("terms with options", 10): (Tile(128, 64, 64, 2, 8, 8, 3), Tile(64, 64, 64, 1, 8, 4, 4)),
    ("accumulate", 8): (Tile(64, 128, 64, 4, 8, 8, 3), Tile(64, 64, 64, 1, 8, 4, 3)),
    ("accumulate", 9): (Tile(128, 256, 64, 4, 8, 8, 3), Tile(64, 64, 64, 1, 8, 4, 4)),
    ("accumulate", 10): (Tile(128, 256, 64, 4, 8, 8, 3), Tile(64, 64, 64, 1, 8, 4, 4)),
}
# For float32 operands, of the terms alone: torch makes the gradients.
SINGLE = {
    8: Tile(64, 64, 32, 1, 8, 8, 3),
    9: Tile(64, 64, 32, 1, 8, 4, 3),
    10: Tile(64, 64, 32, 1, 8, 4, 3),
}


def choose_tile(kernel: str, rows: int, columns: int, dtype: torch.dtype, settings) -> Tile:
    """The tile of ``kernel`` (a name in ``SHIPPED``) for a [rows, columns] result.

    Large tiles where they fill the processors, small ones where they would leave some without
    work.  ``settings`` are those of ``launch``.
    """
    if settings.interpreted:
        return INTERPRETED
    card = min(10, max(8, settings.capability))
    if dtype == torch.float32:
        return SINGLE[card]
    large, small = SHIPPED[kernel, card]
    tiles = -(-rows // large.rows) * -(-columns // large.columns)
    return large if tiles >= settings.processors else small
