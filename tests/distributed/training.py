"""Whole trainings through ``train.main``, inside a spawned world: what they leave behind."""

from __future__ import annotations

import gc
import hashlib
import json
import logging
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

import torch

from coma_ds import comm, train
from coma_ds.run import Run
from coma_ds.stopping import Finished
from tests.pair_files import digests

# The demo's recipes from random weights, so that a step takes a fraction of a second.
SMALL = [
    "precision=fp32", "model.weights=random", "data.length=2000", "data.workers=0",
    "optim.batch_size=8", "chunk.samples=3", "eval.at_end=false", "eval.every=0",
    "logging.every=1", "logging.progress=false",
]  # fmt: skip


class Interrupted(Exception):
    """The run is ended from outside."""


def train_once(
    output: str, arguments: list[str], stop_after: int | None = None, stop_in: int | None = None
) -> dict:
    """One run of ``coma_ds/train.py``; with ``stop_after`` it dies after logging that step, with
    ``stop_in`` in the evaluation of that step.

    What it said, the lines of metrics.jsonl, the digest of the exported weights, and what this
    rank has ``seen`` in each step: digests of its samples, and of its random state after it.
    """
    said: list[str] = []
    seen: list[tuple] = []
    log_step, evaluate = Run.log, Run.evaluate

    def log_and_die(self, step, batch, *rest):
        log_step(self, step, batch, *rest)
        state = hashlib.blake2b(torch.get_rng_state().numpy().tobytes(), digest_size=8)
        seen.append((step + 1, digests(batch), state.hexdigest()))
        if step + 1 == stop_after:
            raise Interrupted

    def evaluate_or_die(self, engine, processing, done, **how):
        if done == stop_in:
            self.checkpoints.settle()
            raise Interrupted
        return evaluate(self, engine, processing, done, **how)

    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    log = logging.getLogger("coma_ds")

    def listen(main):
        log.handlers = [handler]
        log.setLevel(logging.INFO)

    with ExitStack() as stack:
        stack.enter_context(patch.object(Run, "log", log_and_die))
        stack.enter_context(patch.object(Run, "evaluate", evaluate_or_die))
        stack.enter_context(patch("coma_ds.run.log_to_stderr", listen))
        try:
            train.main([*SMALL, f"output={output}", *arguments])
        except Interrupted:
            said.append("interrupted")
        except Finished as end:
            said.append(end.message)
        except ValueError as error:
            said.append(f"error: {error}")
    gc.collect()
    return {"said": said, "seen": seen, **left_behind(Path(output))}


def left_behind(folder: Path) -> dict:
    """The lines of metrics.jsonl by their group, and the digest of the exported weights."""
    metrics = folder / "metrics.jsonl"
    text = metrics.read_text() if metrics.is_file() else ""
    lines = [json.loads(line) for line in text.splitlines()]
    digest = hashlib.blake2b(digest_size=16)
    weights = sorted((folder / "model").glob("*.safetensors"))
    for path in weights:
        digest.update(path.read_bytes())
    return {
        "lines": [line for line in lines if line["group"] == "train"],
        "evaluations": [line for line in lines if line["group"] == "eval"],
        "weights": digest.hexdigest() if weights else "",
    }


def cut_in_half(files: list[str]) -> None:
    """Rank 0 truncates the files; the others wait."""
    if comm.rank() == 0:
        for name in files:
            content = Path(name).read_bytes()
            Path(name).write_bytes(content[: len(content) // 2])
    comm.barrier()


def train_each(runs: list[dict]) -> list[dict]:
    """``train_once`` of each in turn in this world; before it, the files in ``cut`` are broken."""
    found = []
    for run in runs:
        cut_in_half(run.pop("cut", []))
        found.append(train_once(**run))
    return found
