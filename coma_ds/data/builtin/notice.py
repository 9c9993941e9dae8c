"""The attribution that ships with the built-in pictures."""

from __future__ import annotations

from collections.abc import Mapping

SOURCES = {
    "noto": (
        "Noto Emoji",
        "Google Inc",
        "https://github.com/googlefonts/noto-emoji",
        "Apache License 2.0",
    ),
    "twemoji": (
        "Twemoji",
        "Twitter, Inc and other contributors",
        "https://github.com/jdecked/twemoji",
        "CC BY 4.0",
    ),
    "emojione": (
        "EmojiOne 2.3 / EmojiTwo",
        "Ranks.com Inc and the EmojiTwo contributors",
        "https://github.com/EmojiTwo/emojitwo",
        "CC BY 4.0",
    ),
    "noto-v1": (
        "Noto Emoji, first version",
        "Google Inc",
        "https://github.com/googlefonts/noto-emoji",
        "Apache License 2.0",
    ),
    "fxemoji": (
        "Firefox OS Emoji",
        "Mozilla Foundation",
        "https://github.com/mozilla/fxemoji",
        "Apache License 2.0",
    ),
    "fluent-emoji-flat": (
        "Fluent Emoji (flat)",
        "Microsoft Corporation",
        "https://github.com/microsoft/fluentui-emoji",
        "MIT",
    ),
}

_MIT = """\
Permission is hereby granted, free of charge, to any person obtaining a copy
of this software and associated documentation files (the "Software"), to deal
in the Software without restriction, including without limitation the rights
to use, copy, modify, merge, publish, distribute, sublicense, and/or sell
copies of the Software, and to permit persons to whom the Software is
furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all
copies or substantial portions of the Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR
IMPLIED, INCLUDING BUT NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY,
FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE
AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER
LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM,
OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE
SOFTWARE."""


def notice_text(packages: Mapping[str, str], counts: Mapping[str, int]) -> str:
    """NOTICE.md: what is in the set, from whom, under which licence, and what was changed.

    ``packages`` maps each style (and ``annotations``) to its npm ``NAME@VERSION``, ``counts``
    each style to its number of pictures.
    """
    rows = []
    for style, package in packages.items():
        if style in SOURCES:
            title, holder, url, licence = SOURCES[style]
            rows.append(
                f"| {style} | {counts[style]} | {title} | {holder} | {url} | {licence} "
                f"| {package} |"
            )
    table = "\n".join(rows)
    return f"""\
# Notices for the built-in picture set

Written by `python -m coma_ds.data.builtin.build`; do not edit by hand.
The licences below cover the data files in this folder only, not the program code around them.

## Pictures (`pictures.parquet`)

| style | pictures | work | copyright holder | source | licence | npm package |
|---|---|---|---|---|---|---|
{table}

Changes made here: one drawing per concept was kept (no skin tones), rendered from SVG to
64 x 64 pixels with transparency, and stored as lossless WebP. When pictures are used they are
put on coloured backgrounds, moved, scaled and slightly recoloured. None of the holders named
above has reviewed or endorses this use.

- Apache License 2.0: full text in `licenses/Apache-2.0.txt`.
- CC BY 4.0: https://creativecommons.org/licenses/by/4.0/legalcode
- MIT (fluent-emoji-flat):

Copyright (c) Microsoft Corporation.

{_MIT}

## Names, tags and groups (`concepts.parquet`)

Taken from {packages["annotations"]}, which is under the MIT licence and draws its texts from
the Unicode Common Locale Data Repository. Changes made here: components and skin tones were left
out, typographic spaces and apostrophes made plain, and a column `held_out` added.

- CLDR text, Copyright (c) Unicode, Inc., Unicode License V3: full text in
  `licenses/Unicode-3.0.txt`.
- emojibase-data, MIT:

Copyright (c) 2017-2019 Miles Johnson

{_MIT}
"""
