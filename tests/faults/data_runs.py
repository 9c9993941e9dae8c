"""Trainings on pairs of a file, inside a spawned world: what they leave behind, what they read."""

from __future__ import annotations

import multiprocessing
from unittest.mock import patch

from coma_ds import comm, train
from coma_ds.assemble import build_data, build_processing
from tests.distributed import training
from tests.pair_files import pairs_of

SMALL = [
    "--recipe", "demo-match", "init_from=null", "precision=fp32", "deepspeed=zero2",
    "model.weights=random", "model.max_length=64", "data.format=pairs", "data.sources=[]",
    "optim.batch_size=8", "optim.steps=8", "chunk.samples=8", "eval.at_end=false", "eval.every=0",
    "eval.along=[]", "logging.every=1", "logging.progress=false",
]  # fmt: skip


def train_each(runs: list[dict]) -> list[dict]:
    """``training.train_once`` of each in turn."""
    multiprocessing.set_start_method("fork", force=True)  # as under a launcher; here it is spawn
    with patch.object(training, "SMALL", SMALL):
        return training.train_each(runs)


def global_batches(arguments: list[str]) -> list[list[list[str]]]:
    """Digests of query and target of every pair of each step, over the ranks."""
    _, config = train.parse([*SMALL, *arguments])
    data = build_data(config, build_processing(config)[1])
    steps = []
    for batch in data.batches(0, config.optim.steps):
        steps.append([list(pair) for own in comm.all_objects(pairs_of(batch)) for pair in own])
    return steps


def train_and_read(runs: list[dict], arguments: list[str]) -> dict:
    """Both of the above."""
    return {"runs": train_each(runs), "batches": global_batches(arguments)}
