"""What weights, gradients and optimizer take on a GPU, by ZeRO stage and arrangement.

DeepSpeed's own estimators (``estimate_zero2_model_states_mem_needs`` and the like) take every
weight for a trained one; a test compares where that is so.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

from coma_ds.planning.weights import Weights, numel

MASTER = 4  # bytes of the fp32 copy of a trained weight
ADAM = 30  # bytes that an update reads and writes of a trained weight
MOMENTS = {"adamw": 8, "muon": 8, "sgd": 0}  # bytes of the optimizer's own, at most


@dataclass(frozen=True)
class Zero:
    """What counts of a DeepSpeed config; ``whole``: weights that stay whole on every rank;
    ``group``: ranks that share a second copy of the weights (hpZ of ZeRO++), from which all is
    gathered that no update has changed."""

    stage: int
    whole: int = 0
    bucket: int = 0
    live: int = 0
    group: int = 1
    offload_optimizer: bool = False
    offload_weights: bool = False

    @classmethod
    def of(cls, tree: dict, model) -> Zero:
        """From the JSON, for a model of ``outline``; defaults are DeepSpeed's (0.19)."""
        zero = tree.get("zero_optimization", {})
        stage = zero.get("stage", 0)
        whole, room = 0, zero.get("stage3_model_persistence_threshold", sys.maxsize)
        threshold = zero.get("stage3_param_persistence_threshold", 100_000)
        trained = 0
        for parameter in model.parameters():
            size = numel(parameter)
            trained += size * parameter.requires_grad
            if stage == 3 and size < threshold and whole + size <= room:
                whole += size

        def offloaded(name: str) -> bool:
            return (zero.get(name) or {}).get("device", "none") != "none"

        return cls(
            stage=stage,
            whole=whole,
            bucket=int(zero.get("reduce_bucket_size", min(5e8, trained))),
            live=int(zero.get("stage3_max_live_parameters", 1e9)),
            group=int(zero.get("zero_hpz_partition_size", 1)) if stage == 3 else 1,
            offload_optimizer=offloaded("offload_optimizer"),
            offload_weights=offloaded("offload_param"),
        )


def states(
    weights: Weights, zero: Zero, *, world: int, item: int, kind: str, coalesced: bool
) -> dict[str, float]:
    """Bytes by what holds them, at the end of the last backward; ``item``: of a weight (2 or 4).

    ``coalesced``: gradients are whole until then.
    """
    total, trained = weights.total, weights.trained
    part = trained / world if zero.stage else trained
    half = item == 2
    found = {"weights": item * total, "gathered": 0.0, "buckets": 0.0}
    if zero.stage == 3:
        found["weights"] = item * zero.whole + item * total / world * (not zero.offload_weights)
        found["gathered"] = item * min(total - zero.whole, zero.live)
        found["buckets"] = item * zero.bucket
        if zero.group > 1:
            found["copy"] = item * total / min(zero.group, world)
    if zero.stage in (1, 2):
        found["buckets"] = item * min(trained, zero.bucket)
    gradients = {0: item * trained, 1: 4 * (part + trained * half), 2: 4 * part, 3: 4 * part}
    found["gradients"] = gradients[zero.stage]
    found["whole gradients"] = (item + 4 * half) * trained * coalesced
    master = MASTER * part if half or zero.stage else 0
    found["optimizer"] = (master + MOMENTS[kind] * part) * (not zero.offload_optimizer)
    return found


def host_states(weights: Weights, zero: Zero, *, item: int, kind: str) -> float:
    """Bytes that the memory of all nodes together holds of what is offloaded."""
    optimizer = (MASTER + MOMENTS[kind] + 4) * weights.trained * zero.offload_optimizer
    return optimizer + item * weights.total * zero.offload_weights


def host_traffic(
    weights: Weights, zero: Zero, *, gathered: float, reductions: int, world: int, item: int
) -> float:
    """Bytes of a step that each GPU exchanges with the host, or an optimizer there goes through.

    ``gathered``: weights made whole in a step, every time that one is.
    """
    moved = item * gathered / world * zero.offload_weights
    if zero.offload_optimizer:
        part = weights.trained / world
        moved += part * (4 * reductions + item * (not zero.offload_weights) + ADAM)
    return moved
