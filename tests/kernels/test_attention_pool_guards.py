"""What attention pooling must never do: hide a bad number, read memory that nothing wrote, depend
on the order of programs, launch twice, accept what does not fit.
"""

from __future__ import annotations

import re

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from coma_ds.kernels.attention_pool import attention_pool, attention_pool_at, launch, op
from tests.kernels.pooling import Case, call, values

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy, on NaN and overflow

CASES = [
    Case(samples=5, tokens=5, width=24),
    Case(samples=5, tokens=5, width=24, valid=True, length=9),
    Case(samples=5, tokens=5, width=24, valid=True, query=False),
]


@pytest.fixture
def poisoned(monkeypatch) -> None:
    """New memory is full of NaN, and of nonsense where it holds integers."""

    def poison(make):
        def poisoned_make(*args, **kwargs):
            out = make(*args, **kwargs)
            return out.fill_(float("nan") if out.dtype.is_floating_point else 12_345)

        return poisoned_make

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poison(getattr(torch, name)))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_element_is_written(case, on_triton, poisoned) -> None:
    """Inputs that must not be looked at are NaN as well (``Case.inputs``)."""
    assert torch.isnan(torch.empty(3)).all()
    found = values(case, case.inputs())
    assert all(torch.isfinite(value).all() for value in found.values())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_same_bits_twice(case, on_triton) -> None:
    first, second = values(case, case.inputs()), values(case, case.inputs())
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("samples", [1, 2, 11, 12])
def test_the_query_s_gradient_does_not_depend_on_who_is_first(
    samples, on_triton, poisoned, monkeypatch
) -> None:
    """The programs of both launches in several orders; ten programs make groups of four."""
    from triton.runtime.interpreter import interpreter_builder

    monkeypatch.setattr(launch, "processors", lambda device: 3)
    case = Case(samples=samples, tokens=3, width=24)
    inputs = case.inputs()
    straight = interpreter_builder.set_grid_idx
    number = launch.programs(samples, torch.device("cpu"), launch.choose(24, 1, 3, backward=True))
    assert number == min(samples, 12)
    found = []
    for seed in range(4):
        order = {n: torch.randperm(n, generator=torch.Generator().manual_seed(seed)).tolist()
                 for n in {samples, number}}  # fmt: skip

        def moved(x, y, z, order=order, straight=straight):
            straight(order[interpreter_builder.grid_dim[0]][x], y, z)

        with monkeypatch.context() as patch:
            patch.setattr(interpreter_builder, "set_grid_idx", moved)
            found.append(values(case, inputs))
    plain = values(case, inputs)
    for other in found:
        assert all(torch.equal(plain[name], other[name]) for name in plain)


def test_the_backward_can_run_again(on_triton, poisoned) -> None:
    """Its tickets are back at zero."""
    case = Case(samples=7, tokens=3, width=24)
    inputs = case.inputs()
    emb = call(case, inputs)
    loss = (emb * inputs["weight"]).sum()
    first, second = (torch.autograd.grad(loss, inputs["query"], retain_graph=True) for _ in "ab")
    assert torch.equal(first[0], second[0]) and torch.isfinite(first[0]).all()


