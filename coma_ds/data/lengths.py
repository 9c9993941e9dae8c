"""What ``coma-ds prepare`` measured of each row, for the sampler and the planner."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from coma_ds.config import ModelConfig

LENGTHS = "lengths.parquet"  # a line for each sample: its source, row, kind, and
NUMBERS = ("tokens", "image_tokens", "dialogue", "answers")  # of all, of images, ...
NOTE = b"coma_ds"  # among the metadata of the file


@dataclass(frozen=True)
class Settings:
    """What the lengths of given data depend on: keys of ``model``, and the side of the square of
    pixels that becomes one image token."""

    compression_tokens: int
    min_vision_tokens: int | None
    max_vision_tokens: int | None
    max_length: int
    side: int

    @classmethod
    def of(cls, model: ModelConfig, patches) -> Settings:
        """``patches`` has ``patch_size`` and the patches on a side of an image token."""
        merge = getattr(patches, "merge_size", None) or patches.spatial_merge_size
        names = ("compression_tokens", "min_vision_tokens", "max_vision_tokens", "max_length")
        return cls(*(getattr(model, name) for name in names), side=patches.patch_size * merge)

    def metadata(self) -> dict[bytes, str]:
        """For the file."""
        return {NOTE: json.dumps(asdict(self))}

    def more_tokens(self, measured: Settings) -> int:
        """That a sample has under these settings than it had under those ``measured``.

        Raises ``ValueError`` where it is not the same number for all samples.
        """
        for name, value in asdict(self).items():
            if name != "compression_tokens" and value != getattr(measured, name):
                raise ValueError(
                    f"measured with {measured._said(name)}, here it is {self._said(name)}: run "
                    "coma-ds prepare again"
                )
        return self.compression_tokens - measured.compression_tokens

    def _said(self, name: str) -> str:
        value = getattr(self, name)
        if name == "side":
            return f"an image token for {value} x {value} pixels"
        return f"model.{name} {value if value is not None else 'null'}"


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


def read_lengths(folder: str, settings: Settings) -> dict[str, SampleLengths]:
    """By source, as they are under ``settings``.

    Raises ``ValueError`` for a folder without them, a file that is none, or other settings.
    """
    path = Path(folder) / LENGTHS
    if not path.is_file():
        raise ValueError(f"{folder!r}: no {LENGTHS} there; coma-ds prepare writes it")
    try:
        table = pq.read_table(path, columns=["source", "row", *NUMBERS])
        measured = Settings(**json.loads(table.schema.metadata[NOTE]))
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    try:
        more = settings.more_tokens(measured)
    except ValueError as error:
        raise ValueError(f"{folder!r}: {error}") from error
    sources = table["source"].to_numpy()
    numbers = [table[name].to_numpy().astype(np.int64) for name in table.column_names[1:]]
    found = {}
    for name in np.unique(sources):
        lengths = SampleLengths(*(values[sources == name] for values in numbers))
        found[str(name)] = replace(lengths, tokens=lengths.tokens + more)
    return found
