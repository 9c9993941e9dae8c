"""The built-in drawings: what ships, how pictures open, what their digests tell apart."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import coma_ds.data.builtin as builtin
from coma_ds.data.builtin import (
    TEST_STYLE,
    TRAINING_STYLES,
    BuiltinPicture,
    CropPicture,
    PictureSet,
    ScenePicture,
    pixel_baseline,
)
from coma_ds.data.builtin.colours import (
    BACKGROUNDS,
    COLOUR_WORDS,
    background_rgb,
    colour_ids,
    dominant_colour,
    random_background,
)
from coma_ds.data.builtin.concepts import load_concepts
from coma_ds.data.builtin.pictures import _lit

FOLDER = Path(builtin.__file__).parent


def plain(rgb: tuple[int, int, int]) -> np.ndarray:
    return np.asarray(rgb, np.uint8).reshape(1, 1, 3)


def test_the_shipped_set_is_whole_and_small():
    data = [*FOLDER.glob("*.parquet"), FOLDER / "NOTICE.md", *(FOLDER / "licenses").iterdir()]
    assert sum(file.stat().st_size for file in data) < 11e6
    pictures, concepts = PictureSet.load(), load_concepts()
    counts = Counter(style for style, _ in pictures.keys())
    assert set(counts) == {*TRAINING_STYLES, TEST_STYLE}
    assert len(set(pictures.keys())) == len(pictures) == sum(counts.values())
    assert counts["twemoji"] == len(concepts) == 1914
    assert all(code in concepts for _, code in pictures.keys())
    held = [concept for concept in concepts.values() if concept.held_out]
    assert 0.08 < len(held) / len(concepts) < 0.12
    tested = pictures.codes(TEST_STYLE)
    assert sum(not concepts[code].held_out for code in tested) >= 1000
    assert sum(concepts[code].held_out for code in tested) >= 100


def test_notice_names_every_style_and_its_licence():
    notice = (FOLDER / "NOTICE.md").read_text()
    for style in (*TRAINING_STYLES, TEST_STYLE):
        assert f"| {style} |" in notice
    for words in (
        "Apache License 2.0",
        "CC BY 4.0",
        "Copyright (c) Microsoft Corporation",
        "Unicode License V3",
        "Changes made here",
    ):
        assert words in notice
    assert "Apache License" in (FOLDER / "licenses/Apache-2.0.txt").read_text()
    assert "UNICODE LICENSE V3" in (FOLDER / "licenses/Unicode-3.0.txt").read_text()


def test_a_picture_is_its_drawing_over_its_background():
    red = (200, 30, 40)
    pixels = np.asarray(BuiltinPicture("noto", "1F600", red).open())
    assert pixels.shape == (64, 64, 3) and pixels.dtype == np.uint8
    rgba = PictureSet.load().rgba("noto", "1F600").astype(np.float64)
    alpha = rgba[..., 3:] / 255
    expected = rgba[..., :3] * alpha + np.asarray(red) * (1 - alpha)
    assert np.abs(pixels - expected).max() <= 1.01
    assert tuple(pixels[0, 0]) == red
    assert BuiltinPicture("noto", "1F600").name == "builtin:noto/1F600"
    assert BuiltinPicture("noto", "1F600", size=32).open().size == (32, 32)


def test_every_drawing_decodes_and_is_visible():
    pictures = PictureSet.load()
    for style, code in pictures.keys()[::7]:
        rgba = pictures.rgba(style, code)
        assert rgba.shape == (64, 64, 4)
        assert (rgba[..., 3] > 0).mean() > 0.01, (style, code)


def test_augmented_pictures_are_deterministic_and_differ_by_seed():
    def pixels(seed: int | None) -> np.ndarray:
        return np.asarray(BuiltinPicture("twemoji", "1F419", (58, 116, 220), augment=seed).open())

    assert np.array_equal(pixels(7), pixels(7))
    assert not np.array_equal(pixels(7), pixels(8))
    change = np.abs(pixels(7).astype(int) - pixels(None)).mean()
    assert 1 < change < 60


DIGEST_FIELDS = st.tuples(
    st.sampled_from([("noto", "1F600"), ("noto", "1F419"), ("twemoji", "1F419")]),
    st.sampled_from([(255, 255, 255), (22, 22, 22)]),
    st.sampled_from([64, 32]),
    st.sampled_from([None, 0, 1]),
)


@given(DIGEST_FIELDS, DIGEST_FIELDS)
def test_digests_are_equal_exactly_when_pictures_are(one, two):
    first, second = (BuiltinPicture(*key, *rest) for key, *rest in (one, two))
    assert len(first.digest()) == 16
    assert (first.digest() == second.digest()) == (one == two)


def test_the_same_drawing_of_two_concepts_has_one_digest():
    pictures = PictureSet.load()
    same = BuiltinPicture("twemoji", "1F1EB-1F1F7"), BuiltinPicture("twemoji", "1F1E8-1F1F5")
    assert np.array_equal(
        pictures.rgba("twemoji", same[0].code), pictures.rgba("twemoji", same[1].code)
    )
    assert same[0].digest() == same[1].digest()


def test_a_scene_shows_each_drawing_in_its_cell():
    grey = (145, 145, 145)
    cells = (("noto", "1F600"), None, ("twemoji", "1F419"), ("fxemoji", "1F30A"))
    scene = ScenePicture(cells, grey)
    pixels = np.asarray(scene.open()).astype(int)
    assert pixels.shape == (64, 64, 3)
    assert (pixels[:32, 32:] == grey).all()
    for cell, key in enumerate(cells):
        left, top, right, bottom = scene.box(cell)
        if key is not None:
            alone = np.asarray(BuiltinPicture(*key, grey, size=32).open()).astype(int)
            assert np.abs(pixels[top:bottom, left:right] - alone).max() <= 1
    swapped = ScenePicture((cells[2], None, cells[0], cells[3]), grey)
    assert scene.digest() != swapped.digest()
    assert scene.digest() == ScenePicture(cells, grey).digest()


def test_a_crop_is_its_cell_enlarged():
    cells = (("noto", "1F600"),) * 9
    scene = ScenePicture(cells, size=96)
    assert scene.columns == 3 and scene.box(5) == (64, 32, 96, 64)
    crop = CropPicture(scene, 5)
    expected = scene.open().crop((64, 32, 96, 64)).resize((64, 64), 2)
    assert np.array_equal(np.asarray(crop.open()), np.asarray(expected))
    assert crop.digest() != CropPicture(scene, 4).digest()


def test_wrong_drawings_and_scenes_are_named():
    with pytest.raises(ValueError, match=r"no drawing noto/ABC; styles are noto, .*fluent"):
        BuiltinPicture("noto", "ABC").open()
    with pytest.raises(ValueError, match=r"a scene has 3 cells, expected 4 \(2x2\) or 9 \(3x3\)"):
        ScenePicture((None, None, None))
    with pytest.raises(ValueError, match="a scene of 1 pixels is too small"):
        ScenePicture((None,) * 4, size=1)


@pytest.mark.parametrize(
    ("rgb", "word"),
    [
        ((255, 204, 50), "yellow"),
        ((230, 50, 50), "red"),
        ((49, 55, 61), "black"),
        ((121, 85, 61), "brown"),
        ((90, 160, 240), "blue"),
        ((170, 142, 214), "purple"),
        ((244, 144, 12), "orange"),
        ((119, 178, 85), "green"),
        ((204, 214, 221), "gray"),
        ((244, 171, 186), "pink"),
        ((250, 250, 252), "white"),
        ((0, 150, 136), "teal"),
        ((247, 222, 206), "beige"),
    ],
)
def test_colour_words_of_pixels(rgb, word):
    assert COLOUR_WORDS[int(colour_ids(plain(rgb))[0, 0])] == word


def test_dominant_colour_ignores_what_is_transparent():
    rgba = np.zeros((4, 4, 4), np.uint8)
    rgba[..., :3] = (230, 50, 50)
    rgba[0, :, :3] = (0, 200, 0)
    rgba[0, :, 3] = 255
    rgba[1, :1] = (58, 116, 220, 255)
    assert dominant_colour(rgba) == ("green", 0.8)


@given(st.sampled_from(list(BACKGROUNDS)), st.integers(0, 2**32))
@settings(max_examples=200)
def test_a_background_keeps_its_word_through_all_changes(word, seed):
    rng = random.Random(seed)
    rgb = background_rgb(word, rng)
    image = BuiltinPicture("noto", "1F600", rgb, augment=seed).open()
    corner = np.asarray(image)[:1, :1]
    assert COLOUR_WORDS[int(colour_ids(corner)[0, 0])] == word
    assert background_rgb(word) == BACKGROUNDS[word]


@given(st.integers(0, 2**32))
@settings(max_examples=50)
def test_light_changes_colours_within_a_fifth_and_not_the_shape(seed):
    drawing = PictureSet.load().drawing("noto", "1F419")
    lit = _lit(drawing, random.Random(seed))
    assert (lit[..., 3] == drawing[..., 3]).all() and (lit[..., :3] <= lit[..., 3:]).all()
    strong = (drawing[..., 3] == 255) & (drawing[..., 0] > 100) & (lit[..., 0] < 255)
    ratio = lit[..., 0][strong] / drawing[..., 0][strong]
    assert 0.78 <= ratio.min() and ratio.max() <= 1.23 and np.ptp(ratio) < 0.02


@given(st.integers(0, 2**32))
def test_a_random_background_avoids_the_drawing_s_colour(seed):
    assert random_background(random.Random(seed), avoid="red", white_share=0.0) != "red"
    assert random_background(random.Random(seed), avoid="white", white_share=1.0) == "white"


def test_pixel_baseline_finds_the_same_picture_and_not_its_brightness():
    image = BuiltinPicture("noto", "1F419").open()
    emb_E = pixel_baseline(image)
    assert emb_E.shape == (768,) and emb_E.dtype == np.float32
    assert np.linalg.norm(emb_E) == pytest.approx(1)
    darker = image.point(lambda level: level // 2)
    other = BuiltinPicture("noto", "1F600").open()
    assert emb_E @ pixel_baseline(darker) > 0.99 > emb_E @ pixel_baseline(other)
    flat = BuiltinPicture("noto", "1F419").open().point(lambda _: 80)
    assert not pixel_baseline(flat).any()
    with pytest.raises(ValueError, match="side is 0"):
        pixel_baseline(image, side=0)
