"""What the demo found, read from its folder: tables, curves, neighbours, and what they say."""

from __future__ import annotations

import bisect
import json
import math
import os
import platform
from dataclasses import dataclass
from pathlib import Path

import yaml
from PIL import Image
from safetensors import safe_open

from coma_ds.data.mmeb import mmeb_eval
from coma_ds.data.records import RankingTask
from coma_ds.displays import NEIGHBOURS_FILE, Found, without_shared_start
from coma_ds.evaluation import COLUMNS, group_means

MARK = "demo.json"
MEASURED, HELD_OUT = "name_t2i/seen", "name_t2i/unseen"
PIXEL_SETS = ("i2i/seen", "i2i/unseen")
TITLES = {
    "untrained": "untrained base",
    "control": "match only (control)",
    "match": "compress + match",
}
CAVEAT = "One seed: a demonstration, not evidence."


@dataclass(frozen=True)
class Curve:
    """Values at steps, and at seconds of training of the whole arm."""

    steps: list[int]
    seconds: list[float]
    values: list[float]

    def __add__(self, other: Curve) -> Curve:
        return Curve(
            self.steps + other.steps, self.seconds + other.seconds, self.values + other.values
        )


@dataclass(frozen=True)
class Query:
    """A sample query: its gold picture, and by arm the place of the gold one and the nearest."""

    text: str
    gold: Image.Image
    ranks: dict[str, int]
    nearest: dict[str, list[tuple[Image.Image, bool]]]


@dataclass(frozen=True)
class Findings:
    """All that the report shows.  Figures in 0..1; ``None`` where a set was not evaluated."""

    length: str
    parameters: int
    tokens: int
    headline: dict[str, list[float | None]]  # by row, a value for each of ``columns``
    columns: list[str]
    seconds: dict[str, float | None]  # training of the arm, stage 1 included
    steps: dict[str, int]
    candidates: int
    queries_asked: int
    pixels: dict[str, list[float | None]]  # image to image by row, a value for each PIXEL_SETS
    sets: dict[str, dict[str, dict]]  # by arm, the sets of results.json
    precision: dict[str, Curve]  # of MEASURED, by arm
    losses: dict[str, Curve]  # by run
    bottleneck: dict[str, dict[str, float]]  # by kind, with "base" beside the ways
    queries: list[Query]
    runs: list[list[str]]
    remarks: list[str]
    machine: list[str]
    tensorboard: str


def collect(folder: Path) -> Findings:
    """Read a finished demo.

    Raises ``ValueError`` naming a file that is missing.
    """
    mark = _json(folder / MARK)
    results = {p["name"]: _json(folder / p["name"] / "results.json") for p in mark["phases"]}
    sets = {arm: results[arm]["sets"] for arm in TITLES}
    compress_seconds = results["compress"]["training_seconds"]
    before = {"match": compress_seconds}
    seconds = {a: results[a]["training_seconds"] + before.get(a, 0.0) for a in TITLES}
    chances = {name: values | {"p@1": values["chance"]} for name, values in sets["match"].items()}
    columns = [MEASURED, HELD_OUT, *COLUMNS]
    headline = {"chance": _row(chances, columns)}
    # Means over other sets could not be compared.
    groups = {arm: columns if sets[arm].keys() == sets["match"].keys() else () for arm in TITLES}
    headline |= {TITLES[arm]: _row(sets[arm], columns, groups[arm]) for arm in TITLES}
    lines = {name: _metrics(folder / name) for name in results}
    precision = {
        arm: _curve(lines[arm], "eval", MEASURED, before.get(arm, 0.0))
        for arm in ("control", "match")
    }
    start = Curve([0], [0.0], [sets["untrained"][MEASURED]["p@1"]])  # of the control
    precision["control"] = start + precision["control"]
    losses = {n: _curve(lines[n], "train", "loss", 0.0) for n in ("compress", "control", "match")}
    table = results["compress"]["bottleneck"]
    for kind, row in table.items():
        row["base"] = results["base"]["bottleneck"].get(kind, {}).get("visible")
    root = folder / "evaluation_sets"
    task = mmeb_eval(str(root), root / "images", MEASURED)
    measured = sets["match"][MEASURED]
    pixels = {"raw pixels": [sets["match"].get(name, {}).get("pixel_p@1") for name in PIXEL_SETS]}
    pixels |= {TITLES[arm]: _row(sets[arm], PIXEL_SETS) for arm in TITLES}
    return Findings(
        length=mark["length"],
        parameters=_parameters(folder / "match" / "model"),
        tokens=_json(folder / "match" / "model" / "coma_ds.json")["compression_tokens"],
        headline=headline,
        columns=columns,
        seconds={"chance": None, **{TITLES[arm]: seconds[arm] for arm in TITLES}},
        steps={name: values["step"] for name, values in results.items()},
        candidates=int(measured["candidates"]),
        queries_asked=measured["queries"],
        pixels=pixels,
        sets=sets,
        precision=precision,
        losses=losses,
        bottleneck=table,
        queries=_queries(folder, task),
        runs=[_run_line(folder, phase, results[phase["name"]]) for phase in mark["phases"]],
        remarks=_remarks(sets, seconds, compress_seconds, precision, table),
        machine=_machine(folder),
        tensorboard=f"tensorboard --logdir {folder} --host 127.0.0.1",
    )


def terminal_table(findings: Findings) -> str:
    """The headline for a terminal, in percent."""
    shown = [0, 1, len(findings.columns) - 1]
    lines = [["P@1 in %", *(findings.columns[i] for i in shown), "training"]]
    for name, row in findings.headline.items():
        seconds = findings.seconds[name]
        took = "-" if seconds is None else f"{seconds:.0f} s"
        lines.append([name, *(percent(row[i]) for i in shown), took])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = [
        "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:]))])
        for line in lines
    ]
    return "\n".join([*text, CAVEAT])


