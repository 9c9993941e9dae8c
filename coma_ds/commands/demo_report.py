"""The report of the demo: one self-contained page, and the same as a picture.

``python -m coma_ds.commands.demo_report runs/demo`` writes both again from a finished demo.
"""

from __future__ import annotations

import base64
import io
import re
import sys
from collections.abc import Sequence
from html import escape
from importlib import resources
from pathlib import Path
from string import Template

from PIL import Image

from coma_ds.commands.demo_figure import Chart, Series, SvgCanvas, draw_bar, draw_chart
from coma_ds.commands.demo_findings import (
    CAVEAT,
    MEASURED,
    PIXEL_SETS,
    TITLES,
    Findings,
    collect,
    percent,
)
from coma_ds.commands.demo_picture import draw_page

CHART = (470, 250)
ARM_OF = {title: arm for arm, title in TITLES.items()}
RUN_COLUMNS = ("run", "recipe", "from", "steps x batch", "rate", "ZeRO", "training", "in all")


def write_report(findings: Findings, folder: Path) -> list[Path]:
    """Write ``report.html`` and ``report.png`` into the folder; their paths."""
    page, picture = folder / "report.html", folder / "report.png"
    page.write_text(render(findings))
    draw_page(findings, charts(findings)).save(picture, optimize=True)
    return [page, picture]


def render(findings: Findings) -> str:
    """The page, without anything that it would have to fetch."""
    template = resources.files("coma_ds.commands").joinpath("demo_report.html").read_text()
    form = "" if findings.length == "standard" else f", {findings.length} form"
    questions = {row["questions"] for row in findings.bottleneck.values()}
    return Template(template).substitute(
        form=form,
        lede=escape(lede(findings)),
        figures=_figures(findings),
        measured=escape(measured(findings)),
        caveat=CAVEAT,
        headline=_headline(findings),
        remarks="".join(f"<p>{_unbroken(text)}</p>" for text in findings.remarks),
        legend="".join(f"<span>{_key(a)}{escape(TITLES[a])}</span>" for a in ("match", "control")),
        charts="".join(_svg(chart) for chart in charts(findings)),
        questions=f"{max(questions)}" if questions else "no",
        bottleneck=_bottleneck(findings),
        candidates=f"{findings.candidates:,}",
        queries=_queries(findings),
        pixels=_pixels(findings),
        runs=_table(RUN_COLUMNS, findings.runs),
        machine="<br>".join(map(escape, findings.machine)),
        tensorboard=escape(findings.tensorboard),
        sets=_sets(findings),
    )


def lede(findings: Findings) -> str:
    """What was done, in two sentences."""
    return (
        f"A Qwen2.5-VL of {findings.parameters / 1e6:.1f} million parameters learns to pass a "
        f"picture through {findings.tokens} tokens (compress: {findings.steps['compress']} "
        f"steps), then to rank by them (match: {findings.steps['match']} steps). Beside it stand "
        f"the same {findings.steps['control']} contrastive steps without the first stage."
    )


def measured(findings: Findings) -> str:
    """What the four large figures are."""
    return (
        f"{MEASURED}: from a name to its picture, precision@1 among {findings.candidates:,} "
        f"drawings in an unseen style, {findings.queries_asked:,} queries."
    )


def charts(findings: Findings) -> list[Chart]:
    """P@1 against steps and against training time, then the two losses."""
    curves, losses = findings.precision, findings.losses
    arms = ("control", "match")
    compress_end = losses["compress"].seconds[-1] if losses["compress"].seconds else 0.0
    percents = [[100 * v for v in curves[arm].values] for arm in arms]
    return [
        Chart(
            f"{MEASURED} P@1, %",
            "match steps",
            [Series(a, curves[a].steps, y, dots=True) for a, y in zip(arms, percents)],
        ),
        Chart(
            f"{MEASURED} P@1, %",
            "seconds of training, stage 1 included",
            [Series(a, curves[a].seconds, y, dots=True) for a, y in zip(arms, percents)],
            span=(0.0, compress_end, "compress"),
        ),
        Chart(
            "compress: answer loss",
            "compress steps",
            [Series("match", losses["compress"].steps, losses["compress"].values)],
        ),
        Chart(
            "match: contrastive loss",
            "match steps",
            [Series(arm, losses[arm].steps, losses[arm].values) for arm in arms],
        ),
    ]


