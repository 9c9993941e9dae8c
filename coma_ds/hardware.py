"""What the machine computes well, and the memory that a rank has used."""

from __future__ import annotations

import resource

import torch

SLOW = "this CPU has no fast bf16: precision=fp32 takes a fraction of the time"


def has_fast_bf16(device: str = "") -> bool:
    """True where products in bf16 are not slower than those in fp32.

    Any GPU that is supported, and CPUs with AVX-512: without it torch 2.13 has no bf16 kernels for
    them, and a linear layer takes 15 to 50 times as long as in fp32 (measured with AVX2).
    ``device``: ``cuda`` or ``cpu``; by default that on which training would run.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return device != "cpu" or torch.backends.cpu.get_cpu_capability().startswith("AVX512")


def memory_mib() -> float:
    """Peak memory of this rank: of its GPU, or of its process on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
