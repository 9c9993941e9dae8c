"""The disk below a folder that may not be there yet."""

from __future__ import annotations

import os
from pathlib import Path


def existing_part(path: Path) -> Path:
    """The path, or the nearest folder above it that is there."""
    return next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())


def room(path: Path) -> str:
    """What is free where ``path`` is or will be, in words."""
    found = os.statvfs(existing_part(path))
    if found.f_files and not found.f_favail:
        return "there is no room for one more file there"
    return f"{found.f_bavail * found.f_frsize / 2**20:.0f} MB are free there"


def unwritable(path: Path, error: Exception) -> str:
    """What to tell of a file or folder that could not be written."""
    why = str(error)
    if "inline_container" in why:  # all that torch.save knows of a full disk is a place in C++
        why = "torch's writer has failed"
    return f"{path} cannot be written, {room(path)} ({why})"
