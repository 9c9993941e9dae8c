"""Faults on purpose: what the exactness tests must see.

Each stands for a mistake that is easy to make and changes nothing that a run would print.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch

from coma_ds import comm, step
from coma_ds.engine import Engine
from coma_ds.model.embedder import CompressionModel

FORWARD_BACKWARD = Engine.forward_backward
EMBED_IMAGES = CompressionModel.embed_images
SEED_CHUNK = step.seed_chunk
GATHER_ROWS = comm.gather_rows
ALL_SUM = comm.all_sum


def times_world(self, call, *, last):
    """The surrogate with a factor W, as where the gather does not sum."""

    def scaled(model):
        loss, result = call(model)
        return loss * comm.world_size(), result

    return FORWARD_BACKWARD(self, scaled, last=last)


def without_boundaries(self, call, *, last):
    """DeepSpeed takes every part for a whole step."""
    loss, result = self._engine(call)
    self._engine.backward(loss)
    return result


def every_part_is_last(self, call, *, last):
    """The boundary is said, but wrongly."""
    return FORWARD_BACKWARD(self, call, last=True)


_no_graph_yet = False


def untouched_tower(self, images):
    """The first call with a graph in a step loses it: no zero gradient in the first part."""
    global _no_graph_yet
    if not torch.is_grad_enabled():
        _no_graph_yet = True
    elif _no_graph_yet:
        _no_graph_yet = False
        with torch.no_grad():
            return EMBED_IMAGES(self, images)
    return EMBED_IMAGES(self, images)


_numbers = itertools.count()


def fresh_seed(seed, number, chunk, rank=None):
    """Another random state at every call: a replay draws other dropout masks."""
    SEED_CHUNK(seed, number, chunk + 1000 * next(_numbers), rank)


@contextmanager
def alone(self, *, kept=False):
    """Kept graphs without a word to DeepSpeed."""
    yield


def local_count(values):
    """Own rows times W in place of the rows of all ranks: the mean of the ranks' means."""
    return values * comm.world_size() if values.numel() == 1 else ALL_SUM(values)


def local_ids(rows, counts=None):
    """Equal content on two ranks has two ids."""
    if rows.dtype == torch.int64:
        rows = rows + 10_000 * comm.rank()
    return GATHER_ROWS(rows, counts)


def unsummed(ctx, grad):
    """The gather's backward without the gradients of the other ranks."""
    first = sum(ctx.counts[: comm.rank()])
    return grad[first : first + ctx.counts[comm.rank()]], None


def lost_part(self, call, *, last):
    """Only the last part of a step has a gradient."""

    def kept(model):
        loss, result = call(model)
        return loss * float(last), result

    return FORWARD_BACKWARD(self, kept, last=last)


def not_finite(self, call, *, last):
    """A gradient that overflows, on the last rank only."""

    def spoilt(model):
        loss, result = call(model)
        return loss * (float("nan") if comm.rank() == comm.world_size() - 1 else 1.0), result

    return FORWARD_BACKWARD(self, spoilt, last=last)


FAULTS = {
    "not finite on one rank": (Engine, "forward_backward", not_finite),
    "surrogate times W": (Engine, "forward_backward", times_world),
    "parts but the last are lost": (Engine, "forward_backward", lost_part),
    "no boundary calls": (Engine, "forward_backward", without_boundaries),
    "every part is the last": (Engine, "forward_backward", every_part_is_last),
    "no touch of the trained tower": (CompressionModel, "embed_images", untouched_tower),
    "seed not replayed": (step, "seed_chunk", fresh_seed),
    "kept graphs unsaid": (Engine, "gradients_of_a_step", alone),
    "rows counted on one rank": (comm, "all_sum", local_count),
    "ids of one rank only": (comm, "gather_rows", local_ids),
    "gather without a sum": (comm._GatherRows, "backward", staticmethod(unsummed)),
}


@contextmanager
def broken_step(fault: str) -> Iterator[None]:
    """The code under test with a fault."""
    owner, name, replacement = FAULTS[fault]
    with patch.object(owner, name, replacement):
        yield
