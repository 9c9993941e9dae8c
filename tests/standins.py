"""Stand-ins for attention packages that need a GPU: their signatures and contracts, in torch.

They are written from the packages' documentation, compute in fp64 from the definition, and refuse
what the real ones refuse.
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import torch

HALF = (torch.bfloat16, torch.float16)


def defined(query, key, value, bounds, scale, causal) -> torch.Tensor:
    """softmax(query key' scale) value span by span and head by head, in fp64; any dtype out."""
    spans = list(zip(bounds[:-1].tolist(), bounds[1:].tolist()))
    groups = query.shape[1] // key.shape[1]
    columns = []
    for head in range(query.shape[1]):
        rows = []
        for start, end in spans:
            span = slice(start, end)
            q, k, v = query[span, head], key[span, head // groups], value[span, head // groups]
            scores = q.double() @ k.double().T * scale
            if causal:
                size = end - start
                later = torch.ones(size, size, dtype=torch.bool, device=scores.device).triu(1)
                scores = scores.masked_fill(later, float("-inf"))
            rows.append(scores.softmax(-1) @ v.double())
        columns.append(torch.cat(rows))
    return torch.stack(columns, 1).to(query.dtype)


def _check(query, key, value, bounds, longest, *, dtypes) -> None:
    assert query.dtype in dtypes and query.dtype == key.dtype == value.dtype, "dtype"
    assert query.dim() == key.dim() == value.dim() == 3
    assert query.shape[1] % key.shape[1] == 0 and key.shape == value.shape
    assert query.stride(-1) == key.stride(-1) == value.stride(-1) == 1
    assert bounds.dtype == torch.int32 and bounds.is_contiguous() and bounds.dim() == 1
    assert int(bounds[0]) == 0 and int(bounds[-1]) == len(query) == len(key)
    assert type(longest) is int and longest >= int(bounds.diff().max())


def flash_attn_package(dtypes=HALF) -> dict[str, ModuleType]:
    """flash-attn 2.8: ``flash_attn.flash_attn_varlen_func``."""

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
        alibi_slopes=None, deterministic=False, return_attn_probs=False, block_table=None,
    ):  # fmt: skip
        _check(q, k, v, cu_seqlens_q, max_seqlen_q, dtypes=dtypes)
        assert torch.equal(cu_seqlens_q, cu_seqlens_k) and max_seqlen_q == max_seqlen_k
        assert dropout_p == 0 and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256
        scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
        return defined(q, k, v, cu_seqlens_q, scale, causal)

    return _package("flash_attn", "flash_attn_interface", flash_attn_varlen_func)


def flash_attn_4_package(dtypes=HALF) -> dict[str, ModuleType]:
    """flash-attn 4: ``flash_attn.cute.flash_attn_varlen_func``, some releases with the sums."""

    def flash_attn_varlen_func(
        q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None,
        max_seqlen_k=None, *, softmax_scale=None, causal=False, deterministic=False,
    ):  # fmt: skip
        _check(q, k, v, cu_seqlens_q, max_seqlen_q, dtypes=dtypes)
        assert qv is None and torch.equal(cu_seqlens_q, cu_seqlens_k)
        scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
        return defined(q, k, v, cu_seqlens_q, scale, causal), None

    return _package("flash_attn", "cute", flash_attn_varlen_func)


def torch_varlen(release: str, dtypes=HALF):
    """``torch.nn.attention.varlen.varlen_attn`` as it is in torch 2.10, 2.11 and 2.13."""

    def run(q, k, v, bounds, longest, scale, causal):
        _check(q, k, v, bounds, longest, dtypes=dtypes)
        return defined(q, k, v, bounds, q.shape[-1] ** -0.5 if scale is None else scale, causal)

    def old(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):
        assert query.shape == key.shape
        return run(query, key, value, cu_seq_q, max_q, None, is_causal)

    def middle(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *,
        return_aux=None, scale=None, window_size=(-1, -1),
    ):  # fmt: skip
        assert query.shape == key.shape and window_size in ((-1, 0), (-1, -1))
        return run(query, key, value, cu_seq_q, max_q, scale, window_size == (-1, 0))

    def new(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *,
        return_aux=None, scale=None, window_size=(-1, -1), enable_gqa=False,
        seqused_k=None, block_table=None, num_splits=None,
    ):  # fmt: skip
        assert enable_gqa or query.shape == key.shape
        assert window_size in ((-1, 0), (-1, -1))
        return run(query, key, value, cu_seq_q, max_q, scale, window_size == (-1, 0))

    return {"2.10": old, "2.11": middle, "2.13": new}[release]


def _package(name: str, inner: str, function) -> dict[str, ModuleType]:
    outer, module = ModuleType(name), ModuleType(f"{name}.{inner}")
    for made in (outer, module):
        made.__spec__ = ModuleSpec(made.__name__, None)
        made.flash_attn_varlen_func = function
    outer.__path__ = []
    setattr(outer, inner, module)
    return {name: outer, f"{name}.{inner}": module}


def install(monkeypatch, modules: dict[str, ModuleType]) -> None:
    """For the time of a test."""
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)


