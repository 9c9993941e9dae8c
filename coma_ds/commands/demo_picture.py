"""The report as one picture, for a README: drawn with Pillow, no browser."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from PIL import Image

from coma_ds.commands.demo_figure import Chart, PillowCanvas, draw_bar, draw_chart
from coma_ds.commands.demo_findings import (
    CAVEAT,
    MEASURED,
    PIXEL_SETS,
    TITLES,
    Findings,
    Query,
    percent,
)

WIDTH, MARGIN = 1000, 44
INNER = WIDTH - 2 * MARGIN
ROW, CHART_HEIGHT, THUMB = 30, 216, 38
ARM_OF = {title: arm for arm, title in TITLES.items()}


def draw_page(findings: Findings, charts: Sequence[Chart]) -> Image.Image:
    """The whole report, 2,000 pixels wide."""
    bottleneck = ROW * (len(findings.bottleneck) + 1)
    queries = (THUMB + 16) * len(findings.queries)
    height = 190 + ROW * 6 + 2 * CHART_HEIGHT + bottleneck + queries + 680
    canvas = PillowCanvas(WIDTH, height)
    y = _title(canvas, findings)
    y = _results(canvas, findings, y)
    y = _curves(canvas, charts, y)
    y = _bottleneck(canvas, findings, y)
    y = _pixels(canvas, findings, y)
    y = _queries(canvas, findings.queries, findings.candidates, y)
    canvas.text(MARGIN, y + 20, "; ".join(findings.machine), "muted", 10)
    page = canvas.finished()
    page = page.crop((0, 0, page.width, round((y + 44) * canvas.SCALE / canvas.SMOOTH)))
    return page.quantize(255, dither=Image.Dither.NONE)


def _heading(canvas: PillowCanvas, text: str, note: str, y: float) -> float:
    canvas.text(MARGIN, y, text, "ink", 18)
    canvas.text(MARGIN, y + 20, note, "muted", 12)
    return y + 34


def _title(canvas: PillowCanvas, findings: Findings) -> float:
    canvas.text(MARGIN, 70, "Compress, then match", "ink", 34)
    form = "" if findings.length == "standard" else f" ({findings.length} form)"
    note = (
        f"coma-ds demo{form}: {findings.steps['compress']} compress steps and "
        f"{findings.steps['match']} match steps, beside {findings.steps['control']} match steps "
        "alone."
    )
    canvas.text(MARGIN, 96, note, "muted", 13)
    canvas.text(WIDTH - MARGIN, 96, CAVEAT, "control", 13, "end")
    return 146


def _rule(canvas: PillowCanvas, y: float, end: float = WIDTH - MARGIN) -> None:
    canvas.line([(MARGIN, y), (end, y)], "rule", 1)


def _key(canvas: PillowCanvas, x: float, y: float, arm: str | None, text: str) -> None:
    if arm in ("match", "control"):
        canvas.dot(x + 4, y - 4, 4, arm)
    canvas.text(x + 15, y, text, "ink", 13)


def _row(
    canvas: PillowCanvas, y: float, cells: Sequence[str], ends: Sequence[float], head: bool = False
) -> None:
    for cell, end in zip(cells, ends):
        canvas.text(end, y, cell, "muted" if head else "ink", 12 if head else 13, "end")


def _results(canvas: PillowCanvas, findings: Findings, y: float) -> float:
    note = (
        f"Precision@1 in %, drawings in a style that no step has seen; {MEASURED}: from a name to "
        f"its picture among {findings.candidates:,}."
    )
    y = _heading(canvas, "Results", note, y) + 14
    header = [*(c.replace("name_t2i/", "t2i ") for c in findings.columns), "training"]
    first = MARGIN + 240
    pitch = (WIDTH - MARGIN - first) / (len(header) - 1)
    ends = [first + pitch * at for at in range(len(header))]
    _row(canvas, y, header, ends, head=True)
    _rule(canvas, y + 10)
    for name, values in findings.headline.items():
        y += ROW
        seconds = findings.seconds[name]
        _key(canvas, MARGIN, y, ARM_OF.get(name), name)
        took = "-" if seconds is None else f"{seconds:.0f} s"
        _row(canvas, y, [*map(percent, values), took], ends)
        _rule(canvas, y + 10)
    y += 34
    for remark in findings.remarks:
        for line in textwrap.wrap(remark, 150):
            canvas.text(MARGIN, y, line, "muted", 12)
            y += 17
        y += 3
    return y + 34


def _curves(canvas: PillowCanvas, charts: Sequence[Chart], y: float) -> float:
    width = (INNER - 36) / 2
    for at, chart in enumerate(charts):
        x = MARGIN + (at % 2) * (width + 36)
        draw_chart(canvas, chart, x, y + (at // 2) * (CHART_HEIGHT + 12), width, CHART_HEIGHT)
    return y + -(-len(charts) // 2) * (CHART_HEIGHT + 12) + 44


def _bottleneck(canvas: PillowCanvas, findings: Findings, y: float) -> float:
    note = (
        "Exact answers in % after stage 1: through the tokens alone, with the picture in sight, "
        "blind (another picture's tokens); the base before it, in sight."
    )
    y = _heading(canvas, "Does the bottleneck hold the picture?", note, y) + 14
    header = ["tokens", "in sight", "blind", "tokens / in sight", "base, in sight"]
    ends = [MARGIN + at for at in (180, 270, 350, 480, 600)]
    canvas.text(MARGIN, y, "question", "muted", 12)
    _row(canvas, y, header, ends, head=True)
    _rule(canvas, y + 10)
    bar = MARGIN + 640
    for kind, row in findings.bottleneck.items():
        y += ROW
        share = f"{row['tokens'] / row['visible']:.2f}" if row["visible"] else "-"
        canvas.text(MARGIN, y, kind.replace("_", " "), "ink", 13)
        cells = [percent(row[way]) for way in ("tokens", "visible", "blind")]
        _row(canvas, y, [*cells, share, percent(row["base"])], ends)
        draw_bar(canvas, bar, y - 10, WIDTH - MARGIN - bar, 12, row)
        _rule(canvas, y + 10)
    return y + 62


def _pixels(canvas: PillowCanvas, findings: Findings, y: float) -> float:
    note = "The same concept in another style is often found by its pixels alone. P@1 in %."
    y = _heading(canvas, "Image to image, against raw pixels", note, y) + 14
    ends = [MARGIN + 330, MARGIN + 450]
    _row(canvas, y, PIXEL_SETS, ends, head=True)
    _rule(canvas, y + 10, ends[-1])
    for name, values in findings.pixels.items():
        y += ROW
        _key(canvas, MARGIN, y, ARM_OF.get(name), name)
        _row(canvas, y, [percent(value) for value in values], ends)
        _rule(canvas, y + 10, ends[-1])
    return y + 62


def _queries(canvas: PillowCanvas, queries: Sequence[Query], candidates: int, y: float) -> float:
    note = (
        "Drawn by lot before training. The gold picture is framed where it is among the five "
        f"nearest; the number is its place among {candidates:,}."
    )
    y = _heading(canvas, "A dozen queries", note, y) + 14
    step, columns = THUMB + 10, {"control": MARGIN + 300, "match": MARGIN + 622}
    for arm, x in columns.items():
        _key(canvas, x, y, arm, TITLES[arm])
    y += 14
    for query in queries:
        _rule(canvas, y)
        canvas.picture(MARGIN, y + 8, THUMB, query.gold)
        words = textwrap.wrap(query.text, 30, max_lines=2, placeholder=" ...")
        middle = y + 8 + THUMB / 2 + 5 - 8 * (len(words) - 1)
        for at, line in enumerate(words):
            canvas.text(MARGIN + THUMB + 14, middle + 16 * at, line, "ink", 13)
        for arm, x in columns.items():
            for at, (image, gold) in enumerate(query.nearest[arm]):
                canvas.picture(x + at * step, y + 8, THUMB, image)
                if gold:
                    canvas.frame(x + at * step, y + 8, THUMB, "gold")
            place = query.ranks[arm] + 1
            colour = "gold" if place == 1 else "muted"
            canvas.text(x + 5 * step + 36, y + 8 + THUMB / 2 + 5, f"{place:,}", colour, 12, "end")
        y += THUMB + 16
    _rule(canvas, y)
    return y