def percent(value: float | None) -> str:
    """A share in percent: one decimal, two below one percent."""
    if value is None:
        return "-"
    return f"{100 * value:.2f}" if 0 < value < 0.00995 else f"{100 * value:.1f}"


def _json(path: Path) -> dict:
    if not path.is_file():
        raise ValueError(f"{path} is missing: run the demo to its end first")
    return json.loads(path.read_text())


def _metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def _row(sets: dict[str, dict], columns, groups=COLUMNS) -> list[float | None]:
    means = {name: mean for name, mean in group_means(sets).items() if name in groups}
    return [sets[c]["p@1"] if c in sets else means.get(c) for c in columns]


def _curve(lines: list[dict], group: str, name: str, before: float) -> Curve:
    points = [line for line in lines if line["group"] == group and name in line]
    return Curve(
        [line["step"] for line in points],
        [before + line["training_seconds"] for line in points],
        [float(line[name]) for line in points],
    )


def _queries(folder: Path, task: RankingTask) -> list[Query]:
    arms = ("control", "match")
    found = {
        arm: [Found(**x) for x in _json(folder / arm / NEIGHBOURS_FILE)[task.name]] for arm in arms
    }
    texts = without_shared_start([item.text for item in found["match"]])
    queries = []
    for text, *pair in zip(texts, *(found[arm] for arm in arms)):
        by_arm = dict(zip(arms, pair))
        queries.append(
            Query(
                text=text,
                gold=task.pool[pair[0].gold].images[0].open(),
                ranks={arm: item.rank for arm, item in by_arm.items()},
                nearest={
                    arm: [(task.pool[p].images[0].open(), p == item.gold) for p in item.nearest]
                    for arm, item in by_arm.items()
                },
            )
        )
    return queries


def _run_line(folder: Path, phase: dict, results: dict) -> list[str]:
    """What was run: name, recipe, start, steps, batch, rate, what is trained, seconds."""
    config = yaml.safe_load((folder / phase["name"] / "config.yaml").read_text())
    optim, model = config["optim"], config["model"]
    start = Path(config["init_from"]).name if config["init_from"] else model["weights"] + " base"
    steps = results["step"]
    rate = f"{optim['lr']:g} {optim['schedule']}, {optim['kind']}" if steps else "-"
    return [
        phase["name"],
        phase["recipe"],
        start.replace("pretrained ", ""),
        f"{steps} x {optim['batch_size']}" if steps else "0",
        rate,
        f"{config['deepspeed']}, {config['precision']}",
        f"{results['training_seconds']:.0f} s",
        f"{phase['seconds']:.0f} s",
    ]


def _parameters(model: Path) -> int:
    """Elements of all the weights of a model folder."""
    total = 0
    for file in model.glob("*.safetensors"):
        with safe_open(file, "numpy") as weights:
            shapes = [weights.get_slice(name).get_shape() for name in weights.keys()]
        total += sum(math.prod(shape) for shape in shapes)
    return total


def _machine(folder: Path) -> list[str]:
    """One line of the machine, one of the versions."""
    processor = platform.processor() or platform.machine()
    names = Path("/proc/cpuinfo")
    if names.is_file():
        models = [x for x in names.read_text().splitlines() if x.startswith("model name")]
        processor = models[0].partition(":")[2].strip() if models else processor
    versions = (folder / "match" / "versions.txt").read_text().split("\n")
    found = [line for line in versions if line and not line.endswith(" -")]
    return [f"{os.cpu_count()} cores, {processor}", ", ".join(found)]


def _remarks(
    sets: dict, seconds: dict, compress_seconds: float, precision: dict[str, Curve], table: dict
) -> list[str]:
    """What the figures say, and at equal what."""
    ours, control = (sets[arm][MEASURED]["p@1"] for arm in ("match", "control"))
    error = math.sqrt(max(ours * (1 - ours), 1e-9) / sets["match"][MEASURED]["queries"])
    places = max(len(percent(share).partition(".")[2]) for share in (ours, control))
    ours_curve, limit = precision["match"], seconds["control"]
    remarks = [
        f"At equal contrastive steps ({precision['control'].steps[-1]}), {MEASURED} P@1 is "
        f"{percent(ours)} % with compress and {percent(control)} % without, a difference of "
        f"{100 * (ours - control):+.{places}f} points; one standard error of the first is "
        f"{100 * error:.{places}f}."
    ]
    at = bisect.bisect_right(ours_curve.seconds, limit) - 1
    if at >= 0:
        remarks.append(
            f"At equal training time (the {limit:.0f} s of the control) compress + match had "
            f"{percent(ours_curve.values[at])} % after {ours_curve.steps[at]} match steps, in the "
            f"middle of its schedule, against {percent(control)} %."
        )
    else:
        remarks.append(
            f"At equal training time (the {limit:.0f} s of the control) compress + match, which "
            f"spends {compress_seconds:.0f} s on stage 1, had not been evaluated yet."
        )
    half = [k for k, row in table.items() if row["base"] and row["tokens"] >= row["base"] / 2]
    asked = [kind for kind, row in table.items() if row["base"]]
    unknown = [kind for kind in table if kind not in asked]
    if asked:
        remarks.append(
            f"Through the tokens alone at least half of what the base answers with the picture in "
            f"sight is answered right for {len(half)} of {len(asked)} kinds of question."
            + "".join(
                f" Of {kind.replace('_', ' ')} the base itself answers none." for kind in unknown
            )
        )
    return remarks
