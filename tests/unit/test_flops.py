"""The arithmetic of a step: the formula against torch's own counter, operation by operation."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from coma_ds.batch import ImageBatch
from coma_ds.config import FAMILIES
from coma_ds.model import answers
from coma_ds.model.work import Work, visible_pairs, vision_pairs
from coma_ds.objectives.compress import Compress
from coma_ds.objectives.match import Match
from coma_ds.planning.flops import ModelFlops
from coma_ds.step import Budget, accumulate, grad_cache
from coma_ds.throughput import Throughput
from tests.distributed.cases import BUDGET, LORA, TOWER, UNTIED
from tests.distributed.exact import Case
from tests.tiny import PlainEngine, tiny_config
from tests.unit.test_visibility import slow_mask

TWO = {"samples": 2}
CHECKPOINTED = {"gradient_checkpointing": True}
CASES = {
    **{family: Case("", family=family, images="all", chunk=TWO) for family in FAMILIES},
    "tower": Case("", images="all", chunk=TWO, model=TOWER),
    "lora": Case("", images="all", chunk=TWO, model=LORA),
    "untied": Case("", images="all", chunk=TWO, model=UNTIED),
    "packed": Case("", images="all", chunk=BUDGET, model={"carrier": "packed"}),
    "dense": Case("", images="all", chunk=BUDGET, model={"carrier": "dense"}),
    "kept": Case("", images="all", chunk=TWO | {"keep": 2}),
    "no image": Case("", images="none", chunk=TWO),
}


def step(case: Case) -> tuple[float, float, float]:
    """FLOPs of a step: counted by torch, by the formula, and needed."""
    model = case.build(arithmetic="matmul")
    batch, config = case.batch(0, 0), case.run_config
    matching = case.stage == "match"
    objective = Match(config.match) if matching else Compress(config.compress)
    take_step = grad_cache if matching else accumulate
    model.backbone.work.take()
    with FlopCounterMode(display=False) as counter:
        take_step(
            PlainEngine(model.train()), objective, batch, Budget.of(config.chunk), seed=0, step=0
        )
    flops = ModelFlops.of(model)
    executed = flops.executed(model.backbone.work.take())
    vision = model.backbone.lm.config.vision_config
    needed = flops.needed(batch, vision, matching=matching, bottleneck=not matching)
    counted = counter.get_total_flops()
    if matching:  # the similarities, forward and backward
        counted -= 6 * batch.pairs * (len(batch) - batch.pairs) * model.backbone.width
    return counted, executed, needed


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("stage", ["match", "compress"])
def test_the_formula_is_what_torch_counts(stage, name) -> None:
    """To the last FLOP, chunks, replays and padding included."""
    case = CASES[name]
    counted, executed, needed = step(Case(**vars(case) | {"stage": stage}))
    assert executed == pytest.approx(counted, rel=1e-4)
    assert needed < executed


def test_checkpoints_and_logits_that_are_computed_again(monkeypatch) -> None:
    monkeypatch.setattr(answers, "MAX_LOGITS", 3 * 512)
    case = Case("", stage="compress", images="all", chunk=TWO, model=CHECKPOINTED)
    counted, executed, needed = step(case)
    assert executed == pytest.approx(counted, rel=1e-4)
    plain = step(Case(**vars(case) | {"model": {}}))
    assert plain[1] < executed and plain[2] == needed
    teacher = Case(**vars(case) | {"model": {}, "compress": {"loss": "kl"}})
    counted, executed, _ = step(teacher)
    assert executed == pytest.approx(counted, rel=1e-4)


def test_one_chunk_without_padding_and_replay_executes_what_is_needed() -> None:
    """Beside what a chunk's padding costs: every score above the diagonal, on a CPU."""
    case = Case("", images="all", chunk={"samples": 64, "keep": 1}, model={"carrier": "packed"})
    _, executed, needed = step(case)
    model = case.build(arithmetic="matmul")
    sizes = case.batch(0, 0).sizes_B
    above = int((sizes * (sizes - 1) // 2).sum())
    assert executed - needed == 3 * above * ModelFlops.of(model).text_pair


@pytest.mark.parametrize("grid", [(1, 4, 4), (1, 8, 14), (2, 6, 10)])
def test_windows_of_the_tower(grid) -> None:
    """Windows of 56 pixels are two image tokens wide in the tiny tower: counted one by one."""
    vision = tiny_config("qwen2_5_vl").vision_config
    frames, height, width = grid
    images = ImageBatch(torch.zeros(0, 1), torch.tensor([grid]), 4)
    merge, cells = 2, vision.window_size // (2 * vision.patch_size)
    inside = 0
    for top in range(0, height // merge, cells):
        for left in range(0, width // merge, cells):
            rows = min(cells, height // merge - top) * merge
            columns = min(cells, width // merge - left) * merge
            inside += frames * (rows * columns) ** 2
    full = len(vision.fullatt_block_indexes)
    wanted = full * frames * (height * width) ** 2 + (vision.depth - full) * inside
    assert vision_pairs(images, vision) == wanted


def test_visible_pairs_are_those_of_the_table() -> None:
    lengths = [(3, 2, 4), (0, 1, 5), (6, 2, 0)]
    mask = slow_mask(lengths, 9, False)
    assert visible_pairs(torch.tensor(lengths), bottleneck=True) == int(mask.sum())
    causal = sum(n * (n + 1) // 2 for n in map(sum, lengths))
    assert visible_pairs(torch.tensor(lengths), bottleneck=False) == causal


def test_what_was_taken_is_gone() -> None:
    work = Work()
    work.add(graph=True, text_rows=3)
    with torch.no_grad():
        work.add(text_rows=4, head_rows=1)
    taken = work.take()
    assert taken.text_rows == [4, 3] and taken.head_rows == [1, 0]
    assert work == Work() and taken.text_rows == [4, 3]


@pytest.mark.parametrize("stage", ["match", "compress"])
def test_what_a_run_reports_of_a_step(stage) -> None:
    """Evaluations before the step do not count."""
    case = Case("", stage=stage, images="all", chunk=TWO)
    model, batch, config = case.build(arithmetic="matmul"), case.batch(0, 0), case.run_config
    seen = Throughput(model, config)
    with torch.no_grad():
        model.embed_images(batch.images)
    seen.begin()
    take_step, objective = (
        (grad_cache, Match(config.match)) if stage == "match" else
        (accumulate, Compress(config.compress))
    )  # fmt: skip
    take_step(PlainEngine(model.train()), objective, batch, Budget.of(config.chunk), seed=0, step=0)
    _, executed, needed = step(case)
    values = seen.values(batch, 4.0)
    assert values["tflops_per_second"] == pytest.approx(executed / 4e12)
    assert values["executed_per_needed"] == pytest.approx(executed / needed)
