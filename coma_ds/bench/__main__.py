"""Time whole steps beside a rival's, in one process.

    python -m coma_ds.bench [--rounds N] [--pairs N] [--output benchmarks]

On a GPU (one, 9 minutes): both stages of the 3B recipes with random weights, each improvement on
and off, beside the way that scripts usually do it; the tests that need a GPU run first.  On a CPU:
stage 2 of the shipped demo model against sentence-transformers' cached loss on the same embedder
(`pip install sentence-transformers`).  Nothing is reported of ways that compute different things.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

RECIPES = {"match": "qwen2_5_vl_3b-match", "compress": "qwen2_5_vl_3b-compress"}


def main(argv: list[str] | None = None) -> int:
    """Run, print a table, write the JSON.  Raises ``ValueError`` for what the user can mend."""
    import torch

    from coma_ds.screen import log_to_stderr

    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(
        prog="python -m coma_ds.bench", description=__doc__.splitlines()[0], allow_abbrev=False
    )
    parser.add_argument("--rounds", type=int, help="turns of each (default: 3, on a CPU 7)")
    parser.add_argument("--pairs", type=int, default=64, help="of a batch (default: 64)")
    parser.add_argument("--dialogues", type=int, default=64, help="on a GPU (default: 64)")
    parser.add_argument(
        "--chunk", type=int, default=16, help="samples of a chunk, on a CPU (default: 16)"
    )
    parser.add_argument("--stage", choices=RECIPES, help="one of them, on a GPU (default: both)")
    parser.add_argument(
        "--output", type=Path, default=Path("benchmarks"), help="folder of the JSON"
    )
    args = parser.parse_args(argv)
    rounds = (3 if on_gpu else 7) if args.rounds is None else args.rounds
    if min(rounds, args.pairs - 1, args.chunk, args.dialogues) < 1:
        parser.error("rounds, chunk and dialogues must be 1 or more, pairs 2 or more")
    if args.stage and not on_gpu:
        parser.error("--stage is for a GPU: a CPU compares stage 2 alone")
    try:  # now, not after minutes of work
        args.output.mkdir(parents=True, exist_ok=True)
        (args.output / ".written").touch()
        (args.output / ".written").unlink()
    except OSError as error:
        raise ValueError(f"--output {args.output}: cannot be written ({error.strerror})") from None
    log_to_stderr(True)
    if on_gpu:
        return on_card(args, rounds)

    from coma_ds.bench import cpu

    found = cpu.compare(rounds=rounds, pairs=args.pairs, chunk=args.chunk)
    sys.stdout.write(cpu.table(found))
    path = args.output / f"cpu-{found['date']}.json"
    path.write_text(json.dumps(found, indent=1) + "\n")
    sys.stdout.write(f"written: {path}\n")
    return 0


def on_card(args: argparse.Namespace, rounds: int) -> int:
    """The comparison on a GPU."""
    import coma_ds
    from coma_ds import engine
    from coma_ds.bench import gpu

    gpu.check(Path(coma_ds.__file__).resolve().parents[1])
    recipes = {stage: RECIPES[stage] for stage in ([args.stage] if args.stage else RECIPES)}
    records = {"match": args.pairs, "compress": args.dialogues}
    found = gpu.compare(engine.start(), recipes=recipes, records=records, rounds=rounds)
    sys.stdout.write(gpu.table(found))
    sys.stdout.write(f"written: {gpu.write(found, args.output)}\n")
    return 0


if __name__ == "__main__":
    from coma_ds.entry import entry_point

    entry_point(main, sys.argv[1:])
