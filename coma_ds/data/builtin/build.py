"""Rebuild the built-in picture set: ``python -m coma_ds.data.builtin.build``.

For maintainers only; needs ``npm`` and ``resvg-py``.  Users read the parquet files that it
writes next to this module: ``pictures.parquet``, ``concepts.parquet`` and ``NOTICE.md``.
The same package versions give the same rows.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import logging
import subprocess
import tarfile
import tempfile
from collections.abc import Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from coma_ds.data.builtin import mapping
from coma_ds.data.builtin.colours import dominant_colour
from coma_ds.data.builtin.notice import notice_text
from coma_ds.data.builtin.pictures import decode

LOGGER = logging.getLogger("coma_ds")

STYLE_PACKAGES = {
    "noto": "@iconify-json/noto@1.2.9",
    "twemoji": "@iconify-json/twemoji@1.2.5",
    "emojione": "@iconify-json/emojione@1.2.3",
    "noto-v1": "@iconify-json/noto-v1@1.2.5",
    "fxemoji": "@iconify-json/fxemoji@1.2.2",
    "fluent-emoji-flat": "@iconify-json/fluent-emoji-flat@1.2.6",
}
ANNOTATIONS_PACKAGE = "emojibase-data@17.0.0"
LANGUAGES = ("de", "es", "fi", "fr", "it", "ja", "nl", "pl", "pt", "ru", "sv", "zh")
SHORTCODES = ("cldr", "emojibase", "iamcal", "joypixels", "github", "emojibase-legacy")
SIZE = 64
HELD_OUT_ONE_IN = 10
PICTURE_COLUMNS = pa.schema(
    {
        "style": pa.string(),
        "code": pa.string(),
        "image": pa.binary(),
        "colour": pa.string(),
        "colour_share": pa.float32(),
    }
)

# Names that mislead, corrected by eye: the concept that the drawing shows, or None to leave it out.
BY_EYE: Mapping[str, Mapping[str, str | None]] = {
    "fxemoji": {
        "beachumbrella": "1F3D6",
        "bow": "1F380",
        "bunny": "1F430",
        "bunnyside": "1F407",
        "cat": "1F431",
        "catside": "1F408",
        "construction": None,
        "couple": "1F491",
        "darksunglasses": "1F576",
        "dog": "1F436",
        "dogside": "1F415",
        "down": "1F447",
        "dragonhead": "1F432",
        "dragonside": "1F409",
        "keyboard": None,
        "kiss": None,
        "leopardside": "1F406",
        "mouse": "1F42D",
        "mouseside": "1F401",
        "pig": "1F437",
        "pigside": "1F416",
        "pout": "1F64E",
        "pouting": "1F621",
        "sunglasses": "1F60E",
        "tiger": "1F42F",
        "tigerside": "1F405",
        "up": "1F446",
        "wave": "1F30A",
    },
}


def is_held_out(code: str) -> bool:
    """Whether a concept is kept out of all training: a tenth, by a hash of its code points."""
    digest = hashlib.blake2b(code.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % HELD_OUT_ONE_IN == 0


def fetch(package: str, folder: Path) -> Path:
    """Download ``NAME@VERSION`` with ``npm pack`` and unpack it below ``folder``."""
    target = folder / package.replace("/", "-").lstrip("@")
    target.mkdir()
    done = subprocess.run(
        ["npm", "pack", package, "--pack-destination", str(target)],
        capture_output=True,
        text=True,
        timeout=600,
    )
    if done.returncode:
        raise ValueError(
            f"npm pack {package} failed ({done.stderr.strip()[-300:]}); "
            "check that npm is installed and its registry can be reached"
        )
    with tarfile.open(next(target.glob("*.tgz"))) as archive:
        archive.extractall(target, filter="data")
    return target / "package"


def read_json(path: Path):
    """The content of a JSON file, read as UTF-8."""
    return json.loads(path.read_text(encoding="utf-8"))


def clean(text: str) -> str:
    """A label with plain spaces and apostrophes."""
    text = text.replace("\u2019", "'").replace("\u202f:", ":").replace("\u202f", " ")
    return " ".join(text.replace("\u00a0:", ":").replace("\u00a0", " ").split())


def svg_of(icons: Mapping, name: str) -> tuple[str, bool]:
    """The SVG of an icon on a square canvas, and whether it must be mirrored."""
    mirrored = False
    while name not in icons["icons"]:
        alias = icons["aliases"][name]
        mirrored ^= bool(alias.get("hFlip"))
        name = alias["parent"]
    icon = icons["icons"][name]
    width = icon.get("width", icons.get("width", 16))
    height = icon.get("height", icons.get("height", 16))
    side = max(width, height)
    left = icon.get("left", 0) - (side - width) / 2
    top = icon.get("top", 0) - (side - height) / 2
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{left} {top} {side} {side}">{icon["body"]}</svg>'
    )
    return svg, mirrored


def render(icons: Mapping, name: str) -> bytes:
    """One drawing as lossless WebP, RGBA, ``SIZE`` pixels square."""
    import resvg_py

    svg, mirrored = svg_of(icons, name)
    png = resvg_py.svg_to_bytes(svg_string=svg, width=SIZE, height=SIZE, skip_system_fonts=True)
    image = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
    if image.size != (SIZE, SIZE):
        raise ValueError(f"icon {name!r} was rendered as {image.size}, expected {SIZE} x {SIZE}")
    if not image.getchannel("A").getbbox():
        raise ValueError(f"icon {name!r} was rendered empty; leave it out in BY_EYE")
    if mirrored:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    out = io.BytesIO()
    image.save(out, "WEBP", lossless=True, quality=100, method=6)
    return out.getvalue()


def match_styles(
    packages: Mapping[str, Path], annotations: Path, entries: Mapping[str, Mapping]
) -> dict[str, dict[str, str]]:
    """style -> code -> icon name, codes in the order of ``entries``."""
    chars = {style: read_json(path / "chars.json") for style, path in packages.items()}
    by_code = {
        style: mapping.match_by_code(table, entries) for style, table in chars.items() if table
    }
    unicode_names = read_json(annotations / "meta" / "unicode-names.json")
    shortcodes = [read_json(annotations / "en/shortcodes" / f"{n}.json") for n in SHORTCODES]
    tables = mapping.known_names(entries, list(by_code.values()), shortcodes, unicode_names)
    flags = mapping.flag_codes(entries)
    matched = {}
    for style, path in packages.items():
        found = by_code.get(style)
        if found is None:
            icons = read_json(path / "icons.json")
            names = [*icons["icons"], *icons.get("aliases", {})]
            corrected = BY_EYE.get(style, {})
            names = [name for name in names if name not in corrected]
            found = mapping.match_by_name(names, tables, flags)
            found |= {code: name for name, code in corrected.items() if code is not None}
        matched[style] = {code: found[code] for code in entries if code in found}
    return matched


def concept_table(annotations: Path, entries: Mapping[str, Mapping]) -> pa.Table:
    """One row per concept, in the order of the Unicode charts."""
    meta = read_json(annotations / "meta/groups.json")
    codes = sorted(entries, key=lambda code: entries[code]["order"])
    columns = {
        "code": codes,
        "label": [clean(entries[code]["label"]) for code in codes],
        "group": [meta["groups"][str(entries[code]["group"])] for code in codes],
        "subgroup": [meta["subgroups"][str(entries[code]["subgroup"])] for code in codes],
        "tags": [[clean(tag) for tag in entries[code].get("tags", [])] for code in codes],
    }
    for language in LANGUAGES:
        table = read_json(annotations / language / "compact.json")
        names = {mapping.normal_code(row["hexcode"]): clean(row["label"]) for row in table}
        columns[f"name_{language}"] = [names.get(code, "") for code in codes]
    columns["held_out"] = [is_held_out(code) for code in codes]
    return pa.table(columns)


def build(folder: Path) -> None:
    """Fetch, match, render and write the set into ``folder``."""
    with tempfile.TemporaryDirectory() as scratch:
        packages = {s: fetch(package, Path(scratch)) for s, package in STYLE_PACKAGES.items()}
        annotations = fetch(ANNOTATIONS_PACKAGE, Path(scratch))
        entries = mapping.base_entries(read_json(annotations / "en/data.json"))
        matched = match_styles(packages, annotations, entries)
        rows: dict[str, list] = {name: [] for name in PICTURE_COLUMNS.names}
        for style, names in matched.items():
            icons = read_json(packages[style] / "icons.json")
            for code, name in names.items():
                rows["style"].append(style)
                rows["code"].append(code)
                rows["image"].append(render(icons, name))
                word, share = dominant_colour(decode(rows["image"][-1]))
                rows["colour"].append(word)
                rows["colour_share"].append(share)
            LOGGER.info("%s: %d pictures", style, len(names))
        pictures = pa.table(rows, schema=PICTURE_COLUMNS)
        concepts = concept_table(annotations, entries)
    pq.write_table(
        pictures,
        folder / "pictures.parquet",
        compression="zstd",
        use_dictionary=["style", "code", "colour"],
        write_statistics=False,
    )
    pq.write_table(concepts, folder / "concepts.parquet", compression="zstd")
    counts = {style: len(names) for style, names in matched.items()}
    packages_used = {**STYLE_PACKAGES, "annotations": ANNOTATIONS_PACKAGE}
    (folder / "NOTICE.md").write_text(notice_text(packages_used, counts), encoding="utf-8")


def main() -> None:
    """Rebuild the set from the command line."""
    parser = argparse.ArgumentParser(description="Rebuild the built-in picture set.")
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path(__file__).parent,
        help="where the files go (default: the package itself)",
    )
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    build(parser.parse_args().folder)


if __name__ == "__main__":
    main()
