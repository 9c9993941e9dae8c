"""What a published checkpoint is made of, whether it is whole, and which ones are kept.

Files only, no engine.  A checkpoint is a folder ``step-00000100`` with a ``manifest.json``: every
other file of it with its size and its hash.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path

log = logging.getLogger("coma_ds")

MANIFEST, POINTER = "manifest.json", "latest"
DELETING, STAGING, BROKEN = "deleting-", "staging-", "broken-"


@dataclass(frozen=True)
class Manifest:
    """``files``: size in bytes and hash by name.  ``frozen``: what was left out, and where it is
    (see ``Engine.frozen_weights``).  ``metric``: an evaluated value of this step, for ``best``."""

    step: int
    world: int
    stage: int
    files: dict[str, tuple[int, str]]
    frozen: dict = field(default_factory=dict)
    metric: float | None = None


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
    with partial.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """The last file of a checkpoint."""
    write_atomically(folder / MANIFEST, json.dumps(asdict(manifest), indent=1))


def read_manifest(checkpoint: Path) -> Manifest:
    """The manifest of a checkpoint whose files are all there, in full length.

    Raises ``ValueError`` that names what is wrong.
    """
    try:
        manifest = Manifest(**json.loads((checkpoint / MANIFEST).read_text()))
        for name, (size, _) in manifest.files.items():
            file = checkpoint / name
            if not file.is_file() or file.stat().st_size != size:
                raise ValueError(
                    f"checkpoint {checkpoint}: {name} is missing or not {size} bytes long"
                )
    except (OSError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"checkpoint {checkpoint}: no readable {MANIFEST} ({error})") from None
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


def published(folder: Path) -> list[Path]:
    """The published checkpoints, the newest first, whether whole or not."""
    return sorted((p for p in folder.glob("step-*") if p.is_dir()), reverse=True)


def whole(checkpoint: Path) -> Manifest | None:
    """The manifest, or None for a checkpoint that is not whole (hashes are not looked at)."""
    try:
        return read_manifest(checkpoint)
    except ValueError:
        return None


def surplus(folder: Path, *, keep_last: int, keep_every: int) -> list[Path]:
    """Whole checkpoints that need not be kept.

    Kept are the last ``keep_last`` (0: all), those of steps that ``keep_every`` divides (0: none)
    and the one with the highest metric.  One that is not whole counts for nothing and stays.
    """
    found = [(path, manifest) for path in published(folder) if (manifest := whole(path))]
    measured = [m for _, m in found if m.metric is not None]
    best = max(measured, key=lambda m: (m.metric, m.step)).step if measured else None
    return [
        path
        for path, m in found[keep_last or len(found) :]
        if m.step != best and not (keep_every and m.step % keep_every == 0)
    ]


def remove(checkpoint: Path) -> None:
    """Remove a checkpoint; under another name first, so that none is ever half there."""
    aside = checkpoint.with_name(DELETING + checkpoint.name)
    shutil.rmtree(aside, ignore_errors=True)
    checkpoint.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)


def set_aside(checkpoint: Path) -> None:
    """Keep a checkpoint that is broken under a name that says so, instead of an earlier one."""
    aside = checkpoint.with_name(BROKEN + checkpoint.name)
    shutil.rmtree(aside, ignore_errors=True)
    checkpoint.rename(aside)


def remove_remains(folder: Path) -> None:
    """What an interrupted save or removal left."""
    for start in (STAGING, DELETING):
        for path in folder.glob(f"{start}*"):
            shutil.rmtree(path, ignore_errors=True)
