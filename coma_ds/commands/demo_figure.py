"""Charts of the report, drawn once for two surfaces: SVG in the page, Pillow for the picture.

Lengths are logical pixels, colours are names of ``LIGHT``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Protocol

from PIL import Image, ImageDraw, ImageFont

LIGHT = {
    "paper": "#fcfbf9",
    "panel": "#f3f1ec",
    "ink": "#1f2328",
    "muted": "#72767d",
    "rule": "#e3e0d9",
    "match": "#1d6a86",
    "control": "#c4752e",
    "gold": "#0f8a5f",
}
Point = tuple[float, float]


class Canvas(Protocol):
    """A surface; ``anchor`` of a text is start, middle or end of its baseline."""

    def line(self, points: Sequence[Point], colour: str, width: float = 1.0) -> None: ...

    def rect(self, x: float, y: float, width: float, height: float, colour: str) -> None: ...

    def dot(self, x: float, y: float, radius: float, colour: str) -> None: ...

    def text(
        self, x: float, y: float, text: str, colour: str = "ink", size: float = 12,
        anchor: str = "start", bold: bool = False,
    ) -> None: ...  # fmt: skip


class SvgCanvas:
    """An SVG element whose colours are CSS variables of the page."""

    def __init__(self, width: float, height: float, label: str) -> None:
        self.width, self.height, self.label = width, height, label
        self.parts: list[str] = []

    def line(self, points, colour, width=1.0):
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        self.parts.append(
            f'<polyline points="{path}" fill="none" stroke="var(--{colour})" '
            f'stroke-width="{width:g}" stroke-linejoin="round" stroke-linecap="round"/>'
        )

    def rect(self, x, y, width, height, colour):
        self.parts.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(0, width):.1f}" height="{height:.1f}" '
            f'fill="var(--{colour})"/>'
        )

    def dot(self, x, y, radius, colour):
        self.parts.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:g}" fill="var(--{colour})"/>'
        )

    def text(self, x, y, text, colour="ink", size=12, anchor="start", bold=False):
        weight = ' font-weight="600"' if bold else ""
        self.parts.append(
            f'<text x="{x:.1f}" y="{y:.1f}" fill="var(--{colour})" font-size="{size:g}" '
            f'text-anchor="{anchor}"{weight}>{escape(text)}</text>'
        )

    def markup(self) -> str:
        """The element."""
        return (
            f'<svg viewBox="0 0 {self.width:g} {self.height:g}" role="img" '
            f'aria-label="{escape(self.label)}">{"".join(self.parts)}</svg>'
        )


class PillowCanvas:
    """An RGB image at twice the logical size, drawn at four times for smooth edges.

    The font is the one inside Pillow: nothing is looked for on the machine.
    """

    SCALE, SMOOTH = 4, 2

    def __init__(self, width: float, height: float) -> None:
        size = (round(width * self.SCALE), round(height * self.SCALE))
        self.image = Image.new("RGB", size, LIGHT["paper"])
        self.draw = ImageDraw.Draw(self.image)

    def line(self, points, colour, width=1.0):
        scaled = [(x * self.SCALE, y * self.SCALE) for x, y in points]
        pixels = max(1, round(width * self.SCALE))
        self.draw.line(scaled, fill=LIGHT[colour], width=pixels, joint="curve")

    def rect(self, x, y, width, height, colour):
        if width > 0:
            low, high = (x, y), (x + width, y + height)
            corners = [v * self.SCALE - less for p, less in ((low, 0), (high, 1)) for v in p]
            self.draw.rectangle(corners, fill=LIGHT[colour])

    def dot(self, x, y, radius, colour):
        corners = [v * self.SCALE for v in (x - radius, y - radius, x + radius, y + radius)]
        self.draw.ellipse(corners, fill=LIGHT[colour])

    def text(self, x, y, text, colour="ink", size=12, anchor="start", bold=False):
        self.draw.text(
            (x * self.SCALE, y * self.SCALE),
            text,
            fill=LIGHT[colour],
            font=ImageFont.load_default(size * self.SCALE),
            anchor={"start": "ls", "middle": "ms", "end": "rs"}[anchor],
            stroke_width=size * self.SCALE / 36 if bold else 0,
        )

    def text_width(self, text: str, size: float) -> float:
        """Logical width of a text."""
        return ImageFont.load_default(size * self.SCALE).getlength(text) / self.SCALE

    def picture(self, x: float, y: float, size: float, image: Image.Image) -> None:
        """A square picture."""
        side = round(size * self.SCALE)
        fitted = image.convert("RGB").resize((side, side), Image.Resampling.LANCZOS)
        self.image.paste(fitted, (round(x * self.SCALE), round(y * self.SCALE)))

    def frame(self, x: float, y: float, size: float, colour: str) -> None:
        """A frame around a square picture."""
        corners = [v * self.SCALE for v in (x - 3, y - 3, x + size + 3, y + size + 3)]
        self.draw.rounded_rectangle(
            corners, radius=4 * self.SCALE, outline=LIGHT[colour], width=2 * self.SCALE
        )

    def finished(self) -> Image.Image:
        """The smoothed image."""
        return self.image.reduce(self.SMOOTH)


@dataclass(frozen=True)
class Series:
    """A line of a chart, with a dot at each point where there are few; or dots alone."""

    colour: str
    x: list[float]
    y: list[float]
    dots: bool = False
    joined: bool = True
    width: float = 2.0


@dataclass(frozen=True)
class Chart:
    """A small chart with a zero-based or tight value axis, and a shaded span of the other."""

    title: str
    x_label: str
    series: list[Series]
    show_y: Callable[[float], str] = "{:g}".format
    from_zero: bool = True
    span: tuple[float, float, str] | None = None  # from, to, what it is


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers that cover low .. high in about ``count`` steps."""
    span = max(high - low, 1e-9)
    power = 10 ** math.floor(math.log10(span / count))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power * count >= span * 0.999)
    first, last = math.floor(low / step + 1e-6), math.ceil(high / step - 1e-6)
    return [round(i * step, 10) for i in range(first, last + 1)]


