"""The packed batch, and its padded views.

Shapes: B samples, N pairs, T tokens of all samples, L columns of the padded view, K compression
tokens a sample, I images, P patches, C values of a patch, F image tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

IGNORE = -100
CONTEXT, TOKENS, DIALOGUE, PADDING = 0, 1, 2, 3
MOVED = ("input_ids_T", "position_ids_3T", "labels_T", "feature_rows_F")  # to the device

Alignment = Literal["segments", "left", "right"]


@dataclass(frozen=True)
class ImageBatch:
    """Images in Qwen's packed layout: ``pixels_PC``, ``grid_I3`` int64 (t, h, w patches).

    ``merge`` patches become one image token (4 for a 2 x 2 merge).  Pixels are the float32 values
    of patches, or uint8 [P, 3 * p * p] with their values in ``levels_3V`` (float32 [3, 256]) and
    each to be read ``frames`` times: an eighth of the bytes, for the workers and the bus.
    """

    pixels_PC: torch.Tensor
    grid_I3: torch.Tensor
    merge: int
    levels_3V: torch.Tensor | None = None
    frames: int = 1

    def __len__(self) -> int:
        return len(self.grid_I3)

    @property
    def tokens_I(self) -> torch.Tensor:
        """Image tokens of each image, int64 [I]."""
        return self.grid_I3.prod(-1) // self.merge

    def values(self, device: torch.device | str) -> torch.Tensor:
        """What a tower takes: [P, C] on ``device``, (channel, frame, row, column) in C."""
        pixels = self.pixels_PC.to(device, non_blocking=True)
        if self.levels_3V is None:
            return pixels
        levels_3V = self.levels_3V.to(device, non_blocking=True)
        channels = pixels.view(len(pixels), 3, -1).unbind(1)
        values = torch.stack([level[c.int()] for level, c in zip(levels_3V, channels)], 1)
        return values[:, :, None].expand(-1, -1, self.frames, -1).reshape(len(pixels), -1)

    def select(self, images: torch.Tensor) -> ImageBatch:
        """The images at the given indices (int64), in that order."""
        rows = ranges(self.grid_I3.prod(-1).cpu(), images)
        return replace(
            self,
            pixels_PC=self.pixels_PC[rows.to(self.pixels_PC.device)],
            grid_I3=self.grid_I3[images.to(self.grid_I3.device)],
        )

    def slices(self, patches: int) -> list[ImageBatch]:
        """Consecutive images together, no more than ``patches`` of them unless one alone has."""
        counts: list[int] = []  # of images, and
        rows: list[int] = []  # of patches
        for size in self.grid_I3.prod(-1).tolist():
            if not rows or rows[-1] + size > patches:
                counts.append(0)
                rows.append(0)
            counts[-1] += 1
            rows[-1] += size
        parts = zip(self.pixels_PC.split(rows), self.grid_I3.split(counts))
        return [replace(self, pixels_PC=pixels, grid_I3=grid) for pixels, grid in parts]


@dataclass(frozen=True)
class Replaced:
    """A bad row of the data, in whose place another one stands."""

    reason: str  # begins with the row's name
    kind: str  # equal for rows that are bad in the same way
    by: str  # the name of the row in its place


def ranges(lengths: torch.Tensor, picks: torch.Tensor) -> torch.Tensor:
    """Positions covered by the spans ``picks`` of consecutive spans, int64 [sum of lengths]."""
    starts = lengths.cumsum(0) - lengths
    count = lengths[picks]
    ends = count.cumsum(0)
    total = int(ends[-1]) if len(ends) else 0
    return (starts[picks] - (ends - count)).repeat_interleave(count) + torch.arange(total)


@dataclass(frozen=True)
class Padded:
    """A padded view: every packed position stands at ``cell_T`` of the flattened [B, L]."""

    input_ids_BL: torch.Tensor
    position_ids_3BL: torch.Tensor
    segment_BL: torch.Tensor
    cell_T: torch.Tensor
    lengths_B3: torch.Tensor
    alignment: Alignment
    boundary: int  # columns before the first dialogue column; meaningful for "segments"

    def cells(self, rows: torch.Tensor) -> torch.Tensor:
        """Flat indices into [B * L] of the packed positions ``rows``."""
        return self.cell_T[rows]


@dataclass(frozen=True)
class Batch:
    """Samples one after the other, each [context | compression tokens | dialogue].

    ``input_ids_T`` int64; compression tokens carry their own ids (one per place, 0..K-1 from the
    first).  ``position_ids_3T`` int64, M-RoPE.  ``labels_T`` is the token itself where it carries
    loss and -100 elsewhere: the row that predicts it is the one before.  ``lengths_B3`` int64 on
    the host: lengths of the three segments.  ``image_counts_B`` int64 on the host.  The image
    tokens of the batch, in packed order, take the rows ``feature_rows_F`` of the features of
    ``images`` (or of the batch that this one was split from).  The facts of the N pairs are not in
    the parts of a batch.
    """

    input_ids_T: torch.Tensor
    position_ids_3T: torch.Tensor
    labels_T: torch.Tensor
    lengths_B3: torch.Tensor
    image_counts_B: torch.Tensor
    feature_counts_B: torch.Tensor
    feature_rows_F: torch.Tensor
    content_ids_B: torch.Tensor
    images: ImageBatch | None = None
    pairs: int = 0  # stage 2: the first samples are queries, as many targets follow, then negatives
    negative_counts_N: torch.Tensor | None = None  # of each pair, int64 on the host, like its task
    task_ids_N: torch.Tensor | None = None
    truncated: int = 0  # samples that lost text to the longest length; parts do not carry it
    replaced: tuple[Replaced, ...] = ()  # rows that were bad; nor this

    def __len__(self) -> int:
        return len(self.lengths_B3)

    @property
    def sizes_B(self) -> torch.Tensor:
        """Tokens of each sample, int64 on the host."""
        return self.lengths_B3.sum(-1)

    @property
    def token_rows(self) -> torch.Tensor:
        """Packed positions of the compression tokens, sample by sample, int64 [B * K]."""
        starts = self.sizes_B.cumsum(0) - self.sizes_B + self.lengths_B3[:, CONTEXT]
        count = self.lengths_B3[:, TOKENS]
        ends = count.cumsum(0)
        total = int(ends[-1]) if len(ends) else 0
        return (starts - (ends - count)).repeat_interleave(count) + torch.arange(total)

    @property
    def answer_rows(self) -> torch.Tensor:
        """Packed positions of the tokens that carry loss, int64 [R], on the batch's device."""
        return (self.labels_T != IGNORE).nonzero().squeeze(-1)

    def split(self, groups: Sequence[torch.Tensor], *, with_images: bool = False) -> list[Batch]:
        """One batch for each group of sample indices (int64 on the host), in the group's order.

        Without images the parts keep reading the features of this batch; with images each part
        holds its own and reads their features.
        """
        return [self._select(group, with_images) for group in groups]

    def _select(self, samples: torch.Tensor, with_images: bool) -> Batch:
        device = self.input_ids_T.device
        rows = ranges(self.sizes_B, samples).to(device)
        spans = ranges(self.feature_counts_B, samples)
        images = None
        feature_rows = self.feature_rows_F[spans.to(self.feature_rows_F.device)]
        if with_images and self.images is not None:
            picks = ranges(self.image_counts_B, samples)
            if len(picks):
                images = self.images.select(picks)
            feature_rows = torch.arange(len(spans), device=self.feature_rows_F.device)
        return Batch(
            input_ids_T=self.input_ids_T[rows],
            position_ids_3T=self.position_ids_3T[:, rows],
            labels_T=self.labels_T[rows],
            lengths_B3=self.lengths_B3[samples],
            image_counts_B=self.image_counts_B[samples],
            feature_counts_B=self.feature_counts_B[samples],
            feature_rows_F=feature_rows,
            content_ids_B=self.content_ids_B[samples],
            images=images,
        )

    def to(self, device: torch.device | str) -> Batch:
        """A copy with its token tensors on ``device``; lengths stay on the host, and so do pixels,
        which the tower takes a few at a time."""
        moved = {name: getattr(self, name).to(device, non_blocking=True) for name in MOVED}
        return replace(self, **moved)

    def pin_memory(self) -> Batch:
        """A copy from which a GPU can read beside other work; a ``DataLoader`` calls it."""
        pinned = {name: getattr(self, name).pin_memory() for name in MOVED}
        if self.images is not None:
            pixels = self.images.pixels_PC.pin_memory()
            pinned["images"] = replace(self.images, pixels_PC=pixels)
        return replace(self, **pinned)

    def padded(self, alignment: Alignment = "right", pad_id: int = 0) -> Padded:
        """The [B, L] view.

        ``right`` and ``left`` pad on that side.  ``segments`` puts the compression tokens of all
        samples in the same columns: contexts end there, dialogues begin after them.  Padding takes
        ``pad_id`` and position 0.
        """
        lengths, sizes = self.lengths_B3, self.sizes_B
        if alignment == "segments":
            context = int(lengths[:, CONTEXT].max())
            tokens = int(lengths[:, TOKENS].max())
            if int(lengths[:, TOKENS].min()) != tokens:
                raise ValueError("segment-aligned padding needs the same K for every sample")
            boundary, columns = context + tokens, context + tokens + int(lengths[:, DIALOGUE].max())
            shift = context - lengths[:, CONTEXT]
        else:
            columns = boundary = int(sizes.max())
            shift = columns - sizes if alignment == "left" else torch.zeros_like(sizes)
        device = self.input_ids_T.device
        first = torch.arange(len(self)) * columns + shift - (sizes.cumsum(0) - sizes)
        cell = (first.repeat_interleave(sizes) + torch.arange(int(sizes.sum()))).to(device)
        shape = (len(self), columns)
        kinds = torch.tensor([CONTEXT, TOKENS, DIALOGUE]).repeat(len(self))
        segment_T = kinds.repeat_interleave(lengths.flatten()).to(device)
        ids = torch.full(shape, pad_id, dtype=torch.int64, device=device)
        ids.view(-1)[cell] = self.input_ids_T
        positions = torch.zeros((3, *shape), dtype=torch.int64, device=device)
        positions.view(3, -1)[:, cell] = self.position_ids_3T
        segment = torch.full(shape, PADDING, dtype=torch.int64, device=device)
        segment.view(-1)[cell] = segment_T
        return Padded(ids, positions, segment, cell, lengths, alignment, boundary)
