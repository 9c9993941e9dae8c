"""The benchmark's own code, run on the CPU at small shapes: with plain torch where it must be fast,
with the interpreted kernels where it is about them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types

import pytest
import torch

from coma_ds.kernels.bench import __main__ as command
from coma_ds.kernels.bench import gate, info_nce, measure, pooling, rivals, tune
from coma_ds.kernels.bench.measure import Budget, Candidate, Result, compare, row

CPU = torch.device("cpu")
KEYS = ["op", "impl", "N", "M", "D", "K", "dtype", "options", "ms", "percent_of_ceiling",
        "extra_mib", "error"]  # fmt: skip


@pytest.fixture(autouse=True)
def three_rounds(monkeypatch) -> None:
    monkeypatch.setattr(measure, "ROUNDS", (3, 3))


def budget() -> Budget:
    return Budget.start(60, 0.01)


def test_without_a_gpu_the_command_says_so_and_compares(tmp_path) -> None:
    env = os.environ | {"TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-m", "coma_ds.kernels.bench", "--quick", "--output", str(tmp_path)],
        capture_output=True,
        text=True,
        env=env,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "no GPU here" in done.stdout
    (path,) = tmp_path.glob("cpu-????-??-??.json")
    rows = json.loads(path.read_text())
    assert [list(r) for r in rows] == [KEYS] * len(rows)
    assert {r["impl"] for r in rows} == {"torch dense", "coma chunked reference"}
    for one in rows:
        assert one["op"] == "info_nce" and one["ms"] > 0 and one["error"] < 1e-4
        assert one["percent_of_ceiling"] > 0 and one["impl"] in done.stdout


def test_rows_of_the_loss(monkeypatch) -> None:
    """Every kind of row that a GPU run has."""
    monkeypatch.setenv("COMA_KERNELS", "torch")
    fast = rivals.Rival("fast", lambda q, t, temperature: (q * t).sum())
    both = rivals.Rival("both", lambda q, t, temperature: (q * t).sum(), symmetric=True)
    wide = rivals.Rival("wide", lambda q, t, temperature: (q * t).sum(), multiple=256)
    wanted = [info_nce.Shape(32, 32, 24), info_nce.Shape(8, 40, 24)]
    rows = list(
        info_nce.bench(CPU, budget(), [fast, both, wide], wanted, torch.float32, extended=32)
    )
    assert all(list(r) == KEYS for r in rows)
    names = [(r["N"], r["impl"], bool(r["options"].get("symmetric"))) for r in rows]
    assert names == [
        (32, "ceiling: 3 products", False),
        (32, "coma", False),
        (32, "torch", False),
        (32, "fast", False),
        (32, "coma", True),
        (32, "both", True),
        (32, "coma", False),
        (8, "ceiling: 3 products", False),
        (8, "coma", False),
        (8, "torch", False),
    ]
    assert all(r["ms"] > 0 for r in rows)
    assert rows[0]["percent_of_ceiling"] == 100.0
    assert rows[1]["error"] < 1e-4 and rows[2]["error"] < 1e-4 and rows[3]["error"] > 0.1
    share = 100 * rows[0]["ms"] / rows[1]["ms"]
    assert rows[1]["percent_of_ceiling"] == pytest.approx(share, abs=0.06)
    assert rows[6]["options"]["margin"] == 0.1


def test_rows_of_the_pooling(monkeypatch) -> None:
    monkeypatch.setenv("COMA_KERNELS", "torch")
    wanted = [pooling.Shape(6, 4, 16), pooling.Shape(6, 4, 16, 16)]
    rows = list(pooling.bench(CPU, budget(), wanted, torch.float32, past=2**12, copied=2**16))
    assert rows[0]["impl"] == "ceiling: copy" and rows[0]["options"]["gb_per_s"] > 0
    found = [(r["impl"], r["options"]["form"], r["options"]["pass"]) for r in rows[1:]]
    assert found == [
        (impl, form, way)
        for form in ("rows", "padded")
        for way in ("forward", "backward")
        for impl in ("coma", "torch")
    ]
    assert all(list(r) == KEYS and r["ms"] > 0 for r in rows)
    assert all(r["error"] < 1e-5 and r["percent_of_ceiling"] is not None for r in rows[1:])
    assert [r["M"] for r in rows[1:]] == [None] * 4 + [16] * 4


def test_other_tiles_can_be_tried(on_triton) -> None:
    """All tiles give the same result; the shipped one is among them, first."""
    shape = pooling.Shape(3, 5, 48)
    for backward in (False, True):
        mine = list(tune.candidates(shape, torch.float32, CPU, backward=backward))
        assert "(shipped)" in mine[0].name and len(mine) > 20
        assert len({c.name for c in mine}) == len(mine)
        first, *others = (c.run(c.prepare(0)) for c in mine[::12])
        for other in others:
            assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(first, other))


def test_the_sampled_gradients_are_the_gradients() -> None:
    query, target = info_nce.inputs(info_nce.Shape(40, 50, 16), torch.float64, CPU)
    exact = info_nce.sampled_gradients(query, target, 0.05, count=7)
    loss = torch.nn.functional.cross_entropy(query @ target.T / 0.05, torch.arange(40))
    grads = torch.autograd.grad(loss, (query, target))
    assert info_nce.gradient_error(grads, exact) < 1e-12
    assert [len(where) for where, _ in exact] == [7, 7]
    assert info_nce.gradient_error([g * 1.01 for g in grads], exact) == pytest.approx(0.01)
    grads[1][0, 0] = float("nan")
    assert info_nce.gradient_error(grads, exact) != info_nce.gradient_error(grads, exact)


def test_a_candidate_that_fails_is_a_row_not_the_end() -> None:
    def broken(_):
        raise torch.OutOfMemoryError("no room")

    def wrong(_):
        raise RuntimeError("first line\nsecond line")

    fine = Candidate("fine", lambda _: [torch.zeros(2)])
    found = compare([Candidate("big", broken), fine, Candidate("bad", wrong)], CPU, budget())
    assert found["big"].failure == "out of memory" and found["big"].ms is None
    assert found["bad"].failure == "RuntimeError: first line" and found["fine"].ms > 0
    line = row("info_nce", "big", found["big"], 1.0, N=1)
    assert line["options"] == {"failed": "out of memory"} and line["percent_of_ceiling"] is None
    assert compare([Candidate("big", broken)], CPU, budget())["big"].failure


def test_candidates_take_turns_and_preparation_is_not_timed() -> None:
    calls = []

    def candidate(name):
        return Candidate(
            name,
            lambda state: calls.append((name, state)) or [],
            lambda number: calls.append((name, "prepared")) or number,
        )

    compare([candidate("a"), candidate("b")], CPU, budget(), inner=2)
    rounds = [name for name, state in calls[16:] if state == "prepared"][::2]
    assert rounds == ["a", "b", "b", "a", "a", "b"]
    numbers = [state for name, state in calls[16:] if name == "a" and state != "prepared"]
    assert sorted(numbers) == list(range(6))  # each call has its own inputs


def test_a_spent_budget_ends_the_run() -> None:
    over = Budget.start(-1)
    assert not list(info_nce.bench(CPU, over, [], [info_nce.Shape(8, 8, 8)]))
    rows = list(pooling.bench(CPU, over, [pooling.Shape(2, 2, 8)], copied=2**10))
    assert [r["impl"] for r in rows] == ["ceiling: copy"]


def test_memory_beside_the_result() -> None:
    def run():
        large = torch.ones(2**24)  # 64 MiB
        return [large[: 2**22].clone()]

    extra, (out,) = measure.extra_memory(run, CPU)
    assert len(out) == 2**22 and 56 < extra < 72


def test_shapes_are_those_of_the_issue() -> None:
    loss = {(s.rows, s.columns, s.width) for s in info_nce.shapes(False)}
    assert loss == {
        (n, m, d)
        for n, m in ((8192, 8192), (32768, 32768), (65536, 65536), (128, 1024), (1024, 1024),
                     (128, 65536), (1024, 65536))
        for d in (1024, 2048, 3584)
    }  # fmt: skip
    pools = {(s.samples, s.count, s.width) for s in pooling.shapes(False) if not s.length}
    assert pools == {
        (b, k, d) for b in (128, 4096) for k in (16, 32, 64) for d in (1024, 2048, 3584)
    }
    assert pooling.Shape(4096, 32, 3584, 128) in pooling.shapes(True)
    assert set(info_nce.shapes(True)) <= set(info_nce.shapes(False))


def test_rivals_by_name_and_from_a_folder(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    known = types.ModuleType("memeff")

    class Form(torch.nn.Module):
        def __init__(self, **options):
            super().__init__()
            self.options = options

        def forward(self, query, target):
            return (query * target).sum() * self.options["temperature"]

    known.MemoryEfficientQwen3Loss = known.MemoryEfficientCLIPLoss = Form
    monkeypatch.setitem(sys.modules, "memeff", known)
    monkeypatch.setitem(sys.modules, "inf_cl", None)
    (tmp_path / "rival_one.py").write_text(
        "NAME = 'one'\nSYMMETRIC = True\ndef loss(q, t, temperature):\n    return (q @ t.T).sum()\n"
    )
    (tmp_path / "rival_two.py").write_text("import nothing_of_that_name\n")
    found, missing = rivals.find([tmp_path])
    assert [(r.name, r.symmetric) for r in found] == [
        ("memeff", False),
        ("memeff", True),
        ("one", True),
    ]
    assert float(found[0].loss(torch.ones(2, 2), torch.ones(2, 2), 0.5)) == 2.0
    assert [line.split(":")[0] for line in missing] == ["inf_cl", "rival_two.py"]
    with pytest.raises(ValueError, match=r"--rivals .*nowhere: no such folder"):
        rivals.find([tmp_path / "nowhere"])


def test_a_red_gate_ends_the_run(monkeypatch, capsys) -> None:
    monkeypatch.setattr(command, "failures", lambda only, device: ["info_nce: wrong"])
    monkeypatch.setenv("COMA_KERNELS", "auto")
    rows = []
    assert command.on_gpu(command.arguments([]), CPU, rows) == 1 and not rows
    assert "NOT RIGHT" in capsys.readouterr().out
    monkeypatch.setattr(command, "failures", lambda only, device: [])
    monkeypatch.setattr(pooling, "bench", lambda *args: iter([LINE]))
    args = command.arguments(["--only", "attention_pool"])
    assert command.on_gpu(args, CPU, rows) == 0 and rows == [LINE]
    assert "ceiling: copy" in capsys.readouterr().out


LINE = row("attention_pool", "ceiling: copy", Result(1.5), None, options={"gb_per_s": 3})


def test_the_file_is_named_after_card_and_date(tmp_path) -> None:
    path = command.save([LINE], tmp_path / "new", "NVIDIA H100 80GB HBM3")
    assert path.name.startswith("nvidia-h100-80gb-hbm3-20") and json.loads(path.read_text()) == [
        LINE
    ]


def test_the_gate_passes_what_is_right_and_sees_what_is_wrong(on_triton, monkeypatch) -> None:
    """The kernels in the interpreter, small; then with an error planted."""
    monkeypatch.setattr(gate, "poison", lambda device: None)
    shapes = ((3, 4, 16),)
    assert not list(gate.check_pooling(CPU, shapes))
    honest = gate.attention_pool_at

    def slightly_off(*args, **options):
        emb = honest(*args, **options)
        return emb * (1 + 1e-5) if os.environ["COMA_KERNELS"] == "triton" else emb

    monkeypatch.setattr(gate, "attention_pool_at", slightly_off)
    found = list(gate.check_pooling(CPU, shapes))
    assert len(found) == 8 and "errors" in found[0]
