"""The public functions: checks, dispatch, autograd.

Shapes: B samples, K compression tokens, L positions of a padded sequence, D width.
"""

from __future__ import annotations

import math

import torch
from torch.autograd.function import once_differentiable

from coma_ds.kernels.attention_pool import launch, reference
from coma_ds.kernels.dispatch import choose

EPS = reference.EPS
LONGEST = 1024  # tokens of a sample that the kernels serve
WIDEST = 8192  # padded width


def attention_pool(
    rows_BKD: torch.Tensor,
    query_D: torch.Tensor | None = None,
    *,
    valid: torch.Tensor | None = None,
    heads: int = 1,
    eps: float = EPS,
) -> torch.Tensor:
    """Score the rows with a query, softmax over K, weighted sum, unit norm.

    ``rows_BKD`` in any float dtype.  ``query_D`` or None, which is the zero query: the mean.
    ``valid`` integers [B], 1 .. K: how many rows of a sample count, the first ones; the others may
    hold anything, NaN too.  ``heads`` cuts rows and query along D; each part has its own softmax,
    scores are divided by the square root of its width.  Sums are float32 (float64 for float64
    rows); the result [B, D] has that dtype and unit norm, or what is left of it below ``eps``.
    Gradients have the dtypes of rows and query.  NaN, an infinity, or a norm beyond the dtype makes
    the sample's whole result NaN.

    Raises ``ValueError`` for shapes, dtypes, devices or heads that do not fit, and for numbers in
    ``valid`` out of range; on a GPU, where looking would wait for the device, such a sample is NaN.
    Source: the pooling of Lee et al. (Set Transformer, 2019) with one seed and no projections; with
    a zero query the mean of Li et al., arXiv 2511.08480.
    """
    _check_rows(rows_BKD, "rows", "[B, K, D]")
    _check_rest(rows_BKD, query_D, valid, heads, eps)
    _check_values(valid, rows_BKD.shape[1])
    return _pool(rows_BKD, None, query_D, valid, heads, eps)


def attention_pool_at(
    hidden_BLD: torch.Tensor,
    positions_BK: torch.Tensor,
    query_D: torch.Tensor | None = None,
    *,
    valid: torch.Tensor | None = None,
    heads: int = 1,
    eps: float = EPS,
) -> torch.Tensor:
    """``attention_pool`` of the rows at ``positions_BK`` of a padded sequence, taken in place.

    ``positions_BK`` integers, increasing along K within the first ``valid`` ones, 0 .. L - 1; the
    others are not looked at.  The gradient is [B, L, D], its zeros included: where the gathered
    rows are all that is wanted, ``attention_pool`` moves fewer bytes.

    Raises ``ValueError`` as ``attention_pool`` does, and for positions that are no such numbers; on
    a GPU such a sample is NaN.
    """
    _check_rows(hidden_BLD, "hidden", "[B, L, D]")
    samples, length = hidden_BLD.shape[:2]
    if positions_BK.dim() != 2 or len(positions_BK) != samples or not positions_BK.shape[1]:
        raise ValueError(
            f"positions have shape {tuple(positions_BK.shape)}: expected [{samples}, K], K above 0"
        )
    _check_integers(positions_BK, "positions")
    _check_rest(hidden_BLD, query_D, valid, heads, eps)
    _check_device("positions", positions_BK, hidden_BLD)
    _check_values(valid, positions_BK.shape[1])
    _check_positions(positions_BK, valid, length)
    return _pool(hidden_BLD, positions_BK, query_D, valid, heads, eps)


def _check_rows(rows: torch.Tensor, name: str, wanted: str) -> None:
    if rows.dim() != 3 or 0 in rows.shape[1:]:
        raise ValueError(f"{name} have shape {tuple(rows.shape)}: expected {wanted}, none empty")
    if not rows.dtype.is_floating_point:
        raise ValueError(f"{name} have dtype {rows.dtype}: expected a float dtype")


def _check_integers(tensor: torch.Tensor, name: str) -> None:
    if tensor.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{name} have dtype {tensor.dtype}: expected int32 or int64")


def _check_device(name: str, tensor: torch.Tensor, rows: torch.Tensor) -> None:
    if tensor.device != rows.device:
        raise ValueError(f"{name} on {tensor.device}, rows on {rows.device}: expected one device")


