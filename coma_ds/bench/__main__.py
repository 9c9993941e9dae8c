"""Time whole steps beside a rival's, in one process, turn by turn.

    python -m coma_ds.bench [--rounds 7] [--pairs 64] [--chunk 16] [--output benchmarks]

On a CPU: stage 2 of the shipped demo model against sentence-transformers' cached loss on the same
embedder (`pip install sentence-transformers`).  It reports only after both gave the same loss and
the same gradient.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path


def main(argv: list[str] | None = None) -> int:
    """Run, print a table, write the JSON.  Raises ``ValueError`` for what the user can mend."""
    parser = argparse.ArgumentParser(
        prog="python -m coma_ds.bench", description=__doc__.splitlines()[0], allow_abbrev=False
    )
    parser.add_argument("--rounds", type=int, default=7, help="turns of each (default 7)")
    parser.add_argument("--pairs", type=int, default=64, help="of a batch (default 64)")
    parser.add_argument("--chunk", type=int, default=16, help="samples of a chunk (default 16)")
    parser.add_argument(
        "--output", type=Path, default=Path("benchmarks"), help="folder of the JSON"
    )
    args = parser.parse_args(argv)
    if min(args.rounds, args.pairs - 1, args.chunk) < 1:
        parser.error("rounds and chunk must be 1 or more, pairs 2 or more")

    from coma_ds.bench import cpu

    found = cpu.compare(rounds=args.rounds, pairs=args.pairs, chunk=args.chunk)
    sys.stdout.write(cpu.table(found))
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / f"cpu-{found['date']}.json"
    path.write_text(json.dumps(found, indent=1) + "\n")
    sys.stdout.write(f"written: {path}\n")
    return 0


if __name__ == "__main__":
    from coma_ds.entry import entry_point

    entry_point(main, sys.argv[1:])
