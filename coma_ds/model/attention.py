"""Who sees whom, and the carriers that compute it.

The rule of stage 1 (paper, figure 1e): rows are causal, and a dialogue row never sees a context
column.  Everything before the first compression token is context.  ``causal`` leaves the second
half of the rule away.

A *layout* is one arrangement of a batch in memory with the attention that is exact for it.  The
text layers reach it through transformers' ``AttentionInterface`` under the name ``coma_ds``: it
travels as a keyword of the model call, so there is no global state.

Shapes: B samples, H heads, G key/value heads, L columns, T packed tokens, K compression tokens.
Layouts take query [B, H, L, d], key and value [B, G, L, d] and return [B, H, L, d].  Their
``pairs(B, L, fused)`` says how many scores they compute; a fused causal kernel leaves out those
above the diagonal.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from coma_ds.batch import CONTEXT, DIALOGUE, PADDING, Padded
from coma_ds.model.varlen import ARITHMETIC, Arithmetic, Spans, VarLen, looped, matmul, sdpa

Visibility = Literal["bottleneck", "causal"]
TEXT_ATTENTION = "coma_ds"
# transformers hands packed sequences with their offsets only to implementations named "flash".
VISION_ATTENTION = "coma_ds_flash_vision"


def visibility_mask(segment_BL: torch.Tensor, visibility: Visibility) -> torch.Tensor:
    """The rule as a boolean mask [B, 1, L, L], True where a row may look; the reference.

    Padding rows see themselves, so that no row is empty; nobody sees padding.
    """
    length = segment_BL.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=segment_BL.device).tril()
    mask = causal & (segment_BL != PADDING)[:, None, :]
    if visibility == "bottleneck":
        mask &= ~((segment_BL == DIALOGUE)[:, :, None] & (segment_BL == CONTEXT)[:, None, :])
    mask |= torch.eye(length, dtype=torch.bool, device=segment_BL.device)
    return mask[:, None]


def _causal_pairs(length, fused: bool):
    return length * (length + 1) // 2 if fused else length * length


@dataclass
class Dense:
    """One call with the full mask: right for every padding, and quadratic in memory."""

    mask: torch.Tensor
    arithmetic: Arithmetic

    def __call__(self, query, key, value, scale):
        return self.arithmetic(query, key, value, scale, mask=self.mask)

    def pairs(self, samples: int, columns: int, fused: bool) -> int:
        return samples * columns**2


@dataclass
class Causal:
    """No mask: exact for the causal rule when padding stands on the right, where nobody looks."""

    arithmetic: Arithmetic

    def __call__(self, query, key, value, scale):
        return self.arithmetic(query, key, value, scale, causal=True)

    def pairs(self, samples: int, columns: int, fused: bool) -> int:
        return samples * _causal_pairs(columns, fused)


@dataclass
class Split:
    """The rule as two causal calls over segment-aligned columns.

    [context + tokens], then [tokens + dialogue] with the token rows given again as queries and
    their outputs dropped, which keeps the second call square: causal masks of fused kernels are
    ambiguous when it is not.  Contexts of unequal length need ``mask`` in the first call.
    """

    boundary: int
    tokens: int
    mask: torch.Tensor | None
    arithmetic: Arithmetic

    def __call__(self, query, key, value, scale):
        end, begin = self.boundary, self.boundary - self.tokens
        head = [x[:, :, :end] for x in (query, key, value)]
        tail = [x[:, :, begin:] for x in (query, key, value)]
        causal = self.mask is None
        first = self.arithmetic(*head, scale, mask=self.mask, causal=causal)
        second = self.arithmetic(*tail, scale, causal=True)
        return torch.cat([first, second[:, :, self.tokens :]], 2)

    def pairs(self, samples: int, columns: int, fused: bool) -> int:
        first = _causal_pairs(self.boundary, fused and self.mask is None)
        return samples * (first + _causal_pairs(columns - self.boundary + self.tokens, fused))


class Packed:
    """One row of T tokens, sample after sample, no padding; one call over spans.

    A span is a sample.  Under the bottleneck a sample is two: [context + tokens], and [tokens +
    dialogue] with the token rows given again and their second outputs dropped.
    """

    def __init__(self, lengths_B3: torch.Tensor, visibility: Visibility, attend: VarLen) -> None:
        self.lengths_B3 = lengths_B3
        self.splits = visibility == "bottleneck" and bool(lengths_B3[:, CONTEXT].any())
        self.attend = attend
        self._made: tuple[Spans, torch.Tensor | None, torch.Tensor | None] | None = None

    def __call__(self, query, key, value, scale):
        if self._made is None:  # once for all layers
            self._made = self._make(query.device)
        spans, rows_G, kept_T = self._made
        seen = [x[0].transpose(0, 1) for x in (query, key, value)]
        if rows_G is not None:
            seen = [x[rows_G] for x in seen]
        out = self.attend(*seen, spans, scale, True)
        if kept_T is not None:
            out = out[kept_T]
        return out.transpose(0, 1)[None]

    def pairs(self, samples: int, columns: int, fused: bool) -> int:
        context, tokens, dialogue = self.lengths_B3.unbind(1)
        split = [context + tokens, tokens + dialogue]
        spans = split if self.splits else [context + tokens + dialogue]
        return sum(int(_causal_pairs(lengths, fused).sum()) for lengths in spans)

    def _make(self, device: torch.device) -> tuple[Spans, torch.Tensor | None, torch.Tensor | None]:
        """Spans over rows G, which packed row each of them is, and which of them each row reads;
        the last two None where rows G are the packed rows."""
        context, tokens, dialogue = self.lengths_B3.unbind(1)
        sizes = context + tokens + dialogue
        if not self.splits:
            return Spans.of(sizes, device), None, None
        starts = sizes.cumsum(0) - sizes
        first = torch.stack([starts, starts + context], 1).flatten()
        lengths = torch.stack([context + tokens, tokens + dialogue], 1).flatten()
        again = torch.stack([torch.zeros_like(tokens), tokens], 1).flatten()
        begin = (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
        place_G = torch.arange(len(begin)) - begin  # in its span
        rows_G = first.repeat_interleave(lengths) + place_G
        kept_T = (place_G >= again.repeat_interleave(lengths)).nonzero().squeeze(-1)
        moved = [x.to(device, non_blocking=True) for x in (rows_G, kept_T)]
        return Spans.of(lengths, device), *moved


Layout = Dense | Causal | Split | Packed


def build_layout(padded: Padded, visibility: Visibility, carrier: str, name: str) -> Layout:
    """The layout of a padded batch.

    ``carrier``: ``dense`` (the reference), or ``split``, which needs ``segments`` alignment for
    the bottleneck and right padding for the causal rule.  ``name``: an entry of ``ARITHMETIC``.

    Raises ``ValueError`` for an alignment that the carrier cannot serve exactly.
    """
    arithmetic = ARITHMETIC[name]
    if carrier == "dense":
        return Dense(visibility_mask(padded.segment_BL, visibility), arithmetic)
    if visibility == "causal":
        if padded.alignment != "right":
            raise ValueError("the causal rule without a mask needs padding on the right")
        return Causal(arithmetic)
    if padded.alignment != "segments":
        raise ValueError("the split form needs segment-aligned padding")
    context = padded.lengths_B3[:, CONTEXT]
    mask = None
    if int(context.min()) != int(context.max()):
        mask = visibility_mask(padded.segment_BL[:, : padded.boundary], "causal")
    return Split(padded.boundary, int(padded.lengths_B3[0, 1]), mask, arithmetic)


def _text_attention(module, query, key, value, attention_mask, scaling, layout: Callable, **_):
    return layout(query, key, value, scaling).transpose(1, 2).contiguous(), None


def _vision_arithmetic(spans: Spans, query: torch.Tensor) -> Arithmetic:
    return sdpa if query.is_cuda or spans.longest > 128 else matmul


VISION_LOOP = looped(_vision_arithmetic)


def _vision_attention(
    module, query, key, value, attention_mask, scaling, cu_seq_lens_q, max_length_q=None, **given
):
    """Attention inside each span of [1, H, T, d], by ``attend`` of the call of the tower."""
    bounds = cu_seq_lens_q
    longest = int(bounds.diff().max() if max_length_q is None else max_length_q)
    seen = [x[0].transpose(0, 1) for x in (query, key, value)]
    attend = given.get("attend", VISION_LOOP)
    return attend(*seen, Spans(bounds.to(torch.int32), longest), scaling, False)[None], None


AttentionInterface.register(TEXT_ATTENTION, _text_attention)
AttentionMaskInterface.register(TEXT_ATTENTION, lambda *args, **kwargs: None)
AttentionInterface.register(VISION_ATTENTION, _vision_attention)
