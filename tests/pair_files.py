"""Files of pairs with bad rows in them, and what a batch of them holds."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import torch

from coma_ds.batch import Batch
from tests.folders import png
from tests.odd_images import bomb, picture, stored

ROWS = 40


def write(folder: Path, bad: dict[int, dict | str], rows: int = ROWS) -> Path:
    """Pairs of a text and a picture of its own; ``bad``: cells of a row, or its whole line."""
    lines = []
    for row in range(rows):
        (folder / f"{row}.png").write_bytes(png(row))
        cells = {"query": f"find number {row}", "target_image": f"{row}.png"}
        change = bad.get(row, {})
        lines.append(change if isinstance(change, str) else json.dumps(cells | change))
    (folder / "broken.png").write_bytes(png(0)[:-300])
    (folder / "pairs.jsonl").write_text("\n".join(lines))
    return folder


BROKEN = {"target_image": "broken.png"}


def bad_rows(folder: Path) -> dict[str, tuple[dict | str, str]]:
    """Every way to be bad: the change of the row, and what is said of it."""
    (folder / "empty.png").touch()
    (folder / "bomb.png").write_bytes(bomb())
    (folder / "thin.png").write_bytes(stored(picture(0)[:1].repeat(5, 1)[:, :300]))
    (folder.parent / "outside.png").write_bytes(png(0))
    os.symlink(folder.parent / "outside.png", folder / "link.png")
    image = "target_image"
    return {
        "json": ('{"query": "x"', "not valid JSON"),
        "no object": ("[1]", "expected a JSON object"),
        "empty": ({"query": ""}, "empty query"),
        "type": ({"query": 3}, "query must be a text, got int 3"),
        "missing": ({image: "none.png"}, "none.png does not exist"),
        "broken": (BROKEN, "broken.png is truncated or broken"),
        "empty file": ({image: "empty.png"}, "is an empty file"),
        "bomb": ({image: "bomb.png"}, "bomb.png is too large to decode safely"),
        "thin": ({image: "thin.png"}, "is 300 x 1 pixels, an aspect ratio over 200"),
        "parent": ({image: "../outside.png"}, "leaves the image root"),
        "link": ({image: "link.png"}, "outside the image root"),
        "absolute": ({image: "/etc/hostname"}, "is absolute"),
        "url": ({image: "http://host/a.png"}, "is a URL"),
        "spelled": ({"query": "say <|image_pad|>"}, "the text 'say <|image_pad|>' contains"),
        "surrogate": ({"query": "half \ud800"}, "is not valid Unicode"),
        "tokens": ({image: ["1.png"] * 5}, "the images alone take 90 tokens"),
    }


def digests(batch: Batch) -> list[str]:
    """One of each sample, of all that the model sees of it."""
    found = []
    for part in batch.split([torch.tensor([i]) for i in range(len(batch))], with_images=True):
        state = hashlib.blake2b(digest_size=8)
        tensors = [part.input_ids_T, part.position_ids_3T, part.labels_T, part.content_ids_B]
        tensors += [part.images.pixels_PC, part.images.grid_I3] if part.images else []
        for tensor in tensors:
            state.update(tensor.numpy().tobytes())
        found.append(state.hexdigest())
    return found


def pairs_of(batch: Batch) -> list[tuple[str, ...]]:
    """Digests of query and target of each pair."""
    found = digests(batch)
    return list(zip(found[: batch.pairs], found[batch.pairs : 2 * batch.pairs]))
