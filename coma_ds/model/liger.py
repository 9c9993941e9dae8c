"""Liger kernels (Hsu et al., 2024) in the place of what they fuse, module by module.

The stock modules keep their parameters and names; only their forward is another one, on the
instance.  No class and no module of transformers is changed.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from types import FunctionType, MethodType

import torch
from torch import nn

ROTATION = "apply_rotary_pos_emb"  # what the attention of the text calls, (q, k, cos, sin)


@dataclass
class Applied:
    """How many modules of each kind got a kernel, and why those of another kind did not."""

    counts: dict[str, int] = field(default_factory=dict)
    lacks: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        said = ", ".join(f"{count} {name}" for name, count in self.counts.items())
        lacks = "; ".join(f"{name}: {why}" for name, why in self.lacks.items())
        return f"{said or 'nothing'}{f' ({lacks})' if lacks else ''}"


def missing_liger(device: torch.device, precision: str) -> str:
    """Why Liger's kernels cannot be used; empty where they can."""
    if importlib.util.find_spec("liger_kernel") is None:
        return "liger-kernel is not installed"
    if device.type != "cuda":
        return "they need a GPU"
    if precision == "autocast":
        return "autocast mixes the types of their operands"
    return ""


def apply_liger(model) -> Applied:
    """Put Liger's kernels into a ``CompressionModel``, in place."""
    from liger_kernel import transformers as liger

    applied = Applied()
    lm = model.backbone.lm
    applied.counts["RMSNorm"] = sum(_norm(m, liger.LigerRMSNorm) for m in lm.modules())
    applied.counts["SwiGLU"] = sum(_mlp(m, liger.LigerSwiGLUMLP) for m in lm.modules())
    rotated = [_rotation(layer.self_attn, liger) for layer in model.backbone.text.layers]
    applied.counts["RoPE"] = rotated.count("")
    if problems := sorted(set(rotated) - {""}):
        applied.lacks["RoPE"] = problems[0]
    model.answers.fused = FusedCrossEntropy(liger.LigerFusedLinearCrossEntropyLoss)
    applied.counts["cross-entropy"] = 1
    applied.lacks |= {
        name: "no module of that form" for name in ("RMSNorm", "SwiGLU") if not applied.counts[name]
    }
    applied.counts = {name: count for name, count in applied.counts.items() if count}
    return applied


def _norm(module: nn.Module, kind: type) -> int:
    if not type(module).__name__.endswith("RMSNorm") or not hasattr(module, "variance_epsilon"):
        return 0
    # What its forward reads beside the weight differs by release: all that a fresh one has.
    fresh = kind(1, eps=module.variance_epsilon, in_place=False)
    for name, value in vars(fresh).items():
        if not name.startswith("_") and name != "training":
            setattr(module, name, value)
    module.forward = MethodType(kind.forward, module)
    return 1


def _mlp(module: nn.Module, kind: type) -> int:
    parts = ("gate_proj", "up_proj", "down_proj")
    if not all(hasattr(module, name) for name in parts) or not _is_silu(module):
        return 0
    module.forward = MethodType(kind.forward, module)
    return 1


def _is_silu(module: nn.Module) -> bool:
    act = getattr(module, "act_fn", None)
    probe = torch.tensor([-1.5, 0.0, 2.0])
    return callable(act) and torch.equal(act(probe), nn.functional.silu(probe))


def _rotation(attention: nn.Module, liger) -> str:
    """Why the rotation of an attention module stays as it is; empty where it does not.

    Its forward is taken again with Liger's function under the name that it calls.
    """
    forward = type(attention).forward
    if not isinstance(forward, FunctionType) or inspect.unwrap(forward) is not forward:
        return "its forward is wrapped"
    if ROTATION not in forward.__code__.co_names:
        return f"this transformers release does not call {ROTATION}"

    def rotate(query, key, cos, sin, *rest, **named):
        return liger.liger_rotary_pos_emb(query, key, cos, sin)

    own = dict(forward.__globals__) | {ROTATION: rotate}
    again = FunctionType(
        forward.__code__, own, forward.__name__, forward.__defaults__, forward.__closure__
    )
    again.__kwdefaults__ = forward.__kwdefaults__
    attention.forward = MethodType(again, attention)
    return ""


class FusedCrossEntropy:
    """Sum of the cross-entropy of answer rows, and right rows, without logits of all rows.

    Gradients of states and matrix are computed in the forward.
    """

    def __init__(self, kind: Callable) -> None:
        self._loss = kind(reduction="sum", accum_dtype=torch.float32, return_token_accuracy=True)

    def __call__(
        self, hidden_RD: torch.Tensor, weight_VD: torch.Tensor, labels_R: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As ``AnswerHead`` gives them."""
        out = self._loss(weight_VD, hidden_RD, labels_R)
        loss = out.loss if out.loss.dtype == torch.float64 else out.loss.float()
        return loss, (out.token_accuracy * len(labels_R)).float()
