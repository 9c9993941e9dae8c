"""What DeepSpeed's engine holds in memory at the end of a backward, tensor by tensor."""

from __future__ import annotations

import gc
import json
from contextlib import contextmanager
from pathlib import Path

import torch

from coma_ds import comm
from coma_ds.engine import Engine
from coma_ds.mechanics import read_mechanics
from coma_ds.objectives.match import Match
from coma_ds.optim import build_optimizer
from coma_ds.planning.memory import Zero, states
from coma_ds.planning.weights import count_weights
from coma_ds.step import Budget, grad_cache
from tests.distributed.exact import Case


def _tensors() -> dict[int, torch.UntypedStorage]:
    gc.collect()
    things = [x for x in gc.get_objects() if issubclass(type(x), torch.Tensor)]
    return {s.data_ptr(): s for s in (x.untyped_storage() for x in things)}


def _bytes(before: dict) -> float:
    """Of the storages that are not among those of ``before``, which are alive."""
    return float(sum(s.nbytes() for at, s in _tensors().items() if at not in before))


def _watched(gradients, before: dict, inside: list[float]):
    @contextmanager
    def watched(**how):
        with gradients(**how):
            yield
            inside.append(_bytes(before))

    return watched


def count(cases: list[dict]) -> dict[str, dict]:
    """By case: bytes that came with the engine, in the last backward of a step and after it, and
    what ``states`` says of them."""
    found = {}
    for tree in cases:
        case = Case(**tree)
        config = case.run_config
        before = _tensors()
        model = case.build()
        if case.precision == "bf16":
            model.to(torch.bfloat16)
        weights = count_weights(model)
        zero = Zero.of(read_mechanics(config.deepspeed), model)
        engine = Engine(model, build_optimizer(model, config.optim), config, torch.device("cpu"))
        inside: list[float] = []
        engine.gradients_of_a_step = _watched(engine.gradients_of_a_step, before, inside)
        objective, budget = Match(config.match), Budget.of(config.chunk)
        for step in range(2):
            batch = case.batch(0, comm.rank())
            grad_cache(engine, objective, batch, budget, seed=0, step=step)
            del batch
            if step == 0:
                engine.step(0)
        said = states(
            weights,
            zero,
            world=comm.world_size(),
            item=2 if case.precision == "bf16" else 4,
            kind=case.kind,
            coalesced=engine.reduces_once,
        )
        found[case.name] = {"inside": inside[-1], "after": _bytes(before), "said": said}
        engine.step(1)
        engine.destroy()
        del engine, model
    return found


def write_mechanics(folder: Path, name: str, stage: int, **more) -> str:
    """A file of ZeRO mechanics with small buckets, which would outweigh a tiny model."""
    zero = {"stage": stage, "contiguous_gradients": True, "reduce_bucket_size": 1000, **more}
    path = folder / f"{name}.json"
    path.write_text(json.dumps({"zero_optimization": zero}))
    return str(path)
