"""Which drawing of a style shows which concept.

A style names its drawings in its own way: some list code points, others only carry a slug.
Slugs are compared squeezed (lower case, letters and digits only) with the names that a concept
is known by, the most official name first, so that ``cat`` means the concept labelled "cat" and
not another one that merely has "cat" among its short codes.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence

NOT_A_CONCEPT = 2  # emojibase group "component": skin tones and hair alone


def normal_code(hexcode: str) -> str:
    """A code point sequence in upper case without the variation selector FE0F."""
    return "-".join(part for part in hexcode.upper().split("-") if part != "FE0F")


def squeeze(name: str) -> str:
    """A name in lower case without accents and with everything but letters and digits removed."""
    return re.sub(r"[^a-z0-9]", "", unicodedata.normalize("NFKD", name).lower())


def base_entries(annotations: Sequence[Mapping]) -> dict[str, Mapping]:
    """The emojibase entries of base concepts (no skin tones, no components) by normal code."""
    return {
        normal_code(entry["hexcode"]): entry
        for entry in annotations
        if entry.get("group") is not None and entry["group"] != NOT_A_CONCEPT
    }


def _flag_slug(slug: str) -> str:
    return slug.removeprefix("flag-for-").removeprefix("flag-")


def known_names(
    entries: Mapping[str, Mapping],
    icon_names: Sequence[Mapping[str, str]],
    shortcodes: Sequence[Mapping[str, str | Sequence[str]]],
    unicode_names: Mapping[str, str],
) -> list[dict[str, str]]:
    """Tables from squeezed name to code, best table first; a name of two codes is in neither.

    ``icon_names`` are code -> slug tables of styles that list code points, ``shortcodes`` and
    ``unicode_names`` are emojibase's tables by hexcode.
    """
    hexcode = {code: entry["hexcode"] for code, entry in entries.items()}
    tables: list[list[tuple[str, str]]] = [
        [(entry["label"], code) for code, entry in entries.items()],
        [(slug, code) for names in icon_names for code, slug in names.items()],
        [(unicode_names.get(hexcode[code], ""), code) for code in entries],
    ]
    for codes in shortcodes:
        table = []
        for code in entries:
            found = codes.get(hexcode[code], [])
            table += [(name, code) for name in ([found] if isinstance(found, str) else found)]
        tables.append(table)
    unique = []
    for table in tables:
        codes_of: dict[str, set[str]] = {}
        for name, code in table:
            if squeeze(name):
                codes_of.setdefault(squeeze(name), set()).add(code)
        unique.append({name: min(codes) for name, codes in codes_of.items() if len(codes) == 1})
    return unique


def match_by_code(chars: Mapping[str, str], entries: Mapping[str, Mapping]) -> dict[str, str]:
    """code -> icon name for a style that lists code points."""
    return {normal_code(code): name for code, name in chars.items() if normal_code(code) in entries}


def match_by_name(
    icon_names: Sequence[str],
    tables: Sequence[Mapping[str, str]],
    flags: Mapping[str, str],
) -> dict[str, str]:
    """code -> icon name for a style without code points, by the best table that knows a name.

    ``flags`` maps the squeezed country of a flag to its code.
    """
    best: dict[str, tuple[int, int, str]] = {}
    for position, name in enumerate(icon_names):
        if name.startswith("flag-"):
            code = flags.get(squeeze(_flag_slug(_flag_slug(name))))
            rank = 0
        else:
            hits = [
                (rank, table[squeeze(name)])
                for rank, table in enumerate(tables)
                if squeeze(name) in table
            ]
            rank, code = hits[0] if hits else (0, None)
        if code is not None:
            best[code] = min(best.get(code, (99, 0, "")), (rank, position, name))
    return {code: name for code, (_, _, name) in best.items()}


def flag_codes(entries: Mapping[str, Mapping]) -> dict[str, str]:
    """The squeezed country (label without "flag:") of every flag concept -> code."""
    table = {}
    for code, entry in entries.items():
        if entry["label"].startswith("flag: "):
            table[squeeze(entry["label"].removeprefix("flag: ").replace("&", "and"))] = code
    return table
