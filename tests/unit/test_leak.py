"""Nothing but the compression tokens carries the image to the answers.

In every layer the keys and values of the token rows are detached for the rows of the dialogue, and
for them only, around the layout that computes the attention.  Then no path is left from the pixels
to the answers but one that should not exist, and the gradient of the pixels must be exactly zero.
Which position is what is told from the ids, not from the segments that the rule itself reads.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from coma_ds.batch import CONTEXT, DIALOGUE, PADDING, TOKENS, Batch, Padded
from coma_ds.config import FAMILIES
from coma_ds.model import attention, backbone
from coma_ds.model.tokens import CompressionTokens
from tests.tiny import FIRST_ID, IMAGE_ID, K, make_batch, tiny_model

LAYOUTS = {
    "split": ("split", None),
    "dense-right": ("dense", "right"),
    "dense-left": ("dense", "left"),
    "dense-segments": ("dense", "segments"),
    "packed": ("packed", None),
}
CAUSAL_LAYOUTS = [name for name in LAYOUTS if name != "dense-segments"]
EQUAL = [
    {"images": [(2, 2)], "dialogue": 7, "answers": [(2, 4), (5, 7)]},
    {"images": [(2, 2)], "dialogue": 5, "answers": [(1, 3)]},
]
RAGGED = [
    {"images": [(2, 3), (2, 2)], "text": 3, "dialogue": 7, "answers": [(2, 4), (5, 7)]},
    {"images": [(2, 2)], "text": 3, "dialogue": 9, "answers": [(4, 9)]},
    {"images": [(2, 2), (4, 2), (2, 2)], "text": 3, "dialogue": 4, "answers": [(1, 4)]},
]
BATCHES = {"equal contexts": EQUAL, "instruction, several images": RAGGED}


def roles(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Is it a compression token, does it belong to a dialogue: boolean [T] each, from the ids."""
    token = (batch.input_ids_T >= FIRST_ID) & (batch.input_ids_T < FIRST_ID + K)
    after = [part.cumsum(0) == K for part in token.split(batch.sizes_B.tolist())]
    return token, torch.cat(after) & ~token


class CutLayout:
    """A layout whose dialogue rows read the token columns without a gradient."""

    def __init__(self, layout, token_BL: torch.Tensor, dialogue_BL: torch.Tensor) -> None:
        self.layout = layout
        self.token = token_BL[:, None, :, None]
        self.dialogue = dialogue_BL[:, None, :, None]
        self.calls = 0

    def __call__(self, query, key, value, scale):
        self.calls += 1
        cut = [torch.where(self.token, x.detach(), x) for x in (key, value)]
        whole = self.layout(query, key, value, scale)
        return torch.where(self.dialogue, self.layout(query, *cut, scale), whole)

    def pairs(self, *shape) -> int:
        return self.layout.pairs(*shape)


@contextmanager
def cut_in_every_layer(patch: pytest.MonkeyPatch, batch: Batch, layers: int):
    """Wrap whatever layout the backbone builds for ``batch``; every layer must have used it."""
    token_T, dialogue_T = roles(batch)
    made: list[CutLayout] = []
    build, packed = backbone.build_layout, backbone.Packed

    def build_cut(padded: Padded, *args):
        views = [torch.zeros_like(padded.segment_BL, dtype=torch.bool) for _ in range(2)]
        for view, flag_T in zip(views, (token_T, dialogue_T)):
            view.view(-1)[padded.cell_T] = flag_T
        made.append(CutLayout(build(padded, *args), *views))
        return made[-1]

    def packed_cut(*args):
        made.append(CutLayout(packed(*args), token_T[None], dialogue_T[None]))
        return made[-1]

    with patch.context() as local:
        local.setattr(backbone, "build_layout", build_cut)
        local.setattr(backbone, "Packed", packed_cut)
        yield
    assert [layout.calls for layout in made] == [layers]


@contextmanager
def aligned(patch: pytest.MonkeyPatch, alignment: str | None):
    """Padded views of the backbone on the side that the test asks for."""
    padded = Batch.padded
    with patch.context() as local:
        if alignment:
            local.setattr(Batch, "padded", lambda self, *_: padded(self, alignment))
        yield


def pixel_gradient(patch, batch: Batch, model, layout: str, visibility: str, cut: bool):
    """Gradient of the answer loss with respect to the pixels of the batch [P, C]."""
    pixels = batch.images.pixels_PC.clone().requires_grad_()
    seen = replace(batch, images=replace(batch.images, pixels_PC=pixels))
    with aligned(patch, LAYOUTS[layout][1]):
        features = model.embed_images(seen.images)
        if cut:
            with cut_in_every_layer(patch, batch, len(model.backbone.text.layers)):
                loss, _ = model.answer_loss(seen, features, visibility)
        else:
            loss, _ = model.answer_loss(seen, features, visibility)
    loss.backward()
    return torch.zeros_like(pixels) if pixels.grad is None else pixels.grad


def leaks(patch, batch: Batch, model, layout: str, visibility: str = "bottleneck") -> bool:
    """The check: does the image reach an answer past the tokens?"""
    gradient = pixel_gradient(patch, batch, model, layout, visibility, cut=True)
    assert torch.isfinite(gradient).all()
    return bool((gradient != 0).any())


def build(family: str, layout: str, arithmetic: str, **model):
    return tiny_model(
        family, matching=False, carrier=LAYOUTS[layout][0], arithmetic=arithmetic, **model
    )


