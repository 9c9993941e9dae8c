"""The disk below a folder that may not be there yet."""

from __future__ import annotations

import shutil
from pathlib import Path


def existing_part(path: Path) -> Path:
    """The path, or the nearest folder above it that is there."""
    return next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())


def room(path: Path) -> str:
    """What is free where ``path`` is or will be, in words."""
    return f"{shutil.disk_usage(existing_part(path)).free / 2**20:.0f} MB are free there"
