"""The comparison of steps on a GPU, on a CPU: tiny models, and nothing that a time could say."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from coma_ds.batch import IGNORE
from coma_ds.bench import gpu, usual
from coma_ds.bench.clock import Clock
from coma_ds.bench.made import Counts, Maker
from coma_ds.config import CompressConfig, MatchConfig
from coma_ds.objectives.compress import Compress
from coma_ds.objectives.match import Match
from coma_ds.planning.flops import ModelFlops
from tests.distributed.harness import run_world
from tests.tiny import FIRST_ID, IMAGE_ID, K, PlainEngine, tiny_config, tiny_model

SMALL = Counts(sides=(2, 4), words=(4, 9), said=(3, 6))
RECIPES = {"match": "demo-match", "compress": "demo-compress"}


def compared(folder: str) -> dict:
    """Both stages in a process of their own; then with a rival that weighs rows wrongly."""
    how = {
        "records": {"match": 12, "compress": 6}, "rounds": 1, "counts": SMALL,
        "overrides": ("precision=fp32",),
    }  # fmt: skip
    cpu = torch.device("cpu")
    found = gpu.compare(cpu, recipes=RECIPES, **how)
    plain, error = usual.match, ""
    usual.match = lambda *arguments: 1.05 * plain(*arguments)
    gpu.MATCH = (gpu.MATCH[0], gpu.MATCH[-1])
    try:
        gpu.compare(cpu, recipes={"match": "demo-match"}, **how)
    except ValueError as caught:
        error = str(caught)
    found["error"], found["text"] = error, gpu.table(found)
    found["written"] = str(gpu.write(found, Path(folder)))
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict:
    folder = str(tmp_path_factory.mktemp("benchmarks"))
    return run_world(1, "tests.unit.test_bench_gpu:compared", folder=folder)[0]


@pytest.mark.parametrize("stage", RECIPES)
def test_every_way_computes_the_same(found, stage) -> None:
    ways = found["stages"][stage]["ways"]
    losses = [way["loss"] for way in ways.values()]
    assert losses == pytest.approx([losses[0]] * len(losses), rel=1e-4) and losses[0] > 0.1
    assert [*ways][:: len(ways) - 1] == ["ours", "usual"]


def test_what_is_executed_is_what_a_way_is_about(found) -> None:
    match, compress = (
        {n: way["executed_per_needed"] for n, way in found["stages"][stage]["ways"].items()}
        for stage in RECIPES
    )
    assert match["ours"] < 1.1 < match["no graph kept"] < match["replay with checkpoints"]
    assert match["padded, torch's attention"] > match["no graph kept"]
    assert match["usual"] == max(match.values()) > 2
    assert compress["ours"] < 1.1 < compress["with checkpoints"] < compress["usual"]


@pytest.mark.parametrize("stage", RECIPES)
def test_the_rivals_work_is_counted_in_full(stage) -> None:
    """As torch counts it, logits that nobody reads included; similarities are left out."""
    matching = stage == "match"
    model = tiny_model(matching=matching).train()
    model.backbone.carrier, model.backbone.arithmetic = "dense", "matmul"
    maker = Maker(model.backbone.lm.config, FIRST_ID, K, SMALL)
    batch = maker.pairs(5, 0) if matching else maker.dialogues(5, 0)
    objective = Match(MatchConfig()) if matching else Compress(CompressConfig())
    with FlopCounterMode(display=False) as counter:
        getattr(usual, stage)(PlainEngine(model), objective, batch, 2)
    counted = counter.get_total_flops()
    counted -= 6 * batch.pairs**2 * model.backbone.width
    executed = ModelFlops.of(model).executed(model.backbone.work.take())
    assert executed == pytest.approx(counted, rel=1e-3)


def test_times_by_part_name_all_of_a_step(found) -> None:
    kept = found["stages"]["match"]["ways"]["ours"]["parts"]
    assert set(kept) == {"vision", "forward, graph kept", "loss", "backward", "optimizer"}
    replayed = found["stages"]["match"]["ways"]["no graph kept"]["parts"]
    assert {"forward", "forward, replayed"} < set(
        replayed
    ) and "forward, graph kept" not in replayed
    assert set(found["stages"]["compress"]["ways"]["ours"]["parts"]) == {
        "vision", "forward, replayed", "backward", "optimizer",
    }  # fmt: skip


def test_a_way_with_another_loss_is_not_reported(found) -> None:
    assert "has the loss" in found["error"] and "another way" in found["error"]


def test_the_table_has_a_line_for_each_way(found) -> None:
    for way in (*gpu.MATCH, *gpu.COMPRESS):
        assert f"\n{way.name:28}" in found["text"]
    assert found["written"].endswith(f"cpu-{found['date']}.json")


def test_without_the_tests_of_a_gpu_nothing_is_measured(tmp_path) -> None:
    with pytest.raises(ValueError, match="run this in a checkout"):
        gpu.check(tmp_path)
    (tmp_path / "tests" / "gpu").mkdir(parents=True)
    (tmp_path / "tests" / "gpu" / "test_it.py").write_text("def test_it():\n    assert False\n")
    with pytest.raises(ValueError, match="tests of the GPU failed"):
        gpu.check(tmp_path)


def test_batches_are_made_as_they_are_described() -> None:
    maker = Maker(tiny_config("qwen2_5_vl"), FIRST_ID, K, SMALL)
    batch = maker.pairs(200, seed=1)
    assert batch.pairs == 200 and len(batch) == 400
    shares = [float((part > 0).double().mean()) for part in batch.image_counts_B.split(200)]
    assert shares[0] == pytest.approx(0.7, abs=0.1) and shares[1] == pytest.approx(0.5, abs=0.1)
    tokens = batch.images.tokens_I
    assert 4 <= int(tokens.min()) < int(tokens.max()) <= 16
    assert int((batch.input_ids_T == IMAGE_ID).sum()) == int(tokens.sum())
    assert (batch.lengths_B3[:, 1] == K).all() and batch.lengths_B3[:, 0].min() >= 4
    dialogues = maker.dialogues(50, seed=1)
    assert (dialogues.image_counts_B == 1).all() and len(dialogues.images) == 50
    answers = int((dialogues.labels_T != IGNORE).sum())
    assert 0.3 < answers / int(dialogues.lengths_B3[:, 2].sum()) < 0.7
    assert torch.equal(maker.pairs(200, seed=1).input_ids_T, batch.input_ids_T)


def test_a_part_excludes_the_parts_inside(monkeypatch) -> None:
    times = iter([0.0, 2.0, 7.0, 10.0])
    monkeypatch.setattr("coma_ds.bench.clock.time.perf_counter", lambda: next(times))
    clock = Clock(torch.device("cpu"))
    with clock.part("outer"), clock.part("inner"):
        pass
    assert dict(clock.seconds) == {"outer": 2.0 + 3.0, "inner": 5.0}
