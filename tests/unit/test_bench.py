"""The comparison of steps: it reports nothing of a rival that computes something else."""

from __future__ import annotations

import io
import json
from contextlib import redirect_stdout

import pytest
import torch
from torch import nn

from coma_ds.bench import __main__ as command
from coma_ds.bench import cpu
from coma_ds.bench.cpu import Embedder, interleave, ratio, table
from coma_ds.kernels.info_nce import info_nce
from coma_ds.optim import build_optimizer
from tests.distributed.harness import run_world


class Plain:
    """In the rival's place: one graph over the whole batch, of the module that the rival gets."""

    def __init__(self, model, config, batch) -> None:
        self.model = nn.Sequential(Embedder(model, batch))
        self.pairs = batch.pairs
        self.optimizer = build_optimizer(model, config.optim)

    def gradient(self) -> float:
        self.optimizer.zero_grad()
        rows = torch.arange(2 * self.pairs)
        emb = self.model({"rows": rows})["sentence_embedding"]
        loss = info_nce(
            emb[: self.pairs],
            emb[self.pairs :],
            positive_index=torch.arange(self.pairs),
            temperature=cpu.TEMPERATURE,
        )
        loss.backward()
        return float(loss.detach())

    def step(self) -> None:
        self.gradient()
        self.optimizer.step()


class Wrong(Plain):
    """A thousandth beside it."""

    def gradient(self) -> float:
        loss = super().gradient()
        for parameter in self.model.parameters():
            if parameter.grad is not None:
                parameter.grad *= 1.001
        return loss


def compared(rival: str, folder: str) -> list:
    """In a process of its own, as DeepSpeed's groups stay: exit code or error, and the output."""
    cpu.importlib.util.find_spec = lambda name: object()
    cpu.version = lambda name: "1"
    cpu.Rival = {"same": Plain, "wrong": Wrong}[rival]
    words = ["--rounds", "1", "--pairs", "4", "--chunk", "3", "--output", folder]
    with redirect_stdout(io.StringIO()) as out:
        try:
            return [command.main(words), out.getvalue()]
        except ValueError as error:
            return [str(error), out.getvalue()]


def test_both_compute_the_same_before_anything_is_timed(tmp_path) -> None:
    arguments = {"rival": "same", "folder": str(tmp_path)}
    ((code, text),) = run_world(1, "tests.unit.test_bench:compared", **arguments)
    assert code == 0
    for name in ("sentence-transformers", "zero0, graphs replayed", "zero3, graphs kept"):
        assert name in text
    (path,) = tmp_path.glob("cpu-*.json")
    found = json.loads(path.read_text())
    assert found["loss"][0] == pytest.approx(found["loss"][1], rel=1e-4)
    assert len(found["ratios"]) == 4
    assert {k: len(v) for k, v in found["zero3"].items()} == {"replayed": 1, "rival": 1, "kept": 1}


def test_a_rival_that_computes_something_else(tmp_path) -> None:
    arguments = {"rival": "wrong", "folder": str(tmp_path)}
    ((error, text),) = run_world(1, "tests.unit.test_bench:compared", **arguments)
    assert "they do not compute the same" in error and "apart by 1.0e-03" in error
    assert not text and not any(tmp_path.iterdir())


def test_without_the_rival(monkeypatch) -> None:
    monkeypatch.setattr(cpu.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install sentence-transformers"):
        cpu.compare(rounds=1, pairs=4, chunk=3)


def test_a_place_that_cannot_be_written_is_told_before_the_work(monkeypatch, tmp_path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(cpu, "compare", lambda **_: pytest.fail("it was measured"))
    with pytest.raises(ValueError, match=r"--output .*/file: cannot be written"):
        command.main(["--output", str(tmp_path / "file")])


@pytest.mark.parametrize("words", [["--rounds", "0"], ["--stage", "match"]])
def test_what_makes_no_sense_is_refused(monkeypatch, tmp_path, capsys, words) -> None:
    monkeypatch.setattr(cpu, "compare", lambda **_: pytest.fail("it was measured"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        command.main([*words, "--output", str(tmp_path)])
    assert "must be 1 or more" in (said := capsys.readouterr().err) or "is for a GPU" in said


def test_turns_and_ratios() -> None:
    order: list[str] = []
    calls = {name: lambda name=name: order.append(name) for name in "ab"}
    times = interleave(2, calls)
    assert order == ["a", "b"] * (2 + cpu.WARM) and [len(t) for t in times.values()] == [2, 2]
    assert ratio([6, 2, 9], [2, 2, 1]) == {"median": 3, "least": 1, "most": 9}
    found = {
        "pairs": 8, "chunk": 4, "threads": 1, "cpu": "x",
        "zero0": {"rival": [4.0], "kept": [2.0]}, "ratios": {"zero0, graphs kept": ratio([4], [2])},
    }  # fmt: skip
    lines = table(found).splitlines()
    assert lines[-2].split() == ["sentence-transformers", "2.0"]
    assert lines[-1].split() == "zero0, graphs kept 4.0 2.00 x (2.00 to 2.00)".split()
