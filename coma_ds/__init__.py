"""coma-ds: compress an image into a few tokens, then match with them."""

from __future__ import annotations

from typing import Any

__all__ = ["Embedder", "__version__"]


def __getattr__(name: str) -> Any:
    """Loaded when first asked for, so that ``import coma_ds`` is cheap."""
    if name == "Embedder":
        from coma_ds.embedder import Embedder

        return Embedder
    if name == "__version__":
        from importlib.metadata import version

        return version("coma-ds")
    raise AttributeError(f"module 'coma_ds' has no attribute {name!r}")
