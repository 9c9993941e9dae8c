"""Batches that are made up: token counts like those of MMEB, pixels and words at random."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import torch

from coma_ds.batch import IGNORE, Batch, ImageBatch
from coma_ds.data.collate import Collator, Sample


@dataclass(frozen=True)
class Counts:
    """Least and most of what is drawn: sides of an image in image tokens, words of a text,
    dialogue turns, and words of a question and of an answer.  ``images``: of queries, of targets,
    the share that has one."""

    sides: tuple[int, int] = (16, 32)
    words: tuple[int, int] = (16, 64)
    turns: tuple[int, int] = (3, 5)
    said: tuple[int, int] = (15, 45)
    images: tuple[float, float] = (0.7, 0.5)


class Maker:
    """For the config of a model; ``first_id`` is that of the K compression tokens."""

    def __init__(self, config, first_id: int, tokens: int, counts: Counts | None = None) -> None:
        vision = config.vision_config
        merge = vision.spatial_merge_size
        self.counts = counts or Counts()
        self.config, self.merge = config, merge
        self.ids = list(range(first_id, first_id + tokens))
        channels = getattr(vision, "in_channels", 3)
        self.values = channels * vision.temporal_patch_size * vision.patch_size**2
        self.collator = Collator(
            SimpleNamespace(
                image_processor=SimpleNamespace(merge_size=merge),
                image_id=config.image_token_id,
                merge=merge**2,
                image_batch=lambda pixels, grids: ImageBatch(
                    torch.from_numpy(pixels), torch.tensor(grids), merge**2
                ),
            )
        )

    def pairs(self, count: int, seed: int) -> Batch:
        """So many pairs: queries, then targets."""
        drawn = np.random.default_rng(seed)
        samples = [
            self._sample(drawn, drawn.random() < share)
            for share in self.counts.images
            for _ in range(count)
        ]
        nothing = torch.zeros(count, dtype=torch.int64)
        batch = self.collator.pack_samples(samples)
        return replace(batch, pairs=count, negative_counts_N=nothing, task_ids_N=nothing)

    def dialogues(self, count: int, seed: int) -> Batch:
        """So many dialogues, each about one image."""
        drawn = np.random.default_rng(seed)
        samples = []
        for _ in range(count):
            sample = self._sample(drawn, True, words=False)
            for _ in range(self._between(drawn, self.counts.turns)):
                question = self._words(drawn, self.counts.said)
                answer = self._words(drawn, self.counts.said)
                sample.dialogue += question + answer
                sample.labels += [IGNORE] * len(question) + answer
            samples.append(sample)
        return self.collator.pack_samples(samples)

    def _sample(self, drawn, image: bool, words: bool = True) -> Sample:
        context, grids, pixels = [], [], []
        if image:
            height, width = (self._between(drawn, self.counts.sides) for _ in range(2))
            grid = (1, height * self.merge, width * self.merge)
            rows = grid[1] * grid[2]
            grids.append(grid)
            pixels.append(drawn.standard_normal((rows, self.values), dtype=np.float32))
            context += [self.config.image_token_id] * (rows // self.merge**2)
        if words or not image:
            context += self._words(drawn, self.counts.words)
        return Sample(context, self.ids, [], [], grids, pixels, int(drawn.integers(2**62)))

    @staticmethod
    def _between(drawn, bounds: tuple[int, int]) -> int:
        return int(drawn.integers(bounds[0], bounds[1] + 1))

    def _words(self, drawn, bounds: tuple[int, int]) -> list[int]:
        """Ids below all special ones."""
        most = min(self.config.image_token_id, *self.ids, 10**5) - 10
        return drawn.integers(0, most, self._between(drawn, bounds)).tolist()
