"""Which rank keeps the others waiting.

Ranks leave a step together: whoever is late makes all of them late, inside a collective.  So each
rank times what it does by itself: it waits for its data, and it computes in the forward of the
modules that have no modules inside.  DeepSpeed fetches a module's shards before that and waits for
the other ranks there, which is not counted; nor is the backward, where the two cannot be told
apart from outside.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from coma_ds import comm


class OwnTime:
    """The time of one step that this rank spends by itself, on its device."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._device = device
        self._spans: list[tuple] = []

    def _now(self):
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @contextmanager
    def measure(self, model: torch.nn.Module) -> Iterator[None]:
        """Time the forwards inside; without hooks again afterwards."""
        self._spans, begun = [], {}

        def enter(module, _):
            begun[module] = self._now()

        def leave(module, *_):
            self._spans.append((begun.pop(module), self._now()))

        hooks = []
        for module in model.modules():
            if next(module.children(), None) is None:
                # behind DeepSpeed's hook that fetches, before the one that lets go
                hooks.append(module.register_forward_pre_hook(enter))
                hooks.append(module.register_forward_hook(leave, prepend=True))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def compare(self, waited: float) -> dict[str, float]:
        """What the ranks needed for the step last measured, ``waited`` seconds of it for data.

        Every rank calls it.
        """
        if self._on_gpu:
            torch.cuda.synchronize(self._device)
            own = sum(begin.elapsed_time(end) for begin, end in self._spans) / 1000
        else:
            own = sum(end - begin for begin, end in self._spans)
        self._spans = []
        seconds_W = torch.zeros(comm.world_size(), dtype=torch.float64, device=self._device)
        seconds_W[comm.rank()] = waited + own
        seconds_W = comm.all_sum(seconds_W)
        slowest = int(seconds_W.argmax())
        return {
            "slowest_rank": float(slowest),
            "slowest_rank_seconds": float(seconds_W[slowest]),
            "median_rank_seconds": float(seconds_W.median()),  # of two, the quicker one,
        }
