"""Who sees whom, and the carriers that compute it.

The rule of stage 1 (paper, figure 1e): rows are causal, and a dialogue row never sees a context
column.  Everything before the first compression token is context.  ``causal`` leaves the second
half of the rule away.

A *layout* is one arrangement of a batch in memory with the attention that is exact for it.  The
text layers reach it through transformers' ``AttentionInterface`` under the name ``coma_ds``: it
travels as a keyword of the model call, so there is no global state.

Shapes: B samples, H heads, G key/value heads, L columns, T packed tokens, K compression tokens.
Layouts take query [B, H, L, d], key and value [B, G, L, d] and return [B, H, L, d].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from coma_ds.batch import CONTEXT, DIALOGUE, PADDING, Padded

Visibility = Literal["bottleneck", "causal"]
TEXT_ATTENTION = "coma_ds"
# transformers hands packed sequences with their offsets only to implementations named "flash".
VISION_ATTENTION = "coma_ds_flash_vision"


class Arithmetic(Protocol):
    """softmax(query key' * scale + mask) value; ``mask`` is boolean, True where a row may look."""

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
        mask: torch.Tensor | None = None,
        causal: bool = False,
    ) -> torch.Tensor: ...


def sdpa(query, key, value, scale, mask=None, causal=False):
    """Torch's fused attention; grouped heads are expanded on a CPU, which has no such kernel."""
    grouped = query.shape[1] != key.shape[1]
    if grouped and query.device.type == "cpu":
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        grouped = False
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=grouped
    )


def matmul(query, key, value, scale, mask=None, causal=False):
    """Two matrix products and a softmax: the fastest form for short sequences on a CPU."""
    batch, heads, rows, width = query.shape
    groups = key.shape[1]
    query = query.reshape(batch, groups, heads // groups, rows, width)
    scores = torch.matmul(query * scale, key.unsqueeze(2).transpose(-1, -2))
    if causal:
        mask = torch.ones(rows, key.shape[2], dtype=torch.bool, device=query.device).tril()
    if mask is not None:
        if mask.dim() == 4:
            mask = mask.unsqueeze(2)
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    weights = torch.softmax(scores, -1)
    return torch.matmul(weights, value.unsqueeze(2)).reshape(batch, heads, rows, -1)


ARITHMETIC: dict[str, Arithmetic] = {"sdpa": sdpa, "matmul": matmul}


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


@dataclass
class Dense:
    """One call with the full mask: right for every padding, and quadratic in memory."""

    mask: torch.Tensor
    arithmetic: Arithmetic

    def __call__(self, query, key, value, scale):
        return self.arithmetic(query, key, value, scale, mask=self.mask)


@dataclass
class Causal:
    """No mask: exact for the causal rule when padding stands on the right, where nobody looks."""

    arithmetic: Arithmetic

    def __call__(self, query, key, value, scale):
        return self.arithmetic(query, key, value, scale, causal=True)


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


@dataclass
class Packed:
    """One row of T tokens, sample after sample, no padding: the meaning of a varlen kernel.

    ``lengths`` are (context, tokens, dialogue) of each sample.
    """

    lengths: list[tuple[int, int, int]]
    visibility: Visibility
    arithmetic: Arithmetic

    def __call__(self, query, key, value, scale):
        parts, start = [], 0
        for context, tokens, dialogue in self.lengths:
            end = start + context + tokens + dialogue
            spans = [x[:, :, start:end] for x in (query, key, value)]
            if self.visibility == "causal" or not context:
                parts.append(self.arithmetic(*spans, scale, causal=True))
            else:
                split = Split(context + tokens, tokens, None, self.arithmetic)
                parts.append(split(*spans, scale))
            start = end
        return torch.cat(parts, 2)


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


def _vision_attention(module, query, key, value, attention_mask, scaling, cu_seq_lens_q, **_):
    """Attention inside each span of [1, H, T, d]; spans of equal length share one call."""
    bounds = cu_seq_lens_q.tolist()
    lengths = [b - a for a, b in pairwise(bounds)]
    arithmetic = sdpa if query.is_cuda or max(lengths) > 128 else matmul
    _, heads, total, width = query.shape
    if len(set(lengths)) == 1:
        split = [
            x[0].reshape(heads, len(lengths), lengths[0], width).transpose(0, 1)
            for x in (query, key, value)
        ]
        out = arithmetic(*split, scaling)  # [spans, H, l, d]
        return out.transpose(1, 2).reshape(1, total, heads, width), None
    out = query.new_empty(total, heads, width)
    for length in sorted(set(lengths)):
        starts = [a for a, b in pairwise(bounds) if b - a == length]
        rows = torch.tensor(starts, device=query.device)[:, None]
        rows = rows + torch.arange(length, device=query.device)
        picked = [x[0].transpose(0, 1)[rows].transpose(1, 2) for x in (query, key, value)]
        out = out.index_put((rows,), arithmetic(*picked, scaling).transpose(1, 2))
    return out[None], None


AttentionInterface.register(TEXT_ATTENTION, _text_attention)
AttentionMaskInterface.register(TEXT_ATTENTION, lambda *args, **kwargs: None)
AttentionInterface.register(VISION_ATTENTION, _vision_attention)
