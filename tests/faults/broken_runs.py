"""A run that was interrupted, damaged in some way, goes on in a spawned world."""

from __future__ import annotations

import shutil
from pathlib import Path

from coma_ds import comm
from tests.distributed.training import train_once


def flip_one_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def damage(folder: Path, kind: str) -> None:
    """Do it to the newest checkpoint in the folder of a run."""
    checkpoints = folder / "checkpoints"
    newest = sorted(checkpoints.glob("step-*"))[-1]
    shard = sorted(newest.glob("*optim_states.pt"))[-1]
    pointer, manifest = checkpoints / "latest", newest / "manifest.json"
    if kind == "truncated":
        shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    elif kind == "flipped bit":
        flip_one_bit(shard)
    elif kind == "no shard":
        shard.unlink()
    elif kind == "no manifest":
        manifest.unlink()
    elif kind == "half a manifest":
        manifest.write_text(manifest.read_text()[:100])
    elif kind == "dangling pointer":
        pointer.write_text("step-00000099")
    elif kind == "no pointer":
        pointer.unlink()
    elif kind == "half a save":
        staging = checkpoints / "staging-step-00000006"
        staging.mkdir()
        (staging / shard.name).write_bytes(b"half")
    else:
        raise ValueError(kind)


def go_on_each(first: dict, copies: dict[str, str], arguments: list[str]) -> dict[str, dict]:
    """The interrupted run ``first``; then, for each kind of damage, a copy that goes on."""
    train_once(**first)
    found = {}
    for kind, output in copies.items():
        if comm.rank() == 0:
            shutil.copytree(first["output"], output)
            damage(Path(output), kind)
        comm.barrier()
        found[kind] = train_once(output, arguments)
    return found
