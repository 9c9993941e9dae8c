"""Stage 1: answer questions about an image through the compression tokens alone.

Source: the paper, section 3.1 and figure 1d-e.  The loss is the mean over all answer tokens of the
optimizer step, over all ranks and micro-batches: each part returns a sum, ``step.accumulate``
divides once.
"""

from __future__ import annotations

import torch

from coma_ds.batch import Batch
from coma_ds.config import CompressConfig


class Compress:
    """Answers-only cross-entropy, or KL to a teacher that sees the image."""

    def __init__(self, config: CompressConfig) -> None:
        self.config = config
        self.visibility = "causal" if config.visible else "bottleneck"

    def weight(self, batch: Batch) -> int:
        """Answer tokens of the batch."""
        return len(batch.answer_rows)

    def loss(self, model, batch: Batch, features_SFD) -> tuple[torch.Tensor, dict]:
        """Sum over the answer tokens (float32 scalar, with gradient), and sums to report."""
        teacher = None
        if self.config.taught:
            teacher = model.teacher_states(batch, features_SFD)
        total, right = model.answer_loss(batch, features_SFD, self.visibility, teacher)
        return total, {"loss": total.detach(), "answer_accuracy": right}
