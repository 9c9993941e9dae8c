"""How one batch becomes one optimizer step; knows chunks, not models.

``accumulate`` for losses that add up over samples, ``grad_cache`` for losses over the whole batch
(Gao et al., "Scaling deep contrastive learning batch size under memory limited setup", 2021).
Both send the images through the tower once a step, on every rank, real or blank.

Shapes: B own samples, E embedding width, F image tokens of the step, S feature levels.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import partial

import torch

from coma_ds import comm
from coma_ds.batch import Batch, ImageBatch
from coma_ds.config import ChunkConfig

TOWER = 2**31  # the chunk number of the tower, for its random state
PATCHES = 65536  # that go through a frozen tower at a time: more make nothing faster


@dataclass(frozen=True)
class Budget:
    """A ``ChunkConfig`` without ``auto``.  ``keep_tokens``: as many chunks keep their graph as hold
    so many tokens together; None: ``keep`` of them do.  ``packed``: no padding is counted."""

    samples: int
    tokens: int | None = None
    keep: int = 0
    keep_tokens: int | None = None
    packed: bool = False

    @classmethod
    def of(cls, config: ChunkConfig) -> Budget:
        """As the config says, where it says numbers."""
        return cls(config.samples, config.tokens, config.keep)


def seed_chunk(seed: int, step: int, chunk: int, rank: int | None = None) -> None:
    """Set every device's random state from (seed, step, rank, chunk): it can be replayed."""
    rank = comm.rank() if rank is None else rank
    key = f"{seed}/{step}/{rank}/{chunk}".encode()
    torch.manual_seed(int.from_bytes(hashlib.blake2b(key, digest_size=7).digest(), "little"))


def plan_chunks(batch: Batch, budget: Budget, wanted: int | None = None):
    """Groups of sample indices (int64 each), the longest samples first, as many on every rank.

    A group holds at most ``budget.samples`` samples, and at most ``budget.tokens`` tokens where
    that is set (one sample at least).  A rank with fewer groups than another cuts its
    largest ones; a rank with fewer samples than groups gets empty groups.
    """
    order = torch.argsort(batch.sizes_B, descending=True, stable=True)
    lengths_B3 = batch.lengths_B3[order]
    cuts, start = [], 0
    for end in range(1, len(order) + 1):
        full = end < len(order) and end - start == budget.samples
        over = budget.tokens is not None and _tokens(lengths_B3[start : end + 1], budget) > (
            budget.tokens
        )
        if end == len(order) or full or over:
            cuts.append((start, end))
            start = end
    if wanted is None:
        wanted = comm.all_max(len(cuts), batch.input_ids_T.device)
    while len(cuts) < wanted:
        place = max(range(len(cuts)), key=lambda i: cuts[i][1] - cuts[i][0])
        first, last = cuts[place]
        middle = (first + last + 1) // 2
        cuts[place : place + 1] = [(first, middle), (middle, last)]
    return [order[a:b] for a, b in cuts]


def _tokens(lengths_B3: torch.Tensor, budget: Budget) -> int:
    """What a chunk of such samples counts: the tokens, or the cells of the segment-aligned view,
    which is never smaller than the others."""
    if budget.packed:
        return int(lengths_B3.sum())
    return len(lengths_B3) * int(lengths_B3.amax(0).sum())


def kept_chunks(parts: list[Batch], budget: Budget, device) -> int:
    """How many chunks keep their graph: the last ones, which are the smallest, on every rank."""
    if budget.keep_tokens is None:
        return budget.keep
    left, count = budget.keep_tokens, 0
    for part in reversed(parts):
        left -= _tokens(part.lengths_B3, budget)
        if left < 0:
            break
        count += 1
    return -comm.all_max(-count, device)


def embed_images(engine, images: ImageBatch | None, *, seed: int, step: int) -> torch.Tensor:
    """Features of all images without a graph, [S, F, D]; on every rank as many passes.

    A trained tower takes them at once, as it does where it has its graph.
    """
    parts: list[ImageBatch | None] = [images]
    if images is not None and not engine.model.vision_is_trained:
        parts = [*images.slices(PATCHES)]
    found = []
    for number in range(comm.all_max(len(parts), engine.device)):
        part = parts[number] if number < len(parts) else None
        seed_chunk(seed, step, TOWER)
        with torch.no_grad():
            features = engine(lambda m, part=part: m.embed_images(part))
        if number < len(parts):
            found.append(features)
    return torch.cat(found, 1) if len(found) > 1 else found[0]


def _or_first(group: torch.Tensor) -> torch.Tensor:
    """A group to run: an empty one runs sample 0, with weight zero."""
    return group if len(group) else torch.zeros(1, dtype=torch.int64)


