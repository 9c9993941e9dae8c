"""What ZeRO-3 moves between the ranks in one optimizer step, in weights and gradients."""

from __future__ import annotations

from dataclasses import dataclass

from coma_ds.planning.weights import Weights


@dataclass(frozen=True)
class Traffic:
    """Elements.  A rank receives ``(W - 1) / W`` of each."""

    gathered: int  # weights made whole, every time that one is
    reduced: int  # gradients


def step_traffic(
    weights: Weights,
    *,
    matching: bool,
    chunks: int,
    kept: int = 0,
    passes: int = 1,
    trains_vision: bool = False,
    whole: bool = False,
    coalesced: bool = False,
    taught: bool = False,
) -> Traffic:
    """The traffic of one step under ZeRO-3.

    ``chunks`` of which ``kept`` keep their graph; ``passes`` of a frozen tower; ``whole``: the
    weights stay whole from one update to the next; ``coalesced``: gradients are added up on each
    rank and reduced once; ``taught``: a teacher's forward in front of each chunk's.  Where weights
    are sharded, each forward and each backward gathers what it reads; a table that is the head too
    stays whole for the length of a forward in stage 1, of that through the tower alone as well.
    """
    w = weights
    replays = min(chunks, max(chunks - kept, 2 * int(trains_vision)))
    reduced = w.trained if coalesced else w.trained * chunks
    if matching and trains_vision and not coalesced:  # its tower is in the first and last replay
        reduced -= w.vision * (chunks - min(2, replays))
    if whole:
        return Traffic(w.total, reduced)
    tower, language = w.vision, w.language
    if not matching:
        read = language + w.head
        table = 0 if w.head else w.embedding
        teacher = chunks * taught * (language - table)
        if trains_vision:
            return Traffic(2 * chunks * (tower + read) + teacher, reduced)
        return Traffic((tower + table) * passes + 2 * chunks * read + teacher, reduced)
    forwards = chunks + replays
    gathered = tower * passes + (forwards + chunks) * language
    if trains_vision:  # in the first replay, for gradients of zero, and in the last
        gathered += 2 * min(replays, 2) * tower
    return Traffic(gathered, reduced)
