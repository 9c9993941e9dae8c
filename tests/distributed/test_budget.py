"""Measured chunks: the ranks take the smallest answer, and train as a world that was told it."""

from __future__ import annotations

from dataclasses import asdict

import torch

from coma_ds import comm
from coma_ds.budget import settle
from coma_ds.config import ChunkConfig, MatchConfig
from coma_ds.engine import Engine
from coma_ds.objectives.match import Match
from coma_ds.optim import build_optimizer
from coma_ds.step import grad_cache
from tests.distributed.exact import Case, whole_parameters
from tests.distributed.harness import run_world


def work() -> dict:
    """What the rank was given and the sum of its weights after a step under ZeRO-3."""
    sums = []
    budget = None
    for told in (False, True):
        case = Case("budget", images="mixed", uneven=True)
        config = case.run_config
        model = case.build()
        engine = Engine(model, build_optimizer(model, config.optim), config, torch.device("cpu"))
        objective, batch = Match(MatchConfig()), case.batch(0, comm.rank())
        if not told:
            chunk = ChunkConfig(samples=3, tokens="auto", keep="auto")
            budget = settle(engine, objective, batch, chunk, None)
        grad_cache(engine, objective, batch, budget, seed=0, step=0)
        engine.step(0)
        sums.append([float(p.double().sum()) for p in whole_parameters(engine).values()])
        engine.destroy()
    return {"budget": asdict(budget), "sums": sums}


def test_ranks_agree_and_a_measurement_leaves_no_trace() -> None:
    first, second = run_world(2, "tests.distributed.test_budget:work")
    assert first == second
    assert first["budget"]["tokens"] >= 256 and first["budget"]["keep_tokens"] > 0
    measured, told = first["sums"]
    assert measured == told
