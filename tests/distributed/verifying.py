"""The work of the tests of ``--verify-gradients``: on tiny models, in a spawned world."""

from __future__ import annotations

from contextlib import nullcontext

import torch

from coma_ds import comm
from coma_ds.config import CompressConfig, MatchConfig
from coma_ds.engine import Engine
from coma_ds.objectives.compress import Compress
from coma_ds.objectives.match import Match
from coma_ds.optim import build_optimizer
from coma_ds.verify import verify_gradients
from tests.distributed.broken import broken_step
from tests.distributed.exact import Case, distance, whole_parameters


def verify(case: Case) -> dict:
    """What ``verify_gradients`` finds, or its error, and what it did to the model."""
    config = case.run_config
    model = case.build()
    engine = Engine(model, build_optimizer(model, config.optim), config, torch.device("cpu"))
    matching = case.stage == "match"
    objective = Match(MatchConfig(**case.match)) if matching else Compress(CompressConfig())
    before = whole_parameters(engine)
    batch = case.batch(0, comm.rank())
    found: dict = {"differences": {}, "error": ""}
    with broken_step(case.broken) if case.broken else nullcontext():
        try:
            found["differences"] = verify_gradients(engine, objective, batch, config)
        except ValueError as error:
            found["error"] = str(error)
    found["changed"] = distance(whole_parameters(engine), before)[0]
    engine.destroy()
    return found


def verify_each(cases: list[dict]) -> dict[str, dict]:
    """``verify`` of all cases in turn in this world, by name."""
    return {case["name"]: verify(Case(**case)) for case in cases}
