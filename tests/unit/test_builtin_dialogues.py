"""Dialogues and bottleneck questions: pure, varied, true to the picture, silent on held-out."""

from __future__ import annotations

import pickle
import re
from collections import Counter
from functools import lru_cache

import numpy as np
import pytest

from coma_ds.data.builtin import TEST_STYLE, TRAINING_STYLES, BottleneckQuestions, BuiltinDialogues
from coma_ds.data.builtin.colours import COLOUR_WORDS, colour_ids
from coma_ds.data.builtin.concepts import (
    SPOKEN_LANGUAGES,
    Concept,
    load_concepts,
    training_names,
    training_tags,
)
from coma_ds.data.builtin.dialogues import FORMATS
from coma_ds.data.builtin.pairs import SOURCES, TEXTS, BuiltinPairs
from coma_ds.data.builtin.pictures import PictureSet, ScenePicture
from coma_ds.data.builtin.templates import CAPTIONS, DESCRIPTIONS, QUESTIONS
from coma_ds.data.records import Dialogue

EPOCH = len(BuiltinDialogues()._keys)


@lru_cache(maxsize=4)
def sample(format: str = "multi_turn", count: int = 3000) -> list[Dialogue]:
    dialogues = BuiltinDialogues(seed=1, format=format, length=1_000_000)
    return [dialogues[index * 331 + 5] for index in range(count)]


def words(text: str) -> tuple[str, ...]:
    return tuple(re.findall(r"\w+", text.lower()))


@lru_cache(maxsize=1)
def phrases() -> tuple[set[tuple[str, ...]], set[tuple[str, ...]]]:
    """What held-out concepts are called or tagged with and seen ones are not, and seen phrases."""

    def said(concept: Concept, tags: bool) -> set[str]:
        names = {concept.names[language] for language in SPOKEN_LANGUAGES}
        return {concept.label, *names, *(concept.tags if tags else ())}

    concepts = load_concepts().values()
    held = [concept for concept in concepts if concept.held_out]
    seen = [concept for concept in concepts if not concept.held_out]
    named = {words(text) for concept in held for text in said(concept, tags=False)}
    seen_named = {words(text) for concept in seen for text in said(concept, tags=False)}
    tags = {words(tag) for concept in held for tag in concept.tags}
    seen_tags = {words(tag) for concept in seen for tag in concept.tags}
    groups = {words(text) for concept in seen for text in (concept.group, concept.subgroup)}
    forbidden = (named | (tags - seen_tags)) - seen_named - groups - {()}
    return forbidden, (seen_named | seen_tags | groups) - forbidden


@lru_cache(maxsize=1)
def template_words() -> set[str]:
    texts = [text for wordings in QUESTIONS.values() for text in wordings]
    texts += [*CAPTIONS, *TEXTS.values(), *(text for some in DESCRIPTIONS for text in some)]
    return {word for text in texts for word in words(text)} | set(COLOUR_WORDS)


def leaks(text: str) -> list[str]:
    """Forbidden phrases in a text that are no part of a longer seen phrase around them."""
    forbidden, seen = phrases()
    tokens = words(text)
    spans = [
        (start, end)
        for start in range(len(tokens))
        for end in range(start + 1, min(start + 12, len(tokens)) + 1)
    ]
    covers = [span for span in spans if tokens[slice(*span)] in seen]
    found = []
    for start, end in spans:
        phrase = tokens[start:end]
        if phrase not in forbidden or set(phrase) <= template_words():
            continue
        if not any(a <= start and end <= b and b - a > end - start for a, b in covers):
            found.append(" ".join(phrase))
    return found


def test_the_leak_finder_finds_a_leak():
    held = next(c for c in load_concepts().values() if c.held_out and " " in c.label)
    assert leaks(f"Is this {held.label} or octopus?") == [" ".join(words(held.label))]
    assert not leaks("Is this hot dog or octopus?")


def test_training_says_nothing_about_held_out_concepts():
    texts = {
        text
        for format in FORMATS
        for dialogue in sample(format)
        for turn in dialogue.turns
        for text in (turn.question, turn.answer)
    }
    pairs = BuiltinPairs()
    for name in SOURCES:
        for index in range(0, 60_000, 100):
            pair = pairs[name][index]
            texts |= {pair.query.text.replace("<|image_1|>", ""), pair.target.text}
    assert len(texts) > 10_000
    found = {text: leaks(text) for text in texts if leaks(text)}
    assert not found


