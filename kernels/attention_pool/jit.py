"""Attention pooling in Triton: one launch forward, one backward; every row is read once each way.

Shapes: B samples, K compression tokens, L positions of the sequence they stand in (without
``positions`` the rows are the sequence, L = K), D = H * E width of H heads of E.  Axes of a tile:
tokens, heads, width of a head.  Sums, scores and gradients of scores are float32.

The forward walks over the tokens with a running maximum and keeps the scores; the backward needs
no second look at the rows: with p the shares, y = sum p_k x_k and g_y its gradient,
    d score_k = p_k (x_k . g_y - y . g_y),
and y is the embedding times its divisor.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _count(positions, valid, sample, tokens, length, BLOCK_T: tl.constexpr):
    """How many tokens of a sample to read, and 1 where the numbers given are no good: then none."""
    count = tokens
    wrong = (tokens < 1).to(tl.int32)
    if valid is not None:
        given = tl.load(valid + sample).to(tl.int32)
        wrong = ((given < 1) | (given > tokens)).to(tl.int32)
        count = tl.where(wrong == 0, given, 0)
    if positions is not None:
        token_T = tl.arange(0, BLOCK_T)
        own = positions + sample * tokens + token_T
        here_T = token_T < count
        place_T = tl.load(own, mask=here_T, other=0)
        before_T = tl.load(own - 1, mask=here_T & (token_T > 0), other=-1)
        wrong_T = here_T & ((place_T <= before_T) | (place_T < 0) | (place_T >= length))
        wrong = tl.maximum(wrong, tl.max(wrong_T.to(tl.int32), 0))
        count = tl.where(wrong == 0, count, 0)
    return count, wrong


@triton.jit
def _rows(positions, sample, token_K, count, tokens):
    """The rows [BLOCK_K] of the sequence in which the tokens stand."""
    if positions is None:
        row_K = token_K
    else:
        own = positions + sample * tokens + token_K
        row_K = tl.load(own, mask=token_K < count, other=0).to(tl.int32)
    return row_K


@triton.jit
def pool_forward(
    hidden,  # [B, L, D], the last axis contiguous
    positions,  # [B, K] int32 or int64, increasing, or None
    query,  # [D] or None: the mean
    valid,  # [B] int32 or int64, or None: all K
    emb,  # out [B, D] float32
    scores,  # out [B, H, K] float32, scaled; None without a query
    softmax,  # out [B, H, 2] float32: the maximum of the scores, the sum over it; None likewise
    divisor,  # out [B] float32: max(norm, eps), NaN where the input is no good
    counters,  # out [COUNTERS] int32 zeros for the backward, or None
    tokens,
    length,
    stride_sample,
    stride_row,
    scale,
    eps,
    COUNTERS: tl.constexpr,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,  # of a head
    BLOCK_K: tl.constexpr,
    BLOCK_T: tl.constexpr,  # all tokens, for a look at the positions
    BLOCK_H: tl.constexpr,
    BLOCK_E: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One program a sample."""
    sample = tl.program_id(0).to(tl.int64)
    head_H = tl.arange(0, BLOCK_H)
    width_E = tl.arange(0, BLOCK_E)
    column_HE = head_H[:, None] * WIDTH + width_E[None, :]
    inside_HE = (head_H[:, None] < HEADS) & (width_E[None, :] < WIDTH)
    count, wrong = _count(positions, valid, sample, tokens, length, BLOCK_T)
    rows = hidden + sample * stride_sample
    total_HE = tl.zeros([BLOCK_H, BLOCK_E], tl.float32)
    if query is not None:
        query_HE = tl.load(query + column_HE, mask=inside_HE, other=0.0).to(tl.float32)
        top_H = tl.full([BLOCK_H], float("-inf"), tl.float32)
        sum_H = tl.zeros([BLOCK_H], tl.float32)
    for start in tl.range(0, count, BLOCK_K, num_stages=STAGES):
        token_K = start + tl.arange(0, BLOCK_K)
        inside_K = token_K < count
        row_K = _rows(positions, sample, token_K, count, tokens)
        x_KHE = tl.load(
            rows + (row_K[:, None, None] * stride_row + column_HE[None]),
            mask=inside_K[:, None, None] & inside_HE[None],
            other=0.0,
        ).to(tl.float32)
        if query is None:
            total_HE += tl.sum(x_KHE, 0)
        else:
            score_KH = tl.sum(x_KHE * query_HE[None], 2) * scale
            tl.store(
                scores + (sample * HEADS + head_H[None, :]) * tokens + token_K[:, None],
                score_KH,
                mask=inside_K[:, None] & (head_H < HEADS)[None, :],
            )
            score_KH = tl.where(inside_K[:, None], score_KH, float("-inf"))
            higher_H = tl.maximum(top_H, tl.max(score_KH, 0))
            share_KH = tl.exp(score_KH - higher_H[None, :])
            old_H = tl.exp(top_H - higher_H)
            sum_H = sum_H * old_H + tl.sum(share_KH, 0)
            total_HE = total_HE * old_H[:, None] + tl.sum(share_KH[:, :, None] * x_KHE, 0)
            top_H = higher_H
    if query is None:
        pooled_HE = total_HE / count
    else:
        pooled_HE = total_HE / sum_H[:, None]
        pair = softmax + (sample * HEADS + head_H) * 2
        tl.store(pair, top_H, mask=head_H < HEADS)
        tl.store(pair + 1, sum_H, mask=head_H < HEADS)
    pooled_HE = tl.where(inside_HE, pooled_HE, 0.0)
    norm = tl.sqrt_rn(tl.sum(tl.sum(pooled_HE * pooled_HE, 1), 0))
    # comparisons with NaN are false: a bad number anywhere makes the whole row NaN
    fine = (norm < float("inf")) & (wrong == 0)
    norm = tl.where(fine, tl.maximum(norm, eps), float("nan"))
    tl.store(divisor + sample, norm)
    tl.store(emb + sample * (HEADS * WIDTH) + column_HE, pooled_HE / norm, mask=inside_HE)
    if counters is not None:
        if sample == 0:
            number = tl.arange(0, COUNTERS)
            tl.store(counters + number, tl.zeros([COUNTERS], tl.int32))


