"""What an evaluation shows beside its figures, on rank 0: tables, neighbours, the projector.

Shapes: Q queries, P candidates of the pool, E embedding width, N points of the projector,
H, W pixels.
"""

from __future__ import annotations

import itertools
import json
import logging
import textwrap
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from coma_ds.data.records import IMAGE_MARK, Picture, RankingTask, Side
from coma_ds.evaluation import COLUMNS, neighbours, rank_gold
from coma_ds.manifest import write_atomically
from coma_ds.metrics import Monitor

log = logging.getLogger("coma_ds")

NEAREST = 5
SAMPLES, SHOWN = 12, 6  # queries written down for a set, and those of them in its picture
POINTS, THUMB = 400, 40  # candidates in the projector, pixels of their thumbnails
CELL, GAP, QUERY_WIDTH, CAPTION = 96, 12, 226, 20
PAPER, INK, MUTED, PANEL, GOLD = "#ffffff", "#1c1f24", "#767c85", "#f1f2f4", "#0f8a5f"
NEIGHBOURS_FILE = "neighbours.json"


@dataclass(frozen=True)
class Found:
    """A sample query of a set and its nearest candidates; numbers are those of the task."""

    query: int
    text: str  # of the query, without image marks
    rank: int  # candidates that stand before the gold one; 0 is a hit
    gold: int  # pool index
    nearest: list[int]  # pool indices, best first
    scores: list[float]  # cosine similarities