def accumulate(engine, objective, batch: Batch, budget: Budget, *, seed: int, step: int):
    """Gradients of sum(loss of samples) / sum(weight), both over all chunks and ranks.

    The report: means over the weight of what the objective sums.  Raises ``ValueError`` when no
    rank has anything that carries weight.
    """
    groups = plan_chunks(batch, budget)
    own = torch.tensor([float(objective.weight(batch))], device=engine.device)
    total = float(comm.all_sum(own))
    if not total:
        raise ValueError("the whole batch has no answer token: nothing to learn from")
    trained = engine.model.vision_is_trained
    features = None
    if not trained:
        features = embed_images(engine, batch.images, seed=seed, step=step)
    parts = batch.split([_or_first(g) for g in groups], with_images=trained)
    sums: dict[str, torch.Tensor] = {}

    def run(model, number: int):
        part, counts = parts[number], float(len(groups[number]) > 0)
        seen = model.embed_images(part.images) if trained else features
        loss, report = objective.loss(model, part, seen)
        return loss * (counts * comm.world_size() / total), (report, counts)

    with engine.gradients_of_a_step():
        for number in range(len(parts)):
            seed_chunk(seed, step, number)
            call, last = partial(run, number=number), number == len(parts) - 1
            report, counts = engine.forward_backward(call, last=last)
            for name, value in report.items():
                sums[name] = sums.get(name, 0.0) + value.float() * counts
    means = comm.all_sum(torch.stack(list(sums.values()))) / total
    return dict(zip(sums, means.tolist()))


def grad_cache(engine, objective, batch: Batch, budget: Budget, *, seed: int, step: int):
    """Gradients of a loss over the whole gathered batch, a few chunks in memory at a time.

    1. Images through the tower, once.  2. Every chunk without a graph: embeddings; the last ones,
    as many as ``budget`` keeps, with their graph, which stays.  3. The loss over all embeddings,
    and its gradient at each of them.  4. Backward of (embeddings * gradient).sum() for every chunk:
    those that were kept, then the others, which run again with their graph and the same random
    state.  A trained tower is a second level of the same: its features collect a gradient over the
    chunks, and the last replay runs it once more and reads what it gives; the first part of the
    step is a replay as well, so that at least two chunks are replayed.  Returns the objective's
    report.
    """
    groups = plan_chunks(batch, budget)
    parts = batch.split([_or_first(g) for g in groups])
    trained = engine.model.vision_is_trained
    keep = kept_chunks(parts, budget, engine.device)
    replays = min(len(parts), max(len(parts) - keep, 2 * int(trained)))
    features = embed_images(engine, batch.images, seed=seed, step=step)
    features.requires_grad_(trained)
    encoded = []
    for number, part in enumerate(parts):
        seed_chunk(seed, step, number)
        with torch.set_grad_enabled(number >= replays):
            encoded.append(engine(lambda m, part=part: objective.encode(m, part, features)))

    order = torch.cat(groups).to(engine.device)
    rows = torch.cat([emb[: len(g)].detach() for (emb, _), g in zip(encoded, groups)])
    leaf_BE = torch.empty_like(rows).index_copy_(0, order, rows).requires_grad_()
    temperature = encoded[0][1]
    leaf_t = None if temperature is None else temperature.detach().requires_grad_()
    loss, report = objective.loss(leaf_BE, leaf_t, batch)
    loss.backward()

    def surrogate(number: int, emb: torch.Tensor, learned: torch.Tensor | None) -> torch.Tensor:
        """Its backward gives what the loss gives: at the embeddings, and once at what is learned
        beside them."""
        group = groups[number]
        if len(group):
            total = (emb[: len(group)] * leaf_BE.grad[group.to(emb.device)]).sum()
        else:
            total = (emb * 0.0).sum()
        if learned is not None:
            cached = leaf_t.grad if number == 0 else torch.zeros_like(leaf_t)
            total = total + (learned * cached).sum()
        return total

    def replay(model, number: int) -> tuple[torch.Tensor, None]:
        seen, total = features, 0.0
        if trained and number == replays - 1:
            # The tower again, with its graph.  In one part with the last chunk: with an offloaded
            # optimizer ZeRO-3 (0.19.8) drops the gradient of a parameter that has none in the last
            # part of a step.
            seed_chunk(seed, step, TOWER)
            seen = model.embed_images(batch.images)
            if features.grad is not None:
                total = (seen * features.grad).sum()
        elif trained and number == 0:
            # ZeRO-3 (0.19.8) adds to last step's gradient of a parameter that has none in the
            # first part of a step, so the tower gets a zero one here.
            total = model.embed_images(None)[:, :0].sum()
        seed_chunk(seed, step, number)
        return total + surrogate(number, *objective.encode(model, parts[number], seen)), None

    kept = list(range(replays, len(parts)))
    first = [0] if trained else []
    with engine.gradients_of_a_step(kept=bool(kept)):
        for number in [*first, *kept, *range(len(first), replays)]:
            last = number == (replays - 1 if replays else kept[-1])
            if number < replays:
                engine.forward_backward(partial(replay, number=number), last=last)
            else:
                emb, learned = encoded[number]
                encoded[number] = None
                engine.backward(surrogate(number, emb, learned), last=last)
    return report
