"""Times, memory and rows of results; on a GPU by events, else by the clock.

Times are medians of interleaved repeats: each candidate once a round, the first one rotating, so
that a card that slows down slows all of them down.
"""

from __future__ import annotations

import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

MIB = 2**20
ROUNDS = (3, 25)


@dataclass(frozen=True)
class Candidate:
    """``prepare(i)`` makes what the i-th call needs and is not timed; ``run`` gives tensors."""

    name: str
    run: Callable[[Any], Sequence[torch.Tensor]]
    prepare: Callable[[int], Any] = lambda number: None
    options: dict = field(default_factory=dict)


@dataclass
class Result:
    """Of one candidate: milliseconds a call, or why there are none."""

    ms: float | None = None
    extra_mib: float | None = None
    error: float | None = None
    failure: str | None = None


@dataclass
class Budget:
    """Seconds that are left of a run, and seconds that one comparison may take."""

    end: float
    each: float = 1.0

    @classmethod
    def start(cls, seconds: float, each: float = 1.0) -> Budget:
        """A budget of ``seconds`` from now."""
        return cls(time.monotonic() + seconds, each)

    @property
    def spent(self) -> bool:
        """Whether the time is over."""
        return time.monotonic() > self.end


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def elapsed(calls: Callable[[], object], device: torch.device, *, hide: int = 0) -> float:
    """Milliseconds of the device.  ``hide``: calls whose launches are queued behind a pause, so
    that the time of a short call is not the host's."""
    synchronize(device)
    if device.type != "cuda":
        start = time.perf_counter()
        calls()
        return (time.perf_counter() - start) * 1e3
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    if hide:
        torch.cuda._sleep(1_500_000 + 200_000 * hide)
    first.record()
    calls()
    last.record()
    last.synchronize()
    return first.elapsed_time(last)


def _peak() -> int | None:
    """The process's highest resident memory since the last reset, bytes."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return None


def _reset_peak() -> int | None:
    """Give freed memory back and start the count of the peak anew; what is resident now."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):  # not Linux, or not its C library
        return None
    return _peak()


def extra_memory(
    run: Callable[[], Sequence[torch.Tensor]], device: torch.device
) -> tuple[float | None, Sequence[torch.Tensor]]:
    """MiB that a call takes at its peak beside what it returns, and what it returns."""
    gc.collect()
    synchronize(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    else:
        before = _reset_peak()
    outputs = run()
    synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _peak()
    if before is None or peak is None:
        return None, outputs
    kept = sum(t.numel() * t.element_size() for t in outputs)
    return max(0.0, peak - before - kept) / MIB, outputs


def _why(error: Exception) -> str:
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    return f"{type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''}"


def compare(
    candidates: Sequence[Candidate],
    device: torch.device,
    budget: Budget,
    *,
    inner: int = 1,
    judge: Callable[[Sequence[torch.Tensor]], float] | None = None,
) -> dict[str, Result]:
    """Medians of interleaved rounds.  A candidate that fails is reported, not raised.

    ``inner``: calls timed together, for short ones.  ``judge``: the error of what a call returns.
    """
    results = {c.name: Result() for c in candidates}
    slowest = 0.0
    alive = []
    for c in candidates:
        mine = results[c.name]
        try:
            for _ in range(2):  # compilers, handles, a second shape
                c.run(c.prepare(0))
            state = c.prepare(0)
            mine.extra_mib, outputs = extra_memory(lambda c=c, s=state: c.run(s), device)
            mine.error = judge(outputs) if judge else None
            del outputs, state
            state = c.prepare(0)
            slowest = max(slowest, elapsed(lambda c=c, s=state: c.run(s), device))
            del state
            alive.append(c)
        except Exception as error:  # a rival may raise anything
            mine.failure = _why(error)
        if device.type == "cuda" and mine.failure:
            torch.cuda.empty_cache()
    if not alive:
        return results
    rounds = int(1e3 * budget.each / max(slowest * inner * len(alive), 1e-3))
    rounds = min(max(rounds, ROUNDS[0]), ROUNDS[1])
    times: dict[str, list[float]] = {c.name: [] for c in alive}
    for number in range(rounds):
        turn = number % len(alive)
        for c in alive[turn:] + alive[:turn]:
            states = [c.prepare(number * inner + i) for i in range(inner)]

            def calls(c=c, states=states) -> None:
                while states:
                    c.run(states.pop())

            times[c.name].append(elapsed(calls, device, hide=inner if slowest < 5 else 0) / inner)
    for name, seen in times.items():
        results[name].ms = statistics.median(seen)
    return results


def row(op: str, impl: str, result: Result, ceiling_ms: float | None, **fields) -> dict:
    """One line of the report; ``fields`` are N, M, D, K, dtype, options."""
    options = dict(fields.pop("options", None) or {})
    if result.failure:
        options["failed"] = result.failure
    share = None
    if result.ms and ceiling_ms:
        share = round(100 * ceiling_ms / result.ms, 1)
    base = {"op": op, "impl": impl, "N": None, "M": None, "D": None, "K": None, "dtype": None}
    return base | fields | {
        "options": options,
        "ms": None if result.ms is None else round(result.ms, 5),
        "percent_of_ceiling": share,
        "extra_mib": None if result.extra_mib is None else round(result.extra_mib, 2),
        "error": result.error,
    }  # fmt: skip
