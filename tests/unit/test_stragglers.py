"""What counts as a rank's own time, by a clock that the modules move."""

from __future__ import annotations

import pytest
import torch

from coma_ds import stragglers
from coma_ds.stragglers import OwnTime


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(stragglers.time, "perf_counter", lambda: now[0])
    return now


class Takes(torch.nn.Module):
    """A module without others inside whose forward takes ``seconds``."""

    def __init__(self, clock: list[float], seconds: float) -> None:
        super().__init__()
        self.clock, self.seconds = clock, seconds

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.clock[0] += self.seconds
        return x


def test_waiting_for_others_is_not_counted(clock):
    """Hooks that were there before are DeepSpeed's: they fetch, and wait for the other ranks."""
    model = torch.nn.Sequential(Takes(clock, 1.0), Takes(clock, 2.0))

    def fetch(*_):
        clock[0] += 100.0

    for module in model.modules():
        module.register_forward_pre_hook(fetch)
        module.register_forward_hook(fetch)
    own = OwnTime(torch.device("cpu"))
    with own.measure(model):
        model(torch.zeros(1))
        model(torch.zeros(1))
    assert own.compare(0.25) == {
        "slowest_rank": 0.0, "slowest_rank_seconds": 6.25, "median_rank_seconds": 6.25,
    }  # fmt: skip


def test_nothing_stays_behind(clock):
    model = torch.nn.Sequential(Takes(clock, 1.0))
    own = OwnTime(torch.device("cpu"))
    with pytest.raises(ZeroDivisionError), own.measure(model):
        raise ZeroDivisionError
    assert not model[0]._forward_pre_hooks and not model[0]._forward_hooks
    with own.measure(model):
        model(torch.zeros(1))
    model(torch.zeros(1))
    assert own.compare(0.0)["slowest_rank_seconds"] == 1.0
