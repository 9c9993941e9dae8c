"""The DeepSpeed JSON: ZeRO mechanics from a file, and the numbers of the run."""

from __future__ import annotations

import contextlib
import copy
import json
import os
from importlib import resources
from pathlib import Path
from unittest.mock import patch

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

with patch.dict(os.environ, TORCHDYNAMO_DISABLE="1"), contextlib.suppress(ImportError):
    # DeepSpeed (0.19.8) looks at its own Muon in every start.  Nothing here uses that, but where it
    # is imported it asks for torch's compiler, whose import takes one to two seconds.
    import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
from deepspeed.runtime.config import DeepSpeedConfig

from coma_ds import comm
from coma_ds.config import RunConfig

# What the run config says; a DeepSpeed file that says it too is an error.
OWNED_BY_RUN = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "optimizer",
    "scheduler",
    "bf16",
    "fp16",
    "torch_autocast",
    "data_types",
)


def read_mechanics(name: str) -> dict:
    """The ZeRO mechanics: a name of ``ds_configs/`` or a JSON file.

    Raises ``ValueError`` for a file that is missing, is no JSON object, or says what the run
    config owns.
    """
    if name.endswith(".json"):
        path = Path(name)
        if not path.is_file():
            raise ValueError(f"deepspeed file {name!r} does not exist")
        text = path.read_text()
    else:
        folder = resources.files("coma_ds.ds_configs")
        known = sorted(p.name[:-5] for p in folder.iterdir() if p.name.endswith(".json"))
        if name not in known:
            raise ValueError(f"deepspeed {name!r}: expected a JSON file or one of {known}")
        text = folder.joinpath(f"{name}.json").read_text()
    try:
        tree = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"deepspeed file {name!r} is not JSON: {error}") from None
    if not isinstance(tree, dict):
        raise ValueError(f"deepspeed file {name!r}: expected an object, found {tree!r:.60}")
    for key in OWNED_BY_RUN:
        if key in tree:
            raise ValueError(
                f"deepspeed file {name!r} sets {key!r}, which the run config owns "
                "(optim.batch_size, optim.clip, optim.lr, precision): take it out"
            )
    return tree


def deepspeed_config(config: RunConfig) -> dict:
    """The complete DeepSpeed config of a run: the file's mechanics and the run's numbers.

    One forward at a time is one micro batch; accumulation is ours (boundaries), so 1 there.
    Raises ``ValueError`` naming the file for what DeepSpeed does not accept.
    """
    tree = read_mechanics(config.deepspeed)
    zero = tree.setdefault("zero_optimization", {"stage": 0})
    stage = zero.setdefault("stage", 0) if isinstance(zero, dict) else None
    if stage not in (0, 1, 2, 3) or isinstance(stage, bool):
        raise ValueError(
            f"deepspeed file {config.deepspeed!r}: zero_optimization.stage must be 0, 1, 2 or 3, "
            f"found {zero!r:.60}"
        )
    group, world = zero.get("zero_hpz_partition_size", 1), comm.world_size()
    if isinstance(group, int) and 1 < group < world and world % group:
        raise ValueError(
            f"deepspeed file {config.deepspeed!r}: zero_hpz_partition_size {group} does not divide "
            f"the {world} ranks: it is the number of GPUs of a node"
        )
    if '"auto"' in json.dumps(tree):
        raise ValueError(
            f"deepspeed file {config.deepspeed!r} holds 'auto', which transformers' Trainer fills "
            "in: give the value, or leave the key out for DeepSpeed's default"
        )
    tree |= {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.optim.clip,  # DeepSpeed clips at 1.0 when it is not said
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }
    if config.precision == "bf16":
        tree["bf16"] = {"enabled": True}
        if stage > 0:  # without ZeRO DeepSpeed has no fp32 accumulation for bf16 parameters
            tree["data_types"] = {"grad_accum_dtype": "fp32"}
    try:
        DeepSpeedConfig(copy.deepcopy(tree))
    except Exception as error:  # of all kinds, by the section that is wrong
        where = ""
        if hasattr(error, "errors"):  # pydantic's
            first = error.errors()[0]
            where, error = ".".join(map(str, first["loc"])) + ": ", first["msg"]
        raise ValueError(
            f"deepspeed file {config.deepspeed!r} is not what DeepSpeed accepts: {where}{error}"
        ) from None
    return tree
