"""Which start of a run owns its folder: two can be alive at once when a lost node lives on."""

from __future__ import annotations

import json
import os
import socket
import uuid
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from coma_ds.manifest import write_atomically

OWNER = ".owner.json"


@dataclass(frozen=True)
class Incarnation:
    """One start of a run: ``number`` counts them; ``job`` and ``restart`` are SLURM's.

    ``began``: this start, or an earlier one of the same job, has made the folder its own, so that
    the checkpoints there are the job's.
    """

    number: int
    token: str
    host: str
    process: int
    job: str = ""
    restart: int = 0
    began: bool = False

    def __str__(self) -> str:
        job = f", job {self.job}, restart {self.restart}" if self.job else ""
        return f"start {self.number} (process {self.process} on {self.host}{job})"


def read_owner(folder: Path) -> Incarnation | None:
    """The start that owns ``folder``; None where there is none, or nothing that can be read."""
    try:
        return Incarnation(**json.loads((folder / OWNER).read_text()))
    except (OSError, ValueError, TypeError):
        return None


def this_start(folder: Path) -> Incarnation:
    """An incarnation for this process, one above the owner."""
    before = read_owner(folder)
    mine = Incarnation(
        number=before.number + 1 if before else 1,
        token=uuid.uuid4().hex,
        host=socket.gethostname(),
        process=os.getpid(),
        job=os.environ.get("SLURM_JOB_ID", ""),
        restart=int(os.environ.get("SLURM_RESTART_COUNT", 0)),
    )
    return replace(mine, began=takes_over(mine, before) and before.began)


def takes_over(mine: Incarnation, owner: Incarnation | None) -> bool:
    """True for a later start of the owner's job: what is left of that on a lost node gives way."""
    return bool(owner and mine.job and mine.job == owner.job and mine.restart > owner.restart)


def take(folder: Path, mine: Incarnation) -> None:
    """Write ``mine`` as the owner: an older one publishes nothing from here on."""
    write_atomically(folder / OWNER, json.dumps(asdict(mine)))


def owns(folder: Path, mine: Incarnation) -> bool:
    """True while no newer start has taken the folder."""
    owner = read_owner(folder)
    return owner is None or owner.token == mine.token
