"""The demo: compress, then match, beside the same contrastive steps without stage 1.

``python -m coma_ds.commands.demo [--short | --long] [--output runs/demo]`` trains and evaluates
every arm through the ``deepspeed`` launcher on two ranks, then writes ``report.html`` and
``report.png`` there.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml

import coma_ds
from coma_ds.commands.demo_findings import MARK, MEASURED, collect, terminal_table
from coma_ds.commands.demo_report import write_report

RANKS = 2
QUESTIONS = 150  # of each kind, for the bottleneck table and for the base
STEP_LINE = re.compile(r"^step (\d+)/(\d+) +(.*)")
SET_LINE = re.compile(r"^(\w+/\w+): P@1 ")
NOISE = re.compile(r"^\s*$|^\[\d{4}-\d\d-\d\d |^\[rank\d|^W\d{4} ")
# Of the base before any training, which needs no more than where the curves start.
START_SETS = f"eval.sets=[{MEASURED},name_t2i/unseen,i2i/seen,i2i/unseen]"
EVALUATED = "eval.sets=[group_cls/unseen,vqa_yesno/unseen,name_t2i/seen,name_t2i/unseen,i2i/unseen,"


@dataclass(frozen=True)
class Length:
    """What a form of the demo changes in the recipes: of every run, of stage 1, of stage 2."""

    both: tuple[str, ...] = ()
    compress: tuple[str, ...] = ()
    match: tuple[str, ...] = ()
    questions: int = QUESTIONS


MIXED = "data.sources=[name_t2i,i2t,tags_t2i,i2i]"  # more tasks, and the roles swapped

LENGTHS = {
    "standard": Length(),
    "long": Length(
        compress=("optim.steps=400",),
        match=("optim.steps=800", "eval.every=100", MIXED, "data.sub_batch=128"),
    ),
    "short": Length(
        both=("optim.steps=2", "optim.batch_size=32", "chunk.samples=8", "logging.every=1"),
        match=("eval.every=1", MIXED, "data.sub_batch=16", EVALUATED + "grounding/unseen]"),
        questions=4,
    ),
}


@dataclass(frozen=True)
class Phase:
    """One run of the demo: its folder under the output, its recipe and what differs from it."""

    name: str
    recipe: str
    says: str
    overrides: tuple[str, ...]


def plan(length: str, folder: Path, weights: str) -> list[Phase]:
    """The runs of a form of the demo, in order; ``weights`` is ``pretrained`` or ``random``."""
    form = LENGTHS[length]
    start = (f"model.weights={weights}",)
    untouched = ("optim.steps=0",)
    asked = (f"eval.bottleneck_questions={form.questions}",)
    compress = json.dumps(str(folder / "compress"))
    phases = [
        Phase(
            "base",
            "demo-base",
            "the base answers with the picture in sight",
            (*start, "precision=auto", *form.both, *asked, *untouched),
        ),
        Phase(
            "untrained",
            "demo-control",
            "the base retrieves, before any training",
            (*start, *form.both, *form.match, *untouched, START_SETS),
        ),
        Phase(
            "compress",
            "demo-compress",
            "stage 1: answers through the compression tokens alone",
            (*start, *form.both, *form.compress, *asked),
        ),
        Phase(
            "match",
            "demo-match",
            "stage 2, from stage 1",
            (f"init_from={compress}", *form.both, *form.match),
        ),
        Phase(
            "control",
            "demo-control",
            "stage 2 alone, from the base, for the same steps",
            (*start, *form.both, *form.match),
        ),
    ]
    always = ("checkpoint.resume=none",)
    return [
        Phase(
            p.name,
            p.recipe,
            p.says,
            (f"output={json.dumps(str(folder / p.name))}", *always, *p.overrides),
        )
        for p in phases
    ]


def clear(folder: Path, phases: list[Phase]) -> None:
    """Remove what an earlier demo left.

    Raises ``ValueError`` for a folder in its place that is not a run of the same recipe, or that
    holds checkpoints, which the demo does not write.
    """
    for phase in phases:
        run = folder / phase.name
        if not run.is_dir() or not any(run.iterdir()):
            continue
        config = run / "config.yaml"
        recipe = yaml.safe_load(config.read_text()).get("recipe") if config.is_file() else None
        if recipe != phase.recipe or (run / "checkpoints").exists():
            raise ValueError(
                f"{run} is not a {phase.recipe} run of the demo: move it away, or give another "
                "--output"
            )
    for name in (*(phase.name for phase in phases), "evaluation_sets", "logs"):
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in (MARK, "report.html", "report.png"):
        (folder / name).unlink(missing_ok=True)


def launch_command(phase: Phase) -> list[str]:
    """The ``deepspeed`` launcher of this Python, on a free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    gpus = torch.cuda.device_count()
    world = ["--num_gpus", str(min(RANKS, gpus))] if gpus else ["--num_accelerators", str(RANKS)]
    script = Path(coma_ds.__file__).with_name("train.py")
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", *world, "--master_port"]
    return [*launcher, str(port), str(script), "--recipe", phase.recipe, *phase.overrides]


