"""The wordings of questions, instructions and answers.  The first of each list is the plain one."""

from __future__ import annotations

from collections.abc import Mapping

QUESTIONS: Mapping[str, tuple[str, ...]] = {
    "name": (
        "What is this?",
        "What is shown here?",
        "What does the picture show?",
        "What do you see?",
        "Name the picture.",
        "What is it called?",
        "Give its name.",
        "Which thing is this?",
    ),
    "group": (
        "Which group is it in?",
        "What is its group?",
        "Name its group.",
        "To which group does it belong?",
    ),
    "subgroup": (
        "Which subgroup is it in?",
        "What is its subgroup?",
        "Name its subgroup.",
        "To which subgroup does it belong?",
    ),
    "tag": (
        "Give one word for it.",
        "Which word fits it?",
        "Name one tag.",
        "One word that describes it?",
    ),
    "tags": (
        "Which words describe it?",
        "List some tags.",
        "Give a few keywords.",
        "What words go with it?",
    ),
    "colour": (
        "What is its main colour?",
        "Which colour is it mostly?",
        "What colour is the drawing?",
        "Name the main colour.",
    ),
    "background": (
        "What is the background colour?",
        "What colour is behind it?",
        "Name the background colour.",
        "Which colour is the background?",
    ),
    "style": (
        "In which style is it drawn?",
        "What style is this?",
        "Name the drawing style.",
        "Which style is it?",
    ),
    "yesno": ("Is this {0}?", "Does it show {0}?", "Is it {0}?", "Do you see {0}?"),
    "yesno_tag": ("Does the word {0} fit?", "Is {0} a tag of it?", "Does {0} describe it?"),
    "yesno_group": ("Is it in the group {0}?", "Does it belong to {0}?", "Is its group {0}?"),
    "yesno_colour": ("Is it mostly {0}?", "Is {0} its main colour?", "Is the drawing {0}?"),
    "yesno_background": ("Is the background {0}?", "Is it {0} behind it?", "Is it on {0}?"),
    "other_language": (
        "What is it in {0}?",
        "Name it in {0}.",
        "What is its {0} name?",
        "How is it called in {0}?",
    ),
    "reverse": (
        "Is this {0} or {1}?",
        "Which is it: {0} or {1}?",
        "{0} or {1}?",
        "Which name fits: {0} or {1}?",
    ),
    "reverse_tag": ("Which word fits: {0} or {1}?", "Which tag is right: {0} or {1}?"),
    "count": (
        "How many pictures are there?",
        "How many drawings do you see?",
        "Count the drawings.",
    ),
    "count_group": ("How many are in {0}?", "How many belong to {0}?", "Count those in {0}."),
    "position": ("Where is {0}?", "In which place is {0}?", "Find {0}."),
    "at_position": ("What is {0}?", "Name the one {0}.", "Which one is {0}?"),
    "colour_at_position": ("What colour is the one {0}?", "Main colour of the one {0}?"),
    "present": ("Is there {0}?", "Do you see {0}?", "Is {0} among them?"),
    "description": (
        "Describe the picture.",
        "Describe what you see.",
        "Tell me about the picture.",
        "What can be said about it?",
    ),
    "caption": ("Write a caption.", "Give a short caption.", "Caption the picture."),
}

NUMBERS = ("none", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PLACES: Mapping[int, tuple[str, ...]] = {
    4: ("top left", "top right", "bottom left", "bottom right"),
    9: (
        "top left",
        "top middle",
        "top right",
        "middle left",
        "centre",
        "middle right",
        "bottom left",
        "bottom middle",
        "bottom right",
    ),
}
AT_PLACES: Mapping[int, tuple[str, ...]] = {
    count: tuple(f"{'in' if place == 'centre' else 'at'} the {place}" for place in places)
    for count, places in PLACES.items()
}

CAPTIONS = (
    "{label} on {background}",
    "a {style} drawing of {label}",
    "{label}, {subgroup}",
    "{colour} drawing of {label}",
)
DESCRIPTIONS: tuple[tuple[str, ...], ...] = (
    ("The picture shows {label}.", "This is {label}.", "Here is {label}."),
    ("It belongs to {group}, {subgroup}.", "Its group is {group}, its subgroup {subgroup}."),
    ("It goes with the words {tags}.", "Words for it are {tags}."),
    (
        "The drawing is mostly {colour}, on {background}.",
        "Its main colour is {colour} and the background is {background}.",
    ),
    ("It is drawn in {style} style.", "The style is {style}."),
)
