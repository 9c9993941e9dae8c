"""Records to one packed batch.

Stage 1: [images, instruction | K tokens | chat turns], loss on the answers and their end tokens.
Stage 2: [text with its images | K tokens], queries, then targets, then hard negatives.
Source: the paper, section 3 and figure 1; no system prompt, no chat template in stage 2.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from coma_ds.batch import IGNORE, Batch, Replaced
from coma_ds.data.processing import Processing
from coma_ds.data.records import IMAGE_MARK, Dialogue, Pair, Picture, Side

log = logging.getLogger("coma_ds")

TURN = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"


@dataclass
class Sample:
    """One sample before packing; ``grids`` are those of its images, in order."""

    context: list[int]
    tokens: list[int]
    dialogue: list[int]
    labels: list[int]  # of the dialogue
    grids: list[tuple[int, int, int]]
    pixels: list[np.ndarray] = field(default_factory=list)  # of the same images
    content_id: int = 0
    truncated: bool = False


@dataclass
class Ready:
    """One record as samples: a dialogue, or a query, its target and its negatives."""

    samples: list[Sample]
    task_id: int | None = None  # of a pair
    replaced: Replaced | None = None  # the row in whose place this one stands


@contextmanager
def named(name: str) -> Iterator[None]:
    """Errors inside begin with the name of the row."""
    try:
        yield
    except ValueError as error:
        if not name or name in str(error):
            raise
        raise ValueError(f"{name}: {error}") from error


def rope_positions(ids: np.ndarray, grids, image_id: int, merge_size: int) -> np.ndarray:
    """M-RoPE positions of one sequence, int64 [3, T]: (time, height, width).

    Text counts up in all three; an image spans its merged grid from the next position, and text
    goes on after the larger of its sides.  Equal to transformers' ``get_rope_index`` for still
    images in all three families.
    """
    positions = np.empty((3, len(ids)), dtype=np.int64)
    place, current, grids = 0, 0, iter(grids)
    is_image = ids == image_id
    while place < len(ids):
        if is_image[place]:
            frames, height, width = next(grids)
            height, width = height // merge_size, width // merge_size
            count = frames * height * width
            cells = np.indices((frames, height, width)).reshape(3, -1)
            positions[:, place : place + count] = cells + current
            current += max(height, width)
        else:
            later = is_image[place:].argmax()
            count = later if later else len(ids) - place
            positions[:, place : place + count] = np.arange(current, current + count)
            current += count
        place += count
    return positions


class Collator:
    """Packs pairs or dialogues; picklable, runs in the loader's workers.

    A text is cut to ``max_length``, a dialogue loses whole last turns; the batch counts the samples
    that lost something.  Errors name the file and row of their record.
    """

    def __init__(self, processing: Processing) -> None:
        self.processing = processing

    def __call__(self, records: Sequence[Pair] | Sequence[Dialogue]) -> Batch:
        """One batch of a list of pairs or of dialogues (not mixed)."""
        return self.pack([self.prepare(record) for record in records])

    def prepare(self, record: Pair | Dialogue) -> Ready:
        """The samples of one record.  Raises ``ValueError``, naming its row, for a bad one."""
        with named(record.name):
            if isinstance(record, Dialogue):
                return Ready([self._dialogue(record, False)])
            sides = (record.query, record.target, *record.negatives)
            return Ready([self.side(side) for side in sides], record.task_id())

    def pack(self, ready: Sequence[Ready]) -> Batch:
        """One batch of records: of pairs the queries, then the targets, then all negatives."""
        replaced = tuple(each.replaced for each in ready if each.replaced)
        if ready[0].task_id is None:
            return replace(self.pack_samples([r.samples[0] for r in ready]), replaced=replaced)
        samples = [r.samples[0] for r in ready] + [r.samples[1] for r in ready]
        samples += [sample for r in ready for sample in r.samples[2:]]
        return replace(
            self.pack_samples(samples),
            pairs=len(ready),
            negative_counts_N=torch.tensor([len(r.samples) - 2 for r in ready]),
            task_ids_N=torch.tensor([r.task_id for r in ready], dtype=torch.int64),
            replaced=replaced,
        )

    def sides(self, sides: Sequence[Side]) -> Batch:
        """Any sides as samples that end with the K tokens."""
        return self.pack_samples([self.side(side) for side in sides])

    def dialogues(self, dialogues: Sequence[Dialogue], *, prompt_only: bool = False) -> Batch:
        """Dialogues as samples; with ``prompt_only`` each ends where its last answer begins.

        A dialogue too long for ``max_length`` loses its last turns; a prompt cannot, and is a
        ``ValueError``, as is a first turn that does not fit.
        """
        samples = []
        for dialogue in dialogues:
            with named(dialogue.name):
                samples.append(self._dialogue(dialogue, prompt_only))
        return self.pack_samples(samples)

    def _image(self, picture: Picture, pixels: list, grids: list) -> list[int]:
        p = self.processing
        values, grid = p.pixels(picture)
        pixels.append(values)
        grids.append(grid)
        count = grid[0] * grid[1] * grid[2] // p.merge
        return [p.vision_start, *[p.image_id] * count, p.vision_end]

    def side(self, side: Side) -> Sample:
        """One side as a sample that ends with the K tokens."""
        p, grids, pixels = self.processing, [], []
        pictures = iter(side.images)
        texts = IMAGE_MARK.split(side.text)
        images = [self._image(next(pictures), pixels, grids) for _ in texts[1:]]
        p.check_text(side.text)
        words = [p.encode(text) if text else [] for text in texts]
        room = p.max_length - len(p.compression_ids) - sum(map(len, images))
        if room < 0:
            raise ValueError(
                f"{', '.join(i.name for i in side.images)}: the images alone take "
                f"{sum(map(len, images))} tokens, more than model.max_length {p.max_length} allows"
            )
        context = list(words[0][:room])
        room -= len(context)
        truncated = sum(map(len, words)) > room + len(context)
        for image, piece in zip(images, words[1:]):
            context += image + piece[:room]
            room -= len(piece[:room])
        if not context:
            raise ValueError("a side is empty: it has neither text nor an image")
        ids = p.compression_ids
        return Sample(context, ids, [], [], grids, pixels, side.content_id(), truncated)

    def _dialogue(self, dialogue: Dialogue, prompt_only: bool) -> Sample:
        p, grids, pixels, context = self.processing, [], [], []
        for picture in dialogue.images:
            context += self._image(picture, pixels, grids)
        p.check_text(dialogue.instruction)
        if dialogue.instruction:
            context += p.encode(dialogue.instruction)
        room = p.max_length - len(context) - len(p.compression_ids)
        ids: list[int] = []
        labels: list[int] = []
        truncated = False
        for number, turn in enumerate(dialogue.turns):
            p.check_text(turn.question)
            p.check_text(turn.answer)
            question = p.encode(TURN.format(turn.question))
            answer = [*p.encode(turn.answer), p.turn_end]
            if prompt_only and number == len(dialogue.turns) - 1:
                answer = []
            between = p.encode("\n") if ids else []
            wanted = len(between) + len(question) + len(answer)
            if len(ids) + wanted > room:
                if prompt_only or not number:
                    what = "all its turns" if prompt_only else "first turn"
                    raise ValueError(
                        f"{dialogue.name}: its images and {what} take "
                        f"{len(context) + len(ids) + wanted} tokens or more, more than "
                        f"model.max_length {p.max_length} leaves"
                    )
                truncated = True
                break
            ids += between + question + answer
            labels += [IGNORE] * (len(between) + len(question)) + answer
        return Sample(context, p.compression_ids, ids, labels, grids, pixels, truncated=truncated)

    def pack_samples(self, samples: list[Sample]) -> Batch:
        """One batch of samples, in their order."""
        p = self.processing
        merge_size = p.image_processor.merge_size
        ids, labels, positions, lengths = [], [], [], []
        for s in samples:
            row = np.array(s.context + s.tokens + s.dialogue, dtype=np.int64)
            ids.append(row)
            labels += [IGNORE] * (len(s.context) + len(s.tokens)) + s.labels
            positions.append(rope_positions(row, s.grids, p.image_id, merge_size))
            lengths.append((len(s.context), len(s.tokens), len(s.dialogue)))
        grids = [grid for s in samples for grid in s.grids]
        images = None
        if grids:
            pixels_PC = np.concatenate([pixels for s in samples for pixels in s.pixels])
            images = p.image_batch(pixels_PC, grids)
        features = [sum(t * h * w for t, h, w in s.grids) // p.merge for s in samples]
        return Batch(
            input_ids_T=torch.from_numpy(np.concatenate(ids)),
            position_ids_3T=torch.from_numpy(np.concatenate(positions, 1)),
            labels_T=torch.tensor(labels, dtype=torch.int64),
            lengths_B3=torch.tensor(lengths, dtype=torch.int64),
            image_counts_B=torch.tensor([len(s.grids) for s in samples]),
            feature_counts_B=torch.tensor(features),
            feature_rows_F=torch.arange(sum(features)),
            content_ids_B=torch.tensor([s.content_id for s in samples], dtype=torch.int64),
            images=images,
            truncated=sum(s.truncated for s in samples),
        )