def _check_rest(rows, query_D, valid_B, heads: int, eps: float) -> None:
    width = rows.shape[-1]
    if not isinstance(heads, int) or heads < 1 or width % heads:
        raise ValueError(f"heads={heads!r}: expected a divisor of the width {width}")
    if not eps > 0:
        raise ValueError(f"eps={eps!r}: expected a number above 0")
    if query_D is not None:
        if query_D.shape != (width,):
            raise ValueError(
                f"the query has shape {tuple(query_D.shape)}: expected [{width}], "
                "the width of the rows"
            )
        if not query_D.dtype.is_floating_point:
            raise ValueError(f"the query has dtype {query_D.dtype}: expected a float dtype")
        _check_device("query", query_D, rows)
    if valid_B is None:
        return
    if valid_B.shape != rows.shape[:1]:
        raise ValueError(f"valid has shape {tuple(valid_B.shape)}: expected [{len(rows)}]")
    _check_integers(valid_B, "valid")
    _check_device("valid", valid_B, rows)


def _check_values(valid_B, count: int) -> None:
    if valid_B is None or valid_B.device.type != "cpu" or not len(valid_B):
        return
    low, high = int(valid_B.min()), int(valid_B.max())
    if low < 1 or high > count:
        raise ValueError(f"valid spans {low}..{high}: expected 1..{count}")


def _check_positions(positions_BK, valid_B, length: int) -> None:
    if positions_BK.device.type != "cpu":
        return
    count = positions_BK.shape[1]
    used_BK = torch.ones_like(positions_BK, dtype=torch.bool)
    if valid_B is not None:
        used_BK = torch.arange(count) < valid_B[:, None]
    own = positions_BK[used_BK]
    if len(own) and (int(own.min()) < 0 or int(own.max()) >= length):
        raise ValueError(
            f"positions span {int(own.min())}..{int(own.max())}: expected 0..{length - 1}"
        )
    falls_B = ((positions_BK[:, 1:] <= positions_BK[:, :-1]) & used_BK[:, 1:]).any(1)
    if falls_B.any():
        sample = int(falls_B.nonzero()[0])
        raise ValueError(
            f"positions of sample {sample} are {positions_BK[sample].tolist()}: "
            "expected increasing numbers"
        )


def _unserved(rows, query_D, heads: int, count: int) -> str | None:
    """Why the kernels cannot serve these inputs, or None."""
    for name, tensor in (("rows", rows), ("query", query_D)):
        if tensor is not None and tensor.dtype not in (
            torch.bfloat16,
            torch.float16,
            torch.float32,
        ):
            return f"{name} of {tensor.dtype}"
    if count > LONGEST:
        return f"{count} tokens, more than {LONGEST}"
    block = math.prod(launch.tile(rows.shape[-1], heads))
    if block > WIDEST:
        return f"a padded width of {block}, more than {WIDEST}"
    apart = rows.shape[1] * max(rows.stride(1), rows.shape[2])
    if apart >= 2**31:
        return f"a sample of {apart} elements from end to end, more than 2^31"
    return None


def _pool(rows, positions_BK, query_D, valid_B, heads, eps) -> torch.Tensor:
    count = rows.shape[1] if positions_BK is None else positions_BK.shape[1]
    tensors = [t for t in (rows, query_D) if t is not None]
    why = _unserved(rows, query_D, heads, count)
    if choose("attention_pool", *tensors, supported=why) == "triton":
        return _Pool.apply(rows, query_D, positions_BK, valid_B, heads, eps)
    if positions_BK is None:
        return reference.attention_pool(rows, query_D, valid=valid_B, heads=heads, eps=eps)
    return reference.attention_pool_at(
        rows, positions_BK, query_D, valid=valid_B, heads=heads, eps=eps
    )


class _Pool(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, query_D, positions_BK, valid_B, heads, eps):
        if rows.stride(-1) != 1:
            rows = rows.contiguous()
        query_D, positions_BK, valid_B = (
            None if t is None else t.contiguous() for t in (query_D, positions_BK, valid_B)
        )
        with torch.cuda.device_of(rows):
            saved = launch.forward(
                rows,
                positions_BK,
                query_D,
                valid_B,
                heads=heads,
                eps=eps,
                train_query=ctx.needs_input_grad[1],
            )
        ctx.options = {"heads": heads, "eps": eps, "length": rows.shape[1], "dtype": rows.dtype}
        ctx.save_for_backward(
            None if query_D is None else rows,
            positions_BK,
            query_D,
            valid_B,
            saved.emb_BD,
            saved.divisor_B,
            saved.scores_BHK,
            saved.softmax_BH2,
            saved.counters_C,
        )
        return saved.emb_BD

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_emb_BD):
        rows, positions_BK, query_D, valid_B, *kept = ctx.saved_tensors
        with torch.cuda.device_of(grad_emb_BD):
            gradients = launch.backward(
                grad_emb_BD.contiguous(),
                rows,
                positions_BK,
                query_D,
                valid_B,
                launch.Saved(*kept),
                wanted=ctx.needs_input_grad[:2],
                **ctx.options,
            )
        return *gradients, None, None, None, None
