"""Versions of what decides a result."""

from __future__ import annotations

import platform
from importlib import metadata

PACKAGES = ("torch", "deepspeed", "transformers", "peft", "datasets", "triton", "flash-attn")


def package_versions() -> dict[str, str]:
    """Python and the packages by name; ``-`` for one that is not installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "-"
    return found


def versions() -> str:
    """The same as text, one a line."""
    return "".join(f"{name} {version}\n" for name, version in package_versions().items())
