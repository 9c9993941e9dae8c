"""The public function: checks, the choice of an implementation, the reduction."""

from __future__ import annotations

import torch

from coma_ds.kernels.dispatch import choose
from coma_ds.kernels.info_nce import reference
from coma_ds.kernels.info_nce.inputs import FalseNegatives, make_problem
from coma_ds.kernels.info_nce.plan import SHARE

REDUCTIONS = ("mean", "sum", "none")


def info_nce(
    query_ND: torch.Tensor,
    target_MD: torch.Tensor,
    *,
    positive_index: torch.Tensor | int,
    temperature: torch.Tensor | float,
    false_negatives: FalseNegatives | None = None,
    margin: float | None = None,
    hardness: float = 0.0,
    own_negative_NHD: torch.Tensor | None = None,
    query_all_PD: torch.Tensor | None = None,
    query_index: torch.Tensor | int | None = None,
    target_to_target: bool = False,
    reduction: str = "mean",
    weight: float = 1.0,
    operand_dtype: torch.dtype | None = None,
    statistics: bool = False,
    share: float = SHARE,
    chunk: int = reference.DEFAULT_CHUNK,
) -> torch.Tensor | tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Cross-entropy of each query's own target against all its negatives.

    The loss of a row is log(1 + sum over its negatives of exp((s - s_pos) / temperature + a * s)).

    - ``query_ND``, ``target_MD``: unit vectors of one float dtype; sums and gradients of columns
      in float32 (all of it in float64 for float64).
    - ``positive_index``: int64 [N], or a number: the place of the first row's target, those of the
      others follow it.  The number spares a sort, and the look at the values.
    - ``temperature``: above 0; a number, a tensor of one element, or [N], one for each row; a
      tensor may need a gradient.
    - ``false_negatives``: who does not compete with whom, by content.  ``margin``: nor does a
      negative with s > s_pos + margin.  ``hardness`` a >= 0: a negative counts exp(a * s) times,
      s its cosine, without gradient (Lan et al., 2025, LLaVE: added to the logit as a * s, whatever
      the temperature; the positive does not get it).
    - ``own_negative_NHD``: negatives of their own row alone; shared ones are further targets.
    - ``query_all_PD`` with ``query_index`` (where the own queries are in it, like
      ``positive_index``): the other queries are negatives too.  ``target_to_target``: so are the
      cosines of the row's positive with the other targets.  All share the row's sum, its
      ``s_pos``, margin and hardness (Zhang et al., 2025, Qwen3 Embedding).
    - ``reduction``: ``mean``, ``sum`` or ``none``; ``weight`` multiplies the result (given here it
      costs nothing; a factor on the result costs a pass over the gradients).
    - ``operand_dtype``: bfloat16 or float16 for float32 embeddings: they are rounded to it before
      they are multiplied; gradients stay float32.  None: on Triton the cosines of float32 come
      from three TF32 products, the gradients from torch's float32 matmul.
    - ``statistics``: also return the sums of ``retrieval_statistics``, here with the margin, and
      (on Triton) without a pass of their own.
    - ``share``: of the N x C float32 logits that the kernels' panels may take; ``chunk``: rows
      that the plain-torch form takes at a time.

    On Triton a graph can be gone through backwards once only, and bad values inside GPU tensors
    (an index out of range, a temperature of 0) give NaN; elsewhere they are errors.

    Raises ``ValueError`` for shapes, dtypes or devices that do not fit and for numbers out of
    range.  Source: van den Oord et al., 2018.
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction {reduction!r}: expected 'mean', 'sum' or 'none'")
    p = make_problem(
        query_ND,
        target_MD,
        positive_index=positive_index,
        temperature=temperature,
        false_negatives=false_negatives,
        margin=margin,
        hardness=hardness,
        own_negative_NHD=own_negative_NHD,
        query_all_PD=query_all_PD,
        query_index=query_index,
        target_to_target=target_to_target,
    )
    if operand_dtype is not None:
        if operand_dtype not in (torch.bfloat16, torch.float16):
            raise ValueError(f"operand_dtype {operand_dtype}: expected torch.bfloat16 or float16")
        if query_ND.dtype not in (torch.float32, operand_dtype):
            raise ValueError(f"operand_dtype for {query_ND.dtype}: expected float32 embeddings")
    if choose("info_nce", *p.tensors(), supported=_obstacle(p)) == "triton":
        from coma_ds.kernels.info_nce.function import kernel_losses

        if p.query_ND.device.type == "cpu":
            p.check_values()
        loss, sums = kernel_losses(
            p,
            reduction=reduction,
            weight=weight,
            operand_dtype=operand_dtype,
            share=share,
            statistics=statistics,
        )
        return (loss, sums) if statistics else loss
    losses_N = reference.row_losses(p, operand_dtype=operand_dtype, chunk=chunk)
    loss = losses_N * weight if weight != 1 else losses_N
    if reduction != "none":
        loss = loss.mean() if reduction == "mean" else loss.sum()
    if not statistics:
        return loss
    sums = reference.retrieval_statistics(
        query_ND,
        target_MD,
        positive_index=p.positive_N,
        false_negatives=false_negatives,
        margin=margin,
        chunk=chunk,
    )
    return loss, sums


def _obstacle(p) -> str | None:
    """Why the kernels cannot serve a call, or None where they do."""
    if p.query_ND.dtype == torch.float64:
        return "float64 input"
    if not p.query_ND.shape[1] or not len(p.target_MD) or not p.rows:
        return "an empty input"
    return None
