"""One command: right on this card, then how fast, beside the card's own limits and others.

    python -m coma_ds.kernels.bench [--only info_nce|attention_pool] [--quick] [--rivals FOLDER]

Under 8 minutes on one GPU.  Without a GPU it compares the chunked reference with the dense form.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import sys
import time
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path

import torch

from coma_ds.kernels.bench import cpu, gate, info_nce, pooling, rivals, tune
from coma_ds.kernels.bench.measure import Budget

OPERATIONS = ("info_nce", "attention_pool")
RESULTS = Path(__file__).parent / "results"
SECONDS = 420  # of all comparisons; the gate and the start-up come on top
COLUMNS = ("op", "impl", "N", "M", "D", "K", "ms", "%", "MiB", "error", "options")


def say(line: str) -> None:
    """A line to stdout, at once."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m coma_ds.kernels.bench", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--only", choices=OPERATIONS, help="one of the two")
    parser.add_argument("--quick", action="store_true", help="a few shapes, about a minute")
    parser.add_argument(
        "--rivals",
        type=Path,
        action="append",
        default=[],
        metavar="FOLDER",
        help="put on the path: packages that are known by name (memeff, inf_cl), rival_*.py",
    )
    parser.add_argument("--tune", action="store_true", help="other tiles of the pooling, only")
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"default {SECONDS}")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the JSON")
    return parser.parse_args(argv)


def table(rows: Iterable[dict]) -> Iterable[str]:
    """Rows as they come, in columns."""
    widths = (14, 26, 6, 6, 5, 4, 11, 6, 10, 9)

    def line(cells: Sequence[str]) -> str:
        return " ".join(f"{cell:>{w}}" for cell, w in zip(cells, widths)) + f"  {cells[-1]}"

    yield line(COLUMNS)
    for one in rows:
        cells = [one["op"], one["impl"]]
        cells += ["" if one[n] is None else str(one[n]) for n in ("N", "M", "D", "K")]
        for name, form in (
            ("ms", ".4f"),
            ("percent_of_ceiling", ".1f"),
            ("extra_mib", ".1f"),
            ("error", ".1e"),
        ):
            cells.append("" if one[name] is None else format(one[name], form))
        cells.append(", ".join(f"{k}={v}" for k, v in one["options"].items()))
        yield line(cells)


def collect(rows: Iterable[dict], into: list[dict]) -> Iterable[dict]:
    """Pass the rows on and keep them, also those that came before an interruption."""
    for one in rows:
        into.append(one)
        yield one


def save(rows: list[dict], folder: Path, card: str) -> Path:
    """``<card>-<date>.json``, a list of rows."""
    folder.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"[^a-z0-9]+", "-", card.lower()).strip("-")
    path = folder / f"{name}-{time.strftime('%Y-%m-%d')}.json"
    path.write_text(json.dumps(rows, indent=1) + "\n")
    return path


def failures(only: str | None, device: torch.device) -> list[str]:
    """What is wrong on this card."""
    checks = []
    if only != "attention_pool":
        checks.append(gate.check_loss(device))
    if only != "info_nce":
        checks += [gate.check_pooling(device), gate.check_launches(device)]
    return list(chain(*checks))


def on_gpu(args: argparse.Namespace, device: torch.device, rows: list[dict]) -> int:
    """Gate, then times.  1 where the gate is red."""
    import triton

    start = time.monotonic()
    say(f"torch {torch.__version__}, triton {triton.__version__}; the correctness gate first")
    os.environ["COMA_KERNELS"] = "triton"
    wrong = failures(args.only, device)
    if wrong:
        say(f"NOT RIGHT on this card ({len(wrong)} failures); no times:")
        for line in wrong[:40]:
            say(f"  {line}")
        return 1
    say(f"right ({time.monotonic() - start:.0f} s)")
    budget = Budget.start(args.seconds, 0.3 if args.quick else 0.6)
    parts = []
    if args.tune:
        parts.append(tune.bench(device, budget))
    else:
        found, missing = rivals.find(args.rivals)
        for line in missing:
            say(line)
        # pooling is short and comes first: the loss takes what is left of the time
        if args.only != "info_nce":
            parts.append(pooling.bench(device, budget, pooling.shapes(args.quick)))
        if args.only != "attention_pool":
            parts.append(info_nce.bench(device, budget, found, info_nce.shapes(args.quick)))
    for line in table(collect(chain(*parts), rows)):
        say(line)
    if budget.spent:
        say(f"cut short after {args.seconds:.0f} s: not every shape was compared")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run; the exit code."""
    args = arguments(argv)
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    rows: list[dict] = []
    if torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
        card = torch.cuda.get_device_name(device)
        say(f"{card}, {torch.cuda.get_device_properties(device).multi_processor_count} processors")
        code = on_gpu(args, device, rows)
    else:
        card, code = "cpu", 0
        say("no GPU here: the kernels are not timed; the chunked reference beside the dense form")
        budget = Budget.start(args.seconds, 0.5 if args.quick else 2.0)
        for line in table(collect(cpu.bench(budget, args.quick), rows)):
            say(line)
    if rows:
        say(f"written: {save(rows, args.output, card)}")
    return code


if __name__ == "__main__":
    sys.exit(main())