def test_only_training_drawings_of_seen_concepts_are_shown():
    concepts = load_concepts()
    styles, scenes = set(), 0
    for dialogue in sample():
        (picture,) = dialogue.images
        if isinstance(picture, ScenePicture):
            scenes += 1
            keys = [key for key in picture.cells if key is not None]
        else:
            keys = [(picture.style, picture.code)]
        styles |= {style for style, _ in keys}
        assert not any(concepts[code].held_out for _, code in keys)
    assert styles == set(TRAINING_STYLES)
    assert 0.05 < scenes / len(sample()) < 0.15


def test_an_item_is_a_function_of_seed_and_index():
    one, two = BuiltinDialogues(seed=4), BuiltinDialogues(seed=4)
    backwards = [one[index] for index in reversed(range(0, 9000, 300))][::-1]
    assert backwards == [two[index] for index in range(0, 9000, 300)]
    assert BuiltinDialogues(seed=5)[0] != one[0]
    again = pickle.loads(pickle.dumps(one))
    assert again[77] == one[77]
    assert np.array_equal(
        np.asarray(again[77].images[0].open()), np.asarray(one[77].images[0].open())
    )


def test_later_rounds_ask_differently_about_the_same_drawing():
    dialogues = BuiltinDialogues(seed=0, length=50 * EPOCH, scenes=0.0)
    rounds = [dialogues[3 + EPOCH * turn] for turn in range(40)]
    assert len({(d.images[0].style, d.images[0].code) for d in rounds}) == 1
    assert len({d.images[0].background for d in rounds}) > 5
    assert len({d.turns for d in rounds}) == 40


def test_indices_beyond_the_length_end_the_sequence():
    assert len(list(BuiltinDialogues(length=3))) == 3
    with pytest.raises(IndexError):
        BuiltinDialogues(length=3)[3]


def test_turns_are_three_to_five_short_and_varied():
    turns = [turn for dialogue in sample() for turn in dialogue.turns]
    assert {len(dialogue.turns) for dialogue in sample()} == {3, 4, 5}
    share = Counter(turn.kind for turn in turns)
    total = len(turns)
    assert 0.4 < (share["name"] + share["tags"]) / total < 0.6
    assert share["name"] / total > 0.17
    for kind in (
        "group",
        "subgroup",
        "colour",
        "background",
        "style",
        "yesno",
        "reverse",
        "other_language",
        "count",
        "position",
        "at_position",
    ):
        assert share[kind] / total > 0.008, kind
    assert np.mean([len(turn.question.split()) for turn in turns]) < 6
    assert np.mean([len(turn.answer.split()) for turn in turns]) < 3
    assert (
        np.percentile([sum(len(t.question) + len(t.answer) for t in d.turns) for d in sample()], 99)
        < 260
    )
    wordings = Counter(turn.question for turn in turns if turn.kind == "name")
    assert len(wordings) == len(QUESTIONS["name"])
    answers = Counter(turn.answer for turn in turns if turn.kind == "yesno")
    assert 0.42 < answers["yes"] / answers.total() < 0.58
    assert all(turn.answer and not re.search(r"[{}]", turn.question) for turn in turns)


def test_a_name_is_not_given_away_before_it_is_asked():
    for dialogue in sample():
        kinds = [turn.kind for turn in dialogue.turns]
        if "name" not in kinds:
            continue
        name = dialogue.turns[kinds.index("name")].answer
        questions = " ".join(turn.question for turn in dialogue.turns)
        options = re.findall(r"(?:Is this|Does it show|Is it|Do you see|fits:) (.+)\?", questions)
        assert not any(name in option.split(" or ") for option in options if len(name) > 12)


def test_answers_are_true():
    concepts = load_concepts()
    seen = Counter()
    for dialogue in sample():
        (picture,) = dialogue.images
        if isinstance(picture, ScenePicture):
            continue
        concept = concepts[picture.code]
        for turn in dialogue.turns:
            seen[turn.kind] += 1
            if turn.kind in ("name", "group", "subgroup"):
                expected = {
                    "name": concept.label,
                    "group": concept.group,
                    "subgroup": concept.subgroup,
                }
                assert turn.answer == expected[turn.kind]
            elif turn.kind == "style":
                assert turn.answer == picture.style
            elif turn.kind == "background":
                corner = np.asarray(picture.background, np.uint8)
                assert turn.answer == COLOUR_WORDS[int(colour_ids(corner))]
            elif turn.kind == "tags":
                assert set(turn.answer.split(", ")) <= set(training_tags(concept))
            elif turn.kind == "other_language":
                assert turn.answer in training_names(concept).values()
            elif turn.kind == "reverse":
                assert turn.answer in turn.question
                assert turn.answer in (concept.label, *concept.tags)
            elif turn.kind == "yesno" and turn.question.startswith("Does the word "):
                tag = turn.question.removeprefix("Does the word ").removesuffix(" fit?")
                assert (tag in concept.tags) == (turn.answer == "yes")
    assert seen["name"] > 2000 and seen["background"] > 100


