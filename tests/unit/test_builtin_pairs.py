"""Pairs of stage 2 from the built-in set: each source means what its name says."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from coma_ds.data.builtin import BuiltinPairs, BuiltinPicture, CropPicture, ScenePicture
from coma_ds.data.builtin.colours import COLOUR_WORDS
from coma_ds.data.builtin.concepts import LANGUAGES, load_concepts, training_tags
from coma_ds.data.builtin.pairs import SOURCES
from coma_ds.data.builtin.pictures import TRAINING_STYLES
from coma_ds.data.records import Pair

PLACES = ("top left", "top right", "bottom left", "bottom right")


@pytest.fixture(scope="module")
def pairs() -> BuiltinPairs:
    return BuiltinPairs(seed=3)


def some(pairs: BuiltinPairs, source: str, count: int = 200) -> list[Pair]:
    return [pairs[source][index * 97] for index in range(count)]


def picture_of(side) -> BuiltinPicture:
    (picture,) = side.images
    assert isinstance(picture, BuiltinPicture)
    return picture


def test_sources_can_be_chosen():
    assert BuiltinPairs().source_names == SOURCES
    assert len(SOURCES) >= 10
    few = BuiltinPairs(sources=("i2t", "name_t2i"), length=5)
    assert few.source_names == ("i2t", "name_t2i")
    assert len(list(few["i2t"])) == 5
    with pytest.raises(KeyError):
        few["i2i"]
    with pytest.raises(ValueError, match="no source 't2t'; sources are name_t2i, "):
        BuiltinPairs(sources=("t2t",))
    with pytest.raises(ValueError, match="length is 0"):
        BuiltinPairs(length=0)


@pytest.mark.parametrize("source", SOURCES)
def test_items_are_pure_and_show_seen_concepts_in_training_styles(pairs, source):
    again = pickle.loads(pickle.dumps(BuiltinPairs(seed=3)))
    other = BuiltinPairs(seed=4)
    ours = some(pairs, source, 60)
    assert ours[::-1] == some(again, source, 60)[::-1]
    assert ours != some(other, source, 60)
    concepts = load_concepts()
    for pair in ours:
        for picture in (*pair.query.images, *pair.target.images):
            scene = picture.scene if isinstance(picture, CropPicture) else picture
            keys = scene.cells if isinstance(scene, ScenePicture) else [(scene.style, scene.code)]
            assert all(style in TRAINING_STYLES for style, _ in keys)
            assert not any(concepts[code].held_out for _, code in keys)
        assert source in pair.name


def test_the_measured_text_is_the_plain_label(pairs):
    concepts = load_concepts()
    for pair in some(pairs, "name_t2i"):
        label = concepts[picture_of(pair.target).code].label
        assert pair.query.text == f"Find a picture of: {label}"
        assert pair.query.images == () and pair.target.text == "<|image_1|>"


def test_texts_lead_to_pictures_they_fit(pairs):
    concepts = load_concepts()
    for pair in some(pairs, "tags_t2i"):
        concept = concepts[picture_of(pair.target).code]
        said = pair.query.text.removeprefix("Find a picture for: ").split(", ")
        assert 1 <= len(said) <= 5 and set(said) <= set(training_tags(concept))
    for pair in some(pairs, "lang_t2i"):
        concept = concepts[picture_of(pair.target).code]
        language, name = pair.query.text.removeprefix("Find a picture, in ").split(": ", 1)
        code = next(code for code, spoken in LANGUAGES.items() if spoken == language)
        assert concept.names[code] == name


def test_classes_and_names_of_pictures(pairs):
    concepts = load_concepts()
    for source, answer in (("i2t", "label"), ("group_cls", "group"), ("subgroup_cls", "subgroup")):
        for pair in some(pairs, source):
            assert pair.target.text == getattr(concepts[picture_of(pair.query).code], answer)
            assert pair.query.text.startswith("<|image_1|> ")
    assert {pair.target.text for pair in some(pairs, "colour_cls")} <= set(COLOUR_WORDS)


def test_pictures_lead_to_the_same_concept_in_another_style(pairs):
    for source in ("i2i", "i2i_style"):
        for pair in some(pairs, source):
            query, target = picture_of(pair.query), picture_of(pair.target)
            assert query.code == target.code and query.style != target.style
            if source == "i2i_style":
                assert pair.query.text == f"<|image_1|> Find the same in {target.style} style."


def test_questions_have_answers(pairs):
    asked = some(pairs, "vqa", 400)
    assert all(pair.query.text.startswith("<|image_1|>\n") and pair.target.text for pair in asked)
    assert 0.1 < np.mean([isinstance(p.query.images[0], ScenePicture) for p in asked]) < 0.5
    assert len({pair.target.text for pair in asked}) > 100


def test_grounding_leads_to_the_crop_that_is_named(pairs):
    concepts = load_concepts()
    for source in ("grounding", "grounding_place"):
        for pair in some(pairs, source, 60):
            (scene,), (crop,) = pair.query.images, pair.target.images
            assert crop.scene == scene
            assert len({code for _, code in scene.cells}) == 4
            said = pair.query.text.split("\n")[1]
            if source == "grounding":
                assert said == f"Cut out: {concepts[scene.cells[crop.cell][1]].label}"
            else:
                assert PLACES[crop.cell] in said
    left, top, right, bottom = scene.box(crop.cell)
    inside = np.asarray(scene.open())[top:bottom, left:right].mean((0, 1))
    assert np.abs(np.asarray(crop.open()).mean((0, 1)) - inside).max() < 2


def test_rounds_bring_other_pictures_of_the_concept(pairs):
    source = BuiltinPairs(sources=("name_t2i",), length=10**6)["name_t2i"]
    keys = len(source._keys)
    rounds = [source[11 + keys * turn] for turn in range(10)]
    assert len({pair.query.text for pair in rounds}) == 1
    assert len({pair.target.content_id() for pair in rounds}) == 10
    plain = BuiltinPairs(sources=("name_t2i",), augment=False)["name_t2i"]
    assert picture_of(plain[0].target).augment is None
    with pytest.raises(IndexError):
        source[10**6]
