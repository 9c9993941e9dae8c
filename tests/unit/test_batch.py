"""The packed batch: its parts, its padded views, its rows."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from coma_ds.batch import (
    CONTEXT,
    DIALOGUE,
    MOVED,
    PADDING,
    TOKENS,
    Batch,
    ImageBatch,
    ranges,
)
from tests.tiny import END_ID, FIRST_ID, IMAGE_ID, START_ID, K, make_batch, tiny_model

SIZES = st.tuples(st.integers(1, 3), st.integers(1, 3))
SAMPLES = st.lists(
    st.fixed_dictionaries(
        {
            "images": st.lists(SIZES, max_size=3),
            "text": st.integers(0, 4),
            "dialogue": st.integers(0, 5),
        }
    ),
    min_size=1,
    max_size=5,
)


def features_of(images: ImageBatch | None) -> list[tuple[float, ...]]:
    """A stand-in for the tower: each image token is the sum of its own patches, [F]."""
    if images is None:
        return []
    return images.pixels_PC.view(-1, images.merge, images.pixels_PC.shape[1]).sum((1, 2)).tolist()


def pieces(batch: Batch, features: list) -> list[dict]:
    """Each sample of a batch as plain lists: what it is, wherever it stands."""
    found, feature_rows = [], batch.feature_rows_F.tolist()
    start = place = 0
    for sample, size in enumerate(batch.sizes_B.tolist()):
        count = int(batch.feature_counts_B[sample])
        rows = slice(start, start + size)
        found.append(
            {
                "ids": batch.input_ids_T[rows].tolist(),
                "positions": batch.position_ids_3T[:, rows].tolist(),
                "labels": batch.labels_T[rows].tolist(),
                "lengths": batch.lengths_B3[sample].tolist(),
                "images": int(batch.image_counts_B[sample]),
                "content": int(batch.content_ids_B[sample]),
                "features": [features[r] for r in feature_rows[place : place + count]],
            }
        )
        assert found[-1]["ids"].count(IMAGE_ID) == count
        start, place = start + size, place + count
    assert start == len(batch.input_ids_T) and place == len(feature_rows)
    return found


@given(SAMPLES, st.randoms(use_true_random=False), st.booleans(), st.integers(0, 3))
def test_split_keeps_every_sample_whole(samples, random, with_images, cut) -> None:
    batch = make_batch(samples)
    wanted = pieces(batch, features_of(batch.images))
    order = list(range(len(samples)))
    random.shuffle(order)
    groups = [order[:cut], order[cut:], order[:1] * 2]  # a sample may come twice
    parts = batch.split(
        [torch.tensor(g, dtype=torch.int64) for g in groups], with_images=with_images
    )
    assert [len(part) for part in parts] == [len(g) for g in groups]
    for part, group in zip(parts, groups):
        if with_images:
            features = features_of(part.images)
            counts = [len(samples[i]["images"]) for i in group]
            assert (0 if part.images is None else len(part.images)) == sum(counts)
            assert sum(counts) or part.images is None
        else:
            assert part.images is None
            features = features_of(batch.images)
        assert pieces(part, features) == [wanted[i] for i in group]


@given(SAMPLES, st.integers(0, 4))
def test_a_part_can_be_split_again(samples, number) -> None:
    batch = make_batch(samples)
    wanted = pieces(batch, features_of(batch.images))
    number = number % len(samples)
    everything = torch.arange(len(samples)).flip(0)
    part = batch.split([everything])[0]
    again = part.split([torch.tensor([len(samples) - 1 - number])])[0]
    assert pieces(again, features_of(batch.images)) == [wanted[number]]
    own = part.split([torch.tensor([0])])[0]
    assert pieces(own, features_of(batch.images)) == [wanted[-1]]


@given(SAMPLES, st.sampled_from(["right", "left", "segments"]), st.integers(0, 9))
def test_padded_views_hold_every_token_once(samples, alignment, pad_id) -> None:
    batch = make_batch(samples)
    padded = batch.padded(alignment, pad_id)
    kinds = padded.segment_BL
    words = kinds != PADDING
    assert int(words.sum()) == len(batch.input_ids_T) == len(padded.cell_T.unique())
    cells = padded.cells(torch.arange(len(batch.input_ids_T)))
    assert torch.equal(padded.input_ids_BL.flatten()[cells], batch.input_ids_T)
    assert torch.equal(padded.position_ids_3BL.flatten(1)[:, cells], batch.position_ids_3T)
    assert (padded.input_ids_BL[~words] == pad_id).all()
    assert (padded.position_ids_3BL[:, ~words] == 0).all()
    assert padded.alignment == alignment and torch.equal(padded.lengths_B3, batch.lengths_B3)
    for sample, lengths in enumerate(batch.lengths_B3.tolist()):
        row = kinds[sample].tolist()
        named = [kind for kind in row if kind != PADDING]
        assert named == [k for k, n in zip((CONTEXT, TOKENS, DIALOGUE), lengths) for _ in range(n)]
        first, last = row.index(TOKENS), len(row) - 1 - row[::-1].index(TOKENS)
        if alignment == "right":
            assert row[: len(named)] == named
        elif alignment == "left":
            assert row[len(row) - len(named) :] == named
        else:
            context = max(int(n) for n in batch.lengths_B3[:, CONTEXT])
            assert (first, last + 1) == (context, padded.boundary) == (context, context + K)
            assert row[context - lengths[0] : context + K + lengths[2]] == named
    widths = batch.sizes_B.max()
    if alignment == "segments":
        widths = batch.lengths_B3.amax(0).sum()
    assert padded.input_ids_BL.shape[1] == int(widths)


@given(SAMPLES)
def test_token_rows_are_the_rows_of_the_tokens(samples) -> None:
    batch = make_batch(samples)
    is_token = (batch.input_ids_T >= FIRST_ID) & (batch.input_ids_T < FIRST_ID + K)
    assert torch.equal(batch.token_rows, is_token.nonzero().squeeze(-1))
    assert torch.equal(batch.sizes_B, batch.lengths_B3.sum(-1))


@given(SAMPLES, st.data())
def test_answer_rows_are_the_rows_that_carry_loss(samples, data) -> None:
    for sample in samples:
        begin = data.draw(st.integers(0, sample["dialogue"]))
        sample["answers"] = [(begin, data.draw(st.integers(begin, sample["dialogue"])))]
    batch = make_batch(samples)
    wanted, start = [], 0
    for sample, (context, tokens, dialogue) in zip(samples, batch.lengths_B3.tolist()):
        begin, end = sample["answers"][0]
        wanted += [start + context + tokens + i for i in range(begin, end)]
        start += context + tokens + dialogue
    assert batch.answer_rows.tolist() == wanted
    assert torch.equal(batch.labels_T[batch.answer_rows], batch.input_ids_T[batch.answer_rows])


def test_no_compression_tokens_is_a_batch_too() -> None:
    batch = make_batch([{"images": [(2, 2)], "dialogue": 3}, {"text": 2}], tokens=0)
    assert batch.token_rows.tolist() == []
    padded = batch.padded("right")
    assert not (padded.segment_BL == TOKENS).any()


@given(
    st.lists(st.integers(0, 4), min_size=1, max_size=6), st.lists(st.integers(0, 99), max_size=6)
)
def test_ranges(lengths, picks) -> None:
    picks = [p % len(lengths) for p in picks]
    wanted = [sum(lengths[:p]) + i for p in picks for i in range(lengths[p])]
    found = ranges(torch.tensor(lengths), torch.tensor(picks, dtype=torch.int64))
    assert found.dtype == torch.int64 and found.tolist() == wanted


def test_images_are_selected_with_their_patches() -> None:
    grid = torch.tensor([[1, 2, 2], [1, 4, 2], [1, 2, 6]])
    pixels = torch.arange(24.0)[:, None].expand(-1, 3)
    images = ImageBatch(pixels, grid, 4)
    assert images.tokens_I.tolist() == [1, 2, 3] and len(images) == 3
    part = images.select(torch.tensor([2, 0]))
    assert part.pixels_PC[:, 0].tolist() == [*range(12, 24), *range(4)]
    assert part.grid_I3.tolist() == [[1, 2, 6], [1, 2, 2]] and part.merge == 4


def test_images_are_cut_into_slices_of_patches() -> None:
    """In order, each as full as it goes; one that is larger goes alone."""
    grid = torch.tensor([[1, 2, 2], [1, 4, 2], [1, 2, 6], [1, 2, 2], [1, 2, 2]])
    images = ImageBatch(torch.arange(32.0)[:, None], grid, 4)
    for patches, wanted in ((1, [1] * 5), (8, [1, 1, 1, 2]), (12, [2, 1, 2]), (99, [5])):
        parts = images.slices(patches)
        assert [len(part) for part in parts] == wanted
        assert torch.equal(torch.cat([part.pixels_PC for part in parts]), images.pixels_PC)
        assert torch.equal(torch.cat([part.grid_I3 for part in parts]), grid)
        for part in parts:
            assert len(part.pixels_PC) == int(part.grid_I3.prod(-1).sum()) and part.merge == 4


def test_what_goes_to_a_gpu_is_pinned(monkeypatch) -> None:
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: pinned.append(x) or x.clone())
    batch = make_batch([{"images": [(2, 2)], "dialogue": 3}, {"text": 2}])
    found = batch.pin_memory()
    for name in MOVED:
        assert getattr(found, name) is not getattr(batch, name)
        assert any(getattr(batch, name) is tensor for tensor in pinned)
    assert any(batch.images.pixels_PC is tensor for tensor in pinned) and len(pinned) == 5
    assert torch.equal(found.images.pixels_PC, batch.images.pixels_PC)
    assert make_batch([{"text": 2}]).pin_memory().images is None


def test_to_moves_tokens_and_leaves_lengths_and_pixels() -> None:
    batch = make_batch([{"images": [(2, 2)], "dialogue": 3}], pairs=1)
    moved = batch.to("meta")
    for name in MOVED:
        assert getattr(moved, name).device.type == "meta"
    left = (moved.lengths_B3, moved.image_counts_B, moved.images.grid_I3, moved.images.pixels_PC)
    for tensor in left:
        assert tensor.device.type == "cpu"
    assert moved.pairs == 1
    assert make_batch([{"text": 3}]).to("meta").images is None


def test_aligned_padding_needs_one_k() -> None:
    batch = make_batch([{"text": 3}, {"text": 2}])
    uneven = replace(batch, lengths_B3=torch.tensor([[3, K, 0], [3, K - 1, 0]]))
    with pytest.raises(ValueError, match="same K for every sample"):
        uneven.padded("segments")


def test_features_of_a_part_are_those_of_its_images() -> None:
    """Through the real tower: a part that owns its images equals a part that reads the batch's."""
    samples = [{"images": [(2, 2), (2, 3)], "text": 2}, {"text": 3}, {"images": [(4, 2)]}]
    batch, model = make_batch(samples), tiny_model().double()
    batch = replace(batch, images=replace(batch.images, pixels_PC=batch.images.pixels_PC.double()))
    group = [torch.tensor([2, 0])]
    reading, owning = batch.split(group)[0], batch.split(group, with_images=True)[0]
    found = model.embeddings(reading, model.embed_images(batch.images))
    wanted = model.embeddings(owning, model.embed_images(owning.images))
    assert (found - wanted).abs().max() < 1e-10
    ids = batch.input_ids_T.tolist()
    assert ids.count(START_ID) == ids.count(END_ID) == 3