@triton.jit
def _zero(
    rows,
    first,
    end,
    column_HE,
    inside_HE,
    STRIDE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Zeros into the rows first .. end - 1."""
    nothing_KHE = tl.zeros([BLOCK_K, BLOCK_H, BLOCK_E], rows.dtype.element_ty)
    for start in range(first, end, BLOCK_K):
        row_K = start + tl.arange(0, BLOCK_K)
        tl.store(
            rows + (row_K[:, None, None] * STRIDE + column_HE[None]),
            nothing_KHE,
            mask=(row_K < end)[:, None, None] & inside_HE[None],
        )


@triton.jit
def _sum_rows(
    rows,
    first,
    count,
    column_HE,
    inside_HE,
    STRIDE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Sum of the rows first .. first + count - 1 in the order of their numbers, past the L1."""
    total_HE = tl.zeros([BLOCK_H, BLOCK_E], tl.float32)
    for start in range(0, count, BLOCK_K):
        row_K = start + tl.arange(0, BLOCK_K)
        total_HE += tl.sum(
            tl.load(
                rows + (first + row_K[:, None, None]) * STRIDE + column_HE[None],
                mask=(row_K < count)[:, None, None] & inside_HE[None],
                other=0.0,
                cache_modifier=".cg",
            ),
            0,
        )
    return total_HE


@triton.jit(do_not_specialize=["samples", "per_group"])
def pool_backward(
    hidden,  # [B, L, D], or None without a query: the mean needs no row
    positions,  # [B, K], or None
    query,  # [D], or None
    valid,  # [B], or None
    emb,  # [B, D] float32, of the forward
    scores,  # [B, H, K] float32
    softmax,  # [B, H, 2] float32
    divisor,  # [B] float32
    grad_emb,  # [B, D] float32
    grad_hidden,  # out [B, L, D] contiguous, every element written; None: not wanted
    grad_query,  # out [D]; None: not wanted
    partial,  # [programs + groups, D] float32: the programs' sums, then the groups'
    counters,  # [1 + groups] int32, zero before and after
    samples,
    per_group,
    tokens,
    length,
    stride_sample,
    stride_row,
    scale,
    eps,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_E: tl.constexpr,
    STAGES: tl.constexpr,
):
    """A program takes every programs-th sample.  The query's gradient without float atomics: each
    program leaves its sum, the last of a group (an integer ticket) adds the group's sums in the
    order of their numbers, the last group adds the groups'; so the order never depends on time.
    """
    DIM: tl.constexpr = HEADS * WIDTH
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    head_H = tl.arange(0, BLOCK_H)
    width_E = tl.arange(0, BLOCK_E)
    column_HE = head_H[:, None] * WIDTH + width_E[None, :]
    inside_HE = (head_H[:, None] < HEADS) & (width_E[None, :] < WIDTH)
    if query is not None:
        query_HE = tl.load(query + column_HE, mask=inside_HE, other=0.0).to(tl.float32)
    grad_query_HE = tl.zeros([BLOCK_H, BLOCK_E], tl.float32)
    for turn in range(tl.cdiv(samples - program, programs)):
        sample = program.to(tl.int64) + turn * programs
        count, _wrong = _count(positions, valid, sample, tokens, length, BLOCK_T)
        own = sample * DIM + column_HE
        emb_HE = tl.load(emb + own, mask=inside_HE, other=0.0)
        grad_HE = tl.load(grad_emb + own, mask=inside_HE, other=0.0)
        norm = tl.load(divisor + sample)
        # through y / max(|y|, eps); a NaN divisor makes NaN below
        along = tl.where(norm > eps, tl.sum(tl.sum(grad_HE * emb_HE, 1), 0), 0.0)
        grad_HE = (grad_HE - along * emb_HE) / norm
        if query is None:
            grad_row_HE = grad_HE / count
        else:
            mean_H = tl.sum(grad_HE * emb_HE, 1) * norm
            pair = softmax + (sample * HEADS + head_H) * 2
            top_H = tl.load(pair, mask=head_H < HEADS, other=0.0)
            sum_H = tl.load(pair + 1, mask=head_H < HEADS, other=1.0)
        for start in tl.range(0, count, BLOCK_K, num_stages=STAGES):
            token_K = start + tl.arange(0, BLOCK_K)
            inside_K = token_K < count
            inside_KHE = inside_K[:, None, None] & inside_HE[None]
            row_K = _rows(positions, sample, token_K, count, tokens)
            if query is None:
                grad_x_KHE = tl.zeros([BLOCK_K, BLOCK_H, BLOCK_E], tl.float32) + grad_row_HE[None]
            else:
                x_KHE = tl.load(
                    hidden
                    + sample * stride_sample
                    + (row_K[:, None, None] * stride_row + column_HE[None]),
                    mask=inside_KHE,
                    other=0.0,
                ).to(tl.float32)
                score_KH = tl.load(
                    scores + (sample * HEADS + head_H[None, :]) * tokens + token_K[:, None],
                    mask=inside_K[:, None] & (head_H < HEADS)[None, :],
                    other=float("-inf"),
                )
                share_KH = tl.exp(score_KH - top_H[None, :]) / sum_H[None, :]
                grad_score_KH = tl.sum(x_KHE * grad_HE[None], 2) - mean_H[None, :]
                grad_score_KH = share_KH * grad_score_KH * scale
                grad_query_HE += tl.sum(grad_score_KH[:, :, None] * x_KHE, 0)
                grad_x_KHE = (
                    share_KH[:, :, None] * grad_HE[None]
                    + grad_score_KH[:, :, None] * query_HE[None]
                )
            if grad_hidden is not None:
                tl.store(
                    grad_hidden
                    + sample * length * DIM
                    + (row_K[:, None, None] * DIM + column_HE[None]),
                    grad_x_KHE.to(grad_hidden.dtype.element_ty),
                    mask=inside_KHE,
                )
        if grad_hidden is not None:
            zeros = grad_hidden + sample * length * DIM
            if positions is None:
                _zero(zeros, count, length, column_HE, inside_HE, DIM, BLOCK_K, BLOCK_H, BLOCK_E)
            else:
                first = 0
                for token in range(count + 1):
                    place = positions + sample * tokens + token
                    end = tl.load(place, mask=token < count, other=length).to(tl.int32)
                    _zero(zeros, first, end, column_HE, inside_HE, DIM, BLOCK_K, BLOCK_H, BLOCK_E)
                    first = end + 1
    if grad_query is not None:
        tl.store(partial + program * DIM + column_HE, grad_query_HE, mask=inside_HE)
        group = program // per_group
        groups = tl.cdiv(programs, per_group)
        members = tl.minimum(per_group, programs - group * per_group)
        tl.debug_barrier()  # all threads' stores before the ticket
        if tl.atomic_add(counters + 1 + group, 1) == members - 1:
            tl.store(counters + 1 + group, 0)
            sum_HE = _sum_rows(
                partial, group * per_group, members, column_HE, inside_HE,
                DIM, BLOCK_K, BLOCK_H, BLOCK_E,
            )  # fmt: skip
            tl.store(partial + (programs + group) * DIM + column_HE, sum_HE, mask=inside_HE)
            tl.debug_barrier()
            if tl.atomic_add(counters, 1) == groups - 1:
                tl.store(counters, 0)
                sum_HE = _sum_rows(
                    partial, programs, groups, column_HE, inside_HE,
                    DIM, BLOCK_K, BLOCK_H, BLOCK_E,
                )  # fmt: skip
                tl.store(
                    grad_query + column_HE,
                    sum_HE.to(grad_query.dtype.element_ty),
                    mask=inside_HE,
                )
