"""Chunks that are measured: what is shared out, what is agreed, and that nothing is left behind."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch

from coma_ds import budget as module
from coma_ds import hardware
from coma_ds.budget import Cost, measure, probe, remember, settle, share_out
from coma_ds.config import ChunkConfig, CompressConfig, MatchConfig, RunConfig
from coma_ds.objectives.compress import Compress
from coma_ds.objectives.match import Match
from coma_ds.step import Budget, grad_cache, kept_chunks, plan_chunks
from tests.distributed.exact import Case
from tests.tiny import PlainEngine, make_batch, tiny_model

KB = Cost(graph=1000.0, transient=500.0)  # a chunk needs 2000 bytes a token
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def plain(monkeypatch):
    monkeypatch.setattr(PlainEngine, "reduces_once", False, raising=False)


def engine(carrier: str = "split"):
    backbone = SimpleNamespace(carrier=carrier)
    return SimpleNamespace(device=CPU, model=SimpleNamespace(backbone=backbone))


def auto(**keys) -> ChunkConfig:
    return ChunkConfig(**{"tokens": "auto", "keep": 0, **keys})


@pytest.mark.parametrize(
    "config, free, wanted",
    [
        (auto(), 10e6, Budget(64, 3840, 0)),  # 8 MB / 2000, in steps of 256
        (auto(), 1e12, Budget(64, module.LARGEST, 0)),
        (auto(), 0, Budget(64, 100, 0)),  # the longest sample runs all the same
        (auto(keep=3), 10e6, Budget(64, 3840, 3)),
        (auto(keep="auto"), 10e6, Budget(64, 3840, 0, 256)),  # 0.32 MB are left
        (auto(keep="auto"), 200e6, Budget(64, 15872, 0, 128256)),  # 8, and a running one
        (auto(tokens=1000, keep="auto"), 10e6, Budget(64, 1000, 0, 5888)),
        (auto(tokens=None, samples=4, keep="auto"), 10e6, Budget(4, None, 0, 7168)),
        (auto(tokens=9000, keep="auto"), 10e6, Budget(64, 9000, 0, 0)),
    ],
)
def test_what_fits(config, free, wanted) -> None:
    assert share_out(config, KB, free, longest=100, total=10**6) == wanted


@pytest.mark.parametrize("total, kept", [(3000, 3840), (3584, 3840), (3900, 256)])
def test_a_batch_that_fits_keeps_every_graph(total, kept) -> None:
    """8 MB hold 4000 tokens that run; with some room, since the next batch may be larger."""
    config = auto(keep="auto")
    assert share_out(config, KB, 10e6, longest=100, total=total) == Budget(64, 3840, 0, kept)


def test_without_auto_nothing_is_measured() -> None:
    config = ChunkConfig(samples=3, tokens=70, keep=2)
    assert settle(engine(), None, None, config, None) == Budget(3, 70, 2)
    packed = settle(engine("packed"), None, None, config, None)
    assert packed == Budget(3, 70, 2, packed=True)


def test_a_run_that_goes_on_keeps_its_budget(monkeypatch, caplog) -> None:
    """In a world of the same size, with the same settings: what is told anew counts."""
    known = remember(Budget(64, 512, 0, 1024), auto(keep="auto"))
    with caplog.at_level(logging.INFO, "coma_ds"):
        assert settle(engine(), None, None, auto(keep="auto"), known) == Budget(64, 512, 0, 1024)
    assert "chunks as before: at most 64 samples and 512 tokens, graphs of 1024" in caplog.text
    batch = make_batch([{"text": 3}, {"text": 9}])
    monkeypatch.setattr(module, "measure", lambda *_: (KB, 10e6))
    for config, before, wanted in (
        (auto(keep="auto"), known | {"world": 2}, Budget(64, 3840, 0, 3840)),
        (auto(), known, Budget(64, 3840, 0)),  # it was told to keep none
        (auto(samples=2, keep="auto"), known, Budget(2, 3840, 0, 3840)),
    ):
        assert settle(engine(), None, batch, config, before) == wanted


def test_the_probe_is_the_longest_samples(monkeypatch) -> None:
    batch = make_batch([{"text": 3}, {"text": 30}, {"text": 20}, {"text": 9}])
    monkeypatch.setattr(module, "PROBE", 3 * 34)
    assert probe(batch).tolist() == [1, 2, 3]
    monkeypatch.setattr(module, "PROBE", 5)
    assert probe(batch).tolist() == [1]


@pytest.mark.parametrize("objective", [Match(MatchConfig()), Compress(CompressConfig())])
def test_a_token_costs_what_graphs_hold(objective, monkeypatch) -> None:
    """As much in a long measurement as in a short one; no gradient stays, no weight moves."""
    matching = isinstance(objective, Match)
    samples = [{"text": 30, "images": [(4, 4)], "dialogue": 6, "answers": [(1, 6)]}] * 8
    model, batch = tiny_model(matching=matching), make_batch(samples)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    costs = []
    for count in (2, 8):
        monkeypatch.setattr(module, "PROBE", count * int(batch.sizes_B[0]))
        cost, free = measure(PlainEngine(model), objective, batch)
        costs.append(cost.graph)
        # once to set up, once measured
        without, with_graph = model.backbone.work.take().text_rows
        assert without == with_graph > 0
        assert 2**28 < free < 2**45
    assert costs[0] == pytest.approx(costs[1], rel=0.1)
    # Two layers of width 64 keep some dozens of rows of it for each token.
    assert 2 * 10 * 64 * 4 < costs[0] < 2 * 100 * 64 * 4
    for name, parameter in model.named_parameters():
        assert parameter.grad is None and torch.equal(parameter, before[name])


def test_memory_comes_from_the_container_where_it_has_a_limit(monkeypatch, tmp_path) -> None:
    free = hardware.available_memory()
    assert 2**28 < free < 2**45
    monkeypatch.setattr(hardware, "CGROUP", tmp_path)
    (tmp_path / "memory.max").write_text("max\n")
    assert hardware.available_memory() == pytest.approx(free, rel=0.5)
    (tmp_path / "memory.max").write_text("5000\n")
    (tmp_path / "memory.current").write_text("2000\n")
    assert hardware.available_memory() == 3000


@pytest.mark.parametrize("tokens, wanted", [(0, 0), (7, 0), (8, 1), (23, 1), (24, 2), (10**6, 3)])
def test_the_smallest_chunks_are_kept(tokens, wanted) -> None:
    """Chunks of 2 x 11, 2 x 8 and 1 x 8 tokens with their padding."""
    batch = make_batch([{"text": n} for n in (4, 7, 4, 7, 4)], tokens=4)
    budget = Budget(2, None, 0, tokens)
    parts = batch.split(plan_chunks(batch, budget))
    assert [(len(p), int(p.sizes_B.max())) for p in parts] == [(2, 11), (2, 8), (1, 8)]
    assert kept_chunks(parts, budget, CPU) == wanted


def test_kept_by_tokens_is_the_same_gradient() -> None:
    case = Case("", images="all", chunk={"samples": 2})
    found = []
    for budget in (Budget(2, None, 0), Budget(2, None, 0, 60), Budget(64, None, 0)):
        model, batch = case.build().double().eval(), case.batch(0, 0)
        batch.images.pixels_PC.data = batch.images.pixels_PC.double()
        grad_cache(PlainEngine(model), Match(MatchConfig()), batch, budget, seed=0, step=0)
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    for other in found[1:]:
        for name, gradient in found[0].items():
            assert torch.allclose(other[name], gradient, atol=1e-12)


@pytest.mark.parametrize("wrong", ["most", 0, -1])
def test_a_wrong_number_of_tokens(wrong) -> None:
    with pytest.raises(ValueError, match="chunk"):
        RunConfig.model_validate({"chunk": {"tokens": wrong}})
