"""Which images there are: those of a folder or of MMEB-train, in an order drawn by a seed.

An image is named by its path below the image root.  Its place in the order depends on the seed
and its name alone, so the first N are a fair sample of all, and of more images when N grows.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterable, Sequence

from coma_ds.data.mmeb_layout import check_hub_name, open_set, text_column

log = logging.getLogger("coma_ds")

SUFFIXES = (
    *(".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".jp2", ".avif"),
)
_COLUMNS = ("qry_image_path", "pos_image_path", "neg_image_path")


def derived(*parts: object) -> int:
    """A number below 2**31 that the parts (texts and numbers) decide."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") >> 1


def in_drawn_order(names: Iterable[str], seed: int) -> list[str]:
    """The names in the order of the seed, whatever order they come in."""
    return sorted(names, key=lambda name: (derived("order", seed, name), name))


def folder_images(folder: str) -> list[str]:
    """The image files below ``folder``, by their endings, sorted; hidden files are left out.

    Raises ``ValueError`` for no such folder and for one without images.
    """
    if not os.path.isdir(folder):
        raise ValueError(f"{folder}: no such folder of images")
    names = []
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        inside = os.path.relpath(place, folder)
        for name in files:
            if name.lower().endswith(SUFFIXES) and not name.startswith("."):
                names.append(os.path.normpath(os.path.join(inside, name)))
    if not names:
        raise ValueError(f"{folder}: no image files in it (looked for {', '.join(SUFFIXES)})")
    return sorted(names)


def mmeb_images(root_or_hub: str, sources: Sequence[str], per_source: int, seed: int) -> list[str]:
    """The images that rows of MMEB-train name, sorted, each once: ``per_source`` of a set at most.

    ``sources`` names the sets; empty takes all of a folder.  An image of two sets counts for the
    first.  Raises ``ValueError`` for a set that is not there and where no set has an image.
    """
    names: set[str] = set()
    for source in sources or _sets(root_or_hub):
        table = open_set(root_or_hub, source, "original", _COLUMNS)
        found: set[str] = set()
        for column in _COLUMNS:
            found.update(text_column(table, column).unique().to_pylist())
        found -= names | {""}
        drawn = in_drawn_order(found, seed)[:per_source]
        log.info("%s: %d of %d images", source, len(drawn), len(found))
        names.update(drawn)
    if not names:
        raise ValueError(f"{root_or_hub}: no row of {', '.join(sources) or 'any set'} has an image")
    return sorted(names)


def _sets(root: str) -> list[str]:
    if not os.path.isdir(root):
        check_hub_name(root)
        raise ValueError(f"{root} is on the hub: name the sets to take with --sources")
    held = [entry.name for entry in os.scandir(root) if entry.is_dir()]
    held = [name for name in sorted(held) if _has_parquet(os.path.join(root, name))]
    if not held:
        raise ValueError(
            f"{root}: no set of MMEB-train here; expected folders such as "
            "OK-VQA/original-00000-of-00001.parquet"
        )
    return held


def _has_parquet(folder: str) -> bool:
    return any(name.endswith(".parquet") for name in os.listdir(folder))