@pytest.mark.parametrize("arithmetic", ["sdpa", "matmul"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_only_the_tokens_carry_the_image(family, layout, arithmetic, monkeypatch) -> None:
    model = build(family, layout, arithmetic)
    for name, samples in BATCHES.items():
        batch = make_batch(samples, family)
        assert not leaks(monkeypatch, batch, model, layout), name
        gradient = pixel_gradient(monkeypatch, batch, model, layout, "bottleneck", cut=False)
        # every image of every sample reaches an answer through its tokens
        spans = gradient.split(batch.images.grid_I3.prod(-1).tolist())
        assert all((span != 0).any() for span in spans), name


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpointed_layers_do_not_leak(family, monkeypatch) -> None:
    model = build(family, "split", "sdpa", gradient_checkpointing=True).train()
    assert model.backbone.text.layers[0].gradient_checkpointing
    batch = make_batch(RAGGED, family)
    assert not leaks(monkeypatch, batch, model, "split")
    gradient = pixel_gradient(monkeypatch, batch, model, "split", "bottleneck", cut=False)
    plain = build(family, "split", "sdpa")
    wanted = pixel_gradient(monkeypatch, batch, plain, "split", "bottleneck", cut=False)
    assert torch.equal(gradient, wanted) and (wanted != 0).any()


@pytest.mark.parametrize("arithmetic", ["sdpa", "matmul"])
@pytest.mark.parametrize("layout", CAUSAL_LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_check_finds_the_rule_off(family, layout, arithmetic, monkeypatch) -> None:
    """The authors' released code: plain causal, the dialogue sees the image."""
    model = build(family, layout, arithmetic)
    for name, samples in BATCHES.items():
        batch = make_batch(samples, family)
        assert leaks(monkeypatch, batch, model, layout, visibility="causal"), name


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_check_finds_a_visible_instruction(family, layout, monkeypatch) -> None:
    """Text between image and tokens that the dialogue may see has read the image.

    Lengths that count the text with the tokens make every carrier leave it in sight.
    """
    model = build(family, layout, "sdpa")
    batch = make_batch(RAGGED, family)
    moved = batch.lengths_B3 + torch.tensor([-3, 3, 0])
    broken = replace(batch, lengths_B3=moved)
    image_columns = [
        int((part == IMAGE_ID).nonzero()[-1])
        for part in batch.input_ids_T.split(batch.sizes_B.tolist())
    ]
    assert all(c < n for c, n in zip(image_columns, moved[:, 0].tolist()))  # the image is hidden
    assert leaks(monkeypatch, broken, model, layout)
    assert not leaks(monkeypatch, batch, model, layout)


@pytest.mark.parametrize("alignment", ["right", "left"])
def test_the_check_finds_a_visible_instruction_in_the_mask(alignment, monkeypatch) -> None:
    """The same mistake in the dense mask: only the image columns are hidden."""
    mask = attention.visibility_mask

    def hides_the_image_alone(segment_BL, visibility):
        length = segment_BL.shape[1]
        place = torch.arange(length)
        first_token = (segment_BL == TOKENS).int().argmax(-1, keepdim=True)
        text = (segment_BL == CONTEXT) & (place >= first_token - 3)
        rows = (segment_BL == DIALOGUE)[:, :, None]
        return mask(segment_BL, visibility) | (rows & text[:, None, :])[:, None]

    layout = f"dense-{alignment}"
    batch = make_batch(RAGGED)
    assert not leaks(monkeypatch, batch, build("qwen2_5_vl", layout, "sdpa"), layout)
    monkeypatch.setattr(attention, "visibility_mask", hides_the_image_alone)
    assert leaks(monkeypatch, batch, build("qwen2_5_vl", layout, "sdpa"), layout)


def test_detaching_the_input_rows_proves_nothing(monkeypatch) -> None:
    """Why the check works inside the carrier: deeper token rows have read the image."""
    model = build("qwen2_5_vl", "split", "sdpa")
    forward = CompressionTokens.forward
    monkeypatch.setattr(CompressionTokens, "forward", lambda *args: forward(*args).detach())
    batch = make_batch(RAGGED)
    gradient = pixel_gradient(monkeypatch, batch, model, "split", "bottleneck", cut=False)
    assert (gradient != 0).any()


@pytest.mark.parametrize("layout", ["split", "dense-right", "packed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_last_hidden_reads_the_final_states_alone(family, layout, monkeypatch) -> None:
    model = build(family, layout, "sdpa", bottleneck="last_hidden")
    batch = make_batch(RAGGED, family)
    gradient = pixel_gradient(monkeypatch, batch, model, layout, "bottleneck", cut=False)
    assert (gradient != 0).any()
    replaced_by = CompressionTokens.replaced_by
    monkeypatch.setattr(
        CompressionTokens, "replaced_by", lambda self, states: replaced_by(self, states.detach())
    )
    gradient = pixel_gradient(monkeypatch, batch, model, layout, "bottleneck", cut=False)
    assert not (gradient != 0).any()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_layer_at_the_tokens_gets_nothing_in_stage_one(family) -> None:
    """What ``bottleneck: kv`` does not train (design): the states that stage 2 pools."""
    model = build(family, "split", "sdpa")
    batch = make_batch(RAGGED, family)
    kept = []
    model.backbone.text.layers[-1].register_forward_hook(
        lambda *args: (args[2].retain_grad(), kept.append(args[2]))[1]
    )
    features = model.embed_images(batch.images)
    model.answer_loss(batch, features, "bottleneck")[0].backward()
    padded = batch.padded("segments")
    states = kept[0].grad.flatten(0, 1)
    assert not (states[padded.cells(batch.token_rows)] != 0).any()
    assert (states[padded.cells(batch.answer_rows - 1)] != 0).any(-1).all()
    assert not (kept[0].grad[padded.segment_BL == PADDING] != 0).any()
