"""What the passes through a model computed: rows and pairs of rows, not yet FLOPs."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from coma_ds.batch import CONTEXT, DIALOGUE, TOKENS, ImageBatch


def _nothing() -> list[int]:
    return [0, 0]


@dataclass
class Work:
    """Each number twice: of passes without a graph, and of those with one (and a backward).

    ``..._rows`` went through the matrices of every layer; ``..._pairs`` are queries times keys of
    attention, summed over the layers of the tower, of one layer for the text.  ``head_rows`` met
    the output matrix, ``head_rows_again`` once more in the backward.
    """

    patch_rows: list[int] = field(default_factory=_nothing)
    image_rows: list[int] = field(default_factory=_nothing)
    vision_pairs: list[int] = field(default_factory=_nothing)
    text_rows: list[int] = field(default_factory=_nothing)
    text_pairs: list[int] = field(default_factory=_nothing)
    head_rows: list[int] = field(default_factory=_nothing)
    head_rows_again: int = 0

    def add(self, *, graph: bool | None = None, **counts: int) -> None:
        """Add to the fields named; ``graph`` is what torch says where it is left out."""
        place = int(torch.is_grad_enabled() if graph is None else graph)
        for name, count in counts.items():
            getattr(self, name)[place] += count

    def take(self) -> Work:
        """All that was added since the last call."""
        taken = Work(**vars(self))
        self.__init__()
        return taken


def vision_pairs(images: ImageBatch, vision) -> int:
    """Pairs of patches that attend to each other, over all layers of the tower.

    ``vision``: its config.  Qwen2.5-VL attends inside windows, in a few layers inside each image.
    """
    sides = images.grid_I3[:, 1:].tolist()
    frames = images.grid_I3[:, 0].tolist()
    whole = sum(t * (h * w) ** 2 for t, (h, w) in zip(frames, sides))
    window = getattr(vision, "window_size", None)
    layers = vision.depth
    if not window:
        return layers * whole
    merge = vision.spatial_merge_size
    cells = window // (vision.patch_size * merge)  # a side of a window, in image tokens

    def squares(side: int) -> int:
        full, rest = divmod(side // merge, cells)
        return full * cells**2 + rest**2

    inside = sum(t * merge**4 * squares(h) * squares(w) for t, (h, w) in zip(frames, sides))
    full = len(vision.fullatt_block_indexes)
    return full * whole + (layers - full) * inside


def visible_pairs(lengths_B3: torch.Tensor, *, bottleneck: bool) -> int:
    """Pairs that the visibility rule lets see each other in one text layer."""
    context, tokens, dialogue = (lengths_B3[:, i] for i in (CONTEXT, TOKENS, DIALOGUE))
    whole = context + tokens + dialogue
    pairs = whole * (whole + 1) // 2
    if bottleneck:
        pairs = pairs - dialogue * context
    return int(pairs.sum())
