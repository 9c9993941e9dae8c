"""How the work is cut, and the formulas of its cost."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from coma_ds.kernels.info_nce import cost
from coma_ds.kernels.info_nce.plan import FLOOR, TILE_ROWS, Plan, extra_bytes, make_plan
from tests.kernels.info_nce import Case
from tests.kernels.test_info_nce_kernel import run


@given(st.integers(1, 70_000), st.integers(1, 70_000), st.sampled_from([64, 896, 2048, 3584, 4096]))
def test_a_plan_keeps_to_its_memory(rows, columns, width) -> None:
    plan = make_plan(rows, columns, width)
    bound = max(0.07 * rows * columns * 4, FLOOR)
    if plan.rows > TILE_ROWS or plan.columns is not None:
        assert extra_bytes(plan, rows, columns, width) <= bound
    assert plan.rows == rows or plan.rows % TILE_ROWS == 0
    assert plan.columns is None or (plan.rows == rows and plan.columns % 256 == 0)


@pytest.mark.parametrize("width", [1024, 2048, 3584])
@pytest.mark.parametrize("rows", [8192, 32_768, 65_536])
def test_seven_percent_at_the_sizes_of_the_benchmark(rows, width) -> None:
    found = cost(rows, rows, width)
    assert found["share"] <= 0.07 and found["products"] == 3
    assert found["flops"] == pytest.approx(6 * rows * rows * width, rel=1e-3)
    assert found["copies"] == 0


def test_few_rows_and_many_columns_take_two_sweeps() -> None:
    assert cost(1024, 65_536, 2048)["products"] == 4
    assert make_plan(1024, 65_536, 2048, share=0.6).columns is None


def test_what_a_rank_receives() -> None:
    one, four = (cost(1024, 4096, 512, world=w) for w in (1, 4))
    assert one["exchanged"] == 0 and one["flops_per_exchanged_byte"] == float("inf")
    assert four["exchanged"] == 4096 * 512 * (2 + 4) * 3 / 4
    assert cost(1024, 4096, 512, P=4096, world=4)["exchanged"] == 2 * four["exchanged"]


def test_memory_that_is_really_asked_for(monkeypatch) -> None:
    """Every empty tensor of a pass, inputs and gradients aside, within the formula."""
    case = Case(rows=64, targets=600, width=16, operand_dtype=torch.bfloat16, first=0)
    plan = Plan(32, None, 0.0)
    sizes, real = [], torch.empty

    def counted(*args, **kwargs):
        x = real(*args, **kwargs)
        sizes.append(x.numel() * x.itemsize)
        return x

    monkeypatch.setattr(torch, "empty", counted)
    done = run(case, plan=plan)
    gradients = [done.query_grad, done.target_grad]
    extra = sum(sizes) - sum(g.numel() * g.itemsize for g in gradients)
    copies = (64 + 600) * 16 * 2
    panels = 2  # sums and scaled operands are taken anew for each
    assert extra <= panels * extra_bytes(plan, 64, 600, 16) + copies + 8 * 600 * 2
    assert max(sizes) < 64 * 600 * 4
