"""Where the time of a step goes: parts that exclude the parts inside them."""

from __future__ import annotations

import time
from collections import Counter
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import torch

from coma_ds import step as steps
from coma_ds.engine import Engine


class Clock:
    """Seconds by part; waits for the device where one begins and ends, so it slows a step down."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: Counter[str] = Counter()
        self._open: list[str] = []
        self._since = 0.0

    def _turn(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        if self._open:
            self.seconds[self._open[-1]] += now - self._since
        self._since = now

    @contextmanager
    def part(self, name: str):
        """Time goes to ``name`` inside, and not to what is around it."""
        self._turn()
        self._open.append(name)
        try:
            yield
        finally:
            self._turn()
            self._open.pop()

    def around(self, call, name):
        """``call``, timed; ``name`` may be a function that says where its time goes."""

        def timed(*args, **kwargs):
            with self.part(name() if callable(name) else name):
                return call(*args, **kwargs)

        return timed

    def _forward(self) -> str:
        if self._open:  # of the tower, or of a replay
            return self._open[-1]
        return "forward, graph kept" if torch.is_grad_enabled() else "forward"

    @contextmanager
    def watch(self, engine: Engine, objective):
        """A step inside is timed by its parts."""
        plain = Engine.__call__
        with ExitStack() as stack:
            for target, name, part in (
                (engine, "forward_backward", "forward, replayed"),
                (engine, "backward", "backward"),
                (engine, "step", "optimizer"),
                (steps, "embed_images", "vision"),
                (objective, "loss", "loss"),
            ):
                if name == "loss" and not hasattr(objective, "encode"):
                    continue  # stage 1: it is the forward
                timed = self.around(getattr(target, name), part)
                stack.enter_context(patch.object(target, name, timed))

            def called(own, call):
                with self.part(self._forward()):
                    return plain(own, call)

            stack.enter_context(patch.object(Engine, "__call__", called))
            yield
