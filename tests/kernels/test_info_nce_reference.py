"""The reference of InfoNCE against its definition, term by term, and what is made of it."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from coma_ds.kernels.info_nce import FalseNegatives, info_nce, matryoshka, symmetric_info_nce
from tests.kernels.info_nce import (
    WIDE,
    Case,
    by_reference,
    call,
    definition,
    errors,
    exact,
    gradients,
    inputs,
    kernels,
)
from tests.memory import largest_tensor

OPTIONS = {
    "per_row": True,
    "ids": "queries",
    "margin": 0.1,
    "hardness": 4.0,
    "own": 2,
    "queries": 7,
    "target_to_target": True,
    "reduction": "none",
    "temperature": 0.004,
    "first": 2,
    "weight": 0.3,
}


@settings(max_examples=60)
@given(
    st.sets(st.sampled_from(sorted(OPTIONS)), max_size=5),
    st.sampled_from(["random", "hard", "solved"]),
    st.integers(1, 6),
    st.integers(0, 6),
    st.integers(1, 9),
    st.integers(0, 99),
)
def test_options_that_meet(names, difficulty, rows, more, chunk, seed) -> None:
    chosen = {name: OPTIONS[name] for name in names}
    case = Case(rows, rows + 2 + more, 5, difficulty=difficulty, seed=seed, **chosen)
    wanted = definition(case)
    with kernels("torch"):
        loss, cast = call(case, *inputs(case), WIDE, chunk=chunk)
        found = gradients(case, loss, cast)
    for name, x in wanted.items():
        assert torch.allclose(found[name], x, rtol=1e-9, atol=1e-9), name


@pytest.mark.parametrize("difficulty", ["random", "hard", "solved"])
@pytest.mark.parametrize(
    ("rows", "targets", "width"), [(1, 65, 64), (63, 65, 896), (257, 300, 1152), (1000, 4097, 64)]
)
def test_odd_shapes_in_float32(rows, targets, width, difficulty) -> None:
    case = Case(rows, targets, width, difficulty=difficulty, temperature=0.03, ids="queries")
    found = errors(by_reference(case), exact(case))
    assert max(found.values()) < 2e-5, found


def test_gradcheck() -> None:
    case = Case(4, 6, 5, ids="queries", margin=0.4, own=2, queries=5, target_to_target=True)
    leaves, arguments = inputs(case.but(per_row=True, temperature=0.3))
    leaves = {name: x.requires_grad_() for name, x in leaves.items()}

    def loss(query, target, own, others, temperature):
        return info_nce(
            query,
            target,
            own_negative_NHD=own,
            query_all_PD=others,
            temperature=temperature,
            chunk=3,
            **arguments,
        )

    assert torch.autograd.gradcheck(loss, tuple(leaves.values()))


def test_operands_are_rounded_and_gradients_are_not() -> None:
    query, target = F.normalize(torch.randn(7, 9)), F.normalize(torch.randn(8, 9))
    args = {"positive_index": 0, "temperature": 0.05}
    cast = [x.clone().requires_grad_() for x in (query, target)]
    info_nce(*cast, operand_dtype=torch.bfloat16, **args).backward()
    wanted = [x.bfloat16().float().requires_grad_() for x in (query, target)]
    info_nce(*wanted, **args).backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(cast, wanted))
    assert not torch.equal(cast[0].grad, cast[0].grad.bfloat16().float())


def test_memory_of_a_chunk_with_every_block() -> None:
    case = Case(64, 512, 4, queries=256, target_to_target=True, own=3)
    leaves, arguments = inputs(case)
    with kernels("torch"):
        most = largest_tensor(
            lambda: call(case, leaves, arguments, torch.float32, chunk=8)[0].backward()
        )
    assert most <= 8 * (512 + 512 + 256 + 3)


def pairs(dtype=WIDE) -> list[torch.Tensor]:
    return [F.normalize(torch.randn(6, 8, dtype=dtype), dim=-1).requires_grad_() for _ in "qt"]


@pytest.mark.parametrize("masked", [False, True])
def test_symmetric_is_both_directions(masked) -> None:
    query, target = pairs()
    answers, asked = torch.tensor([0, 1, 2, 0, 4, 5]), torch.tensor([9, 8, 7, 6, 7, 5])
    ids, out = None, torch.zeros(6, 6, dtype=torch.bool)
    if masked:
        ids = FalseNegatives(answers, asked, asked, None, asked, answers)
        out = (answers[:, None] == answers) | (asked[:, None] == asked)
        out.fill_diagonal_(False)
    found = symmetric_info_nce(
        query,
        target,
        own_target_ND=target,
        query_all_PD=query,
        positive_index=0,
        query_index=torch.arange(6),
        temperature=0.1,
        false_negatives=ids,
    )
    logits = (query @ target.T / 0.1).masked_fill(out, -math.inf)
    wanted = (
        F.cross_entropy(logits, torch.arange(6)) + F.cross_entropy(logits.T, torch.arange(6))
    ) / 2
    assert found.item() == pytest.approx(wanted.item(), rel=1e-12)
    for a, b in zip(*(torch.autograd.grad(x, (query, target)) for x in (found, wanted))):
        assert torch.allclose(a, b, atol=1e-12)


def test_matryoshka_cuts_every_embedding_and_normalises() -> None:
    query, target = pairs()
    own, others = F.normalize(torch.randn(6, 2, 8, dtype=WIDE), dim=-1), pairs()[0].detach()
    args = {"positive_index": 0, "temperature": 0.1, "query_index": 0}
    found = matryoshka(info_nce, [2, 5, 8], [1.0, 0.5, 2.0])(
        query, target, own_negative_NHD=own, query_all_PD=others, **args
    )
    wanted = 0
    for width, weight in ((2, 1.0), (5, 0.5), (8, 2.0)):
        given = (query, target, own, others)  # of unit norm: the whole width is taken as it is
        cut = (x if width == 8 else F.normalize(x[..., :width], dim=-1) for x in given)
        q, t, o, a = cut
        wanted += weight * info_nce(q, t, own_negative_NHD=o, query_all_PD=a, **args)
    assert found.item() == pytest.approx(wanted.item(), rel=1e-12)
    for a, b in zip(*(torch.autograd.grad(x, (query, target)) for x in (found, wanted))):
        assert torch.allclose(a, b, atol=1e-12)


@pytest.mark.parametrize(
    ("dims", "weights", "message"),
    [
        ([], None, r"dims \[\]: expected increasing widths above 0"),
        ([4, 4], None, r"dims \[4, 4\]: expected increasing"),
        ([0, 4], None, r"dims \[0, 4\]: expected increasing"),
        ([2, 4], [1.0], r"weights \[1.0\]: expected 2 numbers above 0"),
        ([2, 4], [1.0, 0.0], r"weights \[1.0, 0.0\]: expected 2 numbers above 0"),
        ([2, 16], None, r"dims \[2, 16\]: the embeddings have width 8"),
    ],
)
def test_matryoshka_errors(dims, weights, message) -> None:
    with pytest.raises(ValueError, match=message):
        matryoshka(info_nce, dims, weights)(*pairs(), positive_index=0, temperature=1.0)


Q, T = torch.zeros(3, 8), torch.zeros(5, 8)
IDS = FalseNegatives(torch.zeros(5, dtype=torch.int64))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"positive_index": 3}, r"positive_index spans 3..5: expected 0..4"),
        ({"positive_index": -1}, r"positive_index spans -1..1: expected 0..4"),
        ({"positive_index": torch.zeros(3)}, "positive_index has dtype torch.float32: expected"),
        ({"temperature": torch.ones(2)}, r"temperature has shape \(2,\).*or \[3\] floats"),
        ({"temperature": torch.tensor([1.0, 0.0, 1.0])}, r"temperature \[0.0\]: expected a number"),
        ({"temperature": math.inf}, r"temperature \[inf\]: expected a number above 0"),
        ({"temperature": torch.ones(1, dtype=torch.int64)}, "temperature has shape .* torch.int64"),
        ({"margin": math.nan}, "margin nan: expected a finite number"),
        ({"hardness": -1.0}, "hardness -1.0: expected a finite number >= 0"),
        ({"target": T.double()}, "targets have dtype torch.float64, the queries torch.float32"),
        ({"query": Q.long(), "target": T.long()}, "queries have dtype torch.int64: expected a fl"),
        ({"own_negative_NHD": torch.zeros(2, 1, 8)}, r"own negatives have shape \(2, 1, 8\)"),
        ({"own_negative_NHD": torch.zeros(3, 1, 7)}, r"expected \[3, H, 8\]"),
        ({"query_all_PD": T}, "query_all without query_index: say where"),
        ({"query_index": 0}, "query_index without query_all: give both or none"),
        ({"query_all_PD": T, "query_index": 3}, r"query_index spans 3..5: expected 0..4"),
        ({"query_all_PD": torch.zeros(5, 7), "query_index": 0}, r"expected \[P, 8\]"),
        ({"target": T.to("meta")}, "tensors on cpu, meta: expected all on one device"),
        ({"operand_dtype": torch.float32}, "operand_dtype torch.float32: expected torch.bfloat16"),
        (
            {"query": Q.double(), "target": T.double(), "operand_dtype": torch.bfloat16},
            "operand_dtype for torch.float64: expected float32 embeddings",
        ),
        (
            {"false_negatives": FalseNegatives(torch.zeros(5))},
            "target_ids has dtype torch.float32: expected torch.int64",
        ),
        (
            {
                "query_all_PD": T,
                "query_index": 0,
                "false_negatives": FalseNegatives(
                    IDS.target_ids_M, IDS.target_ids_M[:3], IDS.target_ids_M
                ),
            },
            "query_ids with query_all: give query_all_ids too",
        ),
    ],
)
def test_what_does_not_fit_is_an_error(change, message) -> None:
    arguments = {"query": Q, "target": T, "positive_index": 0, "temperature": 1.0} | change
    with pytest.raises(ValueError, match=message):
        info_nce(arguments.pop("query"), arguments.pop("target"), **arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"false_negatives": IDS}, "give query_all_ids and query_all_target_ids"),
        ({"target_to_target": True}, "target_to_target is not an option of both directions"),
    ],
)
def test_symmetric_errors(change, message) -> None:
    with pytest.raises(ValueError, match=message):
        symmetric_info_nce(
            Q, T, own_target_ND=Q, query_all_PD=T, positive_index=0, query_index=0,
            temperature=1.0, **change,
        )  # fmt: skip
