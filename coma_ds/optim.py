"""Parameter groups, optimizer and the learning rate as a function of the step."""

from __future__ import annotations

import math

import torch
from torch import nn

from coma_ds.config import OptimConfig


def parameter_groups(model: nn.Module, config: OptimConfig) -> list[dict]:
    """Trainable parameters by learning rate and decay; vectors are never decayed.

    Each group has ``scale``: its learning rate over ``config.lr``.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        is_token = name.startswith("tokens.")
        scale = config.token_lr / config.lr if is_token and config.token_lr else 1.0
        shape = getattr(parameter, "ds_shape", parameter.shape)  # ZeRO-3 empties the parameter
        decay = config.weight_decay if len(shape) > 1 and not is_token else 0.0
        groups.setdefault((scale, decay), []).append(parameter)
    if not groups:
        raise ValueError("nothing is trained: every parameter is frozen")
    return [
        {"params": params, "scale": scale, "lr": config.lr * scale, "weight_decay": decay}
        for (scale, decay), params in groups.items()
    ]


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """AdamW, Muon with AdamW beside it, or plain SGD (for gradient checks)."""
    groups = parameter_groups(model, config)
    if config.kind == "muon":
        return MuonAdamW(model, config)
    if config.kind == "sgd":
        return torch.optim.SGD(groups, lr=config.lr)
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=1e-8)


class MuonAdamW(torch.optim.Optimizer):
    """Torch's Muon for the weight matrices, AdamW for embeddings, tokens, vectors and the rest.

    Learns a small model from random weights in fewer steps than AdamW.  It needs whole matrices,
    so it runs at ZeRO-0 only.  Muon's rate is ``config.lr`` with the update scaled to AdamW's size
    (Liu et al., "Muon is scalable for LLM training", 2025).
    """

    def __init__(self, model: nn.Module, config: OptimConfig) -> None:
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        lookup = ("embed_tokens", "lm_head", "tokens.", "answers.")
        matrices = [p for n, p in named if p.dim() == 2 and not any(w in n for w in lookup)]
        chosen = {id(p) for p in matrices}
        rest = [p for _, p in named if id(p) not in chosen]
        decay = config.weight_decay
        self.parts = [
            torch.optim.Muon(
                matrices, lr=config.lr, weight_decay=decay, adjust_lr_fn="match_rms_adamw"
            ),
            torch.optim.AdamW(rest, lr=config.lr, betas=config.betas, weight_decay=0.0),
        ]
        super().__init__([{"params": matrices}, {"params": rest}], {"lr": config.lr})

    @torch.no_grad()
    def step(self, closure=None):
        """One update of both, at the rates of this optimizer's groups."""
        for part, group in zip(self.parts, self.param_groups):
            part.param_groups[0]["lr"] = group["lr"]
            part.step()

    def state_dict(self):
        """The states of both parts."""
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state):
        """Restore both parts."""
        for part, saved in zip(self.parts, state["parts"]):
            part.load_state_dict(saved)


def learning_rate(step: int, config: OptimConfig) -> float:
    """The rate of optimizer step ``step`` (from 0): linear warm-up, then the schedule to 0.

    A pure function of the step, so a resumed run needs no scheduler state.
    """
    warm = math.ceil(config.warmup * config.steps)
    if step < warm:
        return config.lr * (step + 1) / warm
    share = (step - warm) / max(1, config.steps - warm)
    if config.schedule == "cosine":
        return config.lr * 0.5 * (1 + math.cos(math.pi * share))
    return config.lr * (1 - share) if config.schedule == "linear" else config.lr
