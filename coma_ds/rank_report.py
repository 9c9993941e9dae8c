"""How each rank of a job ended, told through files: launchers lose exit codes and last words.

Whoever starts a job names a folder in the environment (``coma-ds train`` does); each rank leaves a
file there as its last act.  A rank without a file was ended from outside.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

FOLDER = "COMA_DS_RANK_REPORTS"


@dataclass(frozen=True)
class RankReport:
    """The end of one rank; ``message`` is what it said of its error, empty without one."""

    rank: int
    world: int
    code: int
    message: str
    time: float  # seconds since the epoch


def write_report(code: int, message: str) -> None:
    """Leave this rank's report, if a folder is named."""
    folder = os.environ.get(FOLDER)
    if not folder or not os.path.isdir(folder):
        return
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    report = RankReport(rank, world, code, message, time.time())
    partial = Path(folder, f"{rank}.tmp")
    partial.write_text(json.dumps(asdict(report)))
    partial.replace(Path(folder, f"{rank}.json"))


def read_reports(folder: Path) -> list[RankReport]:
    """The reports in ``folder``, by rank."""
    trees = [json.loads(path.read_text()) for path in folder.glob("*.json")]
    return sorted((RankReport(**tree) for tree in trees), key=lambda report: report.rank)
