"""The order of samples: a pure function of (seed, step), equal at any world size.

A batch is made of sub-batches, each from one source, so that its in-batch negatives are of
its own kind.  Nothing is iterated: any step is computed by itself, so a resumed run and a
worker need no state but the step.

Letters: B samples a global batch, b a sub-batch, S sources, T sub-batches an epoch.
"""

from __future__ import annotations

import hashlib
import heapq
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

WEIGHTINGS = ("uniform", "proportional")
_CACHED_PERMUTATIONS_PER_SOURCE = 2  # a batch may lie across two passes


class BatchOrder:
    """Which rows stand in the global batch of each step.

    Every source walks a permutation of its own rows, a new one for each pass, drawn from
    (seed, name of the source, pass); a pass leaves out the last ``n % b`` rows of its
    permutation.  Which source gives a sub-batch:

    - ``uniform``: in rounds, each a permutation of the S sources, whatever their sizes.  When
      one source ends a pass in the middle of a batch, a row can stand twice in that batch.
    - ``proportional`` (and whenever there is one source): in epochs, each a permutation of all
      sub-batches of all sources.  No row stands twice in an epoch; the rest that fills no
      batch is left out, another one in each epoch.

    Args:
        sizes: rows of each source by name; the order of names gives the source indices.
        batch_size: B, samples of a global batch.
        sub_batch_size: b, samples in a row from one source; 0 mixes the sources freely.
        weighting: ``"uniform"`` over the sources or ``"proportional"`` to their rows.
        seed: not negative.
        weights: of each row, by source, int64: the ranks get as much of each batch by them.

    Raises:
        ValueError: no or empty sources, B not a multiple of b, a source too small for its
            share of a batch, or an unknown weighting.
    """

    def __init__(
        self,
        sizes: Mapping[str, int],
        batch_size: int,
        sub_batch_size: int = 0,
        weighting: str = "uniform",
        seed: int = 0,
        weights: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        self.names = tuple(sizes)
        self.sizes = tuple(sizes[name] for name in self.names)
        self.batch_size = batch_size
        self.seed = seed
        self._weights = [weights[name] for name in self.names] if weights else None
        self._unit = unit = sub_batch_size or 1
        _check(sizes, batch_size, sub_batch_size, weighting, seed)
        self._by_epoch = weighting == "proportional" or len(self.names) == 1
        self._per_batch = batch_size // unit
        self._per_pass = tuple(size // unit for size in self.sizes)
        counts = self._per_pass if self._by_epoch else (1,) * len(self.names)
        self._cycle = np.repeat(np.arange(len(self.names)), counts)
        self._counts = np.asarray(counts)
        rows = sum(self.sizes)
        if self._by_epoch:
            self.steps_per_epoch = len(self._cycle) // self._per_batch
            if self.steps_per_epoch == 0:
                whole = f", {len(self._cycle) * unit} of them in whole sub-batches of {unit}"
                raise ValueError(
                    f"the sources hold {rows} rows{whole if unit > 1 else ''}, fewer than one "
                    f"batch of {batch_size}; lower the batch size or add data"
                )
        else:
            self.steps_per_epoch = max(1, rows // batch_size)
            _check_share(sizes, unit, self._per_batch)
        self._row_cache: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()
        self._cycle_cache: OrderedDict[int, tuple[np.ndarray, np.ndarray]] = OrderedDict()

    def epoch(self, step: int) -> int:
        """The epoch of ``step``; under ``uniform`` a nominal one, by the number of samples."""
        return step // self.steps_per_epoch

    def global_batch(self, step: int) -> list[tuple[int, int]]:
        """The B samples of ``step`` (from 0) as (source index, row), sub-batch after sub-batch.

        Raises:
            ValueError: a negative step.
        """
        if step < 0:
            raise ValueError(f"step {step} is negative; steps count from 0")
        batch: list[tuple[int, int]] = []
        for source, number in self._sub_batches(step):
            passed, place = divmod(number, self._per_pass[source])
            start = place * self._unit
            rows = self._permutation(source, passed)[start : start + self._unit]
            batch.extend((source, row) for row in rows.tolist())
        return batch

    def local_rows(self, step: int, rank: int, world: int) -> list[tuple[int, int]]:
        """The part of ``global_batch(step)`` of one rank: B / world samples, in a row where their
        weights are not known.

        Raises:
            ValueError: B is not a multiple of ``world``, or no such rank.
        """
        if not 0 <= rank < world:
            raise ValueError(f"rank {rank} is not one of a world of {world}")
        if self.batch_size % world:
            raise ValueError(
                f"batch size {self.batch_size} is not a multiple of {world} ranks; take "
                f"{self.batch_size // world * world or world} or another number of ranks"
            )
        share = self.batch_size // world
        batch = self.global_batch(step)
        if self._weights is None:
            return batch[rank * share : (rank + 1) * share]
        weights = np.array([self._weights[source][row] for source, row in batch])
        return [batch[place] for place in deal(weights, world)[rank]]

    def _sub_batches(self, step: int) -> list[tuple[int, int]]:
        """(source, number of the sub-batch within its source, from 0) of one step."""
        if self._by_epoch:
            cycle, at = divmod(step, self.steps_per_epoch)
            slots = [(cycle, at * self._per_batch + i) for i in range(self._per_batch)]
        else:
            first = step * self._per_batch
            slots = [divmod(first + i, len(self._cycle)) for i in range(self._per_batch)]
        found = []
        for cycle, slot in slots:
            sources, earlier = self._cycle_order(cycle)
            source = int(sources[slot])
            found.append((source, cycle * int(self._counts[source]) + int(earlier[slot])))
        return found

    def _cycle_order(self, cycle: int) -> tuple[np.ndarray, np.ndarray]:
        """The sources of one cycle in order, and for each slot how often its source came before."""
        if cycle not in self._cycle_cache:
            order = permutation(len(self._cycle), self.seed, "cycle", cycle)
            sources = self._cycle[order]
            by_source = np.argsort(sources, kind="stable")
            first = np.cumsum(self._counts) - self._counts
            earlier = np.empty_like(by_source)
            earlier[by_source] = np.arange(len(sources)) - first[sources[by_source]]
            self._cycle_cache[cycle] = (sources, earlier)
            kept = 2 if self._by_epoch else 64
            while len(self._cycle_cache) > kept:
                self._cycle_cache.popitem(last=False)
        return self._cycle_cache[cycle]

    def _permutation(self, source: int, passed: int) -> np.ndarray:
        key = (source, passed)
        if key not in self._row_cache:
            order = permutation(self.sizes[source], self.seed, f"rows {self.names[source]}", passed)
            self._row_cache[key] = order
            while len(self._row_cache) > _CACHED_PERMUTATIONS_PER_SOURCE * len(self.names):
                self._row_cache.popitem(last=False)
        else:
            self._row_cache.move_to_end(key)
        return self._row_cache[key]


class LocalBatches:
    """The batches of one rank from step ``start`` up to ``stop``: a torch ``batch_sampler``.

    Raises:
        ValueError: as :meth:`BatchOrder.local_rows`.
    """

    def __init__(self, order: BatchOrder, rank: int, world: int, start: int, stop: int) -> None:
        order.local_rows(start, rank, world)
        self._order, self._rank, self._world = order, rank, world
        self._steps = range(start, stop)

    def __len__(self) -> int:
        return len(self._steps)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in self._steps:
            yield self._order.local_rows(step, self._rank, self._world)


class Sources:
    """Several readers behind one index, (source index, row), as :class:`BatchOrder` gives it."""

    def __init__(self, readers: Mapping[str, Sequence[Any]]) -> None:
        self.readers = dict(readers)
        self._list = list(self.readers.values())

    @property
    def sizes(self) -> dict[str, int]:
        """Rows of each source by name: what :class:`BatchOrder` takes."""
        return {name: len(reader) for name, reader in self.readers.items()}

    def __len__(self) -> int:
        return sum(len(reader) for reader in self._list)

    def __getitem__(self, index: tuple[int, int]) -> Any:
        source, row = index
        return self._list[source][row]

    def after(self, index: tuple[int, int], count: int) -> list[tuple[int, int]]:
        """The next rows of the same source, at most ``count``, from its end on to its start."""
        source, row = index
        size = len(self._list[source])
        return [(source, (row + step) % size) for step in range(1, min(count + 1, size))]


def deal(weights: np.ndarray, hands: int) -> list[list[int]]:
    """Places 0 .. len(weights) - 1 dealt to as many hands, equally many to each: the heaviest
    first, each to the lightest hand with room; in their order within a hand."""
    room = len(weights) // hands
    dealt: list[list[int]] = [[] for _ in range(hands)]
    lightest = [(0, hand) for hand in range(hands)]
    for place in np.argsort(-weights, kind="stable").tolist():
        total, hand = heapq.heappop(lightest)
        dealt[hand].append(place)
        if len(dealt[hand]) < room:
            heapq.heappush(lightest, (total + int(weights[place]), hand))
    return [sorted(hand) for hand in dealt]


def permutation(size: int, seed: int, use: str, number: int) -> np.ndarray:
    """A permutation of ``range(size)``, int64 [size], drawn from (seed, use, number).

    It sorts the raw words of a Philox stream, which numpy promises to keep between versions;
    it does not promise that for ``Generator.permutation``.
    """
    word = int.from_bytes(hashlib.blake2b(use.encode(), digest_size=8).digest(), "little")
    stream = np.random.Philox(np.random.SeedSequence([seed, word, number]))
    return np.argsort(stream.random_raw(size), kind="stable")


def _check(
    sizes: Mapping[str, int], batch_size: int, sub_batch_size: int, weighting: str, seed: int
) -> None:
    if not sizes:
        raise ValueError("no source of samples was given; name at least one data set")
    if weighting not in WEIGHTINGS:
        raise ValueError(f"weighting {weighting!r} is not one of {', '.join(WEIGHTINGS)}")
    if batch_size < 1 or sub_batch_size < 0 or seed < 0:
        raise ValueError(
            f"batch size {batch_size} must be at least 1, sub-batch size {sub_batch_size} and "
            f"seed {seed} not negative"
        )
    if sub_batch_size and batch_size % sub_batch_size:
        raise ValueError(
            f"batch size {batch_size} is not a multiple of the sub-batch size {sub_batch_size}; "
            "change one of them, or take sub-batch size 0 to mix the sources freely"
        )
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"source {name!r} has no rows; check its file and filters")
        if size < sub_batch_size:
            raise ValueError(
                f"source {name!r} has {size} rows, fewer than a sub-batch of {sub_batch_size}; "
                "lower the sub-batch size or leave the source out"
            )


def _check_share(sizes: Mapping[str, int], unit: int, per_batch: int) -> None:
    share = unit * -(-per_batch // len(sizes))
    for name, size in sizes.items():
        if size < share:
            raise ValueError(
                f"source {name!r} has {size} rows but uniform weighting takes up to {share} of "
                "each source into one batch, so rows would repeat in it; take proportional "
                "weighting or a smaller batch"
            )
