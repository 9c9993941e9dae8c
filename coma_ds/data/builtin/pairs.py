"""Training pairs of stage 2 from the built-in pictures, source by source.

The texts of the queries are shared with the evaluation sets, so that both ask in the same words.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence

from coma_ds.data.builtin.concepts import (
    LANGUAGES,
    load_concepts,
    training_names,
    training_tags,
)
from coma_ds.data.builtin.dialogues import DEFAULT_LENGTH, training_keys
from coma_ds.data.builtin.pictures import TRAINING_STYLES, CropPicture, PictureSet
from coma_ds.data.builtin.templates import AT_PLACES
from coma_ds.data.builtin.turns import (
    CLEAR_COLOUR,
    SCENE_KINDS,
    Facts,
    Pool,
    draw_picture,
    draw_scene,
    picture_turn,
    scene_turn,
    tag_list,
)
from coma_ds.data.records import Pair, Side, image_mark

MARK = image_mark(0)
TEXTS: Mapping[str, str] = {
    "name_t2i": "Find a picture of: {label}",
    "tags_t2i": "Find a picture for: {tags}",
    "lang_t2i": "Find a picture, in {language}: {name}",
    "i2t": MARK + " Name the picture.",
    "i2i": MARK + " Find the same in another style.",
    "i2i_style": MARK + " Find the same in {style} style.",
    "group_cls": MARK + " Which group is it in?",
    "subgroup_cls": MARK + " Which subgroup is it in?",
    "colour_cls": MARK + " What is its main colour?",
    "vqa": MARK + "\n{question}",
    "grounding": MARK + "\nCut out: {label}",
    "grounding_place": MARK + "\nCut out the one {place}.",
}
SOURCES = tuple(TEXTS)
TAGS_IN_A_QUERY = 5
VQA_KINDS = {
    "background": 1.0,
    "yesno": 0.7,
    "yesno_tag": 0.3,
    "reverse": 0.7,
    "reverse_tag": 0.3,
    "other_language": 1.0,
    "style": 0.5,
    "tag": 0.5,
    "scene": 1.5,
}


def picture_side(picture) -> Side:
    """A side that is one picture and nothing else."""
    return Side(MARK, (picture,))


def tags_query(tags: Sequence[str], rng: random.Random) -> str:
    """The text of a ``tags_t2i`` query."""
    return TEXTS["tags_t2i"].format(tags=tag_list(tags, rng, most=TAGS_IN_A_QUERY))


class PairSource(Sequence[Pair]):
    """The pairs of one source; item i is a pure function of the seed, the source and i.

    ``make(style, code, rng)`` builds one; ``keys`` are the drawings that it can be asked for.
    """

    def __init__(
        self,
        name: str,
        keys: Sequence[tuple[str, str]],
        make: Callable[[str, str, random.Random], tuple[Side, Side]],
        seed: int,
        length: int,
    ) -> None:
        self.name, self.seed, self.length = name, seed, length
        self._keys, self._make = keys, make

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Pair:
        if not 0 <= index < self.length:
            raise IndexError(f"pair {index} of {self.length} in {self.name}")
        rng = random.Random(f"pair/{self.name}/{self.seed}/{index}")
        style, code = self._keys[index % len(self._keys)]
        query, target = self._make(style, code, rng)
        where = f"builtin {self.name} {index} ({style}/{code})"
        return Pair(query, target, name=where, task=self.name)


class BuiltinPairs:
    """Training pairs by source: ``BuiltinPairs()["name_t2i"][i]``.

    Only training styles and concepts that are not held out.  ``sources`` picks from ``SOURCES``
    (all by default), ``length`` is that of every source.
    """

    def __init__(
        self,
        *,
        seed: int = 0,
        sources: Sequence[str] | None = None,
        augment: bool = True,
        length: int = DEFAULT_LENGTH,
        styles: Sequence[str] = TRAINING_STYLES,
    ) -> None:
        chosen = SOURCES if sources is None else tuple(sources)
        for name in chosen:
            if name not in SOURCES:
                raise ValueError(
                    f"the built-in set has no source {name!r}; sources are {', '.join(SOURCES)}"
                )
        if length < 1:
            raise ValueError(f"length is {length}, expected at least 1")
        self.source_names: tuple[str, ...] = chosen
        self.augment = augment
        self._pool = Pool.load()
        self._keys = training_keys(styles)
        self._styles_of: dict[str, list[str]] = {}
        for style, code in self._keys:
            self._styles_of.setdefault(code, []).append(style)
        self._sources = {
            name: PairSource(name, self._keys_for(name), getattr(self, f"_{name}"), seed, length)
            for name in chosen
        }

    def __getitem__(self, name: str) -> Sequence[Pair]:
        return self._sources[name]

    def _keys_for(self, source: str) -> list[tuple[str, str]]:
        concepts = load_concepts()
        if source == "tags_t2i":
            return [key for key in self._keys if training_tags(concepts[key[1]])]
        if source == "lang_t2i":
            return [key for key in self._keys if training_names(concepts[key[1]])]
        if source in ("i2i", "i2i_style"):
            return [key for key in self._keys if len(self._styles_of[key[1]]) > 1]
        if source == "colour_cls":
            colour = PictureSet.load().colour
            return [key for key in self._keys if colour(*key)[1] >= CLEAR_COLOUR]
        return self._keys

    def _draw(self, style: str, code: str, rng: random.Random) -> tuple[Side, Facts]:
        picture, facts = draw_picture(style, code, rng, self.augment)
        return picture_side(picture), facts

    def _asked(self, source: str, side: Side, **parts: str) -> Side:
        return Side(TEXTS[source].format(**parts), side.images)

    def _name_t2i(self, style: str, code: str, rng: random.Random) -> tuple[Side, Side]:
        side, facts = self._draw(style, code, rng)
        return Side(TEXTS["name_t2i"].format(label=facts.concept.label)), side

    def _tags_t2i(self, style: str, code: str, rng: random.Random) -> tuple[Side, Side]:
        side, facts = self._draw(style, code, rng)
        return Side(tags_query(training_tags(facts.concept), rng)), side

    def _lang_t2i(self, style: str, code: str, rng: random.Random) -> tuple[Side, Side]:
        side, facts = self._draw(style, code, rng)
        language, name = rng.choice(sorted(training_names(facts.concept).items()))
        text = TEXTS["lang_t2i"].format(language=LANGUAGES[language], name=name)
        return Side(text), side

    def _i2t(self, style: str, code: str, rng: random.Random) -> tuple[Side, Side]:
        side, facts = self._draw(style, code, rng)
        return self._asked("i2t", side), Side(facts.concept.label)

    def _other_style(self, style: str, code: str, rng: random.Random) -> str:
        return rng.choice([other for other in self._styles_of[code] if other != style])

    def _i2i(self, style: str, code: str, rng: random.Random) -> tuple[Side, Side]:
        side, _ = self._draw(style, code, rng)
        target, _ = self._draw(self._other_style(style, code, rng), code, rng)
        return self._asked("i2i", side), target

    def _i2i_style(self, style: str, code: str, rng: random.Random) -> tuple[Side, Side]:
        side, _ = self._draw(style, code, rng)
        other = self._other_style(style, code, rng)
        target, _ = self._draw(other, code, rng)
        return self._asked("i2i_style", side, style=other), target

    def _group_cls(self, style: str, code: str, rng: random.Random) -> tuple[Side, Side]:
        side, facts = self._draw(style, code, rng)
        return self._asked("group_cls", side), Side(facts.concept.group)

    def _subgroup_cls(self, style: str, code: str, rng: random.Random) -> tuple[Side, Side]:
        side, facts = self._draw(style, code, rng)
        return self._asked("subgroup_cls", side), Side(facts.concept.subgroup)

    def _colour_cls(self, style: str, code: str, rng: random.Random) -> tuple[Side, Side]:
        side, facts = self._draw(style, code, rng)
        return self._asked("colour_cls", side), Side(facts.colour)

    def _vqa(self, style: str, code: str, rng: random.Random) -> tuple[Side, Side]:
        turn = None
        while turn is None:
            kind = rng.choices(list(VQA_KINDS), list(VQA_KINDS.values()))[0]
            if kind == "scene":
                picture, scene = self._draw_scene(style, code, rng)
                about = rng.choices(list(SCENE_KINDS), list(SCENE_KINDS.values()))[0]
                turn = scene_turn(about, scene, rng, self._pool)
            else:
                picture, facts = draw_picture(style, code, rng, self.augment)
                turn = picture_turn(kind, facts, rng, self._pool)
        query = Side(TEXTS["vqa"].format(question=turn.question), (picture,))
        return query, Side(turn.answer)

    def _draw_scene(self, style: str, code: str, rng: random.Random):
        keys = [(style, code)]
        while len(keys) < 4:
            key = rng.choice(self._keys)
            if all(key[1] != other for _, other in keys):
                keys.append(key)
        return draw_scene(keys, rng, self.augment)

    def _grounding(self, style: str, code: str, rng: random.Random) -> tuple[Side, Side]:
        picture, scene = self._draw_scene(style, code, rng)
        cell = picture.cells.index((style, code))
        text = TEXTS["grounding"].format(label=scene.cells[cell].concept.label)
        return Side(text, (picture,)), picture_side(CropPicture(picture, cell))

    def _grounding_place(self, style: str, code: str, rng: random.Random) -> tuple[Side, Side]:
        picture, scene = self._draw_scene(style, code, rng)
        cell = picture.cells.index((style, code))
        text = TEXTS["grounding_place"].format(place=AT_PLACES[len(scene.cells)][cell])
        return Side(text, (picture,)), picture_side(CropPicture(picture, cell))