def _unbroken(text: str) -> str:
    """A figure stays beside its unit."""
    return re.sub(r"(\d) (%|s\b)", r"\1&nbsp;\2", escape(text))


def _svg(chart: Chart) -> str:
    canvas = SvgCanvas(*CHART, f"{chart.title}, against {chart.x_label}")
    draw_chart(canvas, chart, 0, 0, *CHART)
    return canvas.markup()


def _key(arm: str) -> str:
    return f'<i class="key {arm if arm in ("match", "control") else "none"}"></i>'


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells are plain text in the header and the rows."""
    return _markup(map(escape, header), [map(escape, row) for row in rows])


def _markup(header, rows) -> str:
    head = "".join(f"<th>{cell}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody>"


def _figures(findings: Findings) -> str:
    order = [TITLES["match"], TITLES["control"], TITLES["untrained"], "chance"]
    return "".join(
        f'<div><span class="big">{percent(findings.headline[name][0])}<small> %</small></span>'
        f"<span>{_key(ARM_OF[name]) if ARM_OF.get(name) in ('match', 'control') else ''}"
        f"{escape(name)}</span></div>"
        for name in order
    )


def _headline(findings: Findings) -> str:
    names = [c.replace("/", "<small>", 1) + "</small>" if "/" in c else c for c in findings.columns]
    header = ["", *names, "training"]
    rows = []
    for name, values in findings.headline.items():
        seconds = findings.seconds[name]
        took = "-" if seconds is None else f"{seconds:.0f} s"
        rows.append([_key(ARM_OF.get(name, "")) + escape(name), *map(percent, values), took])
    return _markup(header, rows)


def _bottleneck(findings: Findings) -> str:
    header = [
        "question",
        "tokens",
        "picture in sight",
        "blind",
        "tokens / in sight",
        "base, in sight",
        "",
    ]
    rows = []
    for kind, row in findings.bottleneck.items():
        canvas = SvgCanvas(180, 14, f"{kind}: {percent(row['tokens'])} % through the tokens")
        draw_bar(canvas, 0, 2, 180, 10, row)
        cells = [escape(kind.replace("_", " ")), *bottleneck_cells(row)]
        rows.append([*cells, f'<div class="bar">{canvas.markup()}</div>'])
    return _markup(header, rows)


def bottleneck_cells(row: dict) -> list[str]:
    """tokens, visible, blind, the share of the first two, and the base."""
    share = f"{row['tokens'] / row['visible']:.2f}" if row["visible"] else "-"
    ways = [percent(row[way]) for way in ("tokens", "visible", "blind")]
    return [*ways, share, percent(row["base"])]


def _queries(findings: Findings) -> str:
    cells = ['<div class="head"></div>']
    for arm in ("control", "match"):
        cells.append(f'<div class="head">{_key(arm)}{escape(TITLES[arm])}</div>')
    for query in findings.queries:
        cells.append(f'<div class="ask">{_image(query.gold)}{escape(query.text)}</div>')
        for arm in ("control", "match"):
            pictures = "".join(_image(image, gold) for image, gold in query.nearest[arm])
            place = query.ranks[arm] + 1
            mark = ' class="hit"' if place == 1 else ""
            cells.append(f'<div class="row {arm}">{pictures}<b{mark}>{place:,}</b></div>')
    return "".join(cells)


def _image(image: Image.Image, gold: bool = False) -> str:
    data = io.BytesIO()
    image.convert("RGB").quantize(128).save(data, "PNG", optimize=True)
    mark = ' class="gold"' if gold else ""
    code = base64.b64encode(data.getvalue()).decode()
    return f'<img{mark} alt="" src="data:image/png;base64,{code}">'


def _pixels(findings: Findings) -> str:
    rows = [[name, *map(percent, values)] for name, values in findings.pixels.items()]
    return _table(["", *PIXEL_SETS], rows)


def _sets(findings: Findings) -> str:
    arms = list(TITLES)
    header = ["set", "task", "domain", "candidates", "chance", *(TITLES[arm] for arm in arms)]
    rows = []
    for name, values in findings.sets["match"].items():
        figures = [percent(findings.sets[arm].get(name, {}).get("p@1")) for arm in arms]
        head = [name, values["group"], values["domain"], f"{values['candidates']:.4g}"]
        rows.append([*head, percent(values["chance"]), *figures])
    return _table(header, rows)


if __name__ == "__main__":
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/demo")
    try:
        write_report(collect(folder), folder)
    except ValueError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)
