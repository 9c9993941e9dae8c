"""Our positions, tower and model against the stock classes of transformers."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coma_ds.batch import ImageBatch
from coma_ds.config import FAMILIES
from coma_ds.data.collate import rope_positions
from coma_ds.model.loading import CLASSES
from tests.tiny import END_ID, IMAGE_ID, PATCH, START_ID, K, make_batch, tiny_config, tiny_model


@cache
def stock(family: str):
    torch.manual_seed(0)
    return CLASSES[family]._from_config(tiny_config(family), attn_implementation="sdpa").eval()


PARTS = st.lists(
    st.one_of(
        st.integers(1, 5),  # words
        st.tuples(st.integers(1, 4), st.integers(1, 4)),  # an image in merged cells
    ),
    min_size=1,
    max_size=7,
)


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=50)
@given(st.lists(PARTS, min_size=1, max_size=3), st.booleans(), st.booleans())
def test_positions_equal_get_rope_index(family, samples, left, framed) -> None:
    """Text and several images in any order, padded on either side."""
    rows, grids = [], []
    for parts in samples:
        ids, own = [], []
        for part in parts:
            if isinstance(part, int):
                ids += [7] * part
            else:
                image = [IMAGE_ID] * (part[0] * part[1])
                # one image after the other needs something between: the stock code groups runs
                ids += [START_ID, *image, END_ID] if framed else [7, *image]
                own.append((1, 2 * part[0], 2 * part[1]))
        rows.append(np.array(ids))
        grids.append(own)
    columns = max(map(len, rows))
    ids_BL = torch.zeros(len(rows), columns, dtype=torch.int64)
    mask_BL = torch.zeros_like(ids_BL)
    spans = [slice(columns - len(r), None) if left else slice(0, len(r)) for r in rows]
    for sample, (row, span) in enumerate(zip(rows, spans)):
        ids_BL[sample, span] = torch.from_numpy(row)
        mask_BL[sample, span] = 1
    grid = [g for own in grids for g in own]
    wanted, _ = stock(family).model.get_rope_index(
        ids_BL,
        mm_token_type_ids=(ids_BL == IMAGE_ID).int(),
        image_grid_thw=torch.tensor(grid) if grid else None,
        attention_mask=mask_BL,
    )
    for sample, (row, own, span) in enumerate(zip(rows, grids, spans)):
        found = rope_positions(row, own, IMAGE_ID, 2)
        assert found.dtype == np.int64
        assert np.array_equal(found, wanted[:, sample, span].numpy())


def test_positions_by_hand() -> None:
    ids = np.array([5, START_ID, *[IMAGE_ID] * 6, END_ID, 6])
    found = rope_positions(ids, [(1, 4, 6)], IMAGE_ID, 2)
    assert found.tolist() == [
        [0, 1, 2, 2, 2, 2, 2, 2, 5, 6],
        [0, 1, 2, 2, 2, 3, 3, 3, 5, 6],
        [0, 1, 2, 3, 4, 2, 3, 4, 5, 6],
    ]


GRIDS = {
    "equal": [(1, 4, 4), (1, 4, 4), (1, 4, 4)],
    "unequal": [(1, 4, 6), (1, 2, 2), (1, 8, 4), (1, 2, 2), (1, 6, 10)],
    "one": [(1, 6, 4)],
    "large": [(1, 16, 10), (1, 4, 4)],  # spans above and below the size that picks the arithmetic
}


def pictures(grids, family: str) -> ImageBatch:
    noise = torch.Generator().manual_seed(1)
    patches = sum(t * h * w for t, h, w in grids)
    pixels = torch.randn(patches, 6 * PATCH[family] ** 2, generator=noise)
    return ImageBatch(pixels, torch.tensor(grids), 4)


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_tower_equals_the_stock_tower(family, name) -> None:
    """Output, and the gradient of every parameter and pixel, in fp64."""
    images = pictures(GRIDS[name], family)
    model = tiny_model(family, train_vision=True).double()
    tower = CLASSES[family]._from_config(tiny_config(family), attn_implementation="sdpa")
    tower = tower.model.visual.double()
    tower.load_state_dict(model.backbone.visual.state_dict())
    own = images.pixels_PC.double().requires_grad_()
    other = images.pixels_PC.double().requires_grad_()
    found = model.embed_images(replace(images, pixels_PC=own))
    out = tower(other, grid_thw=images.grid_I3, return_dict=True)
    assert tower.config._attn_implementation == "sdpa"
    levels = [out.pooler_output, *(getattr(out, "deepstack_features", None) or [])]
    wanted = torch.stack(levels)
    assert len(levels) == (2 if family == "qwen3_vl" else 1)
    assert found.shape == wanted.shape == (len(levels), int(images.tokens_I.sum()), 64)
    assert torch.allclose(found, wanted, atol=1e-10)
    weight = torch.randn(wanted.shape, dtype=torch.float64)
    (found * weight).sum().backward()
    (wanted * weight).sum().backward()
    assert torch.allclose(own.grad, other.grad, atol=1e-10)
    theirs = dict(tower.named_parameters())
    for key, parameter in model.backbone.visual.named_parameters():
        assert torch.allclose(parameter.grad, theirs[key].grad, atol=1e-9), key


@pytest.mark.parametrize("family", FAMILIES)
def test_an_image_does_not_see_its_neighbours(family) -> None:
    model = tiny_model(family).double()
    images = pictures(GRIDS["unequal"], family)
    images = replace(images, pixels_PC=images.pixels_PC.double())
    together = model.embed_images(images).split(images.tokens_I.tolist(), 1)
    for number in range(len(images)):
        alone = model.embed_images(images.select(torch.tensor([number])))
        assert torch.allclose(alone, together[number], atol=1e-10)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_rank_without_images_sends_a_blank_one(family) -> None:
    model = tiny_model(family, train_vision=True)
    blank = model.backbone.blank_image()
    assert blank.tokens_I.tolist() == [1] and not blank.pixels_PC.any()
    found = model.embed_images(None)
    assert found.shape[1] == 1 and torch.equal(found, model.embed_images(blank))
    # tied in with no effect: every trained parameter of the tower has a gradient, all zero
    batch = make_batch([{"text": 3}, {"text": 5}], family)
    plain = model.embeddings(batch, None)
    tied = model.embeddings(batch, model.embed_images(batch.images))
    assert torch.equal(plain, tied)
    tied.sum().backward()
    reached = [p.grad for p in model.backbone.visual.parameters()]
    assert all(g is not None and not g.any() for g in reached)


SAMPLES = [
    {"images": [(2, 3), (2, 2)], "text": 3, "dialogue": 4},
    {"text": 5},
    {"images": [(4, 2)], "dialogue": 6},
]


@pytest.mark.parametrize("tokens", [0, K])
@pytest.mark.parametrize("carrier", ["split", "dense", "packed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_model_equals_the_stock_model(family, carrier, tokens) -> None:
    """Features passed in against pixels passed in; the rows of the tokens against a table that
    holds them, which is how an exported model runs."""
    first = 490
    model = tiny_model(family, carrier=carrier, tokens=max(tokens, 1), first_id=first).double()
    lm = CLASSES[family]._from_config(tiny_config(family), attn_implementation="sdpa").double()
    lm.load_state_dict(model.backbone.lm.state_dict())
    if tokens:
        lm.get_input_embeddings().weight.data[first : first + tokens] = model.tokens.weight
    batch = make_batch(SAMPLES, family, tokens=tokens, first_id=first)
    pixels = batch.images.pixels_PC.double()
    batch = replace(batch, images=replace(batch.images, pixels_PC=pixels))
    padded = batch.padded("right")
    wanted = lm.model(
        input_ids=padded.input_ids_BL,
        attention_mask=(padded.segment_BL != 3).long(),
        pixel_values=pixels,
        image_grid_thw=batch.images.grid_I3,
        mm_token_type_ids=(padded.input_ids_BL == IMAGE_ID).int(),
    ).last_hidden_state.flatten(0, 1)[padded.cell_T]
    rows = torch.arange(len(batch.input_ids_T))
    found = model.backbone.hidden_states(batch, model.embed_images(batch.images), rows, "causal")
    assert torch.allclose(found, wanted, atol=1e-9)
    picked = torch.tensor([8, 2, 8])
    some = model.backbone.hidden_states(batch, model.embed_images(batch.images), picked)
    assert torch.allclose(some, wanted[picked], atol=1e-9)
