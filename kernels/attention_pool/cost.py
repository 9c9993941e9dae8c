"""What a call costs at least: bytes through device memory, operations, memory beside the results.

Shapes: B samples, K tokens, L positions of a padded sequence, D width, H heads.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Cost:
    """``bytes`` read once and written once; ``flops``; ``extra`` bytes beside inputs, result and
    gradients."""

    bytes: int
    flops: int
    extra: int


def forward(
    samples: int, count: int, width: int, *, itemsize: int = 2, heads: int = 1, query: bool = True
) -> Cost:
    """Rows in, embedding out; with a query the scores are kept.  Taking the rows from a padded
    sequence reads the same bytes."""
    rows, result = samples * count * width, samples * width
    kept = 4 * samples * (1 + (heads * (count + 2) if query else 0))
    flops = (4 if query else 1) * rows + 3 * result
    return Cost(rows * itemsize + 4 * result + kept, flops, kept)


def backward(
    samples: int,
    count: int,
    width: int,
    *,
    itemsize: int = 2,
    heads: int = 1,
    query: bool = True,
    length: int | None = None,
    programs: int = 0,
) -> Cost:
    """Embedding, its gradient and (with a query) the rows in; the gradient of the rows out, or of
    ``length`` rows of the padded sequence, zeros included.  ``programs`` sum the query's gradient.
    """
    rows, result = samples * count * width, samples * width
    written = samples * (length or count) * width
    partial = 4 * width * (programs + round(programs**0.5)) if query else 0
    kept = 4 * samples * (1 + (heads * (count + 2) if query else 0))
    moved = written * itemsize + 8 * result + kept + 2 * partial
    moved += rows * itemsize if query else 0
    return Cost(moved, (8 if query else 1) * rows + 6 * result, partial)
