"""Checkpoints of a run: staged, complete on all ranks, renamed, then pointed to."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

from coma_ds import comm
from coma_ds.engine import Engine

log = logging.getLogger("coma_ds")

POINTER = "latest"
MANIFEST = "manifest.json"


def save_checkpoint(
    engine: Engine, folder: Path, step: int, *, extra: dict[str, str] | None = None
) -> None:
    """Publish ``folder/step-00000100``; every rank calls this.  ``extra`` are files by name.

    A reader never sees half of one: the shards are written under another name, which becomes the
    published one when all ranks are done.  A published checkpoint is never written again, unless
    it is broken: then it is set aside as ``broken-step-00000100``.
    """
    name = f"step-{step:08d}"
    if comm.broadcast(_is_whole(folder / name)):
        return
    staging = f"staging-{name}"
    if comm.rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(folder / staging, ignore_errors=True)
    comm.barrier()
    engine.save(folder, staging)
    comm.barrier()
    if comm.rank() == 0:
        for file, text in (extra or {}).items():
            (folder / staging / file).write_text(text)
        files = sorted(p for p in (folder / staging).rglob("*") if p.is_file())
        sizes = {str(p.relative_to(folder / staging)): p.stat().st_size for p in files}
        manifest = {"step": step, "world": comm.world_size(), "stage": engine.stage, "files": sizes}
        (folder / staging / MANIFEST).write_text(json.dumps(manifest, indent=1))
        if (folder / name).is_dir():
            shutil.rmtree(folder / f"broken-{name}", ignore_errors=True)
            (folder / name).rename(folder / f"broken-{name}")
        (folder / staging).rename(folder / name)
        pointer = folder / f"{POINTER}.tmp"
        pointer.write_text(name)
        pointer.replace(folder / POINTER)
    comm.barrier()


def read_manifest(checkpoint: Path) -> dict:
    """The manifest of a published checkpoint whose files are all there, in full length.

    Raises ``ValueError`` that names what is wrong.
    """
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"checkpoint {checkpoint}: no readable {MANIFEST} ({error})") from None
    for name, size in manifest["files"].items():
        file = checkpoint / name
        if not file.is_file() or file.stat().st_size != size:
            raise ValueError(f"checkpoint {checkpoint}: {name} is missing or not {size} bytes long")
    return manifest


def _is_whole(checkpoint: Path) -> bool:
    try:
        read_manifest(checkpoint)
    except ValueError:
        return False
    return True


def find_checkpoint(folder: Path, resume: str) -> Path | None:
    """What to resume from: ``none``, ``auto`` (the newest that is whole), or a path.

    Raises ``ValueError`` for a given path that is not whole, and for ``auto`` when there are
    checkpoints but none is whole: a run never starts over silently.
    """
    if resume == "none":
        return None
    if resume != "auto":
        path = Path(resume)
        read_manifest(path)
        return path
    broken = []
    for path in sorted(folder.glob("step-*"), reverse=True):
        try:
            read_manifest(path)
            return path
        except ValueError as error:
            log.warning("%s; falling back to the one before", error)
            broken.append(path.name)
    if broken:
        raise ValueError(
            f"{folder}: no checkpoint is whole ({', '.join(broken)}); "
            "checkpoint.resume=none starts over"
        )
    return None


def load_checkpoint(engine: Engine, checkpoint: Path) -> int:
    """Load a published checkpoint; the step to go on with.

    Raises ``ValueError`` when it was written at another world size or ZeRO stage.
    """
    manifest = read_manifest(checkpoint)
    for key, now, what in (
        ("world", comm.world_size(), "{} rank(s)"),
        ("stage", engine.stage, "ZeRO stage {}"),
    ):
        if manifest[key] != now:
            then = what.format(manifest[key])
            raise ValueError(
                f"checkpoint {checkpoint} was written with {then}, this run has "
                f"{what.format(now)}: take {then}, or start over with checkpoint.resume=none"
            )
    engine.load(checkpoint.parent, checkpoint.name)
    return manifest["step"]
