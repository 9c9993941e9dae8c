"""The work of the loading tests: a model read into the shards of a ZeRO-3 world."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers.utils import logging as transformers_logging

from coma_ds import comm, engine
from coma_ds.config import MatchConfig, ModelConfig, RunConfig
from coma_ds.data.processing import load_processing
from coma_ds.mechanics import deepspeed_config
from coma_ds.model.loading import build_model
from tests.folders import whole


@contextmanager
def transformers_says(said: list[str]) -> Iterator[None]:
    """Collect what transformers logs, warnings included, whatever the environment asks for."""
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    log, before = logging.getLogger("transformers"), transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_warning()
    log.addHandler(handler)
    try:
        yield
        assert transformers_logging.get_verbosity() == logging.WARNING  # for what comes after
    finally:
        log.removeHandler(handler)
        transformers_logging.set_verbosity(before)


def digests(model, gather) -> dict[str, list]:
    """Shape, dtype and digest of the bits of each whole parameter."""
    found = {}
    for name, parameter in model.named_parameters():
        with gather([parameter]):
            bits = parameter.detach().contiguous().view(torch.uint8).numpy().tobytes()
            digest = hashlib.blake2b(bits, digest_size=8).hexdigest()
            found[name] = [list(parameter.shape), str(parameter.dtype), digest]
    return found


def build(folder: str, precision: str, sharded: bool, **model):
    """``build_model`` as a run calls it."""
    config = RunConfig(
        objective="match",
        precision=precision,
        deepspeed="zero3",
        model=ModelConfig(compression_tokens=4, path=folder, **model),
    )
    processing = load_processing(folder, compression_tokens=4)
    return build_model(
        config.model,
        MatchConfig(),
        matching=True,
        source=folder,
        first_id=processing.compression_ids[0],
        extras=processing.extras,
        precision=precision,
        sharding=deepspeed_config(config) if sharded else None,
        whole=engine.full_parameters if sharded else whole,
        seed=0,
        device=torch.device("cpu"),
    )


def load_sharded(folders: dict[str, str], broken: dict[str, str]) -> dict:
    """Digests of each folder's model, what a rank holds of it, and the errors of broken ones.

    ``said`` is what transformers logged while it read the broken ones.
    """
    report: dict = {"models": {}, "errors": {}, "said": []}
    for case, folder in folders.items():
        precision, adapter = case.split()
        model = build(folder, precision, True, adapter=adapter)
        lm = list(model.backbone.lm.parameters())
        report["models"][case] = {
            "sharded": sum(hasattr(p, "ds_id") for p in lm) / len(lm),
            "held": sum(p.numel() for p in lm),
            "digests": digests(model, engine.full_parameters),
        }
    with transformers_says(report["said"]):
        for case, folder in broken.items():
            try:
                build(folder, "fp32", True)
            except ValueError as error:
                report["errors"][case] = str(error)
    # the next model of this process is an ordinary one again
    plain = build(next(iter(folders.values())), "fp32", False)
    report["plain"] = not any(hasattr(p, "ds_id") for p in plain.parameters())
    report["world"] = comm.world_size()
    return report
