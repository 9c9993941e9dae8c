"""The built-in evaluation sets, written in the on-disk format of MMEB-eval.

``ROOT/<task>/<seen|unseen>/test-00000-of-00001.parquet`` with the columns ``qry_text,
qry_img_path, tgt_text (list), tgt_img_path (list)``, gold first; image paths are relative to
``ROOT/images`` and empty where there is no image.  ``ROOT/sets.json`` lists name, group and
domain.  All pictures asked about are in the test style; ``seen`` (IND) asks for concepts that
training shows in other styles, ``unseen`` (OOD) for held-out ones.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from coma_ds.data.builtin.colours import COLOUR_WORDS, WHITE
from coma_ds.data.builtin.concepts import LANGUAGES, SPOKEN_LANGUAGES, load_concepts
from coma_ds.data.builtin.pairs import TEXTS, picture_side, tags_query
from coma_ds.data.builtin.pictures import (
    TEST_STYLE,
    TRAINING_STYLES,
    BuiltinPicture,
    CropPicture,
    PictureSet,
)
from coma_ds.data.builtin.templates import AT_PLACES, NUMBERS
from coma_ds.data.builtin.turns import CLEAR_COLOUR, Pool, draw_picture, draw_scene, facts_of
from coma_ds.data.builtin.turns import picture_turn, scene_turn
from coma_ds.data.records import Picture, Side

FILE = "test-00000-of-00001.parquet"
QUERIES = 300  # of every set but name_t2i, which asks for every picture
SCENES = 100
CHOICES = 100  # candidates where the answer is one of very many labels
LEAST_TAGS = 3

Row = tuple[Side, Side, Sequence[Side]]  # query, gold, and all candidates (the gold too)


class _Half:
    """The drawings of the test style of seen or of held-out concepts, and the sets over them."""

    def __init__(self, held_out: bool) -> None:
        self.held_out = held_out
        self.concepts = load_concepts()
        self.pictures = PictureSet.load()
        self.pool = Pool.load(held_out)
        self.codes = [c for c in self.pictures.codes(TEST_STYLE)
                      if self.concepts[c].held_out == held_out]
        self.white = {code: self._white(TEST_STYLE, code) for code in self.codes}
        self.gallery = list(self.white.values())
        self.labels = [Side(self.concepts[code].label) for code in self.codes]

    @staticmethod
    def _white(style: str, code: str) -> Side:
        return picture_side(BuiltinPicture(style, code, WHITE))

    def _rng(self, task: str) -> random.Random:
        return random.Random(f"evaluation/{task}/{self.held_out}")

    def _sample(self, task: str, codes: Iterable[str] | None = None) -> list[str]:
        codes = list(self.codes if codes is None else codes)
        return self._rng(task).sample(codes, min(QUERIES, len(codes)))

    def _ask(self, task: str, code: str, **parts: str) -> Side:
        return Side(TEXTS[task].format(**parts), self.white[code].images)

    def _classes(self, task: str, answer: Callable[[str], str], words: Iterable[str],
                 codes: Iterable[str] | None = None) -> list[Row]:
        sides = {word: Side(word) for word in words}
        return [(self._ask(task, code), sides[answer(code)], list(sides.values()))
                for code in self._sample(task, codes)]

    def group_cls(self) -> list[Row]:
        groups = sorted({concept.group for concept in self.concepts.values()})
        return self._classes("group_cls", lambda code: self.concepts[code].group, groups)

    def subgroup_cls(self) -> list[Row]:
        subgroups = sorted({concept.subgroup for concept in self.concepts.values()})
        return self._classes("subgroup_cls", lambda c: self.concepts[c].subgroup, subgroups)

    def colour_cls(self) -> list[Row]:
        colour = {code: self.pictures.colour(TEST_STYLE, code) for code in self.codes}
        clear = [code for code in self.codes if colour[code][1] >= CLEAR_COLOUR]
        return self._classes("colour_cls", lambda code: colour[code][0], COLOUR_WORDS, clear)

    def _turns(self, task: str, kind: str, white_share: float = 1.0):
        """(query, turn, code, rng) for questions of a kind in the plain wording of training."""
        rng = self._rng(task)
        for code in self._sample(task):
            picture, facts = draw_picture(TEST_STYLE, code, rng, False, white_share)
            turn = picture_turn(kind, facts, rng, self.pool, plain=True)
            query = Side(TEXTS["vqa"].format(question=turn.question), (picture,))
            yield query, turn, code, rng

    def vqa_yesno(self) -> list[Row]:
        words = {word: Side(word) for word in ("yes", "no")}
        return [(query, words[turn.answer], list(words.values()))
                for query, turn, _, _ in self._turns("vqa_yesno", "yesno")]

    def vqa_background(self) -> list[Row]:
        words = {word: Side(word) for word in COLOUR_WORDS}
        return [(query, words[turn.answer], list(words.values()))
                for query, turn, _, _ in self._turns("vqa_background", "background", 0.0)]

    def _choices(self, rng: random.Random, sides: Sequence[Side], first: Sequence[Side]):
        more = rng.sample(sides, min(CHOICES, len(sides)))
        return [*first, *(side for side in more if side not in first)][:CHOICES]

    def vqa_reverse(self) -> list[Row]:
        rows = []
        for query, turn, _, rng in self._turns("vqa_reverse", "reverse"):
            gold = Side(turn.answer)
            named = [side for side in self.labels if side.text in turn.question]
            rows.append((query, gold, self._choices(rng, self.labels, [gold, *named])))
        return rows

    def vqa_language(self) -> list[Row]:
        rows = []
        rng = self._rng("vqa_language")
        names = {language: [Side(self.concepts[c].names[language]) for c in self.codes]
                 for language in SPOKEN_LANGUAGES}
        for code in self._sample("vqa_language"):
            language = rng.choice(SPOKEN_LANGUAGES)
            question = f"What is it in {LANGUAGES[language]}?"
            gold = Side(self.concepts[code].names[language])
            rows.append((self._ask("vqa", code, question=question), gold, names[language]))
        return rows

    def _scenes(self, task: str):
        rng = self._rng(task)
        codes = rng.sample(self.codes, len(self.codes))
        for start in range(0, min(4 * SCENES, len(codes) - 3), 4):
            keys = [(TEST_STYLE, code) for code in codes[start:start + 4]]
            yield *draw_scene(keys, rng, False), rng

    def vqa_position(self) -> list[Row]:
        rows = []
        for picture, facts, rng in self._scenes("vqa_position"):
            inside = [Side(cell.concept.label) for cell in facts.cells]
            for _ in range(2):
                turn = scene_turn("at_position", facts, rng, self.pool, plain=True)
                query = Side(TEXTS["vqa"].format(question=turn.question), (picture,))
                choices = self._choices(rng, self.labels, inside)
                rows.append((query, Side(turn.answer), choices))
        return rows

    def vqa_count(self) -> list[Row]:
        words = {word: Side(word) for word in NUMBERS[1:5]}
        rng = self._rng("vqa_count")
        rows = []
        for code in self._sample("vqa_count"):
            others = rng.sample([c for c in self.codes if c != code], rng.randrange(4))
            keys = [(TEST_STYLE, other) for other in (code, *others)]
            picture, facts = draw_scene(keys, rng, False)
            turn = scene_turn("count", facts, rng, self.pool, plain=True)
            query = Side(TEXTS["vqa"].format(question=turn.question), (picture,))
            rows.append((query, words[turn.answer], list(words.values())))
        return rows

    def name_t2i(self) -> list[Row]:
        return [(Side(TEXTS["name_t2i"].format(label=self.concepts[code].label)),
                 self.white[code], self.gallery) for code in self.codes]

    def tags_t2i(self) -> list[Row]:
        rng = self._rng("tags_t2i")
        codes = [c for c in self.codes if len(self.concepts[c].tags) >= LEAST_TAGS]
        return [(Side(tags_query(self.concepts[code].tags, rng)), self.white[code], self.gallery)
                for code in self._sample("tags_t2i", codes)]

    def lang_t2i(self) -> list[Row]:
        rng = self._rng("lang_t2i")
        rows = []
        for code in self._sample("lang_t2i"):
            language = rng.choice(SPOKEN_LANGUAGES)
            name = self.concepts[code].names[language]
            text = TEXTS["lang_t2i"].format(language=LANGUAGES[language], name=name)
            rows.append((Side(text), self.white[code], self.gallery))
        return rows

    def i2t(self) -> list[Row]:
        return [(self._ask("i2t", code), Side(self.concepts[code].label), self.labels)
                for code in self._sample("i2t")]

    def _in_training_styles(self, code: str) -> list[str]:
        return [style for style in TRAINING_STYLES if (style, code) in self.pictures]

    def i2i(self) -> list[Row]:
        rng = self._rng("i2i")
        rows = []
        for code in self._sample("i2i", [c for c in self.codes if self._in_training_styles(c)]):
            style = rng.choice(self._in_training_styles(code))
            query = Side(TEXTS["i2i"], self._white(style, code).images)
            rows.append((query, self.white[code], self.gallery))
        return rows

    def i2i_style(self) -> list[Row]:
        rng = self._rng("i2i_style")
        codes = [c for c in self.codes if len(self._in_training_styles(c)) > 1]
        codes = self._sample("i2i_style", codes)
        sides = {(style, code): self._white(style, code)
                 for code in codes for style in self._in_training_styles(code)}
        rows = []
        for code in codes:
            style = rng.choice(self._in_training_styles(code))
            rows.append((self._ask("i2i_style", code, style=style), sides[style, code],
                         list(sides.values())))
        return rows

    def _grounded(self, task: str, text: Callable) -> list[Row]:
        asked = []
        for picture, facts, _ in self._scenes(task):
            for cell, inside in enumerate(facts.cells):
                query = Side(TEXTS[task].format(**text(inside, cell)), (picture,))
                asked.append((query, picture_side(CropPicture(picture, cell))))
        crops = [crop for _, crop in asked]
        return [(query, crop, crops) for query, crop in asked]

    def grounding(self) -> list[Row]:
        return self._grounded("grounding", lambda inside, _: {"label": inside.concept.label})

    def grounding_place(self) -> list[Row]:
        return self._grounded("grounding_place", lambda _, cell: {"place": AT_PLACES[4][cell]})
