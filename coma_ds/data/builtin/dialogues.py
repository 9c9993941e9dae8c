"""Dialogues about the built-in pictures: training (stage 1, base model) and evaluation.

Training says nothing about held-out concepts: neither as an answer nor in any question.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from coma_ds.data.builtin.concepts import load_concepts
from coma_ds.data.builtin.pictures import TEST_STYLE, TRAINING_STYLES, PictureSet
from coma_ds.data.builtin.turns import (
    SCENE_KINDS,
    Facts,
    Pool,
    draw_picture,
    draw_scene,
    picture_turn,
    scene_turn,
)
from coma_ds.data.records import Dialogue, Turn

FORMATS = ("multi_turn", "single_turn", "description", "caption")
NAMED_SHARE = 0.88
# Beside the name and tags, which a dialogue with the name always asks for.
NAMED_KINDS = {
    "subgroup": 1.0,
    "group": 0.7,
    "colour": 0.8,
    "background": 0.5,
    "style": 0.4,
    "other_language": 0.5,
    "reverse_tag": 0.6,
    "yesno_tag": 0.5,
    "yesno_colour": 0.2,
    "yesno_background": 0.2,
}
# Of a dialogue without it.  Both kinds do not mix: whichever came first would give the other away.
UNNAMED_KINDS = {
    "reverse": 1.2,
    "yesno": 1.2,
    "tag": 0.6,
    "subgroup": 0.8,
    "group": 0.5,
    "colour": 0.4,
    "yesno_group": 0.3,
}
SINGLE_KINDS = {**NAMED_KINDS, **UNNAMED_KINDS, "name": 4.5, "tags": 2.0, "tag": 1.5}
# Mean place in a dialogue: a name in another language comes after the name.
_PLACE = {"name": 0.0, "other_language": 0.8}
_USUAL_PLACE = 0.3
DEFAULT_LENGTH = 100_000


def training_keys(styles: Sequence[str]) -> list[tuple[str, str]]:
    """(style, code) of every drawing of these styles whose concept is not held out."""
    concepts = load_concepts()
    known = {style for style, _ in PictureSet.load().keys()}
    for style in styles:
        if style not in known:
            raise ValueError(
                f"the built-in set has no style {style!r}; styles are {', '.join(sorted(known))}"
            )
    return [
        (style, code)
        for style, code in PictureSet.load().keys()
        if style in styles and not concepts[code].held_out
    ]


def sample_kinds(weights: dict[str, float], count: int, rng: random.Random) -> list[str]:
    """``count`` different kinds, the heavier the likelier."""
    left = dict(weights)
    chosen = []
    for _ in range(min(count, len(left))):
        kind = rng.choices(list(left), list(left.values()))[0]
        del left[kind]
        chosen.append(kind)
    return chosen


class BuiltinDialogues(Sequence[Dialogue]):
    """Training dialogues; item i is a pure function of the arguments and i.

    Item i is about drawing ``i % number of drawings`` (or a scene that holds it), and further
    rounds ask other things on other backgrounds, so ``length`` may be as large as one likes.
    ``format`` is one of ``FORMATS``; ``turns`` (least, most) counts for ``multi_turn`` only, and a
    dialogue has fewer when there is nothing more to ask;
    ``scenes`` is the share of scenes among multi-turn and single-turn dialogues.
    """

    def __init__(
        self,
        *,
        seed: int = 0,
        turns: tuple[int, int] = (3, 5),
        augment: bool = True,
        length: int = DEFAULT_LENGTH,
        styles: Sequence[str] = TRAINING_STYLES,
        format: str = "multi_turn",
        scenes: float = 0.1,
    ) -> None:
        if format not in FORMATS:
            raise ValueError(f"format is {format!r}, expected one of {', '.join(FORMATS)}")
        if not 1 <= turns[0] <= turns[1]:
            raise ValueError(f"turns is {turns}, expected (least, most) with 1 <= least <= most")
        if length < 1:
            raise ValueError(f"length is {length}, expected at least 1")
        self.seed, self.turns, self.augment, self.length = seed, tuple(turns), augment, length
        self.format = format
        self.scenes = scenes if format in ("multi_turn", "single_turn") else 0.0
        self._keys = training_keys(styles)
        self._pool = Pool.load()

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Dialogue:
        if not 0 <= index < self.length:
            raise IndexError(f"dialogue {index} of {self.length}")
        rng = random.Random(f"dialogue/{self.seed}/{index}")
        style, code = self._keys[index % len(self._keys)]
        if rng.random() < self.scenes:
            return self._scene(style, code, index, rng)
        picture, facts = draw_picture(style, code, rng, self.augment)
        turns = self._turns(facts, rng)
        return Dialogue((picture,), turns, name=f"builtin dialogue {index} ({picture.name})")

    def _turns(self, facts: Facts, rng: random.Random) -> tuple[Turn, ...]:
        if self.format in ("description", "caption"):
            return (picture_turn(self.format, facts, rng, self._pool),)
        if self.format == "single_turn":
            count, must, weights = 1, [], SINGLE_KINDS
        else:
            count = rng.randint(*self.turns)
            named = rng.random() < NAMED_SHARE
            must = ["name", rng.choice(("tags", "tag"))] if named else ["tags"]
            weights = NAMED_KINDS if named else UNNAMED_KINDS
        placed: list[tuple[float, Turn]] = []
        for kind in [*must, *sample_kinds(weights, len(weights), rng)]:
            if len(placed) == count:
                break
            turn = picture_turn(kind, facts, rng, self._pool)
            if turn is not None:
                placed.append((_PLACE.get(kind, _USUAL_PLACE) + rng.random(), turn))
        return tuple(turn for _, turn in sorted(placed, key=lambda entry: entry[0]))

    def _scene(self, style: str, code: str, index: int, rng: random.Random) -> Dialogue:
        keys = [(style, code)]
        count = rng.choice((2, 3, 4, 4))
        while len(keys) < count:
            key = rng.choice(self._keys)
            if key[1] not in {code for _, code in keys}:
                keys.append(key)
        picture, facts = draw_scene(keys, rng, self.augment)
        count = 1 if self.format == "single_turn" else rng.randint(*self.turns)
        turns: list[Turn] = []
        asked: set[str] = set()
        while len(turns) < count:
            kind = rng.choices(list(SCENE_KINDS), list(SCENE_KINDS.values()))[0]
            turn = scene_turn(kind, facts, rng, self._pool)
            if turn is not None and (kind, turn.answer) not in asked:
                asked.add((kind, turn.answer))
                turns.append(turn)
        return Dialogue((picture,), tuple(turns), name=f"builtin dialogue {index} ({picture.name})")


BOTTLENECK_KINDS = (
    "name",
    "group",
    "subgroup",
    "colour",
    "background",
    "yesno",
    "reverse",
    "other_language",
)


class BottleneckQuestions(Sequence[Dialogue]):
    """Evaluation questions with one exact answer: single-turn dialogues, ``per_kind`` of each kind.

    About drawings of ``styles`` (the test style) of seen concepts, or of held-out ones with
    ``held_out``; without augmentation, in the plain wording of training.  Fewer when a style has
    fewer drawings.  The pictures stand on white, save where the background is asked for.
    """

    def __init__(
        self,
        *,
        per_kind: int = 300,
        held_out: bool = False,
        styles: Sequence[str] = (TEST_STYLE,),
        kinds: Sequence[str] = BOTTLENECK_KINDS,
        seed: int = 0,
    ) -> None:
        concepts = load_concepts()
        keys = [
            (style, code)
            for style, code in PictureSet.load().keys()
            if style in styles and concepts[code].held_out == held_out
        ]
        pool = Pool.load(held_out)
        self._items: list[Dialogue] = []
        for kind in kinds:
            rng = random.Random(f"bottleneck/{seed}/{kind}")
            asked = 0
            for style, code in rng.sample(keys, len(keys)):
                white_share = 0.0 if kind == "background" else 1.0
                picture, facts = draw_picture(style, code, rng, False, white_share)
                turn = picture_turn(kind, facts, rng, pool, plain=True)
                if turn is None or asked == per_kind:
                    continue
                asked += 1
                self._items.append(Dialogue((picture,), (turn,), name=f"{kind} {picture.name}"))

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> Dialogue:
        return self._items[index]
