"""What the samples of a run are like, on average: measured by ``coma-ds prepare``, or assumed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from coma_ds.batch import ImageBatch
from coma_ds.config import RunConfig
from coma_ds.data.lengths import SampleLengths, Settings, read_lengths
from coma_ds.model.work import Work, vision_pairs
from coma_ds.preparation import Prepared

# Assumed of data that was not measured.
IMAGES = 0.6  # share of the sides of pairs that show one
TEXT = 48  # tokens of a side, beside its image and the compression tokens
DIALOGUE, ANSWERS = 320, 200  # tokens of a dialogue, and those of them that carry loss


@dataclass(frozen=True)
class Load:
    """Means over the records (pairs or dialogues) of a run; ``longest`` sample, in tokens."""

    samples: float
    tokens: float
    image_tokens: float
    pairs: float  # of rows that see each other, in a layer of the text
    causal: float  # the same without the visibility rule, as the teacher of stage 1 sees them
    vision_pairs: float  # the same over all layers of the tower
    answers: float
    longest: int
    said: str  # where it comes from

    def work(
        self, records: float, merge: int, *, replayed: float, matching: bool, taught: bool = False
    ) -> Work:
        """Of a step over so many records, of which the share ``replayed`` has no graph at first;
        a frozen tower; ``taught``: that of stage 1 has a teacher."""
        work = Work()
        images = records * self.image_tokens
        work.patch_rows[0], work.image_rows[0] = int(images * merge), int(images)
        work.vision_pairs[0] = int(records * self.vision_pairs)
        tokens, pairs = records * self.tokens, records * self.pairs
        forwards = replayed if matching else 0.0
        work.text_rows = [int(tokens * forwards), int(tokens)]
        work.text_pairs = [int(pairs * forwards), int(pairs)]
        if not matching:
            work.head_rows[1] = int(records * self.answers)
            if taught:
                work.add(
                    graph=False,
                    text_rows=int(tokens),
                    text_pairs=int(records * self.causal),
                    head_rows=int(records * self.answers),
                )
        return work


def assume(config: RunConfig, model, image_tokens: int | None, text_tokens: int | None) -> Load:
    """From the config, and what is said of images and texts (of samples)."""
    low, high = config.model.min_vision_tokens, config.model.max_vision_tokens
    images = image_tokens or ((low or 4) + (high or 1024)) // 2
    matching, count = config.objective == "match", config.model.compression_tokens
    text = text_tokens or (TEXT if matching else DIALOGUE)
    context = np.array([images, 0]) if matching else np.array([images])
    shares = np.array([IMAGES, 1 - IMAGES]) if matching else np.array([1.0])
    lengths = SampleLengths(
        rows=np.arange(len(context)),
        tokens=context + count + text,
        image_tokens=context,
        dialogue=np.zeros_like(context) if matching else np.full_like(context, text),
        answers=np.full_like(context, 0 if matching else min(text, ANSWERS)),
    )
    said = f"assumed: {images} tokens an image"
    said += f" ({IMAGES:.0%} of the sides have one), {text} of text" if matching else f", {text} of"
    said += "" if matching else f" dialogue, {lengths.answers[0]} of them answers"
    samples = 2 if matching else 1
    return _mean(config, model, lengths, shares * samples, said)


def measured(config: RunConfig, model, folder: str) -> Load:
    """From what ``coma-ds prepare`` wrote.

    Raises ``ValueError`` for a folder without it, or measured with other settings.
    """
    settings = Settings.of(config.model, model.backbone.lm.config.vision_config)
    try:
        known = read_lengths(folder, settings)
    except ValueError as error:
        raise ValueError(f"--lengths {error}") from error
    sources = {name: x for name, x in known.items() if not name.startswith("eval/")}
    if not sources:
        raise ValueError(f"--lengths {folder!r}: it tells of no training data")
    data = config.data
    wanted = [Path(data.path).name] if data.path else data.sources
    if missing := [name for name in wanted if name not in sources]:
        raise ValueError(
            f"--lengths {folder!r}: source {missing[0]!r} was not measured, only "
            f"{', '.join(sources)}: run coma-ds prepare again"
        )
    sources = {name: sources[name] for name in wanted or sources}
    return _over(config, model, sources, folder)


def from_prepared(config: RunConfig, model, sources: Iterable[Prepared]) -> Load:
    """From what was found just now."""
    found = {}
    for source in sources:
        columns = np.array(source.lengths, dtype=np.int64).T
        found[source.name] = SampleLengths(columns[0], *columns[2:])
    return _over(config, model, found, "the built-in data")


def _over(config: RunConfig, model, sources: dict[str, SampleLengths], where: str) -> Load:
    records = {name: len(np.unique(lengths.rows)) for name, lengths in sources.items()}
    total = sum(records.values())
    joined, weights = [], []
    for name, lengths in sources.items():
        share = records[name] / total
        if config.data.weighting == "uniform":
            share = 1 / len(sources)
        joined.append(lengths)
        weights.append(np.full(len(lengths.rows), share / records[name]))
    every = SampleLengths(*(np.concatenate(column) for column in zip(*map(_columns, joined))))
    said = f"measured: {total} rows of {len(sources)} source(s) in {where}"
    return _mean(config, model, every, np.concatenate(weights), said)


def _columns(lengths: SampleLengths) -> tuple[np.ndarray, ...]:
    return tuple(vars(lengths).values())


def _mean(config: RunConfig, model, lengths: SampleLengths, weights: np.ndarray, said: str) -> Load:
    """``weights`` of each sample: how many of it a record has."""
    tokens, images = lengths.tokens, lengths.image_tokens
    dialogue, count = lengths.dialogue, config.model.compression_tokens
    pairs = causal = tokens * (tokens + 1) / 2
    if config.objective == "compress" and not config.compress.visible:
        pairs = pairs - dialogue * (tokens - dialogue - count)
    vision = model.backbone.lm.config.vision_config
    kinds, place = np.unique(images, return_inverse=True)
    squares = np.array([_square(int(kind), vision) for kind in kinds], dtype=np.float64)

    def mean(values) -> float:
        return float((values * weights).sum())

    return Load(
        samples=mean(np.ones(len(tokens))),
        tokens=mean(tokens),
        image_tokens=mean(images),
        pairs=mean(pairs),
        causal=mean(causal),
        vision_pairs=mean(squares[place]),
        answers=mean(lengths.answers),
        longest=int(tokens.max()),
        said=said,
    )


def _square(tokens: int, vision) -> float:
    """Pairs of patches in the tower for one square image of about so many tokens."""
    if not tokens:
        return 0.0
    merge = vision.spatial_merge_size
    side = max(1, round(tokens**0.5))
    grid = torch.tensor([[1, side * merge, side * merge]])
    pairs = vision_pairs(ImageBatch(torch.zeros(0, 1), grid, merge**2), vision)
    return pairs * tokens / side**2