class Operations(TorchDispatchMode):
    """Names of the torch operations that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_one_launch_each_way(case, on_triton, monkeypatch) -> None:
    """One kernel, and of torch only memory and views: on a GPU nothing else is launched."""
    from coma_ds.kernels.attention_pool import jit

    launches = []
    for name in ("pool_forward", "pool_backward"):
        kernel = getattr(jit, name)

        def run(*args, name=name, kernel=kernel, **kwargs):
            launches.append(name)
            with _disable_current_modes():  # the interpreter copies tensors itself
                return type(kernel).run(kernel, *args, **kwargs)

        monkeypatch.setattr(kernel, "run", run)
    for name in ("_check_values", "_check_positions"):  # they look at CPU tensors only
        monkeypatch.setattr(op, name, lambda *args: None)
    inputs = case.inputs()
    leaves = [inputs[n] for n in ("rows", "query") if inputs[n] is not None]
    allowed = {"empty", "empty_like", "detach", "alias"}
    with Operations() as seen:
        emb = call(case, inputs)
    assert launches == ["pool_forward"] and "empty" in seen.names and not seen.names - allowed
    with Operations() as seen:
        torch.autograd.grad(emb, leaves, inputs["weight"])
    assert launches == ["pool_forward", "pool_backward"] and not seen.names - allowed


BAD = [float("nan"), float("inf"), -float("inf")]


@pytest.mark.parametrize("mode", ["torch", "triton"])
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_bad_number_is_never_hidden(case, bad, mode, monkeypatch) -> None:
    """In one row of one sample: its embedding and the gradients it gives are NaN, no others."""
    monkeypatch.setenv("COMA_KERNELS", mode)
    inputs = case.inputs()
    place = 0 if inputs["positions"] is None else int(inputs["positions"][2, 0])
    clean = call(case, inputs)
    with torch.no_grad():
        inputs["rows"][2, place, 3] = bad
    emb = call(case, inputs)
    others = [0, 1, 3, 4]
    assert torch.isnan(emb[2]).all() and torch.equal(emb[others], clean[others])
    leaves = [inputs[n] for n in ("rows", "query") if inputs[n] is not None]
    rows, *query = torch.autograd.grad((emb * inputs["weight"]).sum(), leaves)
    assert torch.isnan(rows[2, place]).all() and torch.isfinite(rows[others]).all()
    assert all(torch.isnan(grad).all() for grad in query)


@pytest.mark.parametrize("mode", ["torch", "triton"])
@pytest.mark.parametrize("bad", BAD)
def test_a_bad_query_or_gradient_is_never_hidden(bad, mode, monkeypatch) -> None:
    monkeypatch.setenv("COMA_KERNELS", mode)
    rows, query = torch.randn(2, 3, 8), torch.randn(8)
    query[5] = bad
    assert torch.isnan(attention_pool(rows, query)).all()
    leaf = rows.requires_grad_()
    weight = torch.ones(2, 8)
    weight[1, 0] = bad
    (grad,) = torch.autograd.grad((attention_pool(leaf) * weight).sum(), leaf)
    assert torch.isfinite(grad[0]).all() and not torch.isfinite(grad[1]).any()


@pytest.mark.parametrize("mode", ["torch", "triton"])
def test_a_norm_beyond_float32_is_nan(mode, monkeypatch) -> None:
    """x / infinity would be a zero vector, which looks like a result."""
    monkeypatch.setenv("COMA_KERNELS", mode)
    rows = torch.ones(2, 3, 8)
    rows[1] *= 1e20
    found = attention_pool(rows)
    assert torch.isfinite(found[0]).all() and torch.isnan(found[1]).all()


@pytest.mark.parametrize(
    ("name", "value"),
    [("valid", 0), ("valid", 6), ("valid", -1), ("positions", -1), ("positions", 9)]
    + [("order", 0), ("positions", 2**40)],
)
@pytest.mark.parametrize("mode", ["torch", "triton"])
def test_a_bad_index_that_nobody_looked_at_is_nan(name, value, mode, monkeypatch, poisoned) -> None:
    """What a GPU does, where the checks would wait for the device."""
    monkeypatch.setenv("COMA_KERNELS", mode)
    case = Case(samples=3, tokens=5, width=24, length=9)
    inputs = case.inputs()
    inputs["valid"] = torch.full((3,), 5)
    clean = call(case, inputs)
    if name == "order":
        inputs["positions"][1, 2] = inputs["positions"][1, 1]
    else:
        index = (1,) if name == "valid" else (1, 0 if value < 0 else 4)
        inputs[name][index] = value
    with pytest.raises(ValueError):
        call(case, inputs)
    for name in ("_check_values", "_check_positions"):
        monkeypatch.setattr(op, name, lambda *args: None)
    emb = call(case, inputs)
    assert torch.isnan(emb[1]).all() and torch.equal(emb[[0, 2]], clean[[0, 2]])
    (grad,) = torch.autograd.grad((emb[[0, 2]] * inputs["weight"][[0, 2]]).sum(), inputs["rows"])
    assert torch.isfinite(grad[[0, 2]]).all()


R = torch.zeros(2, 3, 8)
H = torch.zeros(2, 6, 8)
P = torch.tensor([[0, 2, 5], [1, 2, 3]])
META = {"device": "meta"}


@pytest.mark.parametrize("mode", ["torch", "triton"])
@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((R[0],), {}, "rows have shape (3, 8): expected [B, K, D], none empty"),
        ((R[:, :0],), {}, "rows have shape (2, 0, 8): expected [B, K, D], none empty"),
        ((R.int(),), {}, "rows have dtype torch.int32: expected a float dtype"),
        ((R, R[0, 0, :6]), {}, "the query has shape (6,): expected [8], the width of the rows"),
        ((R, R[0, 0].int()), {}, "the query has dtype torch.int32: expected a float dtype"),
        ((R, torch.zeros(8, **META)), {}, "query on meta, rows on cpu: expected one device"),
        ((R,), {"heads": 3}, "heads=3: expected a divisor of the width 8"),
        ((R,), {"heads": 0}, "heads=0: expected a divisor of the width 8"),
        ((R,), {"heads": 2.0}, "heads=2.0: expected a divisor of the width 8"),
        ((R,), {"eps": 0.0}, "eps=0.0: expected a number above 0"),
        ((R,), {"eps": float("nan")}, "eps=nan: expected a number above 0"),
        ((R,), {"valid": torch.ones(3).long()}, "valid has shape (3,): expected [2]"),
        ((R,), {"valid": torch.ones(2)}, "valid have dtype torch.float32: expected int32 or int64"),
        (
            (R,),
            {"valid": torch.ones(2, dtype=torch.int64, **META)},
            "valid on meta, rows on cpu: expected one device",
        ),
        ((R,), {"valid": torch.tensor([1, 4])}, "valid spans 1..4: expected 1..3"),
        ((R,), {"valid": torch.tensor([0, 3])}, "valid spans 0..3: expected 1..3"),
        ((H[0], P), {}, "hidden have shape (6, 8): expected [B, L, D], none empty"),
        ((H, P[0]), {}, "positions have shape (3,): expected [2, K], K above 0"),
        ((H, P[:1]), {}, "positions have shape (1, 3): expected [2, K], K above 0"),
        ((H, P.float()), {}, "positions have dtype torch.float32: expected int32 or int64"),
        ((H, P.to("meta")), {}, "positions on meta, rows on cpu: expected one device"),
        ((H, P + 1), {}, "positions span 1..6: expected 0..5"),
        ((H, P - 1), {}, "positions span -1..4: expected 0..5"),
        (
            (H, P.flip(1)),
            {"valid": torch.tensor([1, 2])},
            "positions of sample 1 are [3, 2, 1]: expected increasing numbers",
        ),
        (
            (H, torch.tensor([[0, 0, 1], [0, 1, 2]])),
            {},
            "positions of sample 0 are [0, 0, 1]: expected increasing numbers",
        ),
    ],
)
def test_what_does_not_fit_is_an_error(arguments, options, message, mode, monkeypatch) -> None:
    monkeypatch.setenv("COMA_KERNELS", mode)
    at = len(arguments) > 1 and arguments[1].dim() + arguments[0].dim() > 4
    at = at or arguments[0] is H or "hidden" in message or "positions" in message
    function = attention_pool_at if at else attention_pool
    with pytest.raises(ValueError, match=re.escape(message)):
        function(*arguments, **options)


@pytest.mark.parametrize(
    ("rows", "query", "reason"),
    [
        (R.double(), None, "rows of torch.float64"),
        (R, R[0, 0].double(), "query of torch.float64"),
        (torch.zeros(1, 1025, 2), None, "1025 tokens, more than 1024"),
        (torch.zeros(1, 1, 8200), None, "a padded width of 16384, more than 8192"),
    ],
)
def test_what_the_kernels_do_not_serve(rows, query, reason, monkeypatch) -> None:
    """Asked for, it is an error; else plain torch does it."""
    monkeypatch.setenv("COMA_KERNELS", "triton")
    with pytest.raises(ValueError, match=re.escape(reason)):
        attention_pool(rows, query)
    monkeypatch.setenv("COMA_KERNELS", "auto")
    assert attention_pool(rows, query).shape == (len(rows), rows.shape[-1])


def test_offsets_within_a_sample_are_32_bits(on_triton) -> None:
    hidden = torch.zeros(0, 2**20, 4096)
    places = torch.zeros(0, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match="a sample of 4294967296 elements from end to end"):
        attention_pool_at(hidden, places)
    assert attention_pool_at(hidden[:, :1000], places).shape == (0, 4096)


def test_float64_stays_float64() -> None:
    assert attention_pool(R.double() + 1).dtype == torch.float64
