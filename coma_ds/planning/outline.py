"""A model without its weights: every shape of the real one, on torch's meta device."""

from __future__ import annotations

from contextlib import nullcontext
from importlib import resources
from pathlib import Path

import torch

from coma_ds.config import RunConfig
from coma_ds.model.embedder import CompressionModel
from coma_ds.model.loading import build_model
from coma_ds.model.source import resolve_model

# Arrangements that need no GPU to be built; what runs on one is planned with.
PLAIN = {"weights": "random", "attention": "split", "arithmetic": "sdpa", "liger": False}


def shape_of(config: RunConfig) -> str:
    """The folder (or hub name) whose config says the shapes.

    A stage that does not exist yet has those of ``model.path``.  The public models of the recipes
    are known here, so that a plan needs no network.
    """
    if config.init_from and is_finished(config.init_from):
        return resolve_model(config.init_from, "init_from")
    known = resources.files("coma_ds.planning") / "shapes" / config.model.path.rpartition("/")[2]
    if config.model.path.startswith("Qwen/") and (known / "config.json").is_file():
        return str(known)
    return resolve_model(config.model.path)


def is_finished(folder: str) -> bool:
    """True for a run that has its model, or a folder that is one."""
    return any((Path(folder) / name).is_file() for name in ("config.json", "model/config.json"))


def outline(config: RunConfig) -> CompressionModel:
    """The ``CompressionModel`` of a run.  Raises ``ValueError`` as ``build_model`` does."""
    with torch.device("meta"):
        model = build_model(
            config.model.model_copy(update=PLAIN),
            config.match,
            matching=config.objective == "match",
            source=shape_of(config),
            first_id=0,
            extras={},
            precision=config.precision,
            sharding=None,
            whole=lambda _: nullcontext(),
            seed=0,
            device=torch.device("cpu"),
        )
    return model.train()
