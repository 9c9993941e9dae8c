"""From K final states to one unit vector."""

from __future__ import annotations

import pytest
import torch

from coma_ds.kernels.attention_pool import attention_pool
from coma_ds.model.pooling import Pooling
from tests.tiny import K, make_batch, tiny_model


def rows(*shape: int, dtype=torch.float64, scale: float = 1.0) -> torch.Tensor:
    noise = torch.Generator().manual_seed(sum(shape))
    return (scale * torch.randn(shape, generator=noise, dtype=dtype)).requires_grad_()


def test_mean_is_the_paper_s() -> None:
    x = rows(3, 5, 7)
    wanted = x.mean(1) / x.mean(1).norm(dim=-1, keepdim=True)
    assert torch.allclose(Pooling("mean", 7)(x), wanted, atol=1e-12)


@pytest.mark.parametrize("count", [1, 4, 9])
def test_attention_with_a_zero_query_is_the_mean(count) -> None:
    """Value, and the gradient that reaches the rows."""
    pooling = Pooling("attention", 7).double()
    assert pooling.query.shape == (7,) and not pooling.query.any()
    x, y = rows(3, count, 7), rows(3, count, 7)
    weight = rows(3, 7).detach()
    found, wanted = pooling(x), Pooling("mean", 7)(y)
    assert torch.allclose(found, wanted, atol=1e-14)
    (found * weight).sum().backward()
    (wanted * weight).sum().backward()
    assert torch.allclose(x.grad, y.grad, atol=1e-14)
    if count > 1:
        assert (pooling.query.grad != 0).any()  # it learns from the first step on


def test_attention_by_hand() -> None:
    x = torch.tensor([[[1.0, 0.0, 0.0, 2.0], [0.0, 1.0, 0.0, 0.0]]], dtype=torch.float64)
    query = torch.tensor([2.0, -1.0, 0.5, 1.0], dtype=torch.float64)
    scores = torch.tensor([4.0, -1.0], dtype=torch.float64) / 2  # sqrt of the width
    share = scores.exp() / scores.exp().sum()
    wanted = share[0] * x[0, 0] + share[1] * x[0, 1]
    found = attention_pool(x, query)
    assert torch.allclose(found, (wanted / wanted.norm())[None], atol=1e-14)


def test_attention_gradients_in_fp64() -> None:
    x, query = rows(2, 3, 5), rows(5)
    assert torch.autograd.gradcheck(attention_pool, (x, query))
    assert torch.autograd.gradcheck(attention_pool, (x,))


def test_last_takes_the_last_row() -> None:
    x = rows(3, 5, 7, dtype=torch.float32)
    found = Pooling("last", 7)(x)
    assert torch.allclose(found, x[:, -1] / x[:, -1].norm(dim=-1, keepdim=True))
    found.sum().backward()
    assert not x.grad[:, :-1].any() and x.grad[:, -1].any()


@pytest.mark.parametrize("kind", ["mean", "attention", "last"])
def test_result_is_float32_of_unit_norm(kind) -> None:
    x = rows(4, 3, 16, dtype=torch.bfloat16, scale=30.0)
    found = Pooling(kind, 16)(x)
    assert found.dtype == torch.float32 and found.shape == (4, 16)
    assert torch.allclose(found.norm(dim=-1), torch.ones(4))
    # sums in float32: the rows are rounded, what is made of them is not
    exact = Pooling(kind, 16)(x.float())
    assert torch.equal(found, exact)


def test_only_attention_has_a_parameter() -> None:
    assert Pooling("mean", 4).query is None and Pooling("last", 4).query is None
    assert [n for n, _ in Pooling("attention", 4).named_parameters()] == ["query"]


def test_zero_rows_stay_finite() -> None:
    x = torch.zeros(2, 3, 4, requires_grad=True)
    found = attention_pool(x)
    found.sum().backward()
    assert torch.isfinite(found).all() and torch.isfinite(x.grad).all()


def test_wrong_shapes_and_kinds_are_errors() -> None:
    with pytest.raises(ValueError, match=r"rows have shape \(3, 7\): expected \[B, K, D\]"):
        attention_pool(torch.zeros(3, 7))
    with pytest.raises(ValueError, match=r"the query has shape \(6,\): expected \[7\]"):
        attention_pool(torch.zeros(2, 3, 7), torch.zeros(6))
    with pytest.raises(ValueError, match="pooling 'max': expected 'mean', 'attention' or 'last'"):
        Pooling("max", 7)


@pytest.mark.parametrize("kind", ["mean", "attention", "last"])
def test_the_model_pools_the_k_rows_and_never_the_sequence(kind) -> None:
    model = tiny_model(pooling=kind)
    batch = make_batch([{"images": [(2, 2)], "text": 9}, {"text": 3}, {"text": 7}])
    shapes = []
    model.pooling.register_forward_pre_hook(lambda _, args: shapes.append(args[0].shape))
    features = model.embed_images(batch.images)
    emb = model.embeddings(batch, features)
    assert shapes == [(3, K, model.backbone.width)] and emb.shape == (3, model.backbone.width)
    # and it is the states at the tokens that it pools, sample by sample
    states = model.backbone.hidden_states(batch, features, torch.arange(len(batch.input_ids_T)))
    place = 0
    for sample, (context, tokens, _) in enumerate(batch.lengths_B3.tolist()):
        own = states[place + context : place + context + tokens]
        assert torch.allclose(model.pooling(own[None])[0], emb[sample], atol=1e-6)
        place += context + tokens