def draw_chart(canvas: Canvas, chart: Chart, x: float, y: float, width: float, height: float):
    """Draw the chart into the box at (x, y)."""
    left, right, top, bottom = x + 38, x + width - 10, y + 34, y + height - 36
    xs = [v for s in chart.series for v in s.x] or [0.0]
    ys = [v for s in chart.series for v in s.y if math.isfinite(v)] or [0.0]
    low = 0.0 if chart.from_zero else min(ys)
    marks_y = ticks(low, max(*ys, low + 1e-3) if len(ys) > 1 else low + 1e-3 + max(ys))
    marks_x = [v for v in ticks(0, max(xs), 5)]
    end_x = max(max(xs), 1e-9)

    def at(vx: float, vy: float) -> Point:
        share_y = (vy - marks_y[0]) / (marks_y[-1] - marks_y[0])
        return left + vx / end_x * (right - left), bottom - share_y * (bottom - top)

    canvas.text(x, y + 14, chart.title, "ink", 13, bold=True)
    if chart.span:
        start, stop, what = chart.span
        from_x, to_x = at(start, 0)[0], at(min(stop, end_x), 0)[0]
        canvas.rect(from_x, top, to_x - from_x, bottom - top, "panel")
        canvas.text((from_x + to_x) / 2, top + 14, what, "muted", 11, "middle")
    for value in marks_y:
        level = at(0, value)[1]
        canvas.line([(left, level), (right, level)], "rule", 1)
        canvas.text(left - 7, level + 4, chart.show_y(value), "muted", 11, "end")
    for value in marks_x:
        if value <= end_x * 1.001:
            canvas.text(at(value, 0)[0], bottom + 16, f"{value:g}", "muted", 11, "middle")
    canvas.text(right, bottom + 31, chart.x_label, "muted", 11, "end")
    for series in chart.series:
        points = [at(a, b) for a, b in zip(series.x, series.y) if math.isfinite(b)]
        if series.joined and len(points) > 1:
            canvas.line(points, series.colour, series.width)
        if series.dots:
            for point in points:
                canvas.dot(*point, 3, series.colour)


def draw_bar(canvas: Canvas, x: float, y: float, width: float, height: float, row: dict) -> None:
    """One kind of question: pale to what the picture gives, full to what the tokens give, and a
    tick where another picture's tokens get."""
    canvas.rect(x, y, width, height, "panel")
    canvas.rect(x, y, width * row["visible"], height, "rule")
    canvas.rect(x, y + height / 4, width * row["tokens"], height / 2, "match")
    blind = x + width * row["blind"]
    canvas.line([(blind, y - 1), (blind, y + height + 1)], "control", 1.5)
