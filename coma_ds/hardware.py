"""What the machine computes well, and what a rank takes of it: threads and memory."""

from __future__ import annotations

import ctypes
import logging
import os
import resource
from pathlib import Path

import torch

log = logging.getLogger("coma_ds")

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX, M_ARENA_MAX = -1, -2, -4, -8  # malloc.h
CGROUP = Path("/sys/fs/cgroup")
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


def ranks_here() -> int:
    """Ranks of this job on this machine, as the launcher said."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)


def share_threads() -> None:
    """Divide the cores that this job may use among the ranks of the machine.

    ``OMP_NUM_THREADS``, where it is set, is what each rank takes instead.
    """
    told = os.environ.get("OMP_NUM_THREADS", "")
    fair = len(os.sched_getaffinity(0)) // ranks_here()
    torch.set_num_threads(max(1, int(told) if told.isdigit() else fair))


def keep_freed_memory() -> None:
    """Tell glibc to keep what is freed, instead of giving it back to the kernel.

    Activations of a step are large blocks; on virtual machines the page faults of mapping them
    anew cost several times the arithmetic (measured: 0.6 s a step against 5 to 14 s).
    """
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(M_ARENA_MAX, 1)  # arenas of other threads are mapped and trimmed regardless
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        libc.mallopt(M_TOP_PAD, 2**28)
    except (OSError, AttributeError):  # another C library
        log.debug("no mallopt here")


def available_memory() -> float:
    """Bytes that processes may still take on this machine, or in this container."""
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    machine = int(fields["MemAvailable"].split()[0]) * 1024
    try:
        limit = int((CGROUP / "memory.max").read_text())
        return float(min(machine, limit - int((CGROUP / "memory.current").read_text())))
    except (OSError, ValueError):  # no such file, or "max"
        return float(machine)


def usable_device(device: str | torch.device) -> torch.device:
    """The device of that name.  Raises ``ValueError`` for one that cannot be used here."""
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise ValueError(f"device {str(device)!r} cannot be used here: {reason}") from None
    return found
