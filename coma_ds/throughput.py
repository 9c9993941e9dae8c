"""How much arithmetic the ranks do, and how much of it the step needs."""

from __future__ import annotations

import torch

from coma_ds import comm
from coma_ds.batch import Batch
from coma_ds.config import RunConfig
from coma_ds.planning.flops import ModelFlops


class Throughput:
    """Of the passes of a ``CompressionModel`` in one step; every rank asks for the same steps."""

    def __init__(self, model, config: RunConfig) -> None:
        self.work = model.backbone.work
        self.flops = ModelFlops.of(model)
        self.vision = model.backbone.lm.config.vision_config
        self.matching = config.objective == "match"
        self.bottleneck = not self.matching and not config.compress.visible

    def begin(self) -> None:
        """Forget what was computed before, in an evaluation."""
        self.work.take()

    def values(self, batch: Batch, took: float) -> dict[str, float]:
        """TFLOP/s of a rank, and how often more was computed than had to be, both over all ranks.

        ``took``: seconds of the step.
        """
        needed = self.flops.needed(
            batch, self.vision, matching=self.matching, bottleneck=self.bottleneck
        )
        own = torch.tensor(
            [self.flops.executed(self.work.take()), needed],
            dtype=torch.float64,
            device=batch.input_ids_T.device,
        )
        executed, needed = comm.all_sum(own).tolist()
        return {
            "tflops_per_second": executed / comm.world_size() / took / 1e12,
            "executed_per_needed": executed / needed,
        }
