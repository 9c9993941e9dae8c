"""The module that is trained: a backbone, its compression tokens, and the heads of both stages.

Shapes: B samples, K compression tokens, R answer rows, D width, F image tokens, S levels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeVar

import torch
from torch import nn

from coma_ds.batch import CONTEXT, TOKENS, Batch, ImageBatch
from coma_ds.model.adapters import base_model
from coma_ds.model.answers import AnswerHead
from coma_ds.model.attention import Visibility
from coma_ds.model.backbone import Backbone
from coma_ds.model.pooling import Pooling
from coma_ds.model.tokens import CompressionTokens

Result = TypeVar("Result")
Bottleneck = Literal["kv", "last_hidden"]


class Temperature(nn.Module):
    """Learned temperatures, float32 [T]: each its start times exp of a parameter.

    The parameter starts at zero, where a bf16 number is fine-grained: the logarithm of 0.03 itself
    could only move by half a percent of its value.  One has the shape [1]: ZeRO refuses shape [].
    """

    def __init__(self, *starts: float) -> None:
        super().__init__()
        self.starts = starts
        self.log_ratio = nn.Parameter(torch.zeros(len(starts)))

    def forward(self) -> torch.Tensor:
        starts = torch.tensor(self.starts, dtype=torch.float32, device=self.log_ratio.device)
        return starts * self.log_ratio.float().exp()


class CompressionModel(nn.Module):
    """Everything that DeepSpeed wraps.  ``forward`` runs a function of this module.

    Under ZeRO every use of a parameter must happen inside the engine's forward; a function lets
    the objectives decide what that is, in one place and under the name of the thing done.
    """

    def __init__(
        self,
        backbone: Backbone,
        tokens: CompressionTokens | None,
        pooling: Pooling,
        temperature: Temperature | None = None,
        bottleneck: Bottleneck = "kv",
        autocast: bool = False,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.tokens = tokens
        self.pooling = pooling
        self.temperature = temperature
        self.bottleneck = bottleneck
        self.autocast = autocast
        self.kernels = ""  # which fused ones stand in its modules, in words
        self.answers = AnswerHead(backbone.lm.lm_head.weight)
        self.answers.work = backbone.work
        if tokens is not None:
            tokens.attach(backbone.lm.get_input_embeddings())

    def forward(self, call: Callable[[CompressionModel], Result]) -> Result:
        # Not by a name: under ZeRO-3 a weight that is touched here comes whole in every forward.
        device = next(self.parameters()).device.type
        with torch.autocast(device, torch.bfloat16, enabled=self.autocast):
            return call(self)

    @property
    def vision_is_trained(self) -> bool:
        """True when the tower has a gradient."""
        return any(p.requires_grad for p in self.backbone.visual.parameters())

    def shard_units(self) -> list[type[nn.Module]]:
        """Classes that ZeRO-3 may gather as a whole.

        Such a module may run once in a forward; ``last_hidden`` runs the decoder twice.
        """
        decoder, vision = self.backbone.layer_classes()
        return [vision] if self.bottleneck == "last_hidden" else [decoder, vision]

    def embed_images(self, images: ImageBatch | None) -> torch.Tensor:
        """See ``Backbone.embed_images``."""
        return self.backbone.embed_images(images)

    def embeddings(self, batch: Batch, features_SFD: torch.Tensor | None) -> torch.Tensor:
        """Pooled final states of the compression tokens, [B, D] float32, unit norm."""
        rows = batch.token_rows
        hidden = self.backbone.hidden_states(batch, features_SFD, rows, "causal")
        return self.pooling(hidden.view(len(batch), -1, hidden.shape[-1]))

    def dialogue_states(
        self,
        batch: Batch,
        features_SFD: torch.Tensor | None,
        rows_R: torch.Tensor,
        visibility: Visibility,
    ) -> torch.Tensor:
        """Final states [R, D] at dialogue positions ``rows_R``, under the chosen bottleneck.

        ``kv`` (the paper): the dialogue reads the token rows in every layer.  ``last_hidden``:
        the K final states enter a second pass over [tokens | dialogue] as its soft prompt.
        """
        if self.bottleneck == "kv" or visibility == "causal":
            return self.backbone.hidden_states(batch, features_SFD, rows_R, visibility)
        head, _ = _drop(batch, dialogue=True)
        tail, place_T = _drop(batch, dialogue=False)
        states = self.backbone.hidden_states(head, features_SFD, head.token_rows, "causal")
        with self.tokens.replaced_by(states):
            return self.backbone.hidden_states(tail, None, place_T[rows_R], "causal")

    def answer_loss(
        self,
        batch: Batch,
        features_SFD: torch.Tensor | None,
        visibility: Visibility,
        teacher_RD: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Sums over the answer tokens: loss and right predictions, float32 scalars."""
        rows = batch.answer_rows
        hidden = self.dialogue_states(batch, features_SFD, rows - 1, visibility)
        return self.answers(hidden, batch.labels_T[rows], teacher_RD)

    @torch.no_grad()
    def teacher_states(self, batch: Batch, features_SFD: torch.Tensor | None) -> torch.Tensor:
        """Final states [R, D] at the answer rows with the image visible, and adapters off.

        Without adapters the teacher is the model as it stands.
        """
        with base_model(self):
            rows = batch.answer_rows - 1
            return self.backbone.hidden_states(batch, features_SFD, rows, "causal")


def _drop(batch: Batch, *, dialogue: bool) -> tuple[Batch, torch.Tensor]:
    """The batch without its dialogues (or without its contexts), and the new place of each token.

    The place is -1 for a dropped token.  Positions stay as they were.
    """
    lengths = batch.lengths_B3.clone()
    lengths[:, 2 if dialogue else CONTEXT] = 0
    kinds = torch.arange(3).repeat(len(batch)).repeat_interleave(batch.lengths_B3.flatten())
    keep = kinds <= TOKENS if dialogue else kinds >= TOKENS
    device = batch.input_ids_T.device
    kept = keep.nonzero().squeeze(-1).to(device)
    place = torch.full((len(keep),), -1, dtype=torch.int64, device=device)
    place[kept] = torch.arange(len(kept), device=device)
    nothing = torch.zeros_like(batch.image_counts_B)
    part = Batch(
        input_ids_T=batch.input_ids_T[kept],
        position_ids_3T=batch.position_ids_3T[:, kept],
        labels_T=batch.labels_T[kept],
        lengths_B3=lengths,
        image_counts_B=batch.image_counts_B if dialogue else nothing,
        feature_counts_B=batch.feature_counts_B if dialogue else nothing,
        feature_rows_F=batch.feature_rows_F if dialogue else batch.feature_rows_F[:0],
        content_ids_B=batch.content_ids_B,
    )
    return part, place