def liger_package() -> dict[str, ModuleType]:
    """liger-kernel 0.8.5: the four of ``liger_kernel.transformers`` that are used."""
    calls: dict[str, int] = dict.fromkeys(("norm", "mlp", "rope", "loss"), 0)

    class LigerRMSNorm(torch.nn.Module):
        def __init__(
            self, hidden_size, eps=1e-6, offset=0.0, casting_mode="llama", init_fn="ones",
            in_place=True, row_mode=None, elementwise_affine=True,
        ):  # fmt: skip
            super().__init__()
            self.elementwise_affine = elementwise_affine
            self.weight = torch.nn.Parameter(torch.ones(hidden_size))
            self.variance_epsilon, self.offset, self.casting_mode = eps, offset, casting_mode
            self.in_place, self.row_mode = in_place, row_mode

        def forward(self, hidden_states):
            calls["norm"] += 1
            assert (self.offset, self.casting_mode, self.in_place) == (0.0, "llama", False)
            assert self.row_mode is None and self.elementwise_affine
            wide = hidden_states.float()  # as the kernel does
            scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.variance_epsilon)
            return (wide * scale).to(hidden_states.dtype) * self.weight

    class LigerSwiGLUMLP(torch.nn.Module):
        def forward(self, x):
            calls["mlp"] += 1
            gate = self.gate_proj(x)
            return self.down_proj(gate * torch.sigmoid(gate) * self.up_proj(x))

    def liger_rotary_pos_emb(q, k, cos, sin, position_ids=None, unsqueeze_dim=1, rotary_dim=None):
        calls["rope"] += 1
        half = q.shape[-1] // 2
        assert cos.dim() == 3 and cos.shape[-1] == 2 * half
        assert torch.equal(cos[..., :half], cos[..., half:])  # the kernel reads the first half

        def turned(x):
            a, b = x[..., :half], x[..., half:]
            c, s = cos[:, None, :, :half], sin[:, None, :, :half]
            return torch.cat([a * c - b * s, b * c + a * s], -1)

        return turned(q), turned(k)

    class LigerFusedLinearCrossEntropyLoss(torch.nn.Module):
        def __init__(
            self, ce_weight=None, ignore_index=-100, lse_square_scale=0.0, label_smoothing=0.0,
            reduction="mean", softcap=None, return_z_loss=False, accum_dtype=None,
            use_token_scaling=False, return_token_accuracy=False, return_predicted_tokens=False,
        ):  # fmt: skip
            super().__init__()
            assert reduction == "sum" and accum_dtype == torch.float32 and return_token_accuracy

        def forward(self, lin_weight, _input, target, bias=None):
            calls["loss"] += 1
            assert _input.dim() == 2 and lin_weight.shape[1] == _input.shape[1] and len(target)
            logits = _input @ lin_weight.T
            loss = (logits.logsumexp(-1) - logits[torch.arange(len(target)), target]).sum()
            right = (logits.argmax(-1) == target).float().mean()
            return SimpleNamespace(loss=loss, z_loss=None, token_accuracy=right)

    outer, inner = ModuleType("liger_kernel"), ModuleType("liger_kernel.transformers")
    for module in (outer, inner):
        module.__spec__ = ModuleSpec(module.__name__, None)
    outer.__path__, outer.transformers = [], inner
    inner.calls = calls
    inner.LigerRMSNorm, inner.LigerSwiGLUMLP = LigerRMSNorm, LigerSwiGLUMLP
    inner.liger_rotary_pos_emb = liger_rotary_pos_emb
    inner.LigerFusedLinearCrossEntropyLoss = LigerFusedLinearCrossEntropyLoss
    return {"liger_kernel": outer, "liger_kernel.transformers": inner}
