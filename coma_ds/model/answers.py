"""Losses over answer tokens, from final states to a sum, without ever holding [B, L, V].

Shapes: R answer rows, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from coma_ds.model.work import Work

MAX_LOGITS = 2**26  # elements of one chunk of logits: 256 MiB in float32


def _wide(logits: torch.Tensor) -> torch.Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


class AnswerHead(nn.Module):
    """The output matrix of the language model, applied to answer rows only, in chunks.

    It shares the parameter of ``lm_head``: as a module of its own ZeRO-3 gathers the matrix once
    a pass for all chunks.
    """

    def __init__(self, weight_VD: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight_VD
        self.work = Work()
        self.fused: Callable | None = None  # ``liger.FusedCrossEntropy``

    def _chunk(self, hidden_RD, labels_R, teacher_RD):
        logits_RV = _wide(F.linear(hidden_RD, self.weight))
        right = (logits_RV.detach().argmax(-1) == labels_R).sum()
        if teacher_RD is None:
            return F.cross_entropy(logits_RV, labels_R, reduction="sum"), right
        with torch.no_grad():
            target_RV = F.log_softmax(_wide(F.linear(teacher_RD, self.weight)), -1)
        student_RV = F.log_softmax(logits_RV, -1)
        return F.kl_div(student_RV, target_RV, reduction="sum", log_target=True), right

    def forward(
        self,
        hidden_RD: torch.Tensor,
        labels_R: torch.Tensor,
        teacher_RD: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Sum over the rows of the cross-entropy (or of KL(teacher || student)), and right rows.

        ``hidden_RD`` predicts ``labels_R`` (int64).  Both results are float32 scalars (float64 for
        float64 states); without rows they are zeros that still reach every parameter, which ZeRO
        needs on every rank.
        """
        count = max(1, MAX_LOGITS // self.weight.shape[0])
        self.work.add(head_rows=len(hidden_RD))
        if teacher_RD is not None:
            self.work.add(graph=False, head_rows=len(teacher_RD))
        if len(hidden_RD) == 0:
            return _wide(F.linear(hidden_RD, self.weight)).sum(), labels_R.sum().float()
        if self.fused is not None and teacher_RD is None and torch.is_grad_enabled():
            return self.fused(hidden_RD, self.weight, labels_R)
        total, right = 0.0, 0
        teachers = teacher_RD.split(count) if teacher_RD is not None else None
        parts = zip(hidden_RD.split(count), labels_R.split(count))
        for place, (hidden, labels) in enumerate(parts):
            args = (hidden, labels, teachers[place] if teachers else None)
            if len(hidden_RD) > count and torch.is_grad_enabled():
                self.work.head_rows_again += len(hidden) * (1 if teacher_RD is None else 2)
                loss, hits = checkpoint(self._chunk, *args, use_reentrant=False)
            else:
                loss, hits = self._chunk(*args)
            total, right = total + loss, right + hits
        return total, right.float()

    @torch.no_grad()
    def predict(self, hidden_RD: torch.Tensor, words: int | None = None) -> torch.Tensor:
        """The most likely next token of each row, int64 [R], among the first ``words`` ids.

        In an exported model with a tied table the compression tokens are output rows as well,
        which no loss ever pushed down: they are no words.
        """
        return F.linear(hidden_RD, self.weight[:words]).argmax(-1)