class Console:
    """What the demo says: a line that is written over on a terminal, else one now and then."""

    def __init__(self) -> None:
        self.live = sys.stdout.isatty()
        self.name, self.began, self.quarter = "", 0.0, 0

    def begin(self, phase: Phase) -> None:
        self.name, self.began, self.quarter = phase.name, 0.0, 0
        self.status(phase.says) if self.live else self.say(f"{phase.name:<11}{phase.says}")

    def say(self, text: str) -> None:
        """A line that stays."""
        sys.stdout.write(f"\r\x1b[2K{text}\n" if self.live else f"{text}\n")
        sys.stdout.flush()

    def status(self, text: str) -> None:
        """The line that is written over."""
        if self.live:
            width = shutil.get_terminal_size().columns - 12
            sys.stdout.write(f"\r\x1b[2K{self.name:<11}{text[:width]}")
            sys.stdout.flush()

    def hear(self, line: str) -> None:
        """A line of the run."""
        if found := SET_LINE.match(line):
            self.status(f"evaluating, {found[1]}")
        if not (found := STEP_LINE.match(line)):
            return
        done, steps = int(found[1]), int(found[2])
        self.began = self.began or time.monotonic()
        left = (time.monotonic() - self.began) / max(1, done - 1) * (steps - done)
        wait = f"  {clock(left)} left" if done > 1 and left else ""
        self.status(f"step {done}/{steps}  {found[3]}{wait}")
        if not self.live and 4 * done // steps > self.quarter:
            self.quarter = 4 * done // steps
            self.say(f"{'':<11}step {done}/{steps}  {found[3]}")


def clock(seconds: float) -> str:
    """Minutes and seconds."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def run_phase(phase: Phase, folder: Path, console: Console) -> float:
    """Run it to its end; the seconds it took.

    Raises ``SystemExit`` with the code of a run that failed, its last message being said.
    """
    console.begin(phase)
    began = time.monotonic()
    log_file = folder / "logs" / f"{phase.name}.txt"
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    if not torch.cuda.device_count():
        environment.setdefault("DS_ACCELERATOR", "cpu")
    last = ""
    with (
        log_file.open("w") as record,
        subprocess.Popen(
            launch_command(phase),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=environment,
            start_new_session=True,  # a group of its own, to end the ranks with
        ) as child,
    ):
        try:
            for line in child.stdout:
                record.write(line)
                record.flush()
                if line.startswith("error") or not (NOISE.match(line) or last.startswith("error")):
                    last = line.strip()
                console.hear(line)
        except BaseException:
            os.killpg(child.pid, signal.SIGTERM)
            raise
    code = child.returncode if child.returncode >= 0 else 128 - child.returncode
    if code == 0 and not (folder / phase.name / "results.json").is_file():
        code = 1  # the launcher of a run that a signal ended says 0
    if code:
        console.say(f"{phase.name} failed (code {code}): {last}\nall it said: {log_file}")
        raise SystemExit(code)
    return time.monotonic() - began


def main(argv: list[str] | None = None) -> None:
    """Run the demo and write its report."""
    parser = argparse.ArgumentParser(prog="demo", description=__doc__.splitlines()[0])
    form = parser.add_mutually_exclusive_group()
    for name, what in (("short", "seconds of training, a test"), ("long", "up to an hour")):
        form.add_argument(f"--{name}", dest="length", action="store_const", const=name, help=what)
    parser.add_argument("--output", type=Path, default=Path("runs/demo"))
    parser.add_argument(
        "--weights",
        choices=("pretrained", "random"),
        default="pretrained",
        help="random: do not start from the shipped base",
    )
    args = parser.parse_args(argv)
    length, folder = args.length or "standard", args.output
    phases = plan(length, folder, args.weights)
    clear(folder, phases)
    (folder / "logs").mkdir(parents=True)
    console, began, record = Console(), time.monotonic(), []
    for phase in phases:
        seconds = run_phase(phase, folder, console)
        results = json.loads((folder / phase.name / "results.json").read_text())
        trained = f"{results['training_seconds']:.0f} s of training, " if results["step"] else ""
        console.say(f"{phase.name:<11}{results['step']} steps, {trained}{seconds:.0f} s in all")
        record.append({"name": phase.name, "recipe": phase.recipe, "seconds": round(seconds, 1)})
    mark = {"length": length, "weights": args.weights, "phases": record}
    (folder / MARK).write_text(json.dumps(mark, indent=1) + "\n")
    began_report = time.monotonic()
    findings = collect(folder)
    paths = write_report(findings, folder)
    now = time.monotonic()
    console.say(f"{'report':<11}{now - began_report:.0f} s\n\n{terminal_table(findings)}\n")
    console.say(f"{clock(now - began)} in all; the report: {' and '.join(map(str, paths))}")
    console.say(f"the curves: {findings.tensorboard}")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        main()
    except ValueError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
