"""Rebuilding the built-in set: matching of names, SVGs, rendering; without any download."""

from __future__ import annotations

import io
import json
import subprocess
import tarfile

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from coma_ds.data.builtin import build, mapping, notice
from coma_ds.data.builtin.concepts import load_concepts

SQUARE = '<path fill="#f00" d="M0 0h8v4H0z"/>'
HALF = '<path fill="#00f" d="M0 0h4v8H0z"/>'


def entry(code: str, label: str, group: int | None = 3) -> dict:
    return {"hexcode": code, "label": label, "group": group, "subgroup": 1, "order": int(code, 16)}


ENTRIES = {
    "1F408": entry("1F408", "cat"),
    "1F431": entry("1F431", "cat face"),
    "1F346": entry("1F346", "eggplant"),
    "1F1": entry("1F1", "flag: Antigua & Barbuda"),
}


def test_base_concepts_leave_out_components_and_variation_selectors():
    rows = [
        entry("1F408", "cat"),
        entry("1F3FB", "light skin tone", 2),
        entry("1F1E6", "regional indicator A", None),
    ]
    rows.append({**entry("2764", "red heart"), "hexcode": "2764-FE0F"})
    assert list(mapping.base_entries(rows)) == ["1F408", "2764"]


def test_the_most_official_name_wins():
    shortcodes = [{"1F408": "cat2", "1F431": ["cat", "kitty"], "1F346": "purple"}]
    tables = mapping.known_names(ENTRIES, [], shortcodes, {"1F346": "AUBERGINE"})
    names = [
        "kitty",
        "cat",
        "cat-face",
        "Aubergine",
        "purple",
        "flag-for-antigua-and-barbuda",
        "unknown",
        "flag-for-nowhere",
    ]
    found = mapping.match_by_name(names, tables, mapping.flag_codes(ENTRIES))
    assert found == {
        "1F408": "cat",
        "1F431": "cat-face",
        "1F346": "Aubergine",
        "1F1": "flag-for-antigua-and-barbuda",
    }


def test_a_name_of_two_concepts_matches_neither():
    tables = mapping.known_names(ENTRIES, [], [{"1F408": "pet", "1F431": "pet"}], {})
    assert mapping.match_by_name(["pet"], tables, {}) == {}


def test_matching_by_code_ignores_the_variation_selector():
    assert mapping.match_by_code({"1f408-fe0f": "cat", "1f999": "x"}, ENTRIES) == {"1F408": "cat"}


def test_names_are_compared_without_accents_and_signs():
    assert mapping.squeeze("Cote d'Ivoire") == mapping.squeeze("C\u00f4te d\u2019Ivoire")


def test_labels_get_plain_spaces_and_apostrophes():
    assert build.clean("drapeau\u202f: l\u2019Inde \u00a0x") == "drapeau: l'Inde x"


def test_the_held_out_tenth_is_the_shipped_one():
    for concept in load_concepts().values():
        assert concept.held_out == build.is_held_out(concept.code)


ICONS = {
    "width": 8,
    "height": 8,
    "icons": {"flat": {"body": SQUARE, "height": 4}, "left": {"body": HALF}, "empty": {"body": ""}},
    "aliases": {"right": {"parent": "left", "hFlip": True}, "again": {"parent": "right"}},
}


def pixels(name: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(build.render(ICONS, name))).convert("RGBA"))


def test_drawings_are_square_centred_and_mirrored_where_an_alias_says_so():
    flat = pixels("flat")
    assert flat.shape == (64, 64, 4)
    assert (flat[:15, :, 3] == 0).all() and (flat[49:, :, 3] == 0).all()
    assert (flat[18:46, 2:62] == (255, 0, 0, 255)).all()
    assert (pixels("left")[2:62, 2:30, 3] == 255).all() and not pixels("left")[:, 34:, 3].any()
    assert np.array_equal(pixels("right"), pixels("left")[:, ::-1])
    assert np.array_equal(pixels("again"), pixels("right"))
    with pytest.raises(ValueError, match="icon 'empty' was rendered empty"):
        build.render(ICONS, "empty")


def test_a_failed_download_is_named(tmp_path, monkeypatch):
    def fail(*args, **_):
        return subprocess.CompletedProcess(args, 1, "", "E404 not found")

    monkeypatch.setattr(build.subprocess, "run", fail)
    with pytest.raises(ValueError, match=r"npm pack @x/y@1 failed \(E404 not found\); check"):
        build.fetch("@x/y@1", tmp_path)


def test_build_writes_matched_pictures_concepts_and_notice(tmp_path, monkeypatch):
    files = {
        "@iconify-json/noto@1.2.9": {
            "icons.json": {**ICONS, "icons": {"cat": {"body": SQUARE}}},
            "chars.json": {"1f408": "cat"},
        },
        "@iconify-json/fxemoji@1.2.2": {
            "icons.json": {
                **ICONS,
                "icons": {
                    "catside": {"body": HALF},
                    "cat": {"body": SQUARE},
                    "eggplant": {"body": SQUARE},
                },
            },
            "chars.json": {},
        },
        build.ANNOTATIONS_PACKAGE: {
            "en/data.json": [{**row, "tags": ["pet"]} for row in ENTRIES.values()],
            "meta/groups.json": {"groups": {"3": "animals-nature"}, "subgroups": {"1": "mammal"}},
            "meta/unicode-names.json": {},
            **{f"en/shortcodes/{name}.json": {} for name in build.SHORTCODES},
            **{
                f"{language}/compact.json": [{"hexcode": "1F408", "label": f"cat {language}"}]
                for language in build.LANGUAGES
            },
        },
    }

    def npm(command, **_):
        package, folder = command[2], command[4]
        with tarfile.open(f"{folder}/p.tgz", "w:gz") as archive:
            for name, content in files[package].items():
                data = json.dumps(content).encode()
                info = tarfile.TarInfo(f"package/{name}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(build.subprocess, "run", npm)
    styles = {"noto": "@iconify-json/noto@1.2.9", "fxemoji": "@iconify-json/fxemoji@1.2.2"}
    monkeypatch.setattr(build, "STYLE_PACKAGES", styles)
    monkeypatch.setattr(build, "BY_EYE", {"fxemoji": {"catside": "1F408", "cat": "1F431"}})
    build.build(tmp_path)
    pictures = pq.read_table(tmp_path / "pictures.parquet").to_pylist()
    assert [(row["style"], row["code"]) for row in pictures] == [
        ("noto", "1F408"),
        ("fxemoji", "1F408"),
        ("fxemoji", "1F431"),
        ("fxemoji", "1F346"),
    ]
    side = np.asarray(Image.open(io.BytesIO(pictures[1]["image"])))
    assert tuple(side[32, 5]) == (0, 0, 255, 255) and not side[32, 60, 3]
    concepts = pq.read_table(tmp_path / "concepts.parquet").to_pylist()
    cat = next(row for row in concepts if row["code"] == "1F408")
    assert (cat["label"], cat["group"], cat["tags"]) == ("cat", "animals-nature", ["pet"])
    assert cat["name_de"] == "cat de"
    assert "| fxemoji | 3 |" in (tmp_path / "NOTICE.md").read_text()


def test_every_style_has_its_attribution():
    assert set(notice.SOURCES) == set(build.STYLE_PACKAGES)
