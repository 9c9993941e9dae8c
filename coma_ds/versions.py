"""Versions of what decides a result."""

from __future__ import annotations

import platform
from importlib import metadata

CPU = "cpu"
PACKAGES = (
    "torch", "deepspeed", "transformers", "peft", "datasets", "triton", "flash-attn",
    "flash-attn-4", "liger-kernel", "tokenizers", "numpy", "pillow", "torchvision", "pyarrow",
)  # fmt: skip


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


def place() -> str:
    """The ranks of this run and what they compute on, in the same form."""
    import torch

    from coma_ds import comm

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else CPU
    return f"ranks {comm.world_size()}\ndevice {device}\n"
