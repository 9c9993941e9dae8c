"""What a published checkpoint is made of, whether it is whole, and which ones are kept.

Files only, no engine.  A checkpoint is a folder ``step-00000100`` with a ``manifest.json``: every
other file of it with its size and its hash, and the hash of all that stands in the manifest.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import shutil
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from itertools import count
from pathlib import Path

log = logging.getLogger("coma_ds")

MANIFEST, POINTER = "manifest.json", "latest"
DELETING, STAGING, BROKEN = "deleting-", "staging-", "broken-"
UNIVERSAL = "universal-"  # a copy in DeepSpeed's form for any number of ranks, while it is read


@dataclass(frozen=True)
class Manifest:
    """``files``: size in bytes and hash by name.  ``frozen``: what was left out, and where it is
    (see ``Engine.frozen_weights``), of the model ``base``.  ``metric``: an evaluated value of this
    step, for ``best``, by the name ``measure``."""

    step: int
    world: int
    stage: int
    files: dict[str, tuple[int, str]]
    frozen: dict = field(default_factory=dict)
    metric: float | None = None
    measure: str = ""
    base: str = ""


def step_name(step: int) -> str:
    """The folder of a step; names sort as steps do."""
    return f"step-{step:08d}"


def digest(path: Path) -> str:
    """The hash of a file: blake2b, 16 bytes, as hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def sync(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomically(path: Path, text: str) -> None:
    """A reader sees the old text or the new one, never a part."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with partial.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError:
        with suppress(OSError):
            partial.unlink()
        raise


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """The last file of a checkpoint."""
    tree = asdict(manifest)
    write_atomically(folder / MANIFEST, json.dumps(tree | {"hash": _hash_of(tree)}, indent=1))


def _hash_of(tree: dict) -> str:
    text = json.dumps(tree, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def read_manifest(checkpoint: Path) -> Manifest:
    """The manifest of a checkpoint whose files are all there, in full length.

    Raises ``ValueError`` that names what is wrong.
    """
    try:
        tree = dict(json.loads((checkpoint / MANIFEST).read_text()))
    except (OSError, TypeError, ValueError) as error:
        raise ValueError(f"checkpoint {checkpoint}: no readable {MANIFEST} ({error})") from None
    if tree.pop("hash", None) != _hash_of(tree):
        raise ValueError(f"checkpoint {checkpoint}: {MANIFEST} is not what was written")
    manifest = Manifest(**tree)
    if checkpoint.name.startswith("step-") and checkpoint.name != step_name(manifest.step):
        raise ValueError(f"checkpoint {checkpoint}: it is of step {manifest.step}")
    for name, (size, _) in manifest.files.items():
        file = checkpoint / name
        if not file.is_file() or file.stat().st_size != size:
            raise ValueError(f"checkpoint {checkpoint}: {name} is missing or not {size} bytes long")
    return manifest


def problems(checkpoint: Path, share: int = 0, shares: int = 1) -> list[str]:
    """What is wrong with a checkpoint; of its files every ``shares``-th is hashed."""
    try:
        manifest = read_manifest(checkpoint)
        for name in sorted(manifest.files)[share::shares]:
            if digest(checkpoint / name) != manifest.files[name][1]:
                raise ValueError(f"checkpoint {checkpoint}: {name} is not what was written")
    except (OSError, ValueError) as error:
        return [str(error)]
    return []


def check_given(resume: str) -> None:
    """Raise ``ValueError`` for a ``checkpoint.resume`` that is no folder of a checkpoint."""
    if resume in ("auto", "none"):
        return
    try:
        read_manifest(Path(resume))
    except ValueError as error:
        if (Path(resume) / MANIFEST).is_file():
            raise
        raise ValueError(
            f"checkpoint.resume {resume!r} is no checkpoint ({error}): expected auto, none, or a "
            "folder RUN/checkpoints/step-..."
        ) from None


def published(folder: Path) -> list[Path]:
    """The published checkpoints, the newest first, whether whole or not."""
    return sorted((p for p in folder.glob("step-*") if p.is_dir()), reverse=True)


def whole(checkpoint: Path) -> Manifest | None:
    """The manifest, or None for a checkpoint that is not whole (hashes are not looked at)."""
    try:
        return read_manifest(checkpoint)
    except ValueError:
        return None


def surplus(folder: Path, *, keep_last: int, keep_every: int, best: str = "") -> list[Path]:
    """Whole checkpoints that need not be kept.

    Kept are the last ``keep_last`` (0: all), those of steps that ``keep_every`` divides (0: none)
    and the one with the highest metric, of the name ``best``.  One that is not whole counts for
    nothing and stays.
    """
    found = [(path, manifest) for path in published(folder) if (manifest := whole(path))]
    metrics = [m for _, m in found if m.metric is not None and m.measure == best]
    measured = [m for m in metrics if not math.isnan(m.metric)]
    top = max(measured, key=lambda m: (m.metric, m.step)).step if measured else None
    return [
        path
        for path, m in found[keep_last or len(found) :]
        if m.step != top and not (keep_every and m.step % keep_every == 0)
    ]


def remove(checkpoint: Path) -> None:
    """Remove a checkpoint; under another name first, so that none is ever half there."""
    aside = checkpoint.with_name(DELETING + checkpoint.name)
    shutil.rmtree(aside, ignore_errors=True)
    checkpoint.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)


def set_apart(checkpoints: Path, *, after: int) -> Path | None:
    """Move those of later steps than ``after`` into ``checkpoints-1`` (2, ...) beside the folder.

    They would be taken for those of the run that goes on here, which does not write a step that is
    published already.  Returns where they are; None where there are none.
    """
    later = [path for path in published(checkpoints) if path.name > step_name(after)]
    if not later:
        return None
    places = (checkpoints.with_name(f"{checkpoints.name}-{n}") for n in count(1))
    place = next(place for place in places if not place.exists())
    place.mkdir()
    for path in later:
        path.rename(place / path.name)
    left = published(checkpoints)
    if left:
        write_atomically(checkpoints / POINTER, left[0].name)
    else:
        (checkpoints / POINTER).unlink(missing_ok=True)
    return place


def set_aside(checkpoint: Path) -> None:
    """Keep a checkpoint that is broken under a name that says so, instead of an earlier one."""
    aside = checkpoint.with_name(BROKEN + checkpoint.name)
    shutil.rmtree(aside, ignore_errors=True)
    checkpoint.rename(aside)


def remove_remains(folder: Path) -> None:
    """What an interrupted save, removal or conversion left."""
    for start in (STAGING, DELETING, UNIVERSAL):
        for path in folder.glob(f"{start}*"):
            shutil.rmtree(path, ignore_errors=True)
