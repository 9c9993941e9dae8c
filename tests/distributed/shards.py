"""The work of the loading tests: a model read into the shards of a ZeRO-3 world."""

from __future__ import annotations

import hashlib

import torch

from coma_ds import comm, engine
from coma_ds.config import MatchConfig, ModelConfig, RunConfig
from coma_ds.data.processing import load_processing
from coma_ds.model.loading import build_model
from tests.folders import whole


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
        sharding=engine.deepspeed_config(config) if sharded else None,
        whole=engine.full_parameters if sharded else whole,
        seed=0,
        device=torch.device("cpu"),
    )


def load_sharded(folders: dict[str, str], broken: str) -> dict:
    """Digests of each folder's model, what a rank holds of it, and the error of a broken one."""
    report: dict = {"models": {}}
    for case, folder in folders.items():
        precision, adapter = case.split()
        model = build(folder, precision, True, adapter=adapter)
        lm = list(model.backbone.lm.parameters())
        report["models"][case] = {
            "sharded": sum(hasattr(p, "ds_id") for p in lm) / len(lm),
            "held": sum(p.numel() for p in lm),
            "digests": digests(model, engine.full_parameters),
        }
    try:
        build(broken, "fp32", True)
    except ValueError as error:
        report["error"] = str(error)
    # the next model of this process is an ordinary one again
    plain = build(next(iter(folders.values())), "fp32", False)
    report["plain"] = not any(hasattr(p, "ds_id") for p in plain.parameters())
    report["world"] = comm.world_size()
    return report
