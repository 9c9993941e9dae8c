"""What ``coma-ds prepare`` measured of each row, for the sampler and the planner."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

LENGTHS = "lengths.parquet"  # a line for each sample: its source, row, kind, and
NUMBERS = ("tokens", "image_tokens", "dialogue", "answers")  # of all, of images, ...


@dataclass(frozen=True)
class SampleLengths:
    """Of the samples of one source, int64 each: the row, all tokens, those of images, those after
    the compression tokens, and those that carry loss."""

    rows: np.ndarray
    tokens: np.ndarray
    image_tokens: np.ndarray
    dialogue: np.ndarray
    answers: np.ndarray

    def of_rows(self, count: int) -> np.ndarray:
        """Tokens of all samples of each row, int64 [count]; the mean where a row was bad."""
        if len(self.rows) and self.rows.max() >= count:
            raise ValueError(f"row {self.rows.max()} was measured, there are {count} rows")
        total = np.bincount(self.rows, self.tokens, count)
        seen = np.bincount(self.rows, minlength=count) > 0
        total[~seen] = total[seen].mean() if seen.any() else 1
        return total.round().astype(np.int64)


def read_lengths(folder: str) -> dict[str, SampleLengths]:
    """By source.  Raises ``ValueError`` for a folder without them, or a file that is none."""
    path = Path(folder) / LENGTHS
    if not path.is_file():
        raise ValueError(f"data.lengths {folder!r}: no {LENGTHS} there; coma-ds prepare writes it")
    try:
        table = pq.read_table(path, columns=["source", "row", *NUMBERS])
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    sources = table["source"].to_numpy()
    numbers = [table[name].to_numpy().astype(np.int64) for name in table.column_names[1:]]
    return {
        str(name): SampleLengths(*(values[sources == name] for values in numbers))
        for name in np.unique(sources)
    }
