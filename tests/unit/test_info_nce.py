"""InfoNCE in chunks against its definition, and the statistics against numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from coma_ds.config import MatchConfig
from coma_ds.kernels.info_nce import FalseNegatives, info_nce, retrieval_statistics
from coma_ds.objectives.match import Match
from tests.memory import largest_tensor
from tests.tiny import make_batch

N, M, D = 7, 11, 5
POSITIVE = torch.tensor([3, 0, 10, 5, 5, 2, 7])


def unit(rows: int, width: int = D, seed: int = 0, dtype=torch.float64) -> torch.Tensor:
    noise = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, width, generator=noise, dtype=torch.float64)
    return F.normalize(x, dim=-1).to(dtype).requires_grad_()


def excluded(positive, target_ids=None, query_ids=None, asked=None) -> torch.Tensor:
    """Who does not compete, by a double loop, bool [N, M]; the positive is not excluded."""
    count = M if target_ids is None else len(target_ids)
    out = torch.zeros(len(positive), count, dtype=torch.bool)
    for row, own in enumerate(positive.tolist()):
        for column in range(count):
            same_target = target_ids is not None and target_ids[column] == target_ids[own]
            same_query = query_ids is not None and asked[column] == query_ids[row]
            out[row, column] = column != own and bool(same_target or same_query)
    return out


def by_definition(query, target, temperature, out, reduction="mean"):
    logits = (query @ target.T / temperature).masked_fill(out, float("-inf"))
    return F.cross_entropy(logits, POSITIVE[: len(query)], reduction=reduction)


IDS = {
    "none": None,
    "targets": FalseNegatives(torch.tensor([1, 2, 3, 1, 4, 5, 2, 6, 7, 8, 3])),
    "queries too": FalseNegatives(
        torch.tensor([1, 2, 3, 1, 4, 5, 2, 6, 7, 8, 3]),
        torch.tensor([10, 11, 12, 13, 14, 10, 11]),
        torch.tensor([11, 50, 10, 10, 13, 14, 51, 11, 12, 52, 12]),
    ),
    "all the same": FalseNegatives(torch.zeros(M, dtype=torch.int64)),
}


def hidden(ids: FalseNegatives | None) -> torch.Tensor:
    if ids is None:
        return excluded(POSITIVE)
    return excluded(POSITIVE, ids.target_ids_M, ids.query_ids_N, ids.target_query_ids_M)


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 1024])
@pytest.mark.parametrize("name", IDS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_value_and_gradients_equal_cross_entropy(reduction, name, chunk) -> None:
    """In fp64: queries, targets and temperature; chunks that do not divide the rows too."""
    found_in = [
        unit(N),
        unit(M, seed=1),
        torch.tensor([0.07], dtype=torch.float64).requires_grad_(),
    ]
    wanted_in = [x.detach().clone().requires_grad_() for x in found_in]
    weight = torch.arange(1.0, N + 1, dtype=torch.float64) if reduction == "none" else 1.0
    query, target, temperature = found_in
    found = info_nce(
        query,
        target,
        positive_index=POSITIVE,
        temperature=temperature,
        false_negatives=IDS[name],
        reduction=reduction,
        chunk=chunk,
    )
    wanted = by_definition(*wanted_in, hidden(IDS[name]), reduction)
    assert found.dtype == torch.float64 and found.shape == wanted.shape
    assert torch.allclose(found, wanted, atol=1e-12)
    (found * weight).sum().backward()
    (wanted * weight).sum().backward()
    for a, b in zip(found_in, wanted_in):
        assert torch.allclose(a.grad, b.grad, atol=1e-11)
    if name == "none":
        assert all((b.grad != 0).any() for b in wanted_in)


def test_ids_hide_what_they_should() -> None:
    """The cases above are not empty, and the second kind hides more than the first."""
    assert not hidden(None).any()
    few, more = hidden(IDS["targets"]), hidden(IDS["queries too"])
    assert few.sum() == 4 and (more & ~few).sum() >= 4 and not (few & ~more).any()
    assert hidden(IDS["all the same"]).sum() == N * (M - 1)


@settings(max_examples=60)
@given(st.integers(1, 6), st.integers(0, 6), st.integers(1, 8), st.integers(0, 99), st.data())
def test_chunks_do_not_matter(rows, extra, chunk, seed, data) -> None:
    targets = rows + extra
    query, target = unit(rows, seed=seed), unit(targets, seed=seed + 1)
    positive = torch.tensor([data.draw(st.integers(0, targets - 1)) for _ in range(rows)])
    ids = torch.tensor([data.draw(st.integers(0, 3)) for _ in range(targets)])
    asked = torch.tensor([data.draw(st.integers(0, 3)) for _ in range(targets)])
    own = torch.tensor([data.draw(st.integers(0, 3)) for _ in range(rows)])
    args = {"positive_index": positive, "false_negatives": FalseNegatives(ids, own, asked)}
    whole = info_nce(query, target, temperature=0.05, reduction="none", **args)
    wanted = torch.autograd.grad(whole.sum(), (query, target))
    parts = info_nce(query, target, temperature=0.05, reduction="none", chunk=chunk, **args)
    found = torch.autograd.grad(parts.sum(), (query, target))
    assert torch.allclose(parts, whole, atol=1e-13)
    assert all(torch.allclose(a, b, atol=1e-11) for a, b in zip(found, wanted))
    first = retrieval_statistics(query, target, **args)
    second = retrieval_statistics(query, target, chunk=chunk, **args)
    assert all(torch.allclose(first[name], second[name], atol=1e-5) for name in first)
    masked = (excluded(positive, ids, own, asked)).sum()
    assert int(first["masked"]) == int(masked) and int(first["rows"]) == rows


def test_a_chunk_of_logits_is_all_that_exists() -> None:
    query, target = unit(64, 4, dtype=torch.float32), unit(512, 4, seed=1, dtype=torch.float32)

    def step(chunk):
        args = {"positive_index": torch.arange(64), "temperature": 0.1, "chunk": chunk}
        info_nce(query, target, **args).backward()

    assert largest_tensor(lambda: step(8)) <= 8 * 513
    assert largest_tensor(lambda: step(64)) >= 64 * 512
    kept = []  # for the backward: the inputs, no logits
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        info_nce(query, target, positive_index=torch.arange(64), temperature=0.1, chunk=8)
    assert max(t.numel() for t in kept) <= target.numel()


def test_the_gradient_of_an_easy_row_keeps_its_digits() -> None:
    """p - 1 of a row with p near 1 has none left in float32; log1p(sum exp) has them all."""
    query = torch.tensor([[1.0, 0.0]])
    target = torch.tensor([[1.0, 0.0], [-0.4, 0.916515]])

    def gradient(dtype):
        q, t = query.to(dtype).requires_grad_(), target.to(dtype)
        loss = info_nce(q, t, positive_index=torch.tensor([0]), temperature=0.03)
        return torch.autograd.grad(loss, q)[0].double()

    exact = gradient(torch.float64)
    assert exact.abs().max() > 1e-25
    assert torch.allclose(gradient(torch.float32), exact, rtol=1e-4, atol=0.0)
    q = query.clone().requires_grad_()
    plain = torch.autograd.grad(F.cross_entropy(q @ target.T / 0.03, torch.tensor([0])), q)[0]
    assert not torch.allclose(plain.double(), exact, rtol=0.5, atol=0.0)


def test_low_precision_is_summed_in_float32() -> None:
    query, target = unit(N, dtype=torch.bfloat16), unit(M, seed=1, dtype=torch.bfloat16)
    found = info_nce(query, target, positive_index=POSITIVE, temperature=0.03)
    exact = info_nce(query.double(), target.double(), positive_index=POSITIVE, temperature=0.03)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(exact.item(), rel=1e-5)
    found.backward()
    assert query.grad.dtype == torch.bfloat16


def test_extreme_logits_stay_finite() -> None:
    query = torch.tensor([[1.0, 0.0]], requires_grad=True)
    target = torch.tensor([[-1.0, 0.0], [1.0, 0.0]])
    loss = info_nce(query, target, positive_index=torch.tensor([0]), temperature=1e-4)
    loss.backward()
    assert loss.item() == pytest.approx(2e4) and torch.isfinite(query.grad).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("place", ["query", "positive", "other target"])
@pytest.mark.parametrize("targets", [1, 3])
def test_a_bad_number_is_never_hidden(place, bad, targets) -> None:
    query, target = unit(1).detach(), unit(targets, seed=1).detach()
    if place == "query":
        query[0, 1] = bad
    elif place == "positive":
        target[0, 1] = bad
    else:  # inf: a competitor that always wins
        target[-1, 1] = bad * torch.sign(query[0, 1])
    query.requires_grad_()
    loss = info_nce(query, target, positive_index=torch.tensor([0]), temperature=0.1)
    assert not torch.isfinite(loss)
    if targets > 1:  # a row without a competitor has no gradient at all
        loss.backward()
        assert not torch.isfinite(query.grad).all()


def test_no_rows_still_reach_the_parameters() -> None:
    query, target = torch.zeros(0, D, requires_grad=True), unit(3, dtype=torch.float32)
    loss = info_nce(
        query,
        target,
        positive_index=torch.zeros(0, dtype=torch.int64),
        temperature=0.1,
        reduction="sum",
    )
    loss.backward()
    assert loss.item() == 0 and query.grad.shape == (0, D)


ROWS = {"positive_index": POSITIVE, "temperature": 0.1}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target_MD": unit(M, D + 1)}, r"\(7, 5\) and targets \(11, 6\): expected \[N, D\]"),
        ({"query_ND": torch.zeros(N, 1, D)}, r"queries \(7, 1, 5\)"),
        ({"target_MD": torch.zeros(M, 1, D)}, r"targets \(11, 1, 5\)"),
        ({"positive_index": POSITIVE[:6]}, r"positive_index has shape \(6,\): expected \[7\]"),
        ({"positive_index": POSITIVE + 1}, r"positive_index spans 1..11: expected 0..10"),
        ({"positive_index": POSITIVE - 1}, r"positive_index spans -1..9: expected 0..10"),
        ({"temperature": 0.0}, r"temperature \[0.0\]: expected a number above 0"),
        ({"temperature": -0.5}, r"temperature \[-0.5\]: expected a number above 0"),
        ({"temperature": math.nan}, r"temperature \[nan\]: expected a number above 0"),
        ({"temperature": torch.tensor([0.0])}, r"temperature \[0.0\]: expected a number above 0"),
        ({"reduction": "max"}, r"reduction 'max': expected 'mean', 'sum' or 'none'"),
        (
            {"false_negatives": FalseNegatives(torch.arange(N))},
            r"target_ids has shape \(7,\): expected \[11\]",
        ),
        (
            {"false_negatives": FalseNegatives(torch.arange(M), torch.arange(N))},
            "query_ids and target_query_ids go together",
        ),
        (
            {"false_negatives": FalseNegatives(torch.arange(M), torch.arange(M), torch.arange(M))},
            r"query_ids has shape \(11,\): expected \[7\]",
        ),
        (
            {"false_negatives": FalseNegatives(torch.arange(M), torch.arange(N), torch.arange(N))},
            r"target_query_ids has shape \(7,\): expected \[11\]",
        ),
    ],
)
def test_what_does_not_fit_is_an_error(change, message) -> None:
    arguments = {"query_ND": unit(N), "target_MD": unit(M), **ROWS, **change}
    query, target = arguments.pop("query_ND"), arguments.pop("target_MD")
    with pytest.raises(ValueError, match=message):
        info_nce(query, target, **arguments)


@pytest.mark.parametrize("name", IDS)
def test_statistics_equal_numpy(name) -> None:
    query, target = unit(N), unit(M, seed=1)
    found = retrieval_statistics(
        query, target, positive_index=POSITIVE, false_negatives=IDS[name], chunk=3
    )
    cosine = (query @ target.T).detach().numpy()
    out, own = hidden(IDS[name]).numpy(), POSITIVE.numpy()
    positive = cosine[np.arange(N), own]
    hardest, right = np.full(N, -1.0), 0
    for row in range(N):
        others = [cosine[row, c] for c in range(M) if c != own[row] and not out[row, c]]
        if others:
            hardest[row] = max(others)
        right += positive[row] > hardest[row]
    wanted = {
        "positive": positive.sum(),
        "hardest": hardest.sum(),
        "accuracy": right,
        "masked": out.sum(),
        "rows": N,
    }
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        assert float(found[key]) == pytest.approx(float(value), abs=1e-5), key
        assert found[key].dtype == torch.float32 and not found[key].requires_grad


def test_a_tie_is_not_a_hit() -> None:
    target = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    found = retrieval_statistics(target[:1], target, positive_index=torch.tensor([0]))
    assert float(found["accuracy"]) == 0


def test_objective_masks_by_target_and_by_query_content() -> None:
    """Queries, targets and a hard negative whose contents meet; the loss by definition."""
    contents = [1, 2, 1, 4, 10, 11, 12, 10, 11]  # 4 queries, 4 targets, 1 hard negative
    batch = make_batch([{"text": 2, "content": c} for c in contents], pairs=4)
    emb = unit(9, seed=3)
    loss, report = Match(MatchConfig(temperature=0.05)).loss(emb, None, batch)
    out = torch.zeros(4, 5, dtype=torch.bool)
    out[0, 2] = out[2, 0] = True  # the same query
    out[0, 3] = out[3, 0] = True  # the same target
    out[1, 4] = True  # the hard negative is the target of row 1
    logits = (emb[:4] @ emb[4:].T / 0.05).masked_fill(out, float("-inf"))
    assert loss.item() == pytest.approx(F.cross_entropy(logits, torch.arange(4)).item(), rel=1e-6)
    assert report["masked_negatives"] == pytest.approx(5 / 4 / 4)
    assert report["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert report["temperature"] == pytest.approx(0.05)
    cosine = (emb[:4] @ emb[4:].T).detach()
    positive = cosine.diagonal().mean()
    hardest = cosine.masked_fill(out, -1).fill_diagonal_(-1).amax(1)
    assert report["positive_similarity"] == pytest.approx(float(positive), abs=1e-5)
    assert report["hardest_negative_similarity"] == pytest.approx(float(hardest.mean()), abs=1e-5)
    assert report["margin"] == pytest.approx(float(positive - hardest.mean()), abs=1e-5)
    assert report["in_batch_accuracy"] == float((cosine.diagonal() > hardest).double().mean())
    off, _ = Match(MatchConfig(temperature=0.05, mask_false_negatives=False)).loss(emb, None, batch)
    plain = F.cross_entropy(emb[:4] @ emb[4:].T / 0.05, torch.arange(4))
    assert off.item() == pytest.approx(plain.item(), rel=1e-6)
