"""Kill a run again and again, and see that it ends as if nothing had happened.

    python -m tests.faults.soak --kills 100 --steps 240 --output runs/soak

Two ranks under torchrun.  Each start is ended by SIGKILL to all of its processes at a random
moment: while it loads, trains, saves or publishes.  After the last kill it runs to its end, which
is compared bit by bit with that of a run that nobody touched; so is every loss that a start wrote
before it was killed.  ``soak.json`` says what was done, ``soak.png`` shows the curve.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from coma_ds.commands.demo_figure import Chart, PillowCanvas, Series, draw_chart
from coma_ds.versions import package_versions
from tests.distributed.harness import free_port
from tests.distributed.launched import ROOT

ALWAYS = [
    "--recipe", "demo-compress", "optim.batch_size=8", "chunk.samples=3", "checkpoint.every=2",
    "model.adapter=lora", "eval.at_end=false", "eval.every=0", "logging.every=1",
    "logging.progress=false", "data.workers=1", "data.length=20000",
]  # fmt: skip
MEASURED = ("step", "loss", "answer_accuracy", "lr", "grad_norm")
STEPS = 5  # new steps before a kill, at most
LOADING, SAVING = 0.15, 0.25  # shares of kills while it loads, and just after a save has begun
WINDOW = 0.15  # seconds that a save may take; halved when a kill comes after it
PATIENCE = 600.0  # seconds for the last, undisturbed part


def start(folder: Path, steps: int) -> subprocess.Popen:
    """Two ranks that train into ``folder``, in a process group of their own."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--master-port", str(free_port()), str(ROOT / "coma_ds" / "train.py")]
    command += [*ALWAYS, f"optim.steps={steps}", f"output={folder}"]
    environment = dict(os.environ, DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1")
    with (folder.parent / f"{folder.name}.log").open("ab") as log:
        return subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=log,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip


def lines(folder: Path) -> list[dict]:
    """The training lines of metrics.jsonl; one that is being written is left out."""
    found = []
    path = folder / "metrics.jsonl"
    for text in path.read_text().splitlines() if path.is_file() else []:
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if line["group"] == "train":
            found.append(line)
    return found


def descendants(process: int) -> Iterator[int]:
    """The processes below one: torchrun starts its ranks in sessions of their own."""
    for children in Path(f"/proc/{process}/task").glob("*/children"):
        for child in children.read_text().split():
            yield from descendants(int(child))
            yield int(child)


def kill(job: subprocess.Popen) -> None:
    """SIGKILL to every process of the job, and wait until they are gone."""
    victims = [*descendants(job.pid), job.pid]
    for victim in victims:
        try:
            os.kill(victim, signal.SIGKILL)
        except ProcessLookupError:
            pass
    job.wait()
    until = time.monotonic() + 10
    while any(Path(f"/proc/{v}/exe").exists() for v in victims) and time.monotonic() < until:
        time.sleep(0.02)


def run_whole(folder: Path, steps: int) -> float:
    """Train undisturbed; the seconds from the start to the first step."""
    began, job, first = time.monotonic(), start(folder, steps), 0.0
    while job.poll() is None:
        if not first and lines(folder):
            first = time.monotonic() - began
        time.sleep(0.1)
    if job.returncode:
        raise RuntimeError(f"the undisturbed run failed: {folder}.log")
    return first or time.monotonic() - began


def rows(folder: Path) -> list[tuple]:
    """What each step measured that does not depend on the clock."""
    return [tuple(line[name] for name in MEASURED) for line in lines(folder)]


def run_killed(folder: Path, steps: int, kills: int, first: float, seed: int) -> list[dict]:
    """Start and kill until ``kills`` are done, then let it end; a line for each kill."""
    chance, done, window = random.Random(seed), [], WINDOW
    undisturbed = set(rows(folder.with_name("whole")))
    while len(done) < kills:
        before, job = len(lines(folder)), start(folder, steps)
        room = (steps - before) // (kills - len(done))  # so that the last kill comes before the end
        target = before + chance.randint(1, max(1, min(STEPS, 2 * room - 1)))
        delay, kind = chance.random(), chance.random()
        saving = LOADING <= kind < LOADING + SAVING or not any(k["in_a_save"] for k in done)
        if saving:
            delay *= window
        elif kind < LOADING:
            target, delay = before, first * delay
        while len(lines(folder)) < target and job.poll() is None:
            time.sleep(0.01)
        while saving and job.poll() is None and not list(folder.glob("checkpoints/staging-*")):
            time.sleep(0.001)
        until = time.monotonic() + delay
        while time.monotonic() < until and job.poll() is None:
            time.sleep(0.005)
        if job.poll() is not None:
            if job.returncode:
                raise RuntimeError(f"a start failed by itself: {folder}.log")
            return done  # it ended before the kill
        kill(job)
        found = rows(folder)
        saves = folder / "checkpoints"
        done.append({
            "new_steps": len(found) - before,
            "step": found[-1][0] if found else 0,
            "loss": found[-1][1] if found else None,
            "other_steps": [row[0] for row in found if row not in undisturbed],
            "published": sorted(int(p.name[5:]) for p in saves.glob("step-*")),
            "in_a_save": bool(list(saves.glob("staging-*"))),
        })  # fmt: skip
        if saving and not done[-1]["in_a_save"]:
            window /= 2
        say(f"kill {len(done)} of {kills}, after step {done[-1]['step']} of {steps}")
    job = start(folder, steps)
    if job.wait(PATIENCE):
        raise RuntimeError(f"the last start failed: {folder}.log")
    return done


def tensors(value, name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """All tensors of a nested state, by their place."""
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from tensors(inner, f"{name}/{key}")
    elif isinstance(value, list | tuple):
        for place, inner in enumerate(value):
            yield from tensors(inner, f"{name}/{place}")


def differences(one: Path, two: Path, steps: int) -> list[str]:
    """Where two finished runs differ: losses, steps written twice, states, exported weights."""
    found = []
    curves = [rows(run) for run in (one, two)]
    if curves[0] != curves[1]:
        found.append("the lines of metrics.jsonl differ")
    if [row[0] for row in curves[1]] != [*range(1, steps + 1)]:
        found.append("not every step stands in metrics.jsonl once")
    shards = [run / "checkpoints" / f"step-{steps:08d}" for run in (one, two)]
    files = sorted(p.name for p in shards[0].glob("*.pt"))
    if not files or files != sorted(p.name for p in shards[1].glob("*.pt")):
        found.append("the shards are others")
    for name in files:
        states = [dict(tensors(torch.load(s / name, weights_only=False))) for s in shards]
        if states[0].keys() != states[1].keys():
            found.append(f"{name} holds other tensors")
            continue
        unequal = [key for key, t in states[0].items() if not torch.equal(t, states[1][key])]
        found += [f"{name}: {key} differs" for key in unequal]
    weights = [(run / "model" / "model.safetensors").read_bytes() for run in (one, two)]
    if weights[0] != weights[1]:
        found.append("the exported weights differ")
    return found


def soak(folder: Path, steps: int, kills: int, seed: int = 0) -> dict:
    """The whole of it; what was done, and ``differences``, which should be empty."""
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        raise SystemExit(f"{folder} is there: remove it, or give another --output") from None
    first = run_whole(folder / "whole", steps)
    done = run_killed(folder / "killed", steps, kills, first, seed)
    found = differences(folder / "whole", folder / "killed", steps)
    found += [f"kill {n}: other losses before it" for n, k in enumerate(done) if k["other_steps"]]
    report = {
        "date": time.strftime("%Y-%m-%d"),
        "versions": package_versions(),
        "seed": seed,
        "steps": steps,
        "kills": len(done),
        "kills_in_a_save": sum(k["in_a_save"] for k in done),
        "kills_before_a_new_step": sum(k["new_steps"] <= 0 for k in done),
        "differences": found,
        "each": done,
    }
    text = json.dumps(report | {"each": 0}, indent=1)
    each = ",\n  ".join(map(json.dumps, done))
    (folder / "soak.json").write_text(text.replace('"each": 0', f'"each": [\n  {each}\n ]') + "\n")
    draw(folder, report)
    return report


def draw(folder: Path, report: dict) -> None:
    """The losses of the killed run on those of the other, a dot where each start was killed."""
    whole, killed = (rows(folder / name) for name in ("whole", "killed"))
    kills = [kill for kill in report["each"] if kill["loss"] is not None]
    step, loss = [[kill[name] for kill in kills] for name in ("step", "loss")]
    series = [
        Series("rule", [row[0] for row in whole], [row[1] for row in whole], width=10),
        Series("match", [row[0] for row in killed], [row[1] for row in killed]),
        Series("control", step, loss, dots=True, joined=False),
    ]
    title = f"Loss of a run killed {report['kills']} times, on that of one left alone (wide)"
    canvas = PillowCanvas(900, 360)
    chart = Chart(title, "step; a dot: SIGKILL to every process", series, from_zero=False)
    draw_chart(canvas, chart, 12, 10, 876, 340)
    canvas.finished().quantize(64).save(folder / "soak.png", optimize=True)


def say(text: str) -> None:
    """A line at once."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("runs/soak"))
    args = parser.parse_args()
    report = soak(args.output.absolute(), args.steps, args.kills, args.seed)
    say(
        f"{report['kills']} kills ({report['kills_in_a_save']} in a save, "
        f"{report['kills_before_a_new_step']} before a new step) over {args.steps} steps: "
        f"{report['differences'] or 'the end is equal bit by bit'}"
    )
    return bool(report["differences"])


if __name__ == "__main__":
    sys.exit(main())
