"""How a batch is cut into chunks, and their random states."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from coma_ds import comm, step
from coma_ds.batch import Batch
from coma_ds.config import CompressConfig
from coma_ds.objectives.compress import Compress
from coma_ds.step import (
    TOWER,
    Budget,
    accumulate,
    embed_images,
    kept_chunks,
    plan_chunks,
    seed_chunk,
)
from tests.tiny import PlainEngine, make_batch, tiny_model

CPU = torch.device("cpu")
LENGTHS = st.lists(
    st.tuples(st.integers(0, 9), st.integers(1, 4), st.integers(0, 9)), min_size=1, max_size=20
)


def batch_of(lengths: list[tuple[int, int, int]]) -> Batch:
    total, count = sum(map(sum, lengths)), len(lengths)
    nothing = torch.zeros(count, dtype=torch.int64)
    return Batch(
        input_ids_T=torch.zeros(total, dtype=torch.int64),
        position_ids_3T=torch.zeros(3, total, dtype=torch.int64),
        labels_T=torch.full((total,), -100),
        lengths_B3=torch.tensor(lengths),
        image_counts_B=nothing,
        feature_counts_B=nothing,
        feature_rows_F=nothing[:0],
        content_ids_B=nothing,
    )


@given(LENGTHS, st.integers(1, 7), st.none() | st.integers(1, 120), st.integers(0, 25))
def test_every_sample_once_within_the_limits(lengths, samples, tokens, extra) -> None:
    batch = batch_of([(c, 2, d) for c, _, d in lengths])
    tokens_of = batch.sizes_B.tolist()
    config = Budget(samples=samples, tokens=tokens)
    alone = plan_chunks(batch, config)
    assert all(len(group) for group in alone)
    for groups in (alone, plan_chunks(batch, config, wanted=len(alone) + extra)):
        assert sorted(torch.cat(groups).tolist()) == list(range(len(batch)))
        order = [tokens_of[i] for i in torch.cat(groups).tolist()]
        assert order == sorted(order, reverse=True)
        for group in groups:
            assert group.dtype == torch.int64 and len(group) <= samples
            if len(group) > 1 and tokens is not None:
                part = batch.split([group])[0]
                for alignment in ("right", "segments"):
                    assert part.padded(alignment).input_ids_BL.numel() <= tokens
    assert len(groups) == len(alone) + extra


@given(LENGTHS, st.integers(1, 7))
def test_no_more_chunks_than_needed(lengths, samples) -> None:
    groups = plan_chunks(batch_of(lengths), Budget(samples=samples))
    assert len(groups) == -(-len(lengths) // samples)


def test_a_budget_is_used_up() -> None:
    """Equal samples of 10 tokens: as many as fit, not one less."""
    batch = batch_of([(5, 2, 3)] * 10)
    config = Budget(samples=64, tokens=40)
    assert [len(g) for g in plan_chunks(batch, config)] == [4, 4, 2]
    assert [len(g) for g in plan_chunks(batch, Budget(samples=3, tokens=40))] == [3, 3, 3, 1]


def test_the_budget_counts_the_aligned_view() -> None:
    """A long context beside a long dialogue is wider than either sample."""
    batch = batch_of([(20, 2, 1), (1, 2, 20)])
    assert len(plan_chunks(batch, Budget(samples=8, tokens=60))) == 2
    assert len(plan_chunks(batch, Budget(samples=8, tokens=84))) == 1


def test_packed_samples_count_their_tokens() -> None:
    batch = batch_of([(20, 2, 1), (1, 2, 20), (1, 2, 3)])
    sizes = [
        [len(group) for group in plan_chunks(batch, Budget(8, tokens, packed=True))]
        for tokens in (23, 46, 51, 52)
    ]
    assert sizes == [[1, 1, 1], [2, 1], [2, 1], [3]]
    parts = batch.split(plan_chunks(batch, Budget(8, 46, packed=True)))
    kept = [kept_chunks(parts, Budget(8, 46, 0, n, packed=True), CPU) for n in (5, 6, 51, 52)]
    assert kept == [0, 1, 1, 2]


def test_a_sample_over_the_budget_goes_alone() -> None:
    batch = batch_of([(30, 2, 0), (3, 2, 0), (3, 2, 0)])
    groups = plan_chunks(batch, Budget(samples=8, tokens=10))
    assert [g.tolist() for g in groups] == [[0], [1, 2]]


def test_wanted_chunks_cut_the_largest_and_then_stay_empty() -> None:
    batch = batch_of([(1, 1, 0)] * 5)
    sizes = [len(g) for g in plan_chunks(batch, Budget(samples=4), wanted=3)]
    assert sorted(sizes) == [1, 2, 2]
    sizes = [len(g) for g in plan_chunks(batch, Budget(samples=4), wanted=8)]
    assert sorted(sizes) == [0, 0, 0, 1, 1, 1, 1, 1]


def test_a_state_replays_and_no_two_are_alike() -> None:
    draws = {}
    for key in product((0, 1), (0, 1, 11), (0, 1, TOWER), (0, 1)):
        seed, step, chunk, rank = key
        seed_chunk(seed, step, chunk, rank)
        first = torch.rand(4)
        torch.rand(7)
        seed_chunk(seed, step, chunk, rank)
        assert torch.equal(first, torch.rand(4))
        draws[key] = tuple(first.tolist())
    assert len(set(draws.values())) == len(draws)
    seed_chunk(0, 1, 11, 1)
    ambiguous = torch.rand(4)
    seed_chunk(0, 11, 1, 1)
    assert not torch.equal(ambiguous, torch.rand(4))
    seed_chunk(3, 2, 1)
    own = torch.rand(2)
    seed_chunk(3, 2, 1, 0)  # in a world of one the rank is 0
    assert torch.equal(own, torch.rand(2))


SAMPLES = [
    {"images": [(2, 2)], "dialogue": 4 + i, "answers": [(1, 2 + i % 3)] if i != 3 else []}
    for i in range(5)
]


@pytest.mark.parametrize("trained", [False, True])
def test_accumulated_chunks_are_the_mean_over_all_answers(trained) -> None:
    """Uneven chunks, one without any answer, against one graph."""
    batch, objective = make_batch(SAMPLES), Compress(CompressConfig())
    model = tiny_model(matching=False, train_vision=trained).double()
    batch = batch.split([torch.arange(5)], with_images=True)[0]
    batch.images.pixels_PC.data = batch.images.pixels_PC.double()
    engine = PlainEngine(model)
    report = accumulate(engine, objective, batch, Budget(samples=2), seed=0, step=0)
    assert engine.lasts == [False, False, True]
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    total, sums = objective.loss(model, batch, model.embed_images(batch.images))
    (total / objective.weight(batch)).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert torch.allclose(found[name], parameter.grad, atol=1e-10), name
    answers = objective.weight(batch)
    assert report["loss"] == pytest.approx(total.item() / answers, rel=1e-5)
    assert report["answer_accuracy"] == pytest.approx(sums["answer_accuracy"].item() / answers)


def test_nothing_to_learn_from_is_an_error() -> None:
    batch = make_batch([{"text": 3, "dialogue": 4}])
    engine = PlainEngine(tiny_model(matching=False))
    with pytest.raises(ValueError, match="the whole batch has no answer token"):
        accumulate(engine, Compress(CompressConfig()), batch, Budget(64), seed=0, step=0)


@pytest.mark.parametrize("patches", [1, 48, 64])
def test_a_frozen_tower_takes_images_in_slices(patches, monkeypatch) -> None:
    """The same features as in one pass; a rank with fewer slices than another runs blanks."""
    samples = [{"images": [(2, 2), (2, 4)]}, {"text": 2}, {"images": [(4, 4), (2, 2)]}]
    batch, model = make_batch(samples), tiny_model().double()
    monkeypatch.setattr(step, "PATCHES", 10**6)
    whole = embed_images(PlainEngine(model), batch.images, seed=0, step=0)
    model.backbone.work.take()
    monkeypatch.setattr(step, "PATCHES", patches)
    engine = PlainEngine(model)
    found = embed_images(engine, batch.images, seed=0, step=0)
    assert torch.allclose(found, whole, atol=1e-6) and not found.requires_grad
    slices = len(batch.images.slices(patches))
    monkeypatch.setattr(comm, "all_max", lambda own, device: max(own, slices + 2))
    again = embed_images(engine, batch.images, seed=0, step=0)
    assert torch.equal(again, found)
    blank = embed_images(engine, None, seed=0, step=0)
    assert torch.equal(blank, model.embed_images(None))
    model.backbone.work.take()
    trained = tiny_model(train_vision=True)
    embed_images(PlainEngine(trained), batch.images, seed=0, step=0)
    patches = int(batch.images.grid_I3.prod(-1).sum())
    assert trained.backbone.work.patch_rows == [patches + 4 * (slices + 1), 0]
