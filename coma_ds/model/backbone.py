"""Stock Qwen-VL classes behind two calls: ``embed_images`` and ``hidden_states``.

Shapes: B samples, L columns, T packed tokens, R wanted rows, D width, F image tokens, S feature
levels (1; for Qwen3-VL one more for each deepstack level).
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import nn
from transformers import PreTrainedModel

from coma_ds.batch import Batch, ImageBatch
from coma_ds.config import FAMILIES
from coma_ds.model.attention import (
    TEXT_ATTENTION,
    VISION_ATTENTION,
    Packed,
    Visibility,
    build_layout,
)
from coma_ds.model.varlen import ARITHMETIC, CARRIERS, span_attention
from coma_ds.model.work import Work, vision_pairs

ARRANGEMENTS = ("split", "dense", "packed")


class Backbone(nn.Module):
    """A ``...ForConditionalGeneration`` of the Qwen-VL families, fed from packed batches.

    ``carrier`` arranges the batch for the text layers (``split``, ``dense`` or ``packed``),
    ``arithmetic`` computes attention: an entry of ``ARITHMETIC``, or of ``varlen.CARRIERS`` for
    packed sequences, which then serves the tower too.
    """

    def __init__(self, lm: PreTrainedModel, carrier: str = "split", arithmetic: str = "sdpa"):
        super().__init__()
        if lm.config.model_type not in FAMILIES:
            raise ValueError(
                f"model family {lm.config.model_type!r}: expected one of {', '.join(FAMILIES)}"
            )
        known = arithmetic in ARITHMETIC or (carrier == "packed" and arithmetic in CARRIERS)
        if carrier not in ARRANGEMENTS or not known:
            raise ValueError(f"attention {carrier!r} with {arithmetic!r} is not known")
        self.lm = lm
        self.carrier = carrier
        self.arithmetic = arithmetic
        self.work = Work()
        lm.config.text_config._attn_implementation = TEXT_ATTENTION
        lm.config.vision_config._attn_implementation = VISION_ATTENTION

    @property
    def visual(self) -> nn.Module:
        """The vision tower."""
        return self.lm.model.visual

    @property
    def text(self) -> nn.Module:
        """The decoder: embedding, layers, final norm."""
        return self.lm.model.language_model

    @property
    def width(self) -> int:
        """D, the width of the final states."""
        return self.lm.config.text_config.hidden_size

    @property
    def merge(self) -> int:
        """Patches that become one image token."""
        return self.lm.config.vision_config.spatial_merge_size**2

    def layer_classes(self) -> list[type[nn.Module]]:
        """The classes of a decoder layer and of a vision block: units of sharding."""
        return [type(self.text.layers[0]), type(self.visual.blocks[0])]

    def blank_image(self) -> ImageBatch:
        """The smallest image, all zeros: what a rank without images sends through the tower."""
        vision = self.lm.config.vision_config
        side = vision.spatial_merge_size
        width = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        pixels = torch.zeros(side * side, width)
        return ImageBatch(pixels, torch.tensor([[1, side, side]]), self.merge)

    def embed_images(self, images: ImageBatch | None) -> torch.Tensor:
        """Image tokens of all images in order, [S, F, D]; of the blank image where there is none.

        Every rank calls this the same number of times, with or without images of its own: under
        ZeRO-3 the tower's parameters are gathered by all ranks or by none.
        """
        images = images or self.blank_image()
        trained = any(p.requires_grad for p in self.visual.parameters())
        self.work.add(
            graph=trained and torch.is_grad_enabled(),
            patch_rows=int(images.grid_I3.prod(-1).sum()),
            image_rows=int(images.tokens_I.sum()),
            vision_pairs=vision_pairs(images, self.lm.config.vision_config),
        )
        weight = next(self.visual.parameters())
        pixels = images.values(weight.device).to(self.visual.dtype)
        grid = images.grid_I3.to(weight.device)
        # Passed through to every attention call; there is no global state.
        asked = {"attend": span_attention(self.arithmetic)} if self.arithmetic in CARRIERS else {}
        out = self.visual(pixels, grid_thw=grid, return_dict=True, **asked)
        levels = [out.pooler_output, *(getattr(out, "deepstack_features", None) or [])]
        return torch.stack(levels)

    def hidden_states(
        self,
        batch: Batch,
        features_SFD: torch.Tensor | None,
        rows_R: torch.Tensor,
        visibility: Visibility = "causal",
    ) -> torch.Tensor:
        """Final (normed) states at the packed positions ``rows_R``, [R, D].

        ``features_SFD`` are those of the batch's images, or of the batch that it was split from;
        None only for a batch without image tokens.
        """
        if self.carrier == "packed":
            ids_BL, positions_3BL = batch.input_ids_T[None], batch.position_ids_3T[:, None]
            layout = Packed(batch.lengths_B3, visibility, span_attention(self.arithmetic))
            cells = rows_R.to(ids_BL.device)
        else:
            aligned = visibility == "bottleneck" and self.carrier == "split"
            padded = batch.padded("segments" if aligned else "right")
            ids_BL, positions_3BL = padded.input_ids_BL, padded.position_ids_3BL
            layout = build_layout(padded, visibility, self.carrier, self.arithmetic)
            cells = padded.cells(rows_R.to(ids_BL.device))
        fused = self.arithmetic != "matmul"
        self.work.add(text_rows=ids_BL.numel(), text_pairs=layout.pairs(*ids_BL.shape, fused))
        images = None
        if len(batch.feature_rows_F):
            levels = features_SFD[:, batch.feature_rows_F].unbind(0)
            deepstack = [(level,) for level in levels[1:]]
            image = SimpleNamespace(pooler_output=(levels[0],), deepstack_features=deepstack)
            images = {"image": image}
        states_BLD = self.lm.model(
            input_ids=ids_BL,
            position_ids=positions_3BL,
            mm_encoder_outputs=images,
            use_cache=False,
            layout=layout,
        ).last_hidden_state
        hidden_RD = states_BLD.flatten(0, 1)[cells]
        if features_SFD is not None and features_SFD.requires_grad:
            # Ties the tower in where no image token read it; adds exactly nothing.
            hidden_RD = hidden_RD + features_SFD[:, :0].sum().to(hidden_RD.dtype)
        return hidden_RD
