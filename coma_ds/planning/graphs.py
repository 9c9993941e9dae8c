"""What the graph of a forward holds in memory: the real modules on torch's meta device.

Attention holds what a flash kernel does: its operands, its output and a sum a row.
"""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn

from coma_ds.model.embedder import CompressionModel

ROWS = 256  # of the measurement; nothing depends on it


@dataclass(frozen=True)
class Graphs:
    """Bytes of a row.  ``held``: of a token until the backward, less with checkpoints; ``layer``:
    of a token in one layer; ``patch``: of a patch in the tower, 0 where that is frozen."""

    held: float
    layer: float
    patch: float


class _Saves(torch.autograd.Function):
    """Gives an empty tensor of the shape of ``like``, and holds the others."""

    @staticmethod
    def forward(ctx, like, *held):
        ctx.save_for_backward(*held)
        return torch.empty_like(like)

    @staticmethod
    def backward(ctx, *_):
        raise NotImplementedError("nothing is computed here")


def _flash(query, key, value):
    """Attention [.., H, T, d] as a flash kernel holds it; its output is held as well."""
    sums = query.new_empty(query.shape[:-1], dtype=torch.float32)
    return _Saves.apply(query, query, key, value, torch.empty_like(query), sums)


def _norm(module, rows):
    return _Saves.apply(rows, rows, rows.new_empty(rows.shape[:-1], dtype=torch.float32))


def _swiglu(module, rows):
    gate, up = module.gate_proj(rows), module.up_proj(rows)
    return module.down_proj(_Saves.apply(gate, gate, up))


@contextmanager
def _fused(model: nn.Module):
    """Norms and SwiGLU hold what Liger's kernels hold."""
    changed = []
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            forward = _norm
        elif all(hasattr(module, name) for name in ("gate_proj", "up_proj", "down_proj")):
            forward = _swiglu
        else:
            continue
        module.forward = forward.__get__(module)
        changed.append(module)
    try:
        yield
    finally:
        for module in changed:
            del module.forward


class SavedBytes(torch.autograd.graph.saved_tensors_hooks):
    """Around a forward: ``total`` bytes that its graph saves, each storage once, those of the
    weights of ``model`` left out."""

    def __init__(self, model: nn.Module) -> None:
        self.total = 0
        self._seen = {p.untyped_storage()._cdata for p in model.parameters()}
        super().__init__(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()  # alive as long as the graph is
        weight = any(isinstance(t, nn.Parameter) for t in (tensor, tensor._base))
        if not weight and storage._cdata not in self._seen:
            self._seen.add(storage._cdata)
            self.total += storage.nbytes()
        return tensor


def measure_graphs(model: CompressionModel, *, liger: bool) -> Graphs:
    """Of a model of ``outline``; ``liger``: with Liger's kernels for the text."""
    text, lm = model.backbone.text, model.backbone.lm
    width, layers = model.backbone.width, len(text.layers)
    checkpointed = lm.is_gradient_checkpointing
    dtype = next(text.parameters()).dtype
    lm.gradient_checkpointing_disable()
    rows = torch.empty(1, ROWS, width, dtype=dtype, device="meta", requires_grad=True)
    places = torch.zeros(3, 1, ROWS, dtype=torch.int64, device="meta")
    held = SavedBytes(text)
    with _fused(text) if liger else nullcontext(), _autocast(model), held:
        out = text(
            inputs_embeds=rows * 1,
            position_ids=places,
            use_cache=False,
            layout=lambda query, key, value, scale: _flash(query, key, value),
        )
    del out
    if checkpointed:
        lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    whole = held.total / ROWS
    layer = whole / layers
    stays = layers * width * dtype.itemsize if checkpointed else whole
    return Graphs(stays, layer, _patch(model) if model.vision_is_trained else 0.0)


def _patch(model: CompressionModel) -> float:
    """Bytes of a patch in the graph of the tower."""
    visual = model.backbone.visual
    block = visual.blocks[0]
    norm = block.norm1
    width = norm.weight.shape[0]
    dtype = norm.weight.dtype
    rows = torch.empty(ROWS, width, dtype=dtype, device="meta", requires_grad=True)
    heads = model.backbone.lm.config.vision_config.num_heads
    turn = torch.empty(ROWS, width // heads, dtype=torch.float32, device="meta")

    def attend(query, key, value, spans, scale, causal):
        return _flash(*(x.transpose(0, 1) for x in (query, key, value))).transpose(0, 1)

    held = SavedBytes(visual)
    with _autocast(model), held:
        block(
            rows * 1,
            cu_seqlens=torch.tensor([0, ROWS], dtype=torch.int32, device="cpu"),
            position_embeddings=(turn, turn),
            attend=attend,
        )
    return held.total / ROWS * len(visual.blocks)


def _autocast(model: CompressionModel):
    return torch.autocast("cpu", torch.bfloat16, enabled=model.autocast)
