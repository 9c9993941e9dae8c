"""Exactly the answer tokens, each with its end token, carry loss; compared as text."""

from __future__ import annotations

from dataclasses import replace
from itertools import groupby

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coma_ds.batch import IGNORE, Batch
from coma_ds.data.builtin import BuiltinDialogues
from coma_ds.data.collate import Collator
from coma_ds.data.records import Dialogue, Turn
from tests.tiny import Flat, demo_processing

TURNS = (
    Turn("What is it?", "A red car"),
    Turn("Which colour?", "red"),
    Turn("Wie heisst das auf Deutsch?", "Auto"),
    Turn("How many\nare there?", "2 or 3,\nperhaps"),
)
PROCESSING = demo_processing()


@pytest.fixture
def collator() -> Collator:
    return Collator(PROCESSING)


def dialogue(turns=TURNS, images: int = 1, instruction: str = "", name: str = "file row 3"):
    return Dialogue(tuple(Flat(f"p{i}") for i in range(images)), tuple(turns), instruction, name)


def spans(batch: Batch, tokenizer) -> list[list[tuple[bool, str]]]:
    """Each sample as runs of (carries loss, text), in order."""
    found = []
    sizes = batch.sizes_B.tolist()
    for ids, labels in zip(batch.input_ids_T.split(sizes), batch.labels_T.split(sizes)):
        taught = labels != IGNORE
        assert torch.equal(labels[taught], ids[taught])
        runs = groupby(zip(taught.tolist(), ids.tolist()), key=lambda pair: pair[0])
        found.append([(k, tokenizer.decode([i for _, i in run])) for k, run in runs])
    return found


def context_text(tokens: int = 8, images: int = 1, instruction: str = "") -> str:
    image = "<|vision_start|>" + "<|image_pad|>" * 16 + "<|vision_end|>"
    return image * images + instruction + "".join(f"<|compress_{k}|>" for k in range(tokens))


def expected(turns, instruction: str = "", images: int = 1) -> list[tuple[bool, str]]:
    runs, before = [], context_text(8, images, instruction)
    for turn in turns:
        question = f"<|im_start|>user\n{turn.question}<|im_end|>\n<|im_start|>assistant\n"
        runs += [(False, before + question), (True, f"{turn.answer}<|im_end|>")]
        before = "\n"
    return runs


@pytest.mark.parametrize("turns", [TURNS[:1], TURNS])
@pytest.mark.parametrize("instruction", ["", "Look closely."])
@pytest.mark.parametrize("images", [0, 1, 2])
def test_answers_and_their_ends_carry_loss(turns, instruction, images, collator) -> None:
    batch = collator([dialogue(turns, images, instruction)])
    found = spans(batch, collator.processing.tokenizer)
    assert found == [expected(turns, instruction, images)]
    context, tokens, _ = batch.lengths_B3[0].tolist()
    assert tokens == 8
    first = batch.input_ids_T[context : context + 8].tolist()
    assert first == collator.processing.compression_ids


def test_each_dialogue_of_a_batch_has_its_own_labels(collator) -> None:
    kinds = [(TURNS, 1), (TURNS[:1], 2), (TURNS[1:3], 0)]
    batch = collator([dialogue(turns, images) for turns, images in kinds])
    found = spans(batch, collator.processing.tokenizer)
    assert found == [expected(turns, images=images) for turns, images in kinds]


WORDS = st.text(
    st.characters(codec="utf-8", exclude_characters="<", exclude_categories=("Cs", "Cn")),
    min_size=1,
    max_size=12,
)


@settings(max_examples=60)
@given(st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=4))
def test_any_text_survives(pairs) -> None:
    """Also where a word begins or ends with a blank or a line break, or is no word at all."""
    turns = tuple(Turn(question, answer) for question, answer in pairs)
    collator = Collator(PROCESSING)
    assert spans(collator([dialogue(turns)]), PROCESSING.tokenizer) == [expected(turns)]


def test_dialogue_is_the_chat_template(collator) -> None:
    """Token for token what the tokenizer's own template gives, but for its last line break."""
    batch = collator([dialogue()])
    roles = [
        {"role": role, "content": text}
        for turn in TURNS
        for role, text in (("user", turn.question), ("assistant", turn.answer))
    ]
    wanted = collator.processing.tokenizer.apply_chat_template(roles, tokenize=False)
    ids = collator.processing.tokenizer(wanted.removesuffix("\n"))["input_ids"]
    assert batch.input_ids_T[int(batch.lengths_B3[0, :2].sum()) :].tolist() == ids


def test_built_in_dialogues_have_their_answers_as_labels(collator) -> None:
    data = BuiltinDialogues(length=40)
    records = [data[i] for i in range(0, 40, 5)]
    found = spans(collator(records), collator.processing.tokenizer)
    for record, runs in zip(records, found):
        taught = [text for carries, text in runs if carries]
        assert taught == [f"{turn.answer}<|im_end|>" for turn in record.turns]


def sizes_of(turns) -> list[int]:
    """Tokens of the sample after each turn, from a collator without a limit."""
    free = Collator(PROCESSING)
    return [int(free([dialogue(turns[: n + 1])]).sizes_B[0]) for n in range(len(turns))]


def test_truncation_drops_whole_last_turns() -> None:
    sizes = sizes_of(TURNS)
    for limit in range(sizes[0], sizes[-1] + 2):
        limited = Collator(replace(PROCESSING, max_length=limit))
        batch = limited([dialogue()])
        kept = sum(size <= limit for size in sizes)
        assert batch.sizes_B.tolist() == [sizes[kept - 1]]
        assert spans(batch, limited.processing.tokenizer) == [expected(TURNS[:kept])]
        assert batch.truncated == (kept < len(TURNS))


def test_a_first_turn_that_does_not_fit_is_an_error() -> None:
    sizes = sizes_of(TURNS)
    limited = Collator(demo_processing(max_length=sizes[0] - 1))
    with pytest.raises(
        ValueError, match=rf"file row 3: its images and first turn take {sizes[0] - 8} tokens"
    ):
        limited([dialogue()])


def test_a_prompt_ends_where_its_last_answer_begins(collator) -> None:
    batch = collator.dialogues([dialogue(), dialogue(TURNS[:1])], prompt_only=True)
    found = spans(batch, collator.processing.tokenizer)
    assert found == [expected(TURNS)[:-1], expected(TURNS[:1])[:-1]]


def test_a_prompt_never_loses_its_question() -> None:
    """Cut like a dialogue it would end with an old answer, and another question be answered."""
    free = Collator(demo_processing())
    size = int(free.dialogues([dialogue()], prompt_only=True).sizes_B[0])
    exact = Collator(demo_processing(max_length=size))
    assert exact.dialogues([dialogue()], prompt_only=True).sizes_B.tolist() == [size]
    short = Collator(demo_processing(max_length=size - 1))
    with pytest.raises(ValueError, match="file row 3: its images and all its turns take"):
        short.dialogues([dialogue()], prompt_only=True)
