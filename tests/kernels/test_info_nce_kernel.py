"""The kernels of InfoNCE in Triton's interpreter against the reference in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coma_ds.kernels.info_nce import tiles
from coma_ds.kernels.info_nce.inputs import make_problem
from coma_ds.kernels.info_nce.plan import Plan
from tests.kernels.info_nce import (
    WIDE,
    Case,
    by_kernel,
    call,
    errors,
    exact,
    inputs,
    kernels,
    plain_torch,
)

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of 1 / 0 and NaN

EVERYTHING = Case(
    per_row=True,
    ids="queries",
    margin=0.15,
    hardness=3.0,
    own=3,
    queries=40,
    target_to_target=True,
)
CASES = {
    "plain": Case(),
    "one row": Case(rows=1, targets=65, width=64),
    "two tiles of rows": Case(rows=67, targets=130, width=96, first=60),
    "width 7": Case(rows=5, targets=9, width=7),
    "width 896": Case(rows=9, targets=11, width=896),
    "ids": Case(ids="targets"),
    "both ids": Case(ids="queries", first=20),
    "margin": Case(margin=0.05),
    "hardness": Case(hardness=9.0, difficulty="hard"),
    "per row": Case(per_row=True),
    "own": Case(own=4, ids="targets"),
    "q-q": Case(queries=50, ids="queries"),
    "t-t": Case(target_to_target=True, ids="queries"),
    "sum": Case(reduction="sum", weight=0.3),
    "none": EVERYTHING.but(reduction="none", weight=0.5),
    "everything": EVERYTHING,
    "one target": Case(rows=3, targets=1, width=16),
    "solved": Case(difficulty="solved", temperature=0.01),
    "above the limit": EVERYTHING.but(temperature=0.004, margin=None),
    "one positive for all": Case(rows=40, targets=3, width=16),
}


@pytest.mark.parametrize("name", CASES)
def test_float32_equals_the_reference(name) -> None:
    case = CASES[name]
    found = errors(by_kernel(case), exact(case))
    # a cosine's rounding error, magnified by the temperature
    assert max(found.values()) < max(2e-6, 1e-7 / case.temperature), found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["plain", "everything", "above the limit", "width 7"])
def test_half_precision(name, dtype) -> None:
    case = CASES[name].but(dtype=dtype)
    found = errors(by_kernel(case), exact(case))
    assert found["loss"] < 1e-5 and found["temperature"] < 1e-4
    assert max(found.values()) < 6e-3, found


OPTIONS = {
    "per_row": True,
    "ids": "queries",
    "margin": 0.1,
    "hardness": 4.0,
    "own": 2,
    "queries": 9,
    "target_to_target": True,
    "reduction": "none",
    "temperature": 0.004,
    "first": 2,
    "share": 0.0,
}


@settings(max_examples=20, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.sets(st.sampled_from(sorted(OPTIONS)), min_size=2, max_size=4),
    st.sampled_from(["random", "hard", "solved"]),
    st.integers(1, 20),
    st.integers(0, 30),
    st.integers(3, 40),
    st.integers(0, 99),
)
def test_options_that_meet(names, difficulty, rows, more, width, seed) -> None:
    chosen = {name: OPTIONS[name] for name in names}
    sizes = {"rows": rows, "targets": rows + 2 + more, "width": width, "seed": seed}
    case = Case(**sizes, difficulty=difficulty, **chosen)
    wanted, found = exact(case), by_kernel(case)
    for name, x in wanted.items():  # a gradient may be a small difference of large terms
        terms = {"loss": 1.0, "temperature": 100.0}.get(name, 1.0) / case.temperature
        assert float((found[name] - x).norm()) < 3e-5 * float(x.norm()) + 1e-6 * terms, name


def run(case: Case, **more):
    """The pass itself, without checks and without autograd."""
    from coma_ds.kernels.info_nce.passes import Run, Wanted

    leaves, arguments = inputs(case)
    for name in ("reduction", "weight"):
        arguments.pop(name)
    renamed = {"own": "own_negative_NHD", "others": "query_all_PD"}
    named = {renamed[n]: x.to(case.dtype) for n, x in leaves.items() if n in renamed}
    p = make_problem(
        leaves["query"].to(case.dtype),
        leaves["target"].to(case.dtype),
        temperature=leaves["temperature"].float(),
        **named,
        **arguments,
    )
    wanted = Wanted(True, True, True, case.own > 0, case.queries > 0)
    return Run(p, wanted, operand_dtype=case.operand_dtype, factor=1.7 / case.rows, **more)


def results(done) -> dict[str, torch.Tensor]:
    names = ("losses", "heat", "query_grad", "target_grad", "own_grad", "all_grad")
    found = {name: getattr(done, name) for name in names}
    return {name: x for name, x in found.items() if x is not None}


PLANS = {
    "panels of rows": Plan(16, None, 0.0),
    "one row a panel, at the end": Plan(32, None, 0.0),
    "panels of columns": Plan(33, 24, 0.0),
    "one panel of columns": Plan(33, 128, 0.0),
}


@pytest.mark.parametrize(
    ("name", "low"),
    [*((name, None) for name in PLANS), ("panels of rows", torch.bfloat16)]
    + [("panels of columns", torch.bfloat16)],
)
def test_every_cut_gives_the_same(name, low) -> None:
    # terms above the limit too: the reference of a row changes between the sweeps
    case = EVERYTHING.but(operand_dtype=low, temperature=0.004, margin=None)
    whole = results(run(case, plan=Plan(case.rows, None, 0.0)))
    found = results(run(case, plan=PLANS[name]))
    # in fp32: one rounding of the largest logit, which is 1 / temperature
    limit = 2**-24 / case.temperature if low is None else 5e-3
    assert max(errors(found, whole).values()) < limit


@pytest.mark.parametrize("split", [2, 4])
def test_parts_of_a_tile(split, monkeypatch) -> None:
    """Small tiles, several groups of them, parts of their columns one after the other."""
    small = tiles.Tile(16, 32, 16, split, 2, 4, 1)
    monkeypatch.setattr(tiles, "INTERPRETED", small)
    case = EVERYTHING.but(rows=50, targets=45, width=33, operand_dtype=torch.bfloat16)
    found = errors(by_kernel(case), exact(case))
    assert max(found.values()) < 6e-3 and found["loss"] < 1e-6, found


@pytest.mark.parametrize("plan", [Plan(16, None, 0.0), Plan(33, 24, 0.0)])
def test_every_number_is_written_and_nothing_else_is_read(plan, monkeypatch) -> None:
    """Fresh memory is NaN: what is read before it is written shows, so does what is not written."""
    case = EVERYTHING.but(operand_dtype=torch.bfloat16)
    clean = results(run(case, plan=plan, statistics=True))
    real = torch.empty

    def poisoned(*args, **kwargs):
        x = real(*args, **kwargs)
        return x.fill_(math.nan) if x.is_floating_point() else x.fill_(-(2**31))

    monkeypatch.setattr(torch, "empty", poisoned)
    assert torch.empty(2).isnan().all()
    dirty = run(case, plan=plan, statistics=True)
    found = results(dirty)
    assert all(torch.equal(found[name], x) for name, x in clean.items())
    assert not dirty.hardest.isnan().any() and not dirty.masked.isnan().any()


def test_the_same_bits_twice() -> None:
    case = EVERYTHING.but(dtype=torch.bfloat16)
    first, second = by_kernel(case), by_kernel(case)
    assert all(torch.equal(first[name], x) for name, x in second.items())


ACCURACY = Case(rows=64, targets=640, width=2048, first=100, operand_dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("difficulty", "temperature"),
    [("random", 0.01), ("random", 0.03), ("hard", 0.01), ("hard", 0.03), ("solved", 0.03)],
)
def test_gradients_are_more_exact_than_torch(difficulty, temperature) -> None:
    """For the same bfloat16 values: a tenth of the error of float32 logits with bfloat16
    gradients, a third at 0.01.  (At width 64 with random embeddings a row has one negative that
    counts, and the rounding of its term is all there is: half of torch's error there.)"""
    case = ACCURACY.but(difficulty=difficulty, temperature=temperature)
    wanted, found, plain = exact(case), by_kernel(case), plain_torch(case)
    share = 1 / 3 if temperature < 0.03 else 1 / 10
    for name, x in plain.items():
        theirs, ours = (float((y - wanted[name]).norm()) for y in (x, found[name]))
        assert ours < share * theirs, f"{name}: {ours / theirs:.3f} of torch's"


def bad_call(change, **more):
    """Loss and gradients by the kernels for inputs with one bad number."""
    case = Case(rows=3, targets=6, width=8, first=1, temperature=0.1)
    leaves, arguments = inputs(case)
    change(leaves)
    with kernels("triton"):
        loss, cast = call(case, leaves, arguments | more, torch.float32)
    return loss, torch.autograd.grad(loss, list(cast.values()))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize(("name", "row"), [("query", 0), ("target", 1), ("target", 5)])
def test_a_bad_number_is_never_hidden(name, row, bad) -> None:
    def change(leaves):
        leaves[name][row, 2] = bad * (1 if name == "query" else leaves["query"][0, 2].sign())

    loss, grads = bad_call(change)
    assert not loss.isfinite()
    assert not grads[0].isfinite().all() and not grads[1].isfinite().all()


def test_bad_values_that_are_not_looked_at_give_nan() -> None:
    """As on a GPU: an index out of range and a temperature of 0, not seen by any check."""
    from coma_ds.kernels.info_nce.passes import Run, Wanted

    leaves, _ = inputs(Case(rows=3, targets=6, width=8))
    query, target = leaves["query"].float(), leaves["target"].float()
    wanted = Wanted(True, True, True)
    good = {"positive_index": torch.tensor([0, 5, 2]), "temperature": torch.tensor([0.1])}
    for bad, rows in (
        ({"positive_index": torch.tensor([0, 6, 2])}, [1]),
        ({"positive_index": torch.tensor([0, 1, -1])}, [2]),
        ({"temperature": torch.tensor([0.1, 0.0, -1.0])}, [1, 2]),
        ({"temperature": torch.tensor([math.nan])}, [0, 1, 2]),
    ):
        done = Run(make_problem(query, target, **(good | bad)), wanted)
        assert done.losses.isnan().nonzero().flatten().tolist() == rows
        assert done.query_grad.isnan().any(1).nonzero().flatten().tolist() == rows
        assert done.target_grad.isnan().all()


def test_statistics_come_with_the_loss() -> None:
    case = Case(ids="queries", margin=0.2, hardness=2.0, per_row=True, rows=70, temperature=0.01)
    case = case.but(queries=40)  # they are not among the targets
    found = []
    for mode, dtype in (("torch", WIDE), ("triton", torch.float32)):
        with kernels(mode):
            loss, _ = call(case, *inputs(case), dtype, statistics=True)
            found.append(loss)
    assert found[1][0].item() == pytest.approx(found[0][0].item(), rel=1e-6)
    assert found[1][1].keys() == found[0][1].keys()
    for name, x in found[0][1].items():
        assert float(found[1][1][name]) == pytest.approx(float(x), rel=1e-6), name
    assert float(found[0][1]["masked"]) > 0


def test_a_tie_is_not_a_hit() -> None:
    target = torch.nn.functional.normalize(torch.randn(2, 33), dim=-1)[[0, 0, 1]]
    leaves = {"query": target[:1], "target": target, "temperature": torch.ones(1)}
    with kernels("triton"):
        (_, sums), _ = call(Case(), leaves, {"positive_index": 1}, torch.float32, statistics=True)
    assert float(sums["accuracy"]) == 0 and float(sums["hardest"]) == pytest.approx(1, abs=1e-6)


def test_a_second_backward_is_refused() -> None:
    case = Case(rows=3, targets=4, width=8)
    with kernels("triton"):
        loss, _ = call(case, *inputs(case), torch.float32)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="a second backward through info_nce"):
        loss.backward()


@pytest.mark.parametrize("needs", ["query", "target", "temperature", ""])
def test_only_what_is_wanted(needs) -> None:
    case = Case(rows=9, targets=12, width=16, ids="targets")
    wanted = exact(case)
    leaves, arguments = inputs(case)
    cast = {n: x.float().requires_grad_(n == needs) for n, x in leaves.items()}
    from coma_ds.kernels.info_nce import info_nce

    with kernels("triton"):
        loss = info_nce(cast["query"], cast["target"], temperature=cast["temperature"], **arguments)
    assert loss.requires_grad == bool(needs)
    assert loss.item() == pytest.approx(wanted["loss"].item(), rel=1e-6)
    if needs:
        (loss * 1.7).backward()
        grad = cast[needs].grad.double()
        assert float((grad - wanted[needs]).norm() / wanted[needs].norm()) < 1e-6
        assert all(x.grad is None for n, x in cast.items() if n != needs)
