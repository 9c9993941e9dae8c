"""A folder of images that are no larger than a run uses them, and what they were made for."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from coma_ds.data.images import FilePicture
from coma_ds.data.processing import Processing

MADE_FOR = ".made-for.json"  # in the folder
Grid = tuple[int, int, int]


@dataclass(frozen=True)
class Held:
    """A picture in memory."""

    name: str
    image: Image.Image

    def open(self) -> Image.Image:
        """It."""
        return self.image


def made_for(folder: Path) -> int | None:
    """Pixels of the largest image that ``folder`` was made for; None where it was not resized.

    Raises ``ValueError`` for a note that cannot be read.
    """
    try:
        return int(json.loads((folder / MADE_FOR).read_text())["pixels"])
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{folder / MADE_FOR} cannot be read ({error}): remove {folder} and run coma-ds "
            "prepare --resize again"
        ) from error


def begin_resized(folder: Path, processing: Processing) -> None:
    """Note in ``folder`` what its images are made for.  Raises ``ValueError`` where they were made
    for something else."""
    pixels = processing.image_processor.size["longest_edge"]
    known = made_for(folder)
    if known not in (None, pixels):
        raise ValueError(
            f"{folder}: its images are resized for at most {_tokens(known, processing)} image "
            f"tokens, these would be for {_tokens(pixels, processing)}: remove it, or take another "
            "--output"
        )
    if known is None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MADE_FOR).write_text(json.dumps({"pixels": pixels}) + "\n")


def check_resized(folder: str | None, processing: Processing) -> None:
    """Raise ``ValueError`` where images of ``folder`` are smaller than they would be used."""
    known = made_for(Path(folder)) if folder else None
    if known is None:
        return
    pixels = processing.image_processor.size["longest_edge"]
    if known < pixels:
        raise ValueError(
            f"data.image_root {folder!r}: its images were resized for at most "
            f"{_tokens(known, processing)} image tokens, model.max_vision_tokens allows "
            f"{_tokens(pixels, processing)} here: run coma-ds prepare --resize again on the "
            "originals"
        )


def _tokens(pixels: int, processing: Processing) -> int:
    p = processing.image_processor
    return pixels // (p.patch_size * p.merge_size) ** 2


def keep_resized(picture: FilePicture, folder: Path, grid: Grid, processing: Processing) -> None:
    """The image below ``folder`` under the same path, no larger than it is used; what is there
    already stays.

    One that is not larger is copied as it is, as is one that the processor would scale another way
    from there.
    """
    target = folder / picture.path
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{os.getpid()}-{target.name}")
    patch = processing.image_processor.patch_size
    size = grid[2] * patch, grid[1] * patch
    image = picture.open()
    small = None
    if image.width * image.height > size[0] * size[1]:
        small = image.resize(size, Image.Resampling.BICUBIC)
        if processing.pixels(Held(picture.name, small))[1] != grid:
            small = None
    if small is None:
        shutil.copyfile(picture.name, partial)
    else:
        kind = Image.registered_extensions().get(target.suffix.lower(), "JPEG")
        options = {"quality": 95, "subsampling": 0} if kind == "JPEG" else {}
        small.save(partial, kind, **options)
    partial.replace(target)
