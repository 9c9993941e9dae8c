"""Attention over packed sequences: spans of unequal length in one call, by whoever offers it.

Shapes: T rows of all spans, S spans, H heads, G key/value heads (H is a multiple of G), d numbers
a head.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import pairwise
from typing import Protocol

import torch
import torch.nn.functional as F

HALF = (torch.bfloat16, torch.float16)
FLEX_BLOCK = 128  # rows that FlexAttention decides about at once


class Arithmetic(Protocol):
    """softmax(query key' * scale + mask) value over [B, H, L, d]; ``mask`` is boolean, True where
    a row may look."""

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


class Spans:
    """Consecutive spans of rows: ``bounds_S1`` int32, from 0 to T; ``longest`` of them."""

    def __init__(self, bounds_S1: torch.Tensor, longest: int) -> None:
        self.bounds_S1 = bounds_S1
        self.longest = longest

    @classmethod
    def of(cls, lengths_S: torch.Tensor, device: torch.device) -> Spans:
        """From lengths, int64 on the host."""
        bounds = F.pad(lengths_S.cumsum(0), (1, 0)).to(torch.int32)
        return cls(bounds.to(device, non_blocking=True), int(lengths_S.max()))

    @cached_property
    def host(self) -> list[int]:
        """The bounds as numbers; waits for the device."""
        return self.bounds_S1.tolist()

    @cached_property
    def number_T(self) -> torch.Tensor:
        """The span of each row, int64 [T]."""
        lengths = self.bounds_S1.diff()
        return torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths)

    @cached_property
    def block_masks(self) -> dict:
        """What FlexAttention made of these spans, by what it was asked for."""
        return {}


class VarLen(Protocol):
    """softmax(query key' * scale) value inside each span, of rows [T, H, d] and [T, G, d]; with
    ``causal`` a row sees none that comes after it.  Returns [T, H, d]."""

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        spans: Spans,
        scale: float,
        causal: bool,
    ) -> torch.Tensor: ...


def looped(choose: Callable[[Spans, torch.Tensor], Arithmetic]) -> VarLen:
    """One call for all spans of one length; the reference, on any device."""

    def attend(query, key, value, spans, scale, causal):
        bounds, arithmetic = spans.host, choose(spans, query)
        lengths = [b - a for a, b in pairwise(bounds)]
        seen = (query, key, value)
        if len(set(lengths)) == 1:
            blocks = [x.unflatten(0, (len(lengths), lengths[0])).transpose(1, 2) for x in seen]
            return arithmetic(*blocks, scale, causal=causal).transpose(1, 2).flatten(0, 1)
        out = query.new_empty(*query.shape[:2], value.shape[2])
        for length in sorted(set(lengths) - {0}):
            starts = [a for a, b in pairwise(bounds) if b - a == length]
            rows = torch.tensor(starts, device=query.device)[:, None]
            rows = rows + torch.arange(length, device=query.device)
            blocks = [x[rows].transpose(1, 2) for x in seen]
            done = arithmetic(*blocks, scale, causal=causal).transpose(1, 2)
            out = out.index_put((rows,), done)
        return out

    return attend


def flash_attn(query, key, value, spans, scale, causal):
    """flash-attn 2 (Dao, 2023)."""
    from flash_attn import flash_attn_varlen_func

    query, key = query.to(value.dtype), key.to(value.dtype)  # autocast leaves rotated ones in fp32
    bounds, longest = spans.bounds_S1, spans.longest
    return flash_attn_varlen_func(
        query,
        key,
        value,
        bounds,
        bounds,
        longest,
        longest,
        softmax_scale=scale,
        causal=causal,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )


def flash_attn_4(query, key, value, spans, scale, causal):
    """flash-attn 4, for Hopper and Blackwell."""
    from flash_attn.cute import flash_attn_varlen_func

    query, key = query.to(value.dtype), key.to(value.dtype)
    bounds, longest = spans.bounds_S1, spans.longest
    out = flash_attn_varlen_func(
        query,
        key,
        value,
        cu_seqlens_q=bounds,
        cu_seqlens_k=bounds,
        max_seqlen_q=longest,
        max_seqlen_k=longest,
        softmax_scale=scale,
        causal=causal,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    return out[0] if isinstance(out, tuple) else out  # some releases return the sums as well


def varlen(query, key, value, spans, scale, causal):
    """The flash attention that torch carries, ``torch.nn.attention.varlen`` (2.10 and later)."""
    from torch.nn.attention.varlen import varlen_attn

    query, key = query.to(value.dtype), key.to(value.dtype)
    known = _parameters(varlen_attn)
    asked: dict = {}
    if "window_size" in known:
        asked["window_size"] = (-1, 0) if causal else (-1, -1)
    else:
        asked["is_causal"] = causal
    if "scale" in known:
        asked["scale"] = scale
    else:
        query = query * (scale * query.shape[-1] ** 0.5)
    if query.shape[1] != key.shape[1]:
        if "enable_gqa" in known:
            asked["enable_gqa"] = True
        else:
            groups = query.shape[1] // key.shape[1]
            key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    bounds, longest = spans.bounds_S1, spans.longest
    return varlen_attn(query, key, value, bounds, bounds, longest, longest, **asked)


@cache
def _parameters(function: Callable) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


def flex(query, key, value, spans, scale, causal):
    """FlexAttention (Dong et al., 2024), compiled on a GPU; torch has no backward of it on CPUs."""
    from torch.nn.attention.flex_attention import create_block_mask

    query, key = query.to(value.dtype), key.to(value.dtype)
    total = len(query)
    fill = -total % FLEX_BLOCK  # whole blocks; the rows that fill up are a span of their own
    if (causal, fill) not in spans.block_masks:
        number = F.pad(spans.number_T, (0, fill), value=-1)

        def visible(batch, head, row, column):
            same = number[row] == number[column]
            return same & (row >= column) if causal else same

        length = total + fill
        spans.block_masks[causal, fill] = create_block_mask(
            visible, None, None, length, length, device=query.device, BLOCK_SIZE=FLEX_BLOCK
        )
    filled = [F.pad(x, (0, 0, 0, 0, 0, fill)).transpose(0, 1)[None] for x in (query, key, value)]
    out = _flex_call(query.device.type)(
        *filled,
        block_mask=spans.block_masks[causal, fill],
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out[0].transpose(0, 1)[:total]


@cache
def _flex_call(device: str) -> Callable:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True) if device == "cuda" else flex_attention


def _problem(module: str) -> str:
    """Why a module cannot be used; empty where it can."""
    package = module.partition(".")[0]
    try:
        if importlib.util.find_spec(module) is not None:
            return ""
    except ModuleNotFoundError as error:
        if error.name != package:
            return f"{package} does not load ({error})"
    except ImportError as error:  # built for another torch
        return f"{package} does not load ({error})"
    return "not installed"


@dataclass(frozen=True)
class Carrier:
    """One way to attend in packed sequences; ``module`` has to be there."""

    attend: VarLen
    module: str
    said: str
    half_only: bool = True

    def missing(self, device: torch.device, dtype: torch.dtype) -> str:
        """Why it cannot be used there; empty where it can."""
        if problem := _problem(self.module):
            return problem
        if device.type != "cuda":
            return "it needs a GPU"
        if self.half_only and dtype not in HALF:
            return "it computes in 16 bits only"
        return ""


# In the order in which ``auto`` looks at them.
CARRIERS = {
    "flash_attn": Carrier(flash_attn, "flash_attn.flash_attn_interface", "flash-attn 2"),
    "flash_attn_4": Carrier(flash_attn_4, "flash_attn.cute", "flash-attn 4"),
    "varlen": Carrier(varlen, "torch.nn.attention.varlen", "torch's varlen_attn"),
    "flex": Carrier(
        flex, "torch.nn.attention.flex_attention", "FlexAttention, compiled", half_only=False
    ),
}
LOOPED = {name: looped(lambda *_, call=call: call) for name, call in ARITHMETIC.items()}


def span_attention(name: str) -> VarLen:
    """The implementation of a name of ``CARRIERS`` or ``ARITHMETIC``."""
    return LOOPED[name] if name in LOOPED else CARRIERS[name].attend


def best_carrier(device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    """The first of ``CARRIERS`` that can be used there, or '', and what the others lack."""
    lacks = {}
    for name, carrier in CARRIERS.items():
        lacks[name] = carrier.missing(device, dtype)
        if not lacks[name]:
            return name, _listed({n: why for n, why in lacks.items() if why})
    return "", _listed(lacks)


def _listed(lacks: dict[str, str]) -> str:
    return "; ".join(f"{CARRIERS[name].said}: {why}" for name, why in lacks.items())