def test_scene_answers_are_true():
    concepts = load_concepts()
    places = ("top left", "top right", "bottom left", "bottom right")
    checked = Counter()
    for index in range(400):
        dialogue = BuiltinDialogues(seed=2, scenes=1.0)[index * 17]
        cells = dialogue.images[0].cells
        labels = [None if key is None else concepts[key[1]].label for key in cells]
        for turn in dialogue.turns:
            if turn.kind == "at_position":
                place = next(place for place in places if place in turn.question)
                assert labels[places.index(place)] == turn.answer
            elif turn.kind == "position":
                assert labels[places.index(turn.answer)] in turn.question
            elif turn.kind == "count" and re.search("pictures|drawings", turn.question):
                number = ("none", "one", "two", "three", "four").index(turn.answer)
                assert number == sum(label is not None for label in labels)
            elif turn.kind == "yesno":
                inside = any(label and label in turn.question for label in labels)
                assert inside or turn.answer == "no"
            checked[turn.kind] += 1
    assert min(checked[kind] for kind in ("at_position", "position", "count", "yesno")) > 50


@pytest.mark.parametrize("format", ["single_turn", "description", "caption"])
def test_other_formats_have_one_turn(format):
    dialogues = sample(format)
    assert all(len(dialogue.turns) == 1 for dialogue in dialogues)
    turns = [dialogue.turns[0] for dialogue in dialogues]
    if format == "single_turn":
        share = Counter(turn.kind for turn in turns)
        assert 0.2 < share["name"] / len(turns) < 0.45
    else:
        concepts = load_concepts()
        assert {turn.kind for turn in turns} == {format}
        assert all(concepts[d.images[0].code].label in d.turns[0].answer for d in dialogues)
        colour = PictureSet.load().colour
        assert any(colour(d.images[0].style, d.images[0].code)[1] < 0.4 for d in dialogues)
        for dialogue in dialogues:
            word, share = colour(dialogue.images[0].style, dialogue.images[0].code)
            said = re.search(
                r"mostly (\w+),|main colour is (\w+)|^(\w+) drawing of", dialogue.turns[0].answer
            )
            assert said is None or (share >= 0.4 and word in said.groups())
    if format == "description":
        assert all(3 <= turn.answer.count(".") for turn in turns)


def test_bottleneck_questions_ask_about_the_test_style_in_training_words():
    concepts = load_concepts()
    for held_out, least in ((False, 250), (True, 100)):
        questions = BottleneckQuestions(per_kind=250, held_out=held_out)
        again = BottleneckQuestions(per_kind=250, held_out=held_out)
        assert list(questions) == list(again)
        count = Counter(dialogue.turns[0].kind for dialogue in questions)
        assert len(count) >= 5
        assert {"name", "group", "subgroup", "colour", "background", "yesno"} <= set(count)
        assert all(least <= number <= 250 for number in count.values())
        for dialogue in questions:
            (picture,), (turn,) = dialogue.images, dialogue.turns
            assert picture.style == TEST_STYLE and picture.augment is None
            assert concepts[picture.code].held_out == held_out
            shape = QUESTIONS[turn.kind][0].split("{")[0]
            assert turn.question.startswith(shape)
            if turn.kind == "name":
                assert turn.answer == concepts[picture.code].label


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="format is 'story', expected one of multi_turn, "):
        BuiltinDialogues(format="story")
    with pytest.raises(ValueError, match=r"turns is \(4, 3\), expected \(least, most\)"):
        BuiltinDialogues(turns=(4, 3))
    with pytest.raises(ValueError, match="no style 'oil'; styles are emojione, "):
        BuiltinDialogues(styles=("oil",))
    with pytest.raises(ValueError, match="length is 0"):
        BuiltinDialogues(length=0)


def test_tags_and_names_of_a_held_out_concept_are_not_said():
    concepts = load_concepts().values()
    held = [concept for concept in concepts if concept.held_out]
    labels = {concept.label.lower() for concept in held}
    names = {name.lower() for concept in held for name in concept.names.values()}
    clashing_tags = clashing_names = 0
    for concept in concepts:
        if not concept.held_out:
            clashing_tags += bool(labels & {tag.lower() for tag in concept.tags})
            clashing_names += any(concept.names[code].lower() in names for code in SPOKEN_LANGUAGES)
            assert not labels & {tag.lower() for tag in training_tags(concept)}
            said = {name.lower() for name in training_names(concept).values()}
            assert not said & names - {concept.label.lower()}
    assert clashing_tags and clashing_names