class Displays:
    """Watches one evaluation.  On the way it shows tables and one set; at the end (``final``)
    one set of every group, domain and kind of sides, and the projector of the first that ranks
    pictures.

    Pass :meth:`watch` to ``evaluate``, then call :meth:`finish` with its results.
    """

    def __init__(self, monitor: Monitor, folder: Path, step: int, *, final: bool) -> None:
        self.monitor, self.folder, self.step, self.final = monitor, folder, step, final
        self.found: dict[str, list[Found]] = {}
        self._seen: set[tuple] = set()
        self._projected = False

    def watch(self, task: RankingTask, query_emb_QE: Tensor, pool_emb_PE: Tensor) -> None:
        """Show the task, if it is one of those to be shown."""
        ranks_pictures = _shows(task.pool[0])
        key = (task.group, task.domain, _shows(task.queries[0]), ranks_pictures)
        if key in self._seen or (self._seen and not self.final):
            return
        self._seen.add(key)
        found = find_neighbours(task, query_emb_QE, pool_emb_PE)
        self.found[task.name] = found
        picture = neighbour_grid(task, found[:: max(1, len(found) // SHOWN)][:SHOWN])
        self.monitor.image(f"val neighbours/{task.name}", picture, self.step)
        if self.final and ranks_pictures and not self._projected:
            self._projected = True
            emb_NE, labels, thumbs_N3HW = projector_points(task, pool_emb_PE)
            name = task.name.replace("/", "-")
            self.monitor.projector(name, emb_NE, labels, thumbs_N3HW, self.step)

    def finish(self, results: dict[str, Any]) -> None:
        """Show the tables; at the end also write ``neighbours.json``."""
        for name, header, rows in ranking_tables(results):
            self.monitor.table(f"results/{name}", header, rows, self.step)
        if self.final and self.found:
            tree = {name: [asdict(item) for item in found] for name, found in self.found.items()}
            try:
                write_atomically(self.folder / NEIGHBOURS_FILE, json.dumps(tree) + "\n")
            except OSError as error:
                log.warning("%s cannot be written: %s", NEIGHBOURS_FILE, error)


def sample_queries(name: str, queries: int, count: int = SAMPLES) -> list[int]:
    """Numbers of ``count`` queries of a set, drawn by its name alone: the same for every model."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    return sorted(rng.choice(queries, min(count, queries), replace=False).tolist())


def find_neighbours(task: RankingTask, query_emb_QE: Tensor, pool_emb_PE: Tensor) -> list[Found]:
    """The nearest candidates of the sample queries of a task; embeddings float32 on the CPU."""
    rows = sample_queries(task.name, len(task.queries))
    emb_RE = query_emb_QE[rows]
    candidates = [task.candidates[row] for row in rows]
    rank_R, _ = rank_gold(emb_RE, pool_emb_PE, candidates)
    nearest = neighbours(emb_RE, pool_emb_PE, candidates, NEAREST)
    found = []
    for at, row in enumerate(rows):
        scores = (pool_emb_PE[nearest[at]] @ emb_RE[at]).tolist()
        found.append(
            Found(
                query=row,
                text=words(task.queries[row]),
                rank=int(rank_R[at]),
                gold=int(candidates[at][0]),
                nearest=nearest[at].tolist(),
                scores=[round(score, 4) for score in scores],
            )
        )
    return found


def ranking_tables(results: dict[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    """(name, header, rows): the means, then a table for each meta-task with a row a set."""
    groups = results["groups"]
    tables = []
    if len(results["sets"]) > 1:
        columns = [column for column in COLUMNS if column in groups]
        means = {"P@1": groups}
        means |= {f"width {width}": of for width, of in results.get("widths", {}).items()}
        rows = [[name, *(f"{100 * of[c]:.1f}" for c in columns)] for name, of in means.items()]
        tables.append(("0 means", ["%", *columns], rows))
    by_group: dict[str, list[list[str]]] = {}
    for name, values in results["sets"].items():
        figures = [f"{100 * values[key]:.1f}" for key in ("p@1", "recall@10")]
        row = [name, *figures, f"{100 * values['chance']:.2f}", str(values["ties"])]
        by_group.setdefault(values["group"], []).append(row)
    header = ["set", "P@1 %", "R@10 %", "chance %", "ties"]
    for number, group in enumerate(COLUMNS, 1):  # TensorBoard sorts by name
        if group in by_group:
            tables.append((f"{number} {group}", header, by_group[group]))
    return tables


def curves(
    results: dict[str, Any], *, means: bool = True
) -> tuple[dict[str, float], dict[str, str]]:
    """The figures of an evaluation by name, and under which tag TensorBoard shows them.

    The means come first there, then a group for each meta-task, or for each way of answering.
    Without ``means`` they have no tag: means over other sets are no points of the same curve.
    """
    values: dict[str, float] = {}
    tags: dict[str, str] = {}
    for name, row in results.get("sets", {}).items():
        values[name] = row["p@1"]
        tags[name] = f"val {row['group']}/{name}"
    for name, value in results.get("groups", {}).items():
        values[f"group/{name}"] = value
        if means:
            tags[f"group/{name}"] = f"val/{name}"
    for width, groups in results.get("widths", {}).items():
        values[f"width/{width}"] = groups["All"]
        if means:
            tags[f"width/{width}"] = f"val width/{width}"
    for kind, row in results.get("bottleneck", {}).items():
        for way, value in row.items():
            values[f"{kind}/{way}"] = value
            if way != "questions":
                tags[f"{kind}/{way}"] = f"val {way}/{kind}"
    return values, tags


def result_tags(tags: dict[str, str]) -> list[str]:
    """Those that stand for the run beside others: the means, or what the tokens alone answer."""
    means = [tag for tag in tags.values() if tag.startswith("val/")]
    return means or [
        tag for tag in tags.values() if tag.startswith(("val tokens/", "val visible/"))
    ]


def bottleneck_table(
    table: dict[str, dict[str, float]],
) -> tuple[list[str], list[list[str]]]:
    """(header, rows) of the bottleneck table in percent, a row for each kind of question."""
    ways = [w for w in ("tokens", "visible", "blind") if any(w in row for row in table.values())]
    rows = [
        [kind, *(f"{100 * row[way]:.1f}" for way in ways), str(row["questions"])]
        for kind, row in table.items()
    ]
    return ["question", *(f"{way} %" for way in ways), "questions"], rows


def neighbour_grid(task: RankingTask, found: Sequence[Found]) -> np.ndarray:
    """A row for each query: itself, its nearest candidates, the gold one framed; uint8 [H, W, 3].

    Where the gold one is not among them it stands at the end of the row, with its place.
    """
    pitch, height = CELL + GAP, CELL + CAPTION + GAP
    width = QUERY_WIDTH + (NEAREST + 1) * pitch + 2 * GAP
    sheet = Image.new("RGB", (width, GAP + height * len(found)), PAPER)
    draw = ImageDraw.Draw(sheet)
    for at, item in enumerate(found):
        top = GAP + at * height
        _paste_query(sheet, task.queries[item.query], (GAP, top))
        for column, place in enumerate(item.nearest):
            corner = (GAP + QUERY_WIDTH + column * pitch, top)
            caption = f"{item.scores[column]:.2f}"
            _paste_candidate(sheet, task.pool[place], corner, caption, place == item.gold)
        if item.gold not in item.nearest:
            corner = (2 * GAP + QUERY_WIDTH + NEAREST * pitch, top)
            caption = f"gold, {item.rank + 1} of {len(task.candidates[item.query])}"
            _paste_candidate(sheet, task.pool[item.gold], corner, caption, True)
        if at:
            draw.line([(GAP, top - GAP // 2), (width - GAP, top - GAP // 2)], fill=PANEL)
    return np.asarray(sheet)


def projector_points(
    task: RankingTask, pool_emb_PE: Tensor, limit: int = POINTS
) -> tuple[np.ndarray, list[str], np.ndarray]:
    """Embeddings float32 [N, E], labels, and thumbnails float32 [N, 3, H, W] in 0..1.

    The points are at most ``limit`` gold candidates, spread over the set; a label is the text of
    the query that asks for it, without what all queries begin with.
    """
    label: dict[int, str] = {}
    for number, places in enumerate(task.candidates):
        label.setdefault(int(places[0]), words(task.queries[number]))
    places = list(label)
    spread = np.linspace(0, len(places) - 1, min(limit, len(places))).astype(int)
    places = [places[i] for i in spread]
    own = without_shared_start([label[place] for place in places])
    labels = []
    for place, text in zip(places, own):
        text = text or words(task.pool[place]) or task.pool[place].images[0].name
        labels.append(" ".join(text.split()))
    thumbs = [np.asarray(_fitted(task.pool[p].images[0], THUMB)) for p in places]
    thumbs_N3HW = np.stack(thumbs).transpose(0, 3, 1, 2).astype(np.float32) / 255
    return pool_emb_PE[places].numpy(), labels, thumbs_N3HW


def without_shared_start(texts: Sequence[str]) -> list[str]:
    """The texts without the words that all of them begin with ("Find a picture of:")."""
    split = [text.split() for text in texts]
    shared = 0
    if len(split) > 1:
        same = (len(set(column)) == 1 for column in zip(*split))
        shared = sum(1 for _ in itertools.takewhile(bool, same))
    return [" ".join(parts[shared:]) for parts in split]


def words(side: Side) -> str:
    """The text of a side without image marks, on one line."""
    return " ".join(IMAGE_MARK.sub(" ", side.text).split())


def _shows(side: Side) -> bool:
    return bool(side.images)


def _fitted(picture: Picture, size: int) -> Image.Image:
    """The picture within ``size`` x ``size``, centred on white."""
    image = picture.open().convert("RGB")
    scale = size / max(image.size)
    shape = tuple(max(1, round(side * scale)) for side in image.size)
    square = Image.new("RGB", (size, size), PAPER)
    square.paste(
        image.resize(shape, Image.Resampling.LANCZOS), tuple((size - s) // 2 for s in shape)
    )
    return square


def _write(
    sheet: Image.Image, corner: tuple[int, int], text: str, width: int, lines: int, colour: str
) -> None:
    font = ImageFont.load_default(15)
    wrapped = textwrap.wrap(text, max(8, int(width / 7.6)), max_lines=lines, placeholder=" ...")
    block = "\n".join(wrapped)
    ImageDraw.Draw(sheet).multiline_text(corner, block, fill=colour, font=font, spacing=3)


def _paste_query(sheet: Image.Image, side: Side, corner: tuple[int, int]) -> None:
    x, y = corner
    room = QUERY_WIDTH - GAP
    if side.images:
        sheet.paste(_fitted(side.images[0], CELL), corner)
        x, room = x + CELL + GAP // 2, room - CELL - GAP // 2
    _write(sheet, (x, y + 4), words(side), room, 6, INK)


def _paste_candidate(
    sheet: Image.Image, side: Side, corner: tuple[int, int], caption: str, gold: bool
) -> None:
    x, y = corner
    draw = ImageDraw.Draw(sheet)
    if side.images:
        sheet.paste(_fitted(side.images[0], CELL), corner)
    else:
        draw.rectangle((x, y, x + CELL - 1, y + CELL - 1), fill=PANEL)
        _write(sheet, (x + 6, y + 6), words(side), CELL - 10, 5, INK)
    if gold:
        draw.rectangle((x - 3, y - 3, x + CELL + 2, y + CELL + 2), outline=GOLD, width=3)
    font = ImageFont.load_default(13)
    draw.text((x, y + CELL + 4), caption, fill=GOLD if gold else MUTED, font=font)
