"""InfoNCE on Triton in autograd: gradients are computed with the loss.

The terms of a panel are there in the forward, so the gradients are made there, for the weight that
a row has in the result; the backward multiplies them by the incoming gradient (which is not even
looked at twice: where it is 1 nothing is read).  ``reduction="none"`` does its work in the
backward, where the weights of the rows are known, and computes the terms a second time.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from coma_ds.kernels.info_nce.inputs import Problem
from coma_ds.kernels.info_nce.launch import rescale
from coma_ds.kernels.info_nce.passes import Run, Wanted

TIE = 2e-6  # cosines of a product and of a single row differ by rounding


class _InfoNCE(torch.autograd.Function):
    @staticmethod
    def forward(ctx, p, options, reduction, factor, query, target, temperature, own, query_all):
        needs = ctx.needs_input_grad[4:]
        ctx.wanted = Wanted(*needs)
        ctx.by_row = reduction == "none"
        ctx.dtypes = (query.dtype, temperature.dtype)
        ctx.temperatures = len(temperature)
        now = Wanted() if ctx.by_row else ctx.wanted
        run = Run(p, now, factor=factor, **options)
        if ctx.by_row:
            ctx.p, ctx.options, ctx.factor = p, options, factor
            ctx.save_for_backward(query, target, temperature, own, query_all)
            loss = run.losses * factor
        else:
            grads = (run.query_grad, run.target_grad, run.heat, run.own_grad, run.all_grad)
            ctx.grads = [grad if need else None for grad, need in zip(grads, needs)]
            loss = run.losses.sum() * factor
        shown = (run.positive, run.hardest, run.masked)
        ctx.mark_non_differentiable(*(x for x in shown if x is not None))
        return loss, *shown

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, *_):
        if ctx.by_row:
            query, target, temperature, own, query_all = ctx.saved_tensors
            p = replace(
                ctx.p,
                query_ND=query,
                target_MD=target,
                temperature=temperature,
                own_negative_NHD=own,
                query_all_PD=query_all,
            )
            run = Run(p, ctx.wanted, weight_N=grad * ctx.factor, **ctx.options)
            needs = ctx.needs_input_grad[4:]
            grads = (run.query_grad, run.target_grad, run.heat, run.own_grad, run.all_grad)
            grads = [grad if need else None for grad, need in zip(grads, needs)]
            grad = torch.ones((), device=query.device)
        else:
            if ctx.grads is None:
                raise RuntimeError(
                    "a second backward through info_nce: its gradients are given away by the "
                    "first; call info_nce again, or use COMA_KERNELS=torch"
                )
            grads, ctx.grads = ctx.grads, None
        query, target, heat, own, query_all = grads
        dtype, warm = ctx.dtypes
        if heat is not None:
            heat = (heat * grad).to(warm)
            heat = heat.sum().reshape(1) if ctx.temperatures == 1 else heat
        query, target, own, query_all = (
            None if x is None else rescale(x, grad, dtype) for x in (query, target, own, query_all)
        )
        return None, None, None, None, query, target, heat, own, query_all


def kernel_losses(
    p: Problem,
    *,
    reduction: str,
    weight: float = 1.0,
    operand_dtype: torch.dtype | None = None,
    share: float,
    statistics: bool = False,
) -> tuple[torch.Tensor, dict[str, torch.Tensor] | None]:
    """Loss (float32, a scalar, or [N] for "none") and sums for monitoring, or None.

    An index out of range or a temperature that is not positive makes NaN: they are not looked at.
    """
    options = {"operand_dtype": operand_dtype, "share": share, "statistics": statistics}
    factor = weight / p.rows if reduction == "mean" else weight
    loss, positive, hardest, masked = _InfoNCE.apply(
        p,
        options,
        reduction,
        factor,
        p.query_ND,
        p.target_MD,
        p.temperature,
        p.own_negative_NHD,
        p.query_all_PD,
    )
    if not statistics:
        return loss, None
    hits = (positive > hardest + TIE).float()
    sums = {"positive": positive, "hardest": hardest, "accuracy": hits, "masked": masked}
    sums = {name: x.sum() for name, x in sums.items()}
    return loss, sums | {"rows": torch.full_like(sums["masked"], p.rows)}
