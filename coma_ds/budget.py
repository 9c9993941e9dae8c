"""``chunk.tokens=auto`` and ``chunk.keep=auto``: how much of a batch goes through the model at a
time, measured on the first one.

A forward of a few samples with its graph says what a token costs.  What is free beside weights,
optimizer and the features of the images, less a margin, is shared out: first a chunk of a good
size, then the graphs that stay (stage 2).  All ranks take the smallest answer, and a run that goes
on keeps the one it had, since random states belong to chunks.
"""

from __future__ import annotations

import gc
import logging
from dataclasses import asdict, dataclass, replace

import torch

from coma_ds import comm
from coma_ds.batch import Batch
from coma_ds.config import ChunkConfig
from coma_ds.hardware import available_memory, ranks_here
from coma_ds.planning.graphs import SavedBytes
from coma_ds.step import Budget, embed_images, seed_chunk

log = logging.getLogger("coma_ds")

PROBE = 2048  # tokens of the measurement, at most (one sample at least)
LARGEST = 32768  # tokens of a chunk: above this nothing gets faster
ENOUGH = 16384  # above this hardly anything does: what memory is left keeps graphs
FINE = 8192  # down to this, so that as many chunks as can be keep theirs
MARGIN = 0.2  # of what is free: allocators, longer samples and more images than in the first batch
TRANSIENT = 2.0  # what a backward holds beside the graph, in what a forward does
GRAIN = 256  # tokens


@dataclass(frozen=True)
class Cost:
    """Bytes of a token: what its graph holds, and what comes and goes in a forward."""

    graph: float
    transient: float


def share_out(config: ChunkConfig, cost: Cost, free: float, longest: int, total: int) -> Budget:
    """What fits in ``free`` bytes; ``longest``: tokens of the longest sample, which must;
    ``total``: of a batch.

    A chunk runs with its graph and the temporaries of a backward.  Rounded down to ``GRAIN``.
    """
    usable = free * (1 - MARGIN)
    running = cost.graph + TRANSIENT * cost.transient
    most = usable / running
    tokens = config.tokens
    if (tokens, config.keep) == ("auto", "auto") and most >= total + GRAIN:
        fits = int(most) // GRAIN * GRAIN
        return Budget(config.samples, max(min(fits, LARGEST), longest), 0, fits)  # each one stays
    if tokens == "auto":
        fits = min(most, LARGEST)
        if config.keep == "auto":
            fits = min(fits, ENOUGH)
            one_more = int((usable / max(fits, 1) - running) / cost.graph) + 1
            finer = usable / (running + one_more * cost.graph)
            fits = finer if finer >= FINE else fits
        tokens = max(int(fits) // GRAIN * GRAIN, longest, 1)
    if config.keep != "auto":
        return Budget(config.samples, tokens, config.keep)
    size = tokens or longest * config.samples
    left = usable - size * running
    return Budget(config.samples, tokens, 0, max(0, int(left / cost.graph)) // GRAIN * GRAIN)


def settle(engine, objective, batch: Batch, config: ChunkConfig, known: dict | None) -> Budget:
    """The budget of a run, the same on every rank, which all call it at the same time.

    ``known``: what ``remember`` gave, of a run that goes on.  Nothing is measured without ``auto``.
    """
    packed = engine.model.backbone.carrier == "packed"
    if "auto" not in (config.tokens, config.keep):
        return replace(Budget.of(config), packed=packed)
    if known and known == remember(Budget(**known["budget"]), config):
        found = Budget(**known["budget"])
        log.info("chunks as before: %s", describe(found))
        return found
    cost, free = measure(engine, objective, batch)
    longest = comm.all_max(int(batch.sizes_B.max()), engine.device)
    total = int(batch.sizes_B.sum()) if packed else longest * len(batch)
    own = share_out(config, cost, free, longest, comm.all_max(total, engine.device))
    least = {
        name: -comm.all_max(-value, engine.device)
        for name, value in asdict(own).items()
        if name != "packed" and value is not None
    }
    found = replace(own, **least, packed=packed)
    log.info(
        "chunks measured: %.0f kB a token with its graph, %.1f GiB free: %s",
        cost.graph / 1e3, free / 2**30, describe(found),
    )  # fmt: skip
    return found


def remember(budget: Budget, config: ChunkConfig) -> dict:
    """For ``settle``, as JSON values: with other settings, or ranks, it is measured anew."""
    return {"world": comm.world_size(), "chunk": config.model_dump(), "budget": asdict(budget)}


def describe(budget: Budget) -> str:
    """In a line."""
    said = f"at most {budget.samples} samples"
    if budget.tokens:
        said += f" and {budget.tokens} tokens"
    if budget.keep_tokens is not None:
        return f"{said}, graphs of {budget.keep_tokens} tokens kept"
    return f"{said}, the graphs of {budget.keep} kept" if budget.keep else said


def measure(engine, objective, batch: Batch) -> tuple[Cost, float]:
    """The cost of a token in a forward with a graph, and the bytes that are free for chunks.

    Every rank takes part with as many passes; gradients and weights stay as they are.
    """
    device = engine.device
    group = probe(batch)
    features = embed_images(engine, batch.images, seed=0, step=0)
    part = batch.split([group])[0]
    seed_chunk(0, 0, 0)
    tokens = len(group) * int(batch.sizes_B[group].max())  # with their padding
    if engine.model.backbone.carrier == "packed":
        tokens = int(batch.sizes_B[group].sum())

    def run(model):
        # The graph must end where it does in a step: at embeddings, or at the loss of answers.
        if hasattr(objective, "encode"):
            return objective.encode(model, part, features)[0]
        return objective.loss(model, part, features)[0]

    with torch.no_grad():  # weights that stay whole come now, and what a device sets up once
        engine(run)
    saved = SavedBytes(engine.model)
    before = _in_use(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with torch.enable_grad(), saved:
        result = engine(run)
    graph, peak = saved.total, 0
    if device.type == "cuda":
        graph = _in_use(device) - before
        peak = torch.cuda.max_memory_allocated(device) - before - graph
    del result
    gc.collect()
    free = _free(device) - _later(engine)
    return Cost(max(graph, 1) / tokens, max(peak, 0) / tokens), max(free, 0.0)


def probe(batch: Batch) -> torch.Tensor:
    """The longest samples of a batch, up to ``PROBE`` tokens with padding, int64 indices."""
    order = torch.argsort(batch.sizes_B, descending=True, stable=True)
    count = max(1, PROBE // int(batch.sizes_B[order[0]]))
    return order[:count]


def _later(engine) -> float:
    """Bytes that come with the first backward and stay: gradients, added up."""
    trained = sum(
        getattr(p, "ds_numel", p.numel()) for p in engine.model.parameters() if p.requires_grad
    )
    return 4.0 * trained / comm.world_size() + (6.0 * trained if engine.reduces_once else 0.0)


def _in_use(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def _free(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return float(torch.cuda.mem_get_info(device)[0])
    return available_memory() / ranks_here()
