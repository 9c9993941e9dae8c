"""What a step moves between the ranks, counted at DeepSpeed's own collectives."""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack
from unittest.mock import patch

import torch
from deepspeed.comm import comm as deepspeed_comm
from torch.distributed import ProcessGroup

from coma_ds import comm
from coma_ds import step as step_module
from coma_ds.engine import Engine
from coma_ds.objectives.compress import Compress
from coma_ds.objectives.match import Match
from coma_ds.optim import build_optimizer
from coma_ds.planning.traffic import step_traffic
from coma_ds.planning.weights import count_weights
from coma_ds.step import Budget, accumulate, grad_cache, plan_chunks
from tests.distributed.cases import LORA
from tests.distributed.exact import STEPS, Case

SLICED = "slices"  # of images
KINDS = ("gather", "reduce_scatter", "all_reduce", "allreduce")


class Counted:
    """Every collective of DeepSpeed's backend, elements and calls by kind; nested ones once.

    ``among_all``: elements of those that are not of a group of some ranks.
    """

    def __init__(self) -> None:
        self.elements: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()
        self.among_all: Counter[str] = Counter()
        self._inside = False

    def patches(self) -> list:
        """One for each collective."""
        backend = deepspeed_comm.cdb
        return [
            patch.object(backend, name, self._wrapped(getattr(backend, name), kind))
            for name in dir(backend)
            for kind in KINDS
            if kind in name
            and not name.startswith(("has", "_"))
            and callable(getattr(backend, name))
        ]

    def _wrapped(self, call, kind: str):
        def counting(*args, **kwargs):
            outside, self._inside = not self._inside, True
            try:
                return call(*args, **kwargs)
            finally:
                if outside:
                    self._inside = False
                    first = args[0] if args else next(iter(kwargs.values()))
                    self.calls[kind] += 1
                    self.elements[kind] += _elements(first)
                    groups = [x for x in (*args, *kwargs.values()) if isinstance(x, ProcessGroup)]
                    if all(group.size() == comm.world_size() for group in groups):
                        self.among_all[kind] += _elements(first)

        return counting


def _elements(value) -> int:
    if torch.is_tensor(value):
        return value.numel()
    return sum(map(_elements, value)) if isinstance(value, list | tuple) else 0


def count(cases: list[dict]) -> dict[str, dict]:
    """By case: what its last step moved, and what ``step_traffic`` says."""
    found = {}
    for tree in cases:
        case = Case(**tree)
        config = case.run_config
        budget = Budget.of(config.chunk)
        model = case.build()
        engine = Engine(model, build_optimizer(model, config.optim), config, torch.device("cpu"))
        weights = count_weights(model)
        matching = case.stage == "match"
        objective = Match(config.match) if matching else Compress(config.compress)
        take_step = grad_cache if matching else accumulate
        for step in range(STEPS):
            counted = Counted()
            batch = case.batch(step, comm.rank())
            with ExitStack() as stack:
                if case.name.endswith(SLICED):
                    stack.enter_context(patch.object(step_module, "PATCHES", 4))
                for context in counted.patches():
                    stack.enter_context(context)
                take_step(engine, objective, batch, budget, seed=0, step=step)
                engine.step(step)
        chunks = len(plan_chunks(batch, budget))
        passes = 1
        if case.name.endswith(SLICED):
            passes = comm.all_max(len(batch.images.slices(4)) if batch.images else 1, engine.device)
        said = step_traffic(
            weights,
            matching=matching,
            chunks=chunks,
            kept=config.chunk.keep,
            passes=passes,
            trains_vision=model.vision_is_trained,
            whole=engine.keeps_weights_whole,
            coalesced=engine.reduces_once,
            taught=config.compress.taught,
        )
        engine.destroy()
        found[case.name] = {
            "chunks": chunks,
            "weights": weights.total,
            "trained": weights.trained,
            "gathered": counted.elements["gather"],
            "gathered_among_all": counted.among_all["gather"],
            "reduced": counted.elements["reduce_scatter"] * comm.world_size(),  # counts a shard
            "reductions": counted.calls["reduce_scatter"],
            "elsewhere": counted.elements["all_reduce"] + counted.elements["allreduce"],
            "said": [said.gathered, said.reduced],
        }
    return found


def add_up_small_parts() -> float:
    """The gradient that 1 and 256 times 2**-9 add up to, in bf16 with adapters."""
    case = Case("sums", model=LORA, precision="bf16")
    model = case.build().to(torch.bfloat16)
    config = case.run_config
    engine = Engine(model, build_optimizer(model, config.optim), config, torch.device("cpu"))
    parts = [1.0] + [2.0**-9] * 256
    with engine.gradients_of_a_step():
        for number, part in enumerate(parts):
            engine.forward_backward(
                lambda m, part=part: ((m.tokens.weight * part).float().sum(), None),
                last=number == len(parts) - 1,
            )
    total = engine.gradients()["tokens.weight"]
    engine.destroy()
    assert (total == total.flatten()[0]).all()
    return float(total.flatten()[0])
