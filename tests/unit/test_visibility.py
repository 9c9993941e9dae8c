"""The visibility rule: one mask from the paper's table, and three carriers that equal it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from coma_ds.batch import PADDING, Batch
from coma_ds.config import FAMILIES
from coma_ds.model.attention import (
    Causal,
    Dense,
    Packed,
    Split,
    build_layout,
    visibility_mask,
)
from coma_ds.model.backbone import Backbone
from coma_ds.model.loading import CLASSES
from coma_ds.model.varlen import ARITHMETIC, span_attention
from tests.tiny import FIRST_ID, make_batch, tiny_config, tiny_model

# Columns that a row may see, besides causality (paper.md, the table of stage 1).
TABLE = {
    "context": {"context"},
    "compression": {"context", "compression"},
    "dialogue": {"compression", "dialogue"},
}
NAMES = ("context", "compression", "dialogue")
BATCHES = {
    "ragged": [
        {"images": [(2, 3), (2, 2)], "text": 2, "dialogue": 7, "answers": [(2, 4), (5, 7)]},
        {"images": [(2, 2)], "text": 5, "dialogue": 9, "answers": [(4, 9)]},
        {"images": [(2, 2), (4, 2), (2, 2)], "dialogue": 4, "answers": [(1, 4)]},
        {"images": [], "text": 3, "dialogue": 6, "answers": [(0, 3)]},
    ],
    "equal contexts": [
        {"images": [(2, 2)], "text": 3, "dialogue": 8, "answers": [(3, 5), (6, 8)]},
        {"images": [(2, 2)], "text": 3, "dialogue": 5, "answers": [(1, 3)]},
    ],
    "no instruction": [
        {"images": [(2, 4)], "dialogue": 5, "answers": [(1, 3)]},
        {"images": [(4, 2), (2, 2)], "dialogue": 5, "answers": [(2, 5)]},
    ],
}


def slow_mask(lengths: list[tuple[int, int, int]], columns: int, left: bool) -> torch.Tensor:
    """The rule sample by sample, row by row, column by column, bool [B, L, L]."""
    mask = torch.zeros(len(lengths), columns, columns, dtype=torch.bool)
    for sample, counts in enumerate(lengths):
        names = [name for name, count in zip(NAMES, counts) for _ in range(count)]
        start = columns - len(names) if left else 0
        for row, row_name in enumerate(names):
            for column, column_name in enumerate(names[: row + 1]):
                mask[sample, start + row, start + column] = column_name in TABLE[row_name]
    return mask


SEGMENTS = st.lists(
    st.tuples(st.integers(0, 6), st.integers(1, 4), st.integers(0, 6)), min_size=1, max_size=4
)


def text_batch(lengths: list[tuple[int, int, int]]) -> Batch:
    """A batch of segment lengths alone."""
    total = sum(map(sum, lengths))
    return Batch(
        input_ids_T=torch.arange(total),
        position_ids_3T=torch.arange(total).expand(3, -1),
        labels_T=torch.full((total,), -100),
        lengths_B3=torch.tensor(lengths),
        image_counts_B=torch.zeros(len(lengths), dtype=torch.int64),
        feature_counts_B=torch.zeros(len(lengths), dtype=torch.int64),
        feature_rows_F=torch.zeros(0, dtype=torch.int64),
        content_ids_B=torch.arange(len(lengths)),
    )


@settings(max_examples=80)
@given(SEGMENTS, st.sampled_from(["left", "right"]))
def test_mask_is_the_table_of_the_paper(lengths, alignment) -> None:
    padded = text_batch(lengths).padded(alignment)
    mask = visibility_mask(padded.segment_BL, "bottleneck")[:, 0]
    wanted = slow_mask(lengths, mask.shape[1], alignment == "left")
    pad = padded.segment_BL == PADDING
    assert torch.equal(mask & ~pad[:, :, None], wanted)
    # a row of padding sees itself and no word, and no word sees it
    others = mask & ~torch.eye(mask.shape[1], dtype=torch.bool)
    assert mask.diagonal(0, 1, 2)[pad].all() and not others.transpose(1, 2)[pad].any()


@settings(max_examples=40)
@given(SEGMENTS, st.sampled_from(["left", "right"]))
def test_causal_mask_hides_the_future_and_the_padding_alone(lengths, alignment) -> None:
    padded = text_batch(lengths).padded(alignment)
    mask = visibility_mask(padded.segment_BL, "causal")[:, 0]
    word = padded.segment_BL != PADDING
    wanted = torch.ones_like(mask).tril() & word[:, None, :] & word[:, :, None]
    assert torch.equal(mask & word[:, :, None], wanted)


SAME_K = st.integers(1, 4).flatmap(
    lambda k: st.lists(
        st.tuples(st.integers(0, 6), st.just(k), st.integers(0, 6)), min_size=1, max_size=4
    )
)


@settings(max_examples=60)
@given(SAME_K, st.sampled_from(sorted(ARITHMETIC)), st.booleans())
def test_carriers_equal_one_attention_call(lengths, arithmetic, bottleneck) -> None:
    """Every layout against softmax(QK')V under the slow mask, grouped heads, fp64."""
    visibility = "bottleneck" if bottleneck else "causal"
    batch = text_batch(lengths)
    total, noise = len(batch.input_ids_T), torch.Generator().manual_seed(0)
    query_T, key_T, value_T = (
        torch.randn(total, heads, 8, generator=noise, dtype=torch.float64) for heads in (4, 2, 2)
    )
    spans = torch.split(torch.arange(total), batch.sizes_B.tolist())
    wanted = torch.empty_like(query_T)
    for span, counts in zip(spans, lengths):
        mask = torch.ones(len(span), len(span), dtype=torch.bool).tril()
        if bottleneck:
            mask = slow_mask([counts], len(span), False)[0]
        for head in range(4):
            scores = query_T[span, head] @ key_T[span, head // 2].T * 0.3
            weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
            wanted[span, head] = weights @ value_T[span, head // 2]

    def check(layout, view):
        seen = [x.transpose(0, 1)[None] if view is None else spread(x, view) for x in packed]
        out = layout(*seen, 0.3).transpose(1, 2).flatten(0, 1)
        rows = out if view is None else out[view.cell_T]
        assert (rows - wanted).abs().max() < 1e-12

    def spread(x_THd, view):
        cells = torch.full((view.input_ids_BL.numel(), *x_THd.shape[1:]), 7.0, dtype=x_THd.dtype)
        cells[view.cell_T] = x_THd
        return cells.view(*view.input_ids_BL.shape, *x_THd.shape[1:]).transpose(1, 2)

    packed = (query_T, key_T, value_T)
    check(Packed(batch.lengths_B3, visibility, span_attention(arithmetic)), None)
    for alignment in ("right", "left", "segments"):
        view = batch.padded(alignment)
        check(build_layout(view, visibility, "dense", arithmetic), view)
    view = batch.padded("segments" if bottleneck else "right")
    check(build_layout(view, visibility, "split", arithmetic), view)


def results(model, batch: Batch, visibility: str) -> dict[str, torch.Tensor]:
    """Loss, states at the answers and at the tokens, gradients of parameters and pixels."""
    model.zero_grad()
    pixels = batch.images.pixels_PC.double().requires_grad_()
    seen = replace(batch, images=replace(batch.images, pixels_PC=pixels))
    features = model.embed_images(seen.images)
    rows = seen.answer_rows
    loss, right = model.answer_loss(seen, features, visibility)
    states = model.dialogue_states(seen, features, rows - 1, visibility)
    emb = model.embeddings(seen, features)
    (loss + (emb * torch.arange(emb.numel()).view_as(emb)).sum() / emb.numel()).backward()
    found = {"loss": loss.detach(), "right": right, "states": states.detach(), "emb": emb.detach()}
    found |= {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return found | {"pixels": pixels.grad}


def assert_equal(found: dict, wanted: dict, bound: float = 1e-9) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        gap = (found[name] - value).abs().max() / value.abs().max().clamp(min=1e-12)
        assert gap < bound, (name, float(gap))


@pytest.mark.parametrize("bottleneck", ["kv", "last_hidden"])
@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize("family", FAMILIES)
def test_dense_split_and_packed_are_one_model(family, name, bottleneck) -> None:
    """Output and every gradient, of parameters and of pixels, in fp64."""
    for tokens in (1, 4) if name == "ragged" else (4,):
        batch = make_batch(BATCHES[name], family, tokens=tokens)
        found = {}
        for carrier in ("dense", "split", "packed"):
            for arithmetic in ("sdpa", "matmul") if carrier == "split" else ("sdpa",):
                model = tiny_model(
                    family,
                    matching=False,
                    carrier=carrier,
                    arithmetic=arithmetic,
                    bottleneck=bottleneck,
                    tokens=tokens,
                    train_vision=True,
                ).double()
                found[carrier, arithmetic] = results(model, batch, "bottleneck")
        wanted = found.pop(("dense", "sdpa"))
        trained = [n for n, p in model.named_parameters() if p.requires_grad]
        assert set(trained) <= wanted.keys() and len(wanted["states"])
        assert all((wanted[n] != 0).any() for n in trained if "norm" not in n)
        for other in found.values():
            assert_equal(other, wanted)
        rule_off = results(model, batch, "causal")["states"]
        assert (rule_off - wanted["states"]).abs().max() > 1e-3  # the rule is not empty


@pytest.mark.parametrize("family", FAMILIES)
def test_last_hidden_is_two_passes_of_the_stock_decoder(family) -> None:
    """Sample by sample: image and text to K states; the states and the dialogue to the loss."""
    model = tiny_model(family, matching=False, bottleneck="last_hidden").double()
    batch = make_batch(BATCHES["ragged"], family)
    pixels = batch.images.pixels_PC.double()
    batch = replace(batch, images=replace(batch.images, pixels_PC=pixels))
    features = model.embed_images(batch.images)
    found, _ = model.answer_loss(batch, features, "bottleneck")

    lm = CLASSES[family]._from_config(tiny_config(family), attn_implementation="sdpa").double()
    lm.load_state_dict(model.backbone.lm.state_dict())
    text, table = lm.model.language_model, lm.get_input_embeddings()
    rows = torch.arange(len(batch.input_ids_T))
    first = model.backbone.hidden_states(batch, features, rows, "causal")
    wanted, start = 0.0, 0
    for context, tokens, dialogue in batch.lengths_B3.tolist():
        begin, end = start + context, start + context + tokens + dialogue
        words = table(batch.input_ids_T[begin + tokens : end])
        seen = torch.cat([first[begin : begin + tokens], words])[None]
        positions = batch.position_ids_3T[:, None, begin:end]
        states = text(inputs_embeds=seen, position_ids=positions).last_hidden_state[0]
        logits, labels = lm.lm_head(states), batch.labels_T[begin:end]
        wanted += F.cross_entropy(logits[:-1], labels[1:], ignore_index=-100, reduction="sum")
        start = end
    assert torch.allclose(found, wanted, atol=1e-9)


@pytest.mark.parametrize("visibility", ["bottleneck", "causal"])
@pytest.mark.parametrize("alignment", ["left", "segments"])
def test_dense_is_right_under_any_padding(alignment, visibility, monkeypatch) -> None:
    """The same states and gradients under right, left and aligned padding."""
    batch = make_batch(BATCHES["ragged"])

    def run():
        model = tiny_model(matching=False, carrier="dense", train_vision=True).double()
        return results(model, batch, visibility)

    wanted = run()
    padded = Batch.padded
    monkeypatch.setattr(Batch, "padded", lambda self, *_: padded(self, alignment))
    assert_equal(run(), wanted)


@pytest.mark.parametrize("carrier", ["dense", "split", "packed"])
def test_a_sample_does_not_depend_on_its_neighbours(carrier) -> None:
    batch = make_batch(BATCHES["ragged"])
    model = tiny_model(matching=False, carrier=carrier).double()

    def states(part):
        features = model.embed_images(
            replace(part.images, pixels_PC=part.images.pixels_PC.double())
        )
        rows = torch.arange(len(part.input_ids_T))
        return model.backbone.hidden_states(part, features, rows, "bottleneck")

    together = states(batch).split(batch.sizes_B.tolist())
    parts = batch.split([torch.tensor([0]), torch.tensor([2, 1])], with_images=True)
    assert (together[0] - states(parts[0])).abs().max() < 1e-10
    swapped = states(parts[1])
    assert (torch.cat([together[2], together[1]]) - swapped).abs().max() < 1e-10


def test_layouts_use_no_mask_where_none_is_needed() -> None:
    equal = make_batch(BATCHES["equal contexts"]).padded("segments")
    ragged = make_batch(BATCHES["ragged"])
    assert build_layout(equal, "bottleneck", "split", "sdpa").mask is None
    layout = build_layout(ragged.padded("segments"), "bottleneck", "split", "sdpa")
    assert isinstance(layout, Split)
    assert layout.mask.shape[-1] == layout.boundary < ragged.padded("segments").segment_BL.shape[1]
    assert isinstance(build_layout(ragged.padded("right"), "causal", "split", "sdpa"), Causal)
    assert isinstance(build_layout(ragged.padded("left"), "causal", "dense", "sdpa"), Dense)


def test_layouts_refuse_what_they_cannot_serve() -> None:
    batch = make_batch(BATCHES["ragged"])
    with pytest.raises(ValueError, match="needs segment-aligned padding"):
        build_layout(batch.padded("right"), "bottleneck", "split", "sdpa")
    with pytest.raises(ValueError, match="without a mask needs padding on the right"):
        build_layout(batch.padded("left"), "causal", "split", "sdpa")
    with pytest.raises(ValueError, match="'ring' with 'sdpa' is not known"):
        Backbone(tiny_model().backbone.lm, "ring", "sdpa")
    with pytest.raises(ValueError, match="'split' with 'flex' is not known"):
        Backbone(tiny_model().backbone.lm, "split", "flex")
    lm = tiny_model().backbone.lm
    lm.config.model_type = "llava"
    with pytest.raises(ValueError, match="'llava': expected one of qwen2_vl, qwen2_5_vl, qwen3_vl"):
        Backbone(lm)


def test_ids_of_the_tokens_stand_where_the_segments_say() -> None:
    """What the leak test reads from the ids is what the rule reads from the segments."""
    batch = make_batch(BATCHES["ragged"])
    ids = batch.input_ids_T[batch.token_rows].view(len(batch), -1)
    assert torch.equal(ids, (FIRST_ID + torch.arange(4)).expand(len(batch), -1))
