"""Many talks at once, by threads or in batches; their outcomes in the order of the talks.

Both hold a bounded number of talks and read no further ahead: an outcome that comes early waits
for its turn, and a slow talk stops the others ``AHEAD`` times ``parallel`` talks later.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from coma_ds.data.chat import Reply, Request
from coma_ds.synthesis.talk import Outcome

AHEAD = 4

Talk = Generator[Request, Reply, Outcome]
Replies = Callable[[Sequence[Request]], list[Reply]]


def in_threads(talks: Iterable[Talk], replies: Replies, parallel: int) -> Iterator[Outcome]:
    """``parallel`` talks at a time, each asking for itself.  Raises what ``replies`` raises."""

    def hold(talk: Talk) -> Outcome:
        try:
            request = next(talk)
            while True:
                request = talk.send(replies([request])[0])
        except StopIteration as end:
            return end.value

    pool = ThreadPoolExecutor(parallel, thread_name_prefix="talk")
    waiting: deque[Future[Outcome]] = deque()
    try:
        for talk in talks:
            waiting.append(pool.submit(hold, talk))
            if len(waiting) == AHEAD * parallel:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def in_batches(talks: Iterable[Talk], replies: Replies, parallel: int) -> Iterator[Outcome]:
    """Ask for ``parallel`` talks together; one that ends gives its place to the next."""
    source = iter(talks)
    asking: dict[int, tuple[Talk, Request]] = {}
    early: dict[int, Outcome] = {}
    begun = told = 0
    more = True

    def go_on(place: int, talk: Talk, reply: Reply | None) -> None:
        try:
            asking[place] = talk, (next(talk) if reply is None else talk.send(reply))
        except StopIteration as end:
            asking.pop(place, None)
            early[place] = end.value

    while more or asking:
        while more and len(asking) < parallel and begun - told < AHEAD * parallel:
            talk = next(source, None)
            if talk is None:
                more = False
            else:
                go_on(begun, talk, None)
                begun += 1
        if asking:
            batch = list(asking.items())
            for (place, (talk, _)), reply in zip(batch, replies([r for _, (_, r) in batch])):
                go_on(place, talk, reply)
        while told in early:
            yield early.pop(told)
            told += 1
