"""How each rank of a job ended, told through files: launchers lose exit codes and last words.

Whoever starts a job names a folder in the environment (``coma-ds train`` and the batch scripts of
``slurm/`` do); each rank leaves a file there as its last act.  A rank without a file was ended from
outside.

As a program, ``python -m coma_ds.rank_report FOLDER FIRST COUNT [RANKS_PER_NODE NODE ...]`` ends
with the code that these ranks make together, and says what there is to say.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

FOLDER = "COMA_DS_RANK_REPORTS"
CONTROL = "COMA_DS_CONTROL"  # where a job of a cluster finds its folder
# Codes of a run that ended as it was asked to: stopped, taken over, held (``coma_ds.stopping``).
AS_ASKED = (85, 86, 87)
RESERVED = 4096  # bytes
NO_ANSWER = "gave no answer"  # in the message of a rank that waited for one that hangs


@dataclass(frozen=True)
class RankReport:
    """The end of one rank; ``message`` is what it said of its error, empty without one."""

    rank: int
    world: int
    code: int
    message: str
    time: float  # seconds since the epoch


def reserve() -> None:
    """Take the room of this rank's report, if a folder is named, while there is some."""
    if partial := _partial():
        with suppress(OSError):
            partial.write_text(" " * RESERVED)


def write_report(code: int, message: str) -> bool:
    """Leave this rank's report, if a folder is named; True when it is there.

    A disk that is full by now has what ``reserve`` took.
    """
    partial = _partial()
    if not partial:
        return False
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    for said in (message, message[: RESERVED // 8]):
        report = RankReport(rank, world, code, said, time.time())
        try:
            with partial.open("r+" if partial.exists() else "w") as file:
                file.write(json.dumps(asdict(report)).ljust(RESERVED))
                file.truncate()
            partial.replace(partial.with_suffix(".json"))
            return True
        except OSError as error:
            problem = error
    with suppress(OSError):
        sys.stderr.write(f"{partial.parent}: this rank's end cannot be written ({problem})\n")
    return False


def _partial() -> Path | None:
    folder = os.environ.get(FOLDER)
    if not folder or not os.path.isdir(folder):
        return None
    return Path(folder, f"{int(os.environ.get('RANK', 0))}.tmp")


def read_reports(folder: Path) -> list[RankReport]:
    """The reports in ``folder``, by rank."""
    trees = [json.loads(path.read_text()) for path in folder.glob("*.json")]
    return sorted((RankReport(**tree) for tree in trees), key=lambda report: report.rank)


def outcome(
    reports: Sequence[RankReport],
    ranks: Sequence[int],
    names: Sequence[str] = (),
    first_node: str = "",
) -> tuple[int, str]:
    """The code that ``ranks`` make together, and a sentence where there is one to say.

    A fault wins, of several the first; then a rank without a report, which counts as code 1; then
    86, 87 and 85.  ``names`` are those of the ranks' nodes, in the order of ``ranks``.  Of silent
    ranks only those on ``first_node`` are told, where it is known: the others were ended with it.
    A rank that hung says nothing: the one that waited for it does.
    """

    def named(silent: list[int]) -> str:
        places = [f" on {names[ranks.index(rank)]}" if names else "" for rank in silent]
        who = ", ".join(f"rank {rank}{place}" for rank, place in zip(silent[:4], places))
        return f"{who} and {len(silent) - 4} more" if len(silent) > 4 else who

    ours = [report for report in reports if report.rank in ranks]
    faults = [report for report in ours if report.code and report.code not in AS_ASKED]
    silent = sorted(set(ranks) - {report.rank for report in ours})
    if faults:
        first = min(faults, key=lambda report: report.time)
        said = first.message or f"error: rank {first.rank} ended with {first.code}"
        if NO_ANSWER in said and silent:
            said += f"; ended without a word: {named(silent)}"
        return first.code, said
    if silent:
        begun = [r for r in silent if names and names[ranks.index(r)] == first_node]
        why = "ended without a word: killed from outside, or see the lines above"
        return 1, f"error: {named(begun or silent)} {why}"
    codes = {report.code for report in ours}
    asked = next((code for code in (86, 87, 85) if code in codes), 0)
    words = [report.message for report in ours if report.code == asked and report.message]
    return asked, words[0] if words else ""


def main(argv: list[str]) -> int:
    """The program: see the head of this file."""
    folder, first, count = Path(argv[0]), int(argv[1]), int(argv[2])
    ranks = range(first, first + count)
    nodes, each = argv[4:], int(argv[3]) if argv[3:] else 1
    names = [nodes[rank // each] for rank in ranks] if nodes else []
    failed = folder / "failed"  # the nodes in the order in which they failed (slurm/node.sh)
    words = failed.read_text().split() if failed.is_file() else []  # empty on a full disk
    first_node = words[0] if words else ""
    code, message = outcome(read_reports(folder), ranks, names, first_node)
    if message:
        sys.stdout.write(f"{message}\n")
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
