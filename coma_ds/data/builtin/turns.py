"""Turns about one picture or one scene, from facts that are known without a model."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from coma_ds.data.builtin.colours import COLOUR_WORDS, background_rgb, random_background
from coma_ds.data.builtin.concepts import (
    LANGUAGES,
    Concept,
    load_concepts,
    training_names,
    training_tags,
)
from coma_ds.data.builtin.pictures import SIZE, BuiltinPicture, PictureSet, ScenePicture
from coma_ds.data.builtin.templates import (
    AT_PLACES,
    CAPTIONS,
    DESCRIPTIONS,
    NUMBERS,
    PLACES,
    QUESTIONS,
)
from coma_ds.data.records import Turn

CLEAR_COLOUR = 0.4  # share of the pixels from which a dominant colour is worth asking for
TAGS_IN_A_LIST = 3
# How often each is asked.
SCENE_KINDS: Mapping[str, float] = {
    "at_position": 4,
    "position": 2,
    "count": 0.7,
    "count_group": 0.7,
    "present": 1.5,
    "colour_at_position": 1,
    "background": 0.4,
}


class Pool:
    """Concepts that texts may name, for distractors: seen ones, or held-out ones."""

    def __init__(self, concepts: Sequence[Concept]) -> None:
        self.concepts = list(concepts)
        self.groups = sorted({concept.group for concept in concepts})
        self.by_subgroup: dict[str, list[Concept]] = {}
        for concept in concepts:
            self.by_subgroup.setdefault(concept.subgroup, []).append(concept)

    @staticmethod
    @lru_cache(maxsize=2)
    def load(held_out: bool = False) -> Pool:
        """The pool of all seen (or all held-out) concepts."""
        return Pool([c for c in load_concepts().values() if c.held_out == held_out])

    def other(self, concept: Concept, rng: random.Random, near: float = 0.5) -> Concept:
        """Another concept, with probability ``near`` from the same subgroup."""
        near_ones = self.by_subgroup.get(concept.subgroup, ())
        choices = near_ones if rng.random() < near and len(near_ones) > 1 else self.concepts
        while (found := rng.choice(choices)).code == concept.code:
            pass
        return found

    def other_tag(self, concept: Concept, rng: random.Random) -> str:
        """A tag of another concept that this one does not carry."""
        while True:
            tags = training_tags(self.other(concept, rng))
            found = rng.choice(tags) if tags else ""
            if found and found not in concept.tags:
                return found


@dataclass(frozen=True, slots=True)
class Facts:
    """What can be asked about one picture."""

    concept: Concept
    style: str
    background: str
    colour: str
    colour_share: float


def facts_of(style: str, code: str, background: str) -> Facts:
    """The facts of a drawing on a background of that word."""
    colour, share = PictureSet.load().colour(style, code)
    return Facts(load_concepts()[code], style, background, colour, share)


def draw_picture(
    style: str, code: str, rng: random.Random, augment: bool, white_share: float = 0.5
) -> tuple[BuiltinPicture, Facts]:
    """A picture on a random background, and its facts."""
    colour = PictureSet.load().colour(style, code)[0]
    background = random_background(rng, avoid=colour, white_share=white_share)
    seed = rng.getrandbits(32) if augment else None
    rgb = background_rgb(background, rng if augment else None)
    picture = BuiltinPicture(style, code, rgb, augment=seed)
    return picture, facts_of(style, code, background)


def _ask(kind: str, rng: random.Random | None, *parts: str) -> str:
    wordings = QUESTIONS[kind]
    return (wordings[0] if rng is None else rng.choice(wordings)).format(*parts)


def _yesno(
    about: str, facts: Facts, rng: random.Random, wording: random.Random | None, pool: Pool
) -> Turn | None:
    concept = facts.concept
    tags = training_tags(concept)
    if (about == "yesno_colour" and facts.colour_share < CLEAR_COLOUR) or (
        about == "yesno_tag" and not tags
    ):
        return None
    truth = rng.random() < 0.5
    if about == "yesno_tag":
        said = rng.choice(tags) if truth else pool.other_tag(concept, rng)
    elif about == "yesno":
        said = (concept if truth else pool.other(concept, rng)).label
    else:
        own, choices = {
            "yesno_group": (concept.group, pool.groups),
            "yesno_colour": (facts.colour, COLOUR_WORDS),
            "yesno_background": (facts.background, COLOUR_WORDS),
        }[about]
        said = own if truth else rng.choice([choice for choice in choices if choice != own])
    return Turn(_ask(about, wording, said), "yes" if truth else "no", "yesno")


def _choice(
    kind: str, right: str, wrong: str, rng: random.Random, wording: random.Random | None
) -> Turn:
    options = [right, wrong]
    rng.shuffle(options)
    return Turn(_ask(kind, wording, *options), right, "reverse")


def picture_turn(
    kind: str, facts: Facts, rng: random.Random, pool: Pool, plain: bool = False
) -> Turn | None:
    """A turn of a kind about one picture; None when the facts have no good answer.

    Kinds: name, group, subgroup, tag, tags, colour, background, style, other_language, yesno
    (about the name), yesno_tag, yesno_group, yesno_colour, yesno_background, reverse (of two
    names), reverse_tag, description, caption.  ``plain`` uses the first wording.
    """
    concept = facts.concept
    wording = None if plain else rng
    tags = training_tags(concept)
    if kind in ("name", "group", "subgroup", "style", "background"):
        answer = {
            "name": concept.label,
            "group": concept.group,
            "subgroup": concept.subgroup,
            "style": facts.style,
            "background": facts.background,
        }[kind]
        return Turn(_ask(kind, wording), answer, kind)
    if kind == "colour":
        if facts.colour_share < CLEAR_COLOUR:
            return None
        return Turn(_ask(kind, wording), facts.colour, kind)
    if kind in ("tag", "tags") and not tags:
        return None
    if kind == "tag":
        return Turn(_ask(kind, wording), rng.choice(tags), "tags")
    if kind == "tags":
        return Turn(_ask(kind, wording), tag_list(tags, rng), "tags")
    if kind.startswith("yesno"):
        return _yesno(kind, facts, rng, wording, pool)
    if kind == "other_language":
        names = training_names(concept) if not concept.held_out else concept.names
        if not names:
            return None
        language = rng.choice(sorted(names))
        return Turn(_ask(kind, wording, LANGUAGES[language]), names[language], kind)
    if kind == "reverse":
        return _choice(kind, concept.label, pool.other(concept, rng).label, rng, wording)
    if kind == "reverse_tag":
        if not tags:
            return None
        return _choice(kind, rng.choice(tags), pool.other_tag(concept, rng), rng, wording)
    if kind == "description":
        return Turn(_ask(kind, wording), describe(facts, rng), kind)
    if kind == "caption":
        return Turn(
            _ask(kind, wording), _filled(rng.choice(_fitting(CAPTIONS, facts)), facts, rng), kind
        )
    raise ValueError(f"no turn of kind {kind!r}; kinds are {', '.join(QUESTIONS)}")


def tag_list(tags: Sequence[str], rng: random.Random, most: int = TAGS_IN_A_LIST) -> str:
    """Up to ``most`` tags drawn at random, in their own order, joined with commas."""
    chosen = sorted(rng.sample(range(len(tags)), min(most, len(tags))))
    return ", ".join(tags[position] for position in chosen)


def _fitting(wordings: Sequence[str], facts: Facts) -> list[str]:
    """The wordings that ask for nothing that the facts leave open."""
    missing = [] if training_tags(facts.concept) else ["{tags}"]
    if facts.colour_share < CLEAR_COLOUR:
        missing.append("{colour}")
    return [text for text in wordings if not any(part in text for part in missing)]


def _filled(text: str, facts: Facts, rng: random.Random) -> str:
    concept = facts.concept
    return text.format(
        label=concept.label,
        group=concept.group,
        subgroup=concept.subgroup,
        colour=facts.colour,
        background=facts.background,
        style=facts.style,
        tags=tag_list(training_tags(concept), rng),
    )


def describe(facts: Facts, rng: random.Random) -> str:
    """Three to five sentences about the picture, the name first."""
    first, *rest = (rng.choice(wordings) for wordings in DESCRIPTIONS)
    rest = _fitting(rest, facts)
    chosen = rng.sample(rest, rng.randint(2, len(rest)))
    return " ".join(_filled(sentence, facts, rng) for sentence in [first, *chosen])


@dataclass(frozen=True, slots=True)
class SceneFacts:
    """What can be asked about a scene: the facts of every cell, None where it is empty."""

    cells: tuple[Facts | None, ...]

    def filled(self) -> list[int]:
        """The positions of the cells that hold a drawing."""
        return [cell for cell, facts in enumerate(self.cells) if facts is not None]


def draw_scene(
    keys: Sequence[tuple[str, str]],
    rng: random.Random,
    augment: bool,
    cells: int = 4,
    size: int = SIZE,
) -> tuple[ScenePicture, SceneFacts]:
    """The drawings ``keys`` in random cells of a scene on a random background, and its facts."""
    places = rng.sample(range(cells), len(keys))
    background = random_background(rng)
    grid: list[tuple[str, str] | None] = [None] * cells
    for place, key in zip(places, keys):
        grid[place] = tuple(key)
    rgb = background_rgb(background, rng if augment else None)
    seed = rng.getrandbits(32) if augment else None
    facts = tuple(None if key is None else facts_of(*key, background) for key in grid)
    return ScenePicture(tuple(grid), rgb, size, seed), SceneFacts(facts)


def scene_turn(
    kind: str, scene: SceneFacts, rng: random.Random, pool: Pool, plain: bool = False
) -> Turn | None:
    """A turn of a kind about a scene; None when the facts have no good answer.

    Kinds: count, count_group, position, at_position, colour_at_position, present, background.
    """
    wording = None if plain else rng
    count = len(scene.cells)
    filled = scene.filled()
    cell = rng.choice(filled)
    facts = scene.cells[cell]
    if kind == "count":
        return Turn(_ask(kind, wording), NUMBERS[len(filled)], kind)
    if kind == "count_group":
        same = sum(scene.cells[c].concept.group == facts.concept.group for c in filled)
        return Turn(_ask(kind, wording, facts.concept.group), NUMBERS[same], "count")
    if kind == "position":
        return Turn(_ask(kind, wording, facts.concept.label), PLACES[count][cell], kind)
    if kind == "at_position":
        return Turn(_ask(kind, wording, AT_PLACES[count][cell]), facts.concept.label, kind)
    if kind == "colour_at_position":
        if facts.colour_share < CLEAR_COLOUR:
            return None
        return Turn(_ask(kind, wording, AT_PLACES[count][cell]), facts.colour, "colour")
    if kind == "present":
        inside = {scene.cells[c].concept.code for c in filled}
        truth = rng.random() < 0.5
        said = facts.concept if truth else pool.other(facts.concept, rng)
        while not truth and said.code in inside:
            said = pool.other(facts.concept, rng, near=0.0)
        return Turn(_ask(kind, wording, said.label), "yes" if truth else "no", "yesno")
    if kind == "background":
        return Turn(_ask(kind, wording), facts.background, kind)
    raise ValueError(f"no scene turn of kind {kind!r}")
