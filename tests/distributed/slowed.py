"""Runs in which one rank is slow, inside a spawned world."""

from __future__ import annotations

import time
from collections.abc import Callable
from unittest.mock import patch

import torch

from coma_ds import comm
from coma_ds.data.collate import Collator
from tests.distributed.training import train_once

# Where a rank loses its time, by name.
PLACES = {"compute": (torch.nn.Embedding, "forward"), "data": (Collator, "pack")}


def later(call: Callable, seconds: float) -> Callable:
    def slow(*arguments, **named):
        time.sleep(seconds)
        return call(*arguments, **named)

    return slow


def train_slowly(runs: list[dict]) -> list[dict]:
    """Each run with ``slow``: (rank, place of PLACES, seconds for each call)."""
    found = []
    for run in runs:
        rank, place, seconds = run.pop("slow")
        owner, name = PLACES[place]
        slow = later(getattr(owner, name), seconds if comm.rank() == rank else 0.0)
        with patch.object(owner, name, slow):
            found.append(train_once(**run))
    return found
