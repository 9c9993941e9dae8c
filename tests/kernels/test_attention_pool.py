"""Attention pooling against its definition: the reference at full size, the kernels in Triton's
interpreter at sizes that it can do."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coma_ds.kernels.attention_pool import attention_pool, cost, launch
from coma_ds.model.pooling import Pooling
from tests.kernels.pooling import Case, call, definition, values

SMALL = [
    Case(),
    Case(samples=1, tokens=1, width=1),
    Case(samples=2, tokens=1, width=7, query=False),
    Case(samples=5, tokens=9, width=65, seed=1),
    Case(samples=4, tokens=33, width=96, heads=3, seed=2),
    Case(samples=4, tokens=6, width=40, heads=5, valid=True, seed=3),
    Case(samples=5, tokens=5, width=33, query=False, valid=True, seed=4),
    Case(samples=4, tokens=5, width=32, length=11, valid=True, seed=5),
    Case(samples=3, tokens=4, width=32, length=4, seed=6),
    Case(samples=3, tokens=4, width=17, length=9, query=False, valid=True, seed=7),
    Case(samples=1, tokens=128, width=64, seed=8),
    Case(samples=2, tokens=3, width=896, heads=14, seed=9),
    Case(samples=2, tokens=5, width=1152, seed=10),
    Case(samples=1, tokens=3, width=4096, seed=11),
]
LARGE = [
    Case(samples=9, tokens=32, width=896),
    Case(samples=5, tokens=128, width=1152, heads=9, valid=True),
    Case(samples=3, tokens=64, width=3584, heads=7),
    Case(samples=7, tokens=16, width=4096, query=False, valid=True),
    Case(samples=4, tokens=32, width=2560, length=77, valid=True),
    Case(samples=257, tokens=4, width=64, length=9),
]


def errors(case: Case) -> dict[str, float]:
    """Relative errors against the definition; absolute ones where the exact gradient is zero.

    The query's gradient is a difference, tiny where one token has all the weight: its rounding
    errors are those of its terms.
    """
    inputs = case.inputs()
    exact, found = definition(case, inputs), values(case, inputs)
    assert found.keys() == exact.keys()
    assert found["emb"].dtype == torch.float32 and found["rows"].dtype == case.dtype
    sizes = {n: float(v.norm()) for n, v in exact.items()}
    if case.query:
        row = float(inputs["rows"].detach().double().nan_to_num().norm(dim=-1).max())
        terms = row * sizes["rows"] * (case.width / case.heads) ** -0.5
        sizes["query"] = max(sizes["query"], 0.1 * terms)
    return {
        n: float((found[n].double() - v).norm()) / (sizes[n] if sizes[n] > 1e-9 else 1.0)
        for n, v in exact.items()
    }


def check_kernels(case: Case, slack: float = 4.0, floor: float = 3e-7) -> None:
    """At most ``slack`` times as far off as plain torch with the same inputs in float32."""
    found = {}
    for mode in ("triton", "torch"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("COMA_KERNELS", mode)
            found[mode] = errors(case)
    for name, mine in found["triton"].items():
        assert mine <= slack * found["torch"][name] + floor, name


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_kernels_equal_the_definition(case) -> None:
    check_kernels(case)


@pytest.mark.parametrize("case", LARGE + SMALL, ids=str)
def test_reference_equals_the_definition(case, monkeypatch) -> None:
    monkeypatch.setenv("COMA_KERNELS", "torch")
    assert max(errors(case).values()) < 2e-6


@pytest.mark.parametrize("options", [{}, {"length": 8, "valid": True}, {"query": False}], ids=str)
def test_half_precision_loses_only_the_last_rounding(options, on_triton) -> None:
    found = errors(Case(samples=3, tokens=5, width=64, dtype=torch.float16, **options))
    assert found.pop("rows") < 2**-11 and max(found.values()) < 1e-6


def test_bfloat16_is_read_and_written(on_triton) -> None:
    """The interpreter cuts off where a card rounds: twice the error of rounding."""
    found = errors(Case(samples=3, tokens=5, width=64, dtype=torch.bfloat16))
    assert found.pop("rows") < 2**-7 and max(found.values()) < 1e-6


@st.composite
def calls(draw) -> Case:
    heads = draw(st.sampled_from([1, 1, 2, 3]))
    tokens = draw(st.integers(1, 9))
    length = draw(st.one_of(st.none(), st.integers(tokens, tokens + 6)))
    return Case(
        samples=draw(st.integers(1, 5)),
        tokens=tokens,
        width=heads * draw(st.integers(1, 20)),
        heads=heads,
        query=draw(st.booleans()),
        valid=draw(st.booleans()),
        length=length,
        seed=draw(st.integers(0, 99)),
    )


@settings(max_examples=30)
@given(calls())
def test_every_pair_of_options(case) -> None:
    check_kernels(case, 10.0, 2e-6)  # a width of 1 or 2 may leave a norm near zero


@pytest.mark.parametrize(
    "case",
    [
        Case(samples=2, tokens=3, width=4, heads=2),
        Case(samples=3, tokens=4, width=4, valid=True),
        Case(samples=2, tokens=3, width=4, length=6, valid=True),
        Case(samples=2, tokens=3, width=4, query=False, valid=True),
    ],
    ids=str,
)
def test_gradients_of_the_reference(case) -> None:
    inputs = case.inputs()
    kept = {**inputs, "rows": inputs["rows"].detach().nan_to_num().double().requires_grad_()}
    leaves = [kept["rows"]]
    if case.query:
        kept["query"] = inputs["query"].detach().double().requires_grad_()
        leaves.append(kept["query"])

    def function(rows, query=None):
        return call(case, {**kept, "rows": rows, "query": query})

    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("heads", [1, 4])
def test_a_zero_query_is_the_mean(heads, on_triton) -> None:
    """Result and gradient of the rows, the launch without a query beside the one with it."""
    rows, weight = torch.randn(4, 6, 32), torch.randn(4, 32)
    mean_rows, zero_rows = rows.clone().requires_grad_(), rows.clone().requires_grad_()
    query = torch.zeros(32, requires_grad=True)
    mean, zero = attention_pool(mean_rows), attention_pool(zero_rows, query, heads=heads)
    assert torch.allclose(mean, torch.nn.functional.normalize(rows.mean(1), dim=-1), atol=1e-7)
    assert torch.allclose(mean, zero, atol=1e-7)
    (mean * weight).sum().backward()
    (zero * weight).sum().backward()
    assert torch.allclose(mean_rows.grad, zero_rows.grad, atol=1e-7) and query.grad.any()


def test_large_scores_do_not_overflow(on_triton) -> None:
    """A running maximum: the largest score first, last and in the middle of the tokens."""
    for place in (0, 4, 8):
        rows = torch.randn(1, 9, 16)
        rows[0, place] *= 300
        found = attention_pool(rows, 40 * rows[0, place])
        wanted = torch.nn.functional.normalize(rows[:, place], dim=-1)
        assert torch.allclose(found, wanted, atol=1e-6)


def test_a_norm_below_eps_is_not_blown_up(on_triton) -> None:
    rows = torch.zeros(2, 3, 8)
    rows[1, 0, 0] = 3e-13
    rows.requires_grad_()
    found = attention_pool(rows)
    assert not found[0].any() and float(found[1, 0].detach()) == pytest.approx(0.1)
    found[:, 0].sum().backward()
    grad = torch.zeros(2, 3, 8)
    grad[:, :, 0] = 1e12 / 3
    assert torch.allclose(rows.grad, grad, rtol=1e-6)


def test_one_wanted_gradient_at_a_time(on_triton) -> None:
    case = Case(samples=4, tokens=5, width=16)
    inputs = case.inputs()
    both = values(case, inputs)
    for name in ("rows", "query"):
        other = {"rows": "query", "query": "rows"}[name]
        alone = values(case, {**inputs, other: inputs[other].detach()})
        assert alone.keys() == {"emb", name} and torch.equal(alone[name], both[name])
    plain = call(case, {**inputs, "rows": inputs["rows"].detach(), "query": torch.zeros(16)})
    assert not plain.requires_grad
    with torch.no_grad():
        assert torch.equal(call(case, inputs), both["emb"])


def test_any_strides(on_triton) -> None:
    """Rows that are a part of a sequence, a transposed tensor, a gradient that is expanded."""
    base = torch.randn(4, 9, 16)
    query = torch.randn(16)
    cut = attention_pool(base[:, 3:8], query)
    assert torch.equal(cut, attention_pool(base[:, 3:8].contiguous(), query))
    assert torch.equal(cut, attention_pool(base.mT.contiguous().mT[:, 3:8], query))
    wide = torch.stack([query, query], 1).flatten()[::2]
    assert not wide.is_contiguous() and torch.equal(cut, attention_pool(base[:, 3:8], wide))
    leaf = base.clone().requires_grad_()
    attention_pool(leaf[:, 3:8], query).sum().backward()
    same = base[:, 3:8].clone().requires_grad_()
    (attention_pool(same, query) * torch.ones(4, 16)).sum().backward()
    assert torch.equal(leaf.grad[:, 3:8], same.grad) and not leaf.grad[:, :3].any()


def test_no_samples(on_triton) -> None:
    rows = torch.zeros(0, 3, 8, requires_grad=True)
    query = torch.ones(8, requires_grad=True)
    found = attention_pool(rows, query)
    found.sum().backward()
    assert found.shape == (0, 8) and rows.grad.shape == (0, 3, 8) and not query.grad.any()


def test_positions_of_the_tokens_or_the_gathered_rows(on_triton) -> None:
    case = Case(samples=4, tokens=5, width=16, length=12)
    inputs = case.inputs()
    index = inputs["positions"][..., None].expand(-1, -1, 16)
    rows = inputs["rows"].detach().gather(1, index).requires_grad_()
    query = inputs["query"].detach().requires_grad_()
    gathered = values(
        dataclasses.replace(case, length=None), {**inputs, "rows": rows, "query": query}
    )
    found = values(case, inputs)
    assert torch.equal(found["emb"], gathered["emb"])
    assert torch.equal(found["query"], gathered["query"])
    assert torch.equal(found["rows"].gather(1, index), gathered["rows"])
    rest = found["rows"].scatter(1, index, 0.0)
    assert not rest.any()


@pytest.mark.parametrize("kind", ["mean", "attention"])
def test_the_model_s_pooling(kind, monkeypatch) -> None:
    """Through the module of the trainer, with both implementations."""
    rows, weight = torch.randn(3, 4, 24), torch.randn(3, 24)
    out = {}
    for mode in ("torch", "triton"):
        monkeypatch.setenv("COMA_KERNELS", mode)
        pooling, leaf = Pooling(kind, 24), rows.clone().requires_grad_()
        emb = pooling(leaf)
        (emb * weight).sum().backward()
        out[mode] = [emb, leaf.grad] + [p.grad for p in pooling.parameters()]
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(out["torch"], out["triton"]))


def test_cost_counts_the_tensors(on_triton) -> None:
    """Bytes of what goes in and out; the buffers of a real call beside them."""
    case = Case(samples=4, tokens=6, width=32, heads=2, length=9, dtype=torch.float16)
    inputs = case.inputs()
    saved = launch.forward(
        inputs["rows"].detach(),
        inputs["positions"],
        inputs["query"].detach(),
        None,
        heads=2,
        eps=1e-12,
        train_query=False,
    )

    def size(*tensors: torch.Tensor) -> int:
        return sum(t.numel() * t.element_size() for t in tensors)

    kept = size(saved.divisor_B, saved.scores_BHK, saved.softmax_BH2)
    rows = 4 * 6 * 32 * 2
    there = cost.forward(4, 6, 32, heads=2)
    assert there.extra == kept and there.bytes == rows + size(saved.emb_BD) + kept
    back = cost.backward(4, 6, 32, heads=2, length=9, programs=4)
    assert back.extra == 6 * 32 * 4  # four programs, two groups
    assert back.bytes == rows + 4 * 9 * 32 * 2 + 2 * size(saved.emb_BD) + kept + 2 * back.extra
    mean = cost.backward(4, 6, 32, query=False)
    assert mean.bytes == rows + 2 * size(saved.emb_BD) + 4 * 4 and mean.extra == 0
