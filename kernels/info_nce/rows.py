"""The work on rows and vectors around the products: a few bytes a row, or one pass over rows.

Shapes: N rows of the call, R rows of a panel, T column tiles, H own negatives of a row, D width.
Everything is float32 except embeddings and operands.  Terms as in ``jit``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from coma_ds.kernels.info_nce.jit import LIMIT, SHIFT, narrow

LN2: tl.constexpr = tl.constexpr(0.6931471805599453)
LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def cosines(
    query,  # [N, D]
    target,  # [M, D]
    negative,  # [N, H, D] or None
    index,  # [N] int64
    temperature,  # [1] or [N] float32
    ids,  # [M] int64 of the targets, or None
    negative_ids,  # [N, H] int64 or None
    positive,  # out [N]: s_pos; NaN for an index out of range, a temperature that is not positive
    scale,  # out [N]
    reference,  # out [N]: not 0 where an own negative is above the limit
    scores,  # out [N, H]: cosines of own negatives, -inf where dropped, or None
    rows,
    targets,
    width,
    stride_query,
    stride_target,
    hardness,
    margin,
    TEMPERATURES: tl.constexpr,  # 1, or one a row
    OWN: tl.constexpr,  # H
    MARGIN: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The positive's cosine of each row, before any other, and those of own negatives."""
    n = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    here = n < rows
    at = tl.load(index + n, mask=here, other=0)
    fine = (at >= 0) & (at < targets)
    at = tl.where(fine, at, 0)
    if TEMPERATURES == 1:
        t = tl.load(temperature) + tl.zeros([BLOCK_R], tl.float32)
    else:
        t = tl.load(temperature + n, mask=here, other=1.0)
    total = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    for start in range(0, width, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        inside = here[:, None] & (d < width)[None, :]
        q = tl.load(query + n[:, None] * stride_query + d[None, :], mask=inside, other=0.0)
        p = tl.load(target + at[:, None] * stride_target + d[None, :], mask=inside, other=0.0)
        total += q.to(tl.float32) * p.to(tl.float32)
    base = tl.sum(total, 1)
    base = tl.where(fine & (t > 0), base + (base - base), float("nan"))  # infinite is NaN
    steep = LOG2E / t
    top = base * 0.0
    for h in range(0, OWN):
        total = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
        row = negative + (n * OWN + h)[:, None] * width
        for start in range(0, width, BLOCK_D):
            d = start + tl.arange(0, BLOCK_D)
            inside = here[:, None] & (d < width)[None, :]
            q = tl.load(query + n[:, None] * stride_query + d[None, :], mask=inside, other=0.0)
            x = tl.load(row + d[None, :], mask=inside, other=0.0)
            total += q.to(tl.float32) * x.to(tl.float32)
        s = tl.sum(total, 1)
        if negative_ids is not None:
            content = tl.load(negative_ids + n * OWN + h, mask=here, other=0)
            answer = tl.load(ids + at, mask=here, other=1)
            s = tl.where(content == answer, float("-inf"), s)
        if MARGIN:
            s = tl.where(s > base + margin, float("-inf"), s)
        tl.store(scores + n * OWN + h, s, mask=here)
        y = (s - base) * steep + hardness * s
        top = tl.where(y > top, y, top)
    tl.store(positive + n, base, mask=here)
    tl.store(scale + n, steep, mask=here)
    tl.store(reference + n, tl.where(top + SHIFT > LIMIT, top, 0.0), mask=here)


@triton.jit
def gather(ids, index, out, rows, count, BLOCK: tl.constexpr):
    """out = ids[index], 0 for an index out of range (the row is NaN then)."""
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    at = tl.load(index + n, mask=n < rows, other=0)
    fine = (at >= 0) & (at < count)
    tl.store(out + n, tl.load(ids + at, mask=fine & (n < rows), other=0), mask=n < rows)


@triton.jit
def _own_term(s, base, steep, hardness, ref):
    """Term of an own negative; none where it was dropped, its cosine then -inf."""
    y = (s - base) * steep + hardness * s + (-ref + SHIFT)
    return tl.exp2(tl.where(s == float("-inf"), float("-inf"), y))


@triton.jit
def finish(
    sums,  # [T, R]
    slopes,  # or None: no gradient for the temperature
    peaks,
    drops,  # or None
    positive,  # [R]
    scale,
    reference,  # [R], out too: what the terms are relative to
    temperature,  # [1] or [R]
    weight,  # [R]: factor of a row's loss, or None: ``factor`` for all
    scores,  # [R, H] or None
    loss,  # out [R]
    push,  # out [R]: factor of sum term * column in the row's gradient
    pull,  # out [R]: factor of the positive, below 0
    heat,  # out [R]: gradient for the temperature, where there are slopes
    own_push,  # out [R, H] or None
    hardest,  # out [R] or None: cosine of the best competitor among the targets
    masked,  # out [R] or None: targets dropped
    rows,
    tiles,
    target_tiles,  # of the first block
    factor,
    hardness,  # times log2(e)
    TEMPERATURES: tl.constexpr,
    OWN: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Sums of tiles, in a fixed order, to a row's loss and the factors of its gradients."""
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    t = tl.arange(0, BLOCK_T)
    inside = r < rows
    total = tl.zeros([BLOCK_R], tl.float32)
    slope = tl.zeros([BLOCK_R], tl.float32)
    top = tl.full([BLOCK_R], float("-inf"), tl.float32)
    best = top
    dropped = total
    for start in range(0, tiles, BLOCK_T):
        place = (start + t)[:, None].to(tl.int64) * rows + r[None, :]
        there = (start + t < tiles)[:, None] & inside[None, :]
        total += tl.sum(tl.load(sums + place, mask=there, other=0.0), 0)
        if slopes is not None:
            slope += tl.sum(tl.load(slopes + place, mask=there, other=0.0), 0)
        peak = tl.load(peaks + place, mask=there, other=float("-inf"))
        top = tl.maximum(top, tl.max(peak, 0))
        if hardest is not None:
            first = (start + t < target_tiles)[:, None]
            best = tl.maximum(best, tl.max(tl.where(first, peak, float("-inf")), 0))
            count = tl.load(drops + place, mask=there & first, other=0.0)
            dropped += tl.sum(count, 0)
    base = tl.load(positive + r, mask=inside, other=0.0)
    steep = tl.load(scale + r, mask=inside, other=1.0)
    early = tl.load(reference + r, mask=inside, other=0.0)
    ref = early + tl.where(top > LIMIT, top - SHIFT, 0.0)
    if TEMPERATURES == 1:
        warm = tl.load(temperature)
    else:
        warm = tl.load(temperature + r, mask=inside, other=1.0)
    if weight is not None:
        w = tl.load(weight + r, mask=inside, other=0.0)
    else:
        w = factor
    for h in range(0, OWN):
        s = tl.load(scores + r * OWN + h, mask=inside, other=0.0)
        term = _own_term(s, base, steep, hardness, ref)
        total += term
        slope += tl.where(term == 0, 0.0, term * ((s - base) * steep))
    share = tl.exp2(-ref + SHIFT)  # the positive's term
    z = share + total
    push_R = w / (z * warm)
    ratio = total * (1.0 / share)
    # log1p, exact also where 1 + ratio is 1; the maximum's row needs no such care
    one = 1.0 + ratio
    small = tl.where(one == 1.0, ratio, tl.log(one) * (ratio / (one - 1.0)))
    value = tl.where(ref > 0, (ref - SHIFT) * LN2 + tl.log(z), small)
    tl.store(loss + r, value + (base - base), mask=inside)
    tl.store(reference + r, ref, mask=inside)
    tl.store(push + r, push_R, mask=inside)
    tl.store(pull + r, -(w * (total / z)) / warm, mask=inside)
    if slopes is not None:
        tl.store(heat + r, -(w / warm) * (slope / z) * LN2, mask=inside)
    for h in range(0, OWN):
        s = tl.load(scores + r * OWN + h, mask=inside, other=0.0)
        term = _own_term(s, base, steep, hardness, ref)
        tl.store(own_push + r * OWN + h, term * push_R, mask=inside)
    if hardest is not None:
        cosine = (best - SHIFT + early + base * steep) / (steep + hardness)
        tl.store(hardest + r, tl.where(best == float("-inf"), -1.0, cosine), mask=inside)
        tl.store(masked + r, dropped, mask=inside)


@triton.jit
def spread(
    query,  # [R, D] operands
    target,  # [M, D]
    negative,  # [R, H, D] or None
    index,  # [R]
    push,  # [R]
    pull,  # [R]
    own_push,  # [R, H] or None
    query_grad,  # [R, D] float32: in sum of term * column, out the gradient; None where not wanted
    more,  # [R, D] float32: the same sum over a second block, or None
    target_sum,  # [R, D] float32: of t-t; in the sum, out what the positive gets; or None
    scaled_query,  # out [R, D] operands of the targets' gradient: query * push; or None
    scaled_target,  # out [R, D]: positive * push; or None
    negative_grad,  # out [R, H, D] float32 or None
    rows,
    targets,
    width,
    stride_query,
    stride_target,
    stride_grad,
    stride_scaled,
    OWN: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Everything that the rows' own vectors give to the gradients."""
    n = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    here = n < rows
    at = tl.load(index + n, mask=here, other=0)
    at = tl.where((at >= 0) & (at < targets), at, 0)
    up = tl.load(push + n, mask=here, other=0.0)[:, None]
    down = tl.load(pull + n, mask=here, other=0.0)[:, None]
    for start in range(0, width, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)[None, :]
        inside = here[:, None] & (d < width)
        at_grad = n[:, None] * stride_grad + d
        at_scaled = n[:, None] * stride_scaled + d
        q = tl.load(query + n[:, None] * stride_query + d, mask=inside, other=0.0).to(tl.float32)
        p = tl.load(target + at[:, None] * stride_target + d, mask=inside, other=0.0)
        p = p.to(tl.float32)
        if query_grad is not None:
            grad = tl.load(query_grad + at_grad, mask=inside, other=0.0)
            if more is not None:
                grad += tl.load(more + at_grad, mask=inside, other=0.0)
            grad = grad * up + down * p
            for h in range(0, OWN):
                own = n * OWN + h
                x = tl.load(negative + own[:, None] * width + d, mask=inside, other=0.0)
                grad += tl.load(own_push + own, mask=here, other=0.0)[:, None] * x.to(tl.float32)
            tl.store(query_grad + at_grad, grad, mask=inside)
        if negative_grad is not None:
            for h in range(0, OWN):
                own = n * OWN + h
                part = tl.load(own_push + own, mask=here, other=0.0)[:, None] * q
                tl.store(negative_grad + own[:, None] * width + d, part, mask=inside)
        if scaled_query is not None:
            scaled = narrow(q * up, scaled_query.dtype.element_ty, INTERPRETED)
            tl.store(scaled_query + at_scaled, scaled, mask=inside)
        if scaled_target is not None:
            scaled = narrow(p * up, scaled_target.dtype.element_ty, INTERPRETED)
            tl.store(scaled_target + at_scaled, scaled, mask=inside)
        if target_sum is not None:
            grad = tl.load(target_sum + at_grad, mask=inside, other=0.0)
            tl.store(target_sum + at_grad, grad * up + down * q, mask=inside)


@triton.jit
def collect(
    places,  # [R] int64, sorted: targets that rows have as positive
    order,  # [R] int64: those rows, in their order
    query,  # [R, D] operands
    pull,  # [R]
    target_sum,  # [R, D] float32 or None: then pull * query
    target_grad,  # [M, D] float32, in and out
    rows,
    targets,
    width,
    stride_query,
    stride_grad,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """What positives get from their rows, one after the other: the first row of a target adds."""
    k = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    at = tl.load(places + k, mask=k < rows, other=-1)
    before = tl.load(places + k - 1, mask=(k > 0) & (k < rows), other=-1)
    leads = (k < rows) & (before != at) & (at >= 0) & (at < targets)
    at = tl.where(leads, at, 0)
    for start in range(0, width, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)[None, :]
        place = target_grad + at[:, None] * stride_grad + d
        total = tl.load(place, mask=leads[:, None] & (d < width), other=0.0)
        i = k
        more = leads
        while tl.max(more.to(tl.int32), 0) > 0:
            n = tl.load(order + i, mask=more, other=0)
            inside = more[:, None] & (d < width)
            if target_sum is not None:
                total += tl.load(target_sum + n[:, None] * width + d, mask=inside, other=0.0)
            else:
                q = tl.load(query + n[:, None] * stride_query + d, mask=inside, other=0.0)
                part = tl.load(pull + n, mask=more, other=0.0)[:, None] * q.to(tl.float32)
                total += tl.where(more[:, None], part, 0.0)
            i += 1
            more = more & (i < rows)
            more = more & (tl.load(places + i, mask=more, other=-1) == at)
        tl.store(place, total, mask=leads[:, None] & (d < width))


@triton.jit
def rescale(grad, factor, elements, BLOCK: tl.constexpr):
    """grad *= factor in place; nothing is read where the factor is 1."""
    by = tl.load(factor).to(tl.float32)
    if by != 1.0:
        i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(grad + i, mask=i < elements)
        tl.store(grad + i, x * by, mask=i < elements)
