"""The concepts of the built-in set: what is known about each, and what training may say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import pyarrow.parquet as pq

FOLDER = Path(__file__).parent
LANGUAGES: Mapping[str, str] = {
    "de": "German",
    "es": "Spanish",
    "fi": "Finnish",
    "fr": "French",
    "it": "Italian",
    "ja": "Japanese",
    "nl": "Dutch",
    "pl": "Polish",
    "pt": "Portuguese",
    "ru": "Russian",
    "sv": "Swedish",
    "zh": "Chinese",
}
# The ones that dialogues and pairs speak: few, so that a tiny model learns them.
SPOKEN_LANGUAGES: tuple[str, ...] = ("de", "es", "fr", "it")


@dataclass(frozen=True, slots=True)
class Concept:
    """One concept: its code points, English label, groups, tags, and names by language code."""

    code: str
    label: str
    group: str
    subgroup: str
    tags: tuple[str, ...]
    names: Mapping[str, str]
    held_out: bool


@lru_cache(maxsize=1)
def load_concepts() -> Mapping[str, Concept]:
    """All concepts by code, in the order of the Unicode charts."""
    concepts = {}
    for row in pq.read_table(FOLDER / "concepts.parquet").to_pylist():
        concepts[row["code"]] = Concept(
            code=row["code"],
            label=row["label"],
            group=row["group"].replace("-", " and "),
            subgroup=row["subgroup"].replace("-", " "),
            tags=tuple(row["tags"]),
            names={language: row[f"name_{language}"] for language in LANGUAGES},
            held_out=row["held_out"],
        )
    return concepts


@lru_cache(maxsize=1)
def held_out_phrases() -> frozenset[str]:
    """Lower-case texts that training never uses as a name or a tag.

    The labels and names of held-out concepts, and the tags that only they carry.
    """
    concepts = load_concepts().values()
    held = [concept for concept in concepts if concept.held_out]
    seen_tags = {
        tag.lower() for concept in concepts if not concept.held_out for tag in concept.tags
    }
    labels = {concept.label.lower() for concept in held}
    names = {name.lower() for concept in held for name in concept.names.values()}
    tags = {tag.lower() for concept in held for tag in concept.tags}
    seen_labels = {concept.label.lower() for concept in concepts if not concept.held_out}
    return frozenset((labels | names | (tags - seen_tags)) - seen_labels)


def training_tags(concept: Concept) -> tuple[str, ...]:
    """The tags of a concept that training may say: none that names a held-out concept."""
    return tuple(tag for tag in concept.tags if tag.lower() not in held_out_phrases())


def training_names(concept: Concept) -> dict[str, str]:
    """The names by spoken language that training may say."""
    return {
        language: concept.names[language]
        for language in SPOKEN_LANGUAGES
        if concept.names[language].lower() not in held_out_phrases()
    }
