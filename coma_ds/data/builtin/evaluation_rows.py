"""The questions of the built-in evaluation sets: queries with their candidates, task by task.

All pictures asked about are in the test style, plain and on white unless the task says otherwise.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from coma_ds.data.builtin.colours import COLOUR_WORDS, WHITE
from coma_ds.data.builtin.concepts import LANGUAGES, SPOKEN_LANGUAGES, load_concepts
from coma_ds.data.builtin.pairs import TEXTS, picture_side, tags_query
from coma_ds.data.builtin.pictures import (
    TEST_STYLE,
    TRAINING_STYLES,
    BuiltinPicture,
    CropPicture,
    PictureSet,
    ScenePicture,
)
from coma_ds.data.builtin.templates import AT_PLACES, NUMBERS, QUESTIONS
from coma_ds.data.builtin.turns import (
    CLEAR_COLOUR,
    Facts,
    Pool,
    SceneFacts,
    draw_picture,
    draw_scene,
    picture_turn,
    scene_turn,
)
from coma_ds.data.records import Side, Turn

QUERIES = 300  # of every set but name_t2i, which asks for every picture
SCENES = 100
CHOICES = 100  # candidates where the answer is one of very many labels
LEAST_TAGS = 3

# A query, its gold candidate, and all candidates (the gold one anywhere among them).
Row = tuple[Side, Side, Sequence[Side]]
# Every task and its meta-task.
TASKS: Mapping[str, str] = {
    "group_cls": "Cls",
    "subgroup_cls": "Cls",
    "colour_cls": "Cls",
    "vqa_yesno": "VQA",
    "vqa_background": "VQA",
    "vqa_reverse": "VQA",
    "vqa_language": "VQA",
    "vqa_position": "VQA",
    "vqa_count": "VQA",
    "name_t2i": "Ret",
    "tags_t2i": "Ret",
    "lang_t2i": "Ret",
    "i2t": "Ret",
    "i2i": "Ret",
    "i2i_style": "Ret",
    "grounding": "VG",
    "grounding_place": "VG",
}


class EvaluationRows:
    """The sets over the test style's drawings of seen (or of held-out) concepts.

    Every task of ``TASKS`` is a method without arguments that returns its rows; they are a pure
    function of the data files.
    """

    def __init__(self, held_out: bool) -> None:
        self.held_out = held_out
        self.concepts = load_concepts()
        self.pictures = PictureSet.load()
        self.pool = Pool.load(held_out)
        self.codes = [
            c for c in self.pictures.codes(TEST_STYLE) if self.concepts[c].held_out == held_out
        ]
        self.white = {code: self._white(TEST_STYLE, code) for code in self.codes}
        self.gallery = list(self.white.values())
        self.labels = [Side(self.concepts[code].label) for code in self.codes]

    @staticmethod
    def _white(style: str, code: str) -> Side:
        return picture_side(BuiltinPicture(style, code, WHITE))

    def _rng(self, task: str) -> random.Random:
        return random.Random(f"evaluation/{task}/{self.held_out}")

    def rows(self, task: str) -> list[Row]:
        """The rows of a task of ``TASKS``."""
        if task not in TASKS:
            raise ValueError(f"no evaluation task {task!r}; tasks are {', '.join(TASKS)}")
        return getattr(self, task)()

    def _sample(self, task: str, codes: Iterable[str] | None = None) -> list[str]:
        codes = list(self.codes if codes is None else codes)
        return self._rng(task).sample(codes, min(QUERIES, len(codes)))

    def _ask(self, task: str, code: str, **parts: str) -> Side:
        return Side(TEXTS[task].format(**parts), self.white[code].images)

    def _classes(
        self,
        task: str,
        answer: Callable[[str], str],
        words: Iterable[str],
        codes: Iterable[str] | None = None,
    ) -> list[Row]:
        sides = {word: Side(word) for word in words}
        everything = list(sides.values())
        return [
            (self._ask(task, code), sides[answer(code)], everything)
            for code in self._sample(task, codes)
        ]

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

    def _turns(
        self, task: str, kind: str, white_share: float = 1.0
    ) -> Iterator[tuple[Side, Turn, random.Random]]:
        """(query, turn, random numbers) for questions of a kind in training's plain wording."""
        rng = self._rng(task)
        for code in self._sample(task):
            picture, facts = draw_picture(TEST_STYLE, code, rng, False, white_share)
            turn = picture_turn(kind, facts, rng, self.pool, plain=True)
            query = Side(TEXTS["vqa"].format(question=turn.question), (picture,))
            yield query, turn, rng

    def vqa_yesno(self) -> list[Row]:
        words = {word: Side(word) for word in ("yes", "no")}
        return [
            (query, words[turn.answer], list(words.values()))
            for query, turn, _ in self._turns("vqa_yesno", "yesno")
        ]

    def vqa_background(self) -> list[Row]:
        words = {word: Side(word) for word in COLOUR_WORDS}
        return [
            (query, words[turn.answer], list(words.values()))
            for query, turn, _ in self._turns("vqa_background", "background", 0.0)
        ]

    def _choices(
        self, rng: random.Random, sides: Sequence[Side], first: Sequence[Side]
    ) -> list[Side]:
        more = rng.sample(sides, min(CHOICES, len(sides)))
        return [*first, *(side for side in more if side not in first)][:CHOICES]

    def vqa_reverse(self) -> list[Row]:
        rows = []
        rng = self._rng("vqa_reverse")
        for code in self._sample("vqa_reverse"):
            concept = self.concepts[code]
            options = [Side(concept.label), Side(self.pool.other(concept, rng).label)]
            choices = self._choices(rng, self.labels, options)
            gold = options[0]
            rng.shuffle(options)
            question = QUESTIONS["reverse"][0].format(*(side.text for side in options))
            rows.append((self._ask("vqa", code, question=question), gold, choices))
        return rows

    def vqa_language(self) -> list[Row]:
        rng = self._rng("vqa_language")
        codes = self._sample("vqa_language")
        names = {
            language: [Side(self.concepts[code].names[language]) for code in codes]
            for language in SPOKEN_LANGUAGES
        }
        rows = []
        for place, code in enumerate(codes):
            language = rng.choice(SPOKEN_LANGUAGES)
            question = QUESTIONS["other_language"][0].format(LANGUAGES[language])
            query = self._ask("vqa", code, question=question)
            rows.append((query, names[language][place], names[language]))
        return rows

    def _scenes(self) -> Iterator[tuple[ScenePicture, SceneFacts]]:
        """Full 2x2 scenes, each concept in one only; the same ones for every task."""
        rng = self._rng("scenes")
        codes = rng.sample(self.codes, len(self.codes))
        for start in range(0, min(4 * SCENES, len(codes) - 3), 4):
            keys = [(TEST_STYLE, code) for code in codes[start : start + 4]]
            yield draw_scene(keys, rng, False)

    def vqa_position(self) -> list[Row]:
        rows = []
        rng = self._rng("vqa_position")
        for picture, facts in self._scenes():
            inside = [Side(cell.concept.label) for cell in facts.cells]
            for cell in rng.sample(range(4), 2):
                question = QUESTIONS["at_position"][0].format(AT_PLACES[4][cell])
                query = Side(TEXTS["vqa"].format(question=question), (picture,))
                rows.append((query, inside[cell], self._choices(rng, self.labels, inside)))
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
        return [
            (
                Side(TEXTS["name_t2i"].format(label=self.concepts[code].label)),
                self.white[code],
                self.gallery,
            )
            for code in self.codes
        ]

    def tags_t2i(self) -> list[Row]:
        rng = self._rng("tags_t2i")
        codes = [c for c in self.codes if len(self.concepts[c].tags) >= LEAST_TAGS]
        return [
            (Side(tags_query(self.concepts[code].tags, rng)), self.white[code], self.gallery)
            for code in self._sample("tags_t2i", codes)
        ]

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
        return [
            (self._ask("i2t", code), Side(self.concepts[code].label), self.labels)
            for code in self._sample("i2t")
        ]

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
        codes = self._sample("i2i_style", codes)[: QUERIES // 2]
        sides = {
            (style, code): self._white(style, code)
            for code in codes
            for style in self._in_training_styles(code)
        }
        everything = list(sides.values())
        rows = []
        for code in codes:
            style = rng.choice(self._in_training_styles(code))
            query = self._ask("i2i_style", code, style=style)
            rows.append((query, sides[style, code], everything))
        return rows

    def _grounded(self, task: str, text: Callable[[Facts, int], dict[str, str]]) -> list[Row]:
        asked = []
        for picture, facts in self._scenes():
            for cell, inside in enumerate(facts.cells):
                query = Side(TEXTS[task].format(**text(inside, cell)), (picture,))
                asked.append((query, picture_side(CropPicture(picture, cell))))
        crops = [crop for _, crop in asked]
        return [(query, crop, crops) for query, crop in asked]

    def grounding(self) -> list[Row]:
        return self._grounded("grounding", lambda inside, _: {"label": inside.concept.label})

    def grounding_place(self) -> list[Row]:
        return self._grounded("grounding_place", lambda _, cell: {"place": AT_PLACES[4][cell]})
