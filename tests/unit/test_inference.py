"""Embeddings in the order of the sides, and greedy answers word by word."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch

from coma_ds.assessment import evaluate_bottleneck, format_bottleneck
from coma_ds.batch import IGNORE
from coma_ds.config import RunConfig
from coma_ds.data.collate import Collator
from coma_ds.data.records import Dialogue, Side, Turn
from coma_ds.inference import append, encode_sides, greedy_answers, swap_images
from tests.tiny import Flat, demo_model, demo_processing

RED, BLUE, GREEN = Flat("r"), Flat("b", (20, 20, 220)), Flat("g", (10, 200, 10))


@cache
def parts():
    processing = demo_processing()
    return Collator(processing), demo_model(processing)


def double(batch):
    if batch.images is None:
        return batch
    return replace(batch, images=replace(batch.images, pixels_PC=batch.images.pixels_PC.double()))


def run(call):
    return call(parts()[1])


def ask(*answers: str, picture=RED, instruction: str = "") -> Dialogue:
    turns = tuple(Turn(f"Question {n}?", answer) for n, answer in enumerate(answers))
    return Dialogue((picture,) if picture else (), turns, instruction, "here")


DIALOGUES = [
    ask("old answer", "red car"),
    ask("blue", picture=BLUE, instruction="Look."),
    ask("none", picture=None),
    ask("yes", "no", "perhaps", picture=GREEN),
]


def test_appending_is_collating_the_longer_dialogue() -> None:
    """Ids, positions, segments and features, token by token to the end of the answer."""
    collator, _ = parts()
    full = collator.dialogues(DIALOGUES)
    prompt = collator.dialogues(DIALOGUES, prompt_only=True)
    rows = full.input_ids_T.split(full.sizes_B.tolist())
    words = [row[size:] for row, size in zip(rows, prompt.sizes_B.tolist())]
    count = min(map(len, words))
    assert count >= 2
    batch = prompt
    for number in range(count):
        batch = append(batch, torch.stack([word[number] for word in words]))
    assert torch.equal(batch.lengths_B3, prompt.lengths_B3 + torch.tensor([0, 0, count]))
    spans = zip(full.sizes_B.tolist(), batch.sizes_B.tolist())
    keep = torch.cat([torch.arange(a) < b for a, b in spans])
    assert torch.equal(batch.input_ids_T, full.input_ids_T[keep])
    assert torch.equal(batch.position_ids_3T, full.position_ids_3T[:, keep])
    old = prompt.labels_T.split(prompt.sizes_B.tolist())
    wanted = [torch.cat([labels, torch.full((count,), IGNORE)]) for labels in old]
    assert torch.equal(batch.labels_T, torch.cat(wanted)) and (batch.labels_T != IGNORE).any()
    for name in ("image_counts_B", "feature_counts_B", "feature_rows_F", "content_ids_B"):
        assert torch.equal(getattr(batch, name), getattr(prompt, name))
    assert batch.images is prompt.images


def test_appending_after_the_tokens_themselves() -> None:
    """A sample without a dialogue, and one that is an image and nothing else."""
    collator, _ = parts()
    batch = collator.sides([Side("<|image_1|>", (RED,)), Side("a word")])
    longer = append(batch, torch.tensor([7, 8]))
    assert longer.lengths_B3[:, 2].tolist() == [1, 1]
    last = longer.sizes_B.cumsum(0) - 1
    assert longer.input_ids_T[last].tolist() == [7, 8]
    ends = batch.position_ids_3T[:, batch.sizes_B.cumsum(0) - 1]
    assert torch.equal(longer.position_ids_3T[:, last], ends + 1)


def test_embeddings_come_in_the_order_of_the_sides() -> None:
    """Blocks are sorted by length; what comes back is not."""
    collator, model = parts()
    sides = [
        Side("a rather long text about nothing in particular " * 3),
        Side("<|image_1|> and text", (RED,)),
        Side("b"),
        Side("<|image_1|>", (BLUE,)),
        Side("middle sized text"),
        Side("<|image_1|><|image_2|>", (RED, GREEN)),
        Side("c"),
    ]
    seen = []

    def counted(call):
        seen.append(1)
        return call(model)

    found = encode_sides(counted, collator, sides, batch_size=2)
    assert found.dtype == np.float32 and len(seen) == 4
    with torch.no_grad():
        alone = []
        for side in sides:
            batch = collator.sides([side])
            alone.append(model.embeddings(batch, model.embed_images(batch.images))[0].numpy())
    assert np.abs(found - np.stack(alone)).max() < 1e-6
    assert np.abs(np.linalg.norm(found, axis=1) - 1).max() < 1e-6
    assert len(np.unique(found.round(4), axis=0)) == len(sides)
    whole = encode_sides(run, collator, sides, workers=1)
    assert np.abs(whole - found).max() < 1e-6
    assert encode_sides(run, collator, []).shape == (0, 0)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_side_is_named_in_its_own_words(workers) -> None:
    collator, _ = parts()
    sides = [Side("fine"), Side("<|image_1|>", (Flat("thin.png", size=(900, 2)),))]
    with pytest.raises(ValueError) as caught:
        encode_sides(run, collator, sides, workers=workers)
    assert str(caught.value).startswith("thin.png: the image processor refuses it")
    assert "Traceback" not in str(caught.value)


def slow_answer(dialogue: Dialogue, visibility: str, limit: int, model=None) -> str:
    """One dialogue, one word at a time, from the logits of the stock output matrix."""
    collator, usual = parts()
    model, processing = model or usual, collator.processing
    batch = double(collator.dialogues([dialogue], prompt_only=True))
    features = model.embed_images(batch.images)
    ids: list[int] = []
    for _ in range(limit):
        rows = torch.arange(len(batch.input_ids_T))
        states = model.backbone.hidden_states(batch, features, rows, visibility)
        logits = model.backbone.lm.lm_head(states[-1])[: processing.compression_ids[0]]
        word = int(logits.argmax())
        if word in (processing.turn_end, processing.image_id):
            break
        ids.append(word)
        batch = append(batch, torch.tensor([word]))
    return processing.tokenizer.decode(ids).strip()


@pytest.mark.parametrize("visibility", ["bottleneck", "causal"])
@torch.no_grad()
def test_greedy_answers_one_word_after_the_other(visibility) -> None:
    collator, _ = parts()
    found = greedy_answers(run, collator, DIALOGUES, visibility, batch_size=3, max_tokens=5)
    assert found == [slow_answer(d, visibility, 5) for d in DIALOGUES]
    assert any(found)
    words = [len(collator.processing.encode(d.turns[-1].answer)) for d in DIALOGUES]
    usual = greedy_answers(run, collator, DIALOGUES, visibility)
    assert usual == [slow_answer(d, visibility, max(words) + 1) for d in DIALOGUES]
    shorter = greedy_answers(run, collator, DIALOGUES, visibility, max_tokens=1)
    assert all(len(a) <= len(b) for a, b in zip(shorter, found)) and shorter != found


def push(model, word: int, direction: torch.Tensor) -> None:
    """Make the output matrix prefer ``word`` wherever a state points to ``direction``."""
    model.answers.weight.data[word] = 50 * direction


@torch.no_grad()
def test_an_answer_ends_at_its_end_token_or_at_an_image() -> None:
    """Also a model that says <|image_pad|>, which stands for no image, gets through."""
    collator, _ = parts()
    processing = collator.processing
    for word in (processing.turn_end, processing.image_id):
        model = demo_model(processing)
        batch = double(collator.dialogues(DIALOGUES[:1], prompt_only=True))
        last = torch.tensor([len(batch.input_ids_T) - 1])
        features = model.embed_images(batch.images)
        direction = model.dialogue_states(batch, features, last, "bottleneck")[0]
        plain = slow_answer(DIALOGUES[0], "bottleneck", 4, model)
        push(model, word, direction)
        found = greedy_answers(
            lambda call, m=model: call(m), collator, DIALOGUES, "bottleneck", max_tokens=4
        )
        assert plain and found[0] == ""
        assert found == [slow_answer(d, "bottleneck", 4, model) for d in DIALOGUES]


@torch.no_grad()
def test_a_compression_token_is_no_word() -> None:
    collator, _ = parts()
    model = demo_model(collator.processing)
    plain = slow_answer(DIALOGUES[0], "bottleneck", 3, model)
    state = torch.ones(model.backbone.width, dtype=torch.float64)
    for token in collator.processing.compression_ids:
        push(model, token, state * (-1) ** token)
    found = greedy_answers(
        lambda call: call(model), collator, DIALOGUES[:1], "bottleneck", max_tokens=3
    )
    assert found == [plain]


@torch.no_grad()
def test_blind_answers_see_another_picture() -> None:
    collator, _ = parts()
    dialogues = [ask("x", picture=p) for p in (RED, BLUE, GREEN)]
    found = greedy_answers(run, collator, dialogues, "bottleneck", blind=True, max_tokens=3)
    swapped = swap_images(dialogues)
    assert found == greedy_answers(run, collator, swapped, "bottleneck", max_tokens=3)


def test_swapped_images_are_always_others() -> None:
    again = Flat("the same red under another name")
    pictures = [RED, RED, BLUE, again, GREEN, RED]
    dialogues = [ask(f"a{i}", picture=p, instruction=f"i{i}") for i, p in enumerate(pictures)]
    swapped = swap_images(dialogues)
    for own, other in zip(dialogues, swapped):
        assert other.images[0].digest() != own.images[0].digest()
        assert (other.turns, other.instruction, other.name) == (
            own.turns,
            own.instruction,
            own.name,
        )
    assert swap_images(dialogues) == swapped
    assert {d.images for d in swapped} <= {d.images for d in dialogues}


def test_one_picture_alone_cannot_be_swapped() -> None:
    with pytest.raises(ValueError, match="all dialogues have the same images"):
        swap_images([ask("a"), ask("b"), ask("c", picture=Flat("other name"))])


QUESTIONS = [
    Dialogue((RED,), (Turn("Old?", "no", "old"), Turn("Colour?", "red", "colour"))),
    Dialogue((BLUE,), (Turn("Colour?", "Blue", "colour"),)),
    Dialogue((GREEN,), (Turn("How many?", "2", "count"),)),
]
ANSWERS = {
    ("bottleneck", False): [" RED ", "red", "2"],
    ("causal", False): ["red", "blue", "2"],
    ("bottleneck", True): ["blue", "green", "3"],
}


class TestBottleneckTable:
    """How often the last answer is right, asked in three ways."""

    def asked(self, monkeypatch, **model) -> tuple[dict, list[tuple]]:
        calls = []

        def spy(engine, collator, questions, visibility, *, blind, **how):
            assert (engine, collator, questions) == ("engine", "collator", QUESTIONS)
            assert how == {"batch_size": 7, "device": "cpu", "workers": 0}
            calls.append((visibility, blind))
            return ANSWERS[visibility, blind]

        monkeypatch.setattr("coma_ds.assessment.greedy_answers", spy)
        settings = {"model": model, "data": {"workers": 0}, "eval": {"batch_size": 7}}
        config = RunConfig(compress={"visible": not model["compression_tokens"]}, **settings)
        table = evaluate_bottleneck("engine", "collator", QUESTIONS, config, "cpu")
        return table, calls

    def test_through_the_tokens_in_sight_and_blind(self, monkeypatch) -> None:
        table, calls = self.asked(monkeypatch, compression_tokens=4)
        assert sorted(calls) == sorted(ANSWERS)
        assert table == {
            "colour": {"tokens": 0.5, "visible": 1.0, "blind": 0.0, "questions": 2},
            "count": {"tokens": 1.0, "visible": 1.0, "blind": 0.0, "questions": 1},
        }
        assert format_bottleneck(table).splitlines()[1].split() == [
            "colour", "50.0%", "100.0%", "0.0%", "2",
        ]  # fmt: skip

    def test_a_model_without_tokens_is_asked_in_sight_only(self, monkeypatch) -> None:
        table, calls = self.asked(monkeypatch, compression_tokens=0)
        assert calls == [("causal", False)]
        assert table == {
            "colour": {"visible": 1.0, "questions": 2},
            "count": {"visible": 1.0, "questions": 1},
        }
        assert format_bottleneck(table).split("\n")[0].split() == [
            "question", "visible", "questions",
        ]  # fmt: skip
