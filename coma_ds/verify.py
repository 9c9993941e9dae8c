"""``--verify-gradients``: one chunked step against one plain step, on the user's own model."""

from __future__ import annotations

import logging
import math

import torch

from coma_ds import comm
from coma_ds.batch import Batch
from coma_ds.budget import settle
from coma_ds.config import RunConfig
from coma_ds.step import accumulate, grad_cache

log = logging.getLogger("coma_ds")


def plain_step(engine, objective, batch: Batch, *, matching: bool) -> None:
    """Gradients of the whole local batch in one graph: no chunk, no cached embedding."""
    if matching:

        def run(model):
            features = model.embed_images(batch.images)
            emb, temperature = objective.encode(model, batch, features)
            loss, report = objective.loss(emb, temperature, batch)
            return loss, report

    else:
        own = torch.tensor([float(objective.weight(batch))], device=engine.device)
        total = float(comm.all_sum(own))

        def run(model):
            features = model.embed_images(batch.images)
            loss, report = objective.loss(model, batch, features)
            return loss * (comm.world_size() / total), report

    engine.forward_backward(run, last=True)


def verify_gradients(engine, objective, batch: Batch, config: RunConfig) -> dict[str, float]:
    """Log and return, by group of parameters, |chunked - plain| / |plain| of the gradients.

    Dropout is off (its masks depend on the chunks).  In fp32 expect 1e-5 or less; bf16 rounds at
    every layer, and its noise says nothing about the chunks: use ``precision=fp32``.
    """
    batch = batch.to(engine.device)
    matching = config.objective == "match"
    engine.eval()
    take_step = grad_cache if matching else accumulate
    budget = settle(engine, objective, batch, config.chunk, None)
    take_step(engine, objective, batch, budget, seed=config.seed, step=0)
    chunked = engine.gradients()
    engine.discard_gradients()
    plain_step(engine, objective, batch, matching=matching)
    plain = engine.gradients()
    engine.discard_gradients()
    engine.train()

    groups: dict[str, list[float]] = {}
    for name, wanted in plain.items():
        gap = (chunked[name] - wanted).square().sum().item()
        sums = groups.setdefault(group_name(name), [0.0, 0.0])
        sums[0] += gap
        sums[1] += wanted.square().sum().item()
    errors = {name: (a / b) ** 0.5 if b else a**0.5 for name, (a, b) in groups.items()}
    log.info("gradients, chunked against plain (%s, dropout off)", config.precision)
    for name, error in errors.items():
        log.info("  %-24s relative difference %.2e", name, error)
    worst = max(errors.values(), key=lambda error: (math.isnan(error), error))
    bound = 1e-4 if config.precision == "fp32" else 5e-2
    log.info("  largest %.2e: %s", worst, "equal" if worst <= bound else "NOT EQUAL")
    if not worst <= bound:  # nan as well
        raise ValueError(
            f"the chunked gradient differs from the plain one by {worst:.1e} (bound {bound:.0e})"
        )
    return errors


def group_name(parameter: str) -> str:
    """The part of the model that a parameter belongs to."""
    for start in ("tokens", "pooling", "temperature"):
        if parameter.startswith(start + "."):
            return start
    for part in ("visual", "lora", "embed_tokens", "layers"):
        if part in parameter:
            return part
    return "other"
