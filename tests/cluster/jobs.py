"""Jobs of the batch scripts on a virtual cluster: submitted, watched, broken."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.cluster.virtual import VirtualCluster, wait_for

ROOT = Path(__file__).resolve().parents[2]
STEPS = 30
# The demo's first stage on its own weights, steps of a tenth of a second.
SMALL = (
    f"optim.steps={STEPS}", "optim.batch_size=4", "chunk.samples=4", "data.length=2000",
    "data.workers=1", "eval.at_end=false", "eval.sets=[]", "logging.every=1", "checkpoint.every=5",
)  # fmt: skip
OVER = ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL")


@dataclass
class Job:
    """One job by its number; ``run`` is the folder that it trains into."""

    cluster: VirtualCluster
    shared: Path
    name: str
    number: int
    run: Path

    @property
    def log(self) -> str:
        """Everything that the user sees of it."""
        path = self.shared / f"{self.name}-{self.number}.log"
        return path.read_text() if path.exists() else ""

    @property
    def control(self) -> Path:
        """The job's folder."""
        return self.shared / "jobs" / f"{self.name}-{self.number}"

    @property
    def published(self) -> int:
        """The last step that the trainer published."""
        path = self.control / "published"
        return int(path.read_text()) if path.exists() else 0

    def losses(self) -> list[tuple[int, float]]:
        """Step and loss of each line of the run's metrics."""
        path = self.run / "metrics.jsonl"
        if not path.exists():
            return []
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        return [(line["step"], line["loss"]) for line in lines if line["group"] == "train"]

    def wait_for_step(self, step: int, limit: float = 240) -> None:
        """Wait until a step is logged."""
        self._wait_for(lambda: (self.losses() or [(0, 0.0)])[-1][0] >= step, f"step {step}", limit)

    def wait_for_published(self, step: int, limit: float = 240) -> None:
        """Wait until this step or a later one is published."""
        self._wait_for(lambda: self.published >= step, f"step {step} is published", limit)

    def wait_for_words(self, words: str, limit: float = 240) -> None:
        """Wait until the log has ``words``."""
        self._wait_for(lambda: words in self.log, repr(words), limit)

    def _wait_for(self, what: Callable[[], object], name: str, limit: float) -> None:
        wait_for(what, limit, f"{name} of job {self.name}", log=lambda: self.log)

    def wait_for_start(self, restart: int, limit: float = 240) -> None:
        """Wait until a start of the job has begun."""
        self.wait_for_words(f"restart {restart}: ", limit=limit)

    def wait(self, limit: float = 180) -> dict[str, str]:
        """Wait for the end; what SLURM says of it."""
        return self.cluster.wait_for_state(self.number, *OVER, limit=limit)

    def signal_rank(self, node: str, number: signal.Signals) -> int:
        """Send a signal to the rank on a node; its process."""
        process = wait_for(lambda: self.cluster.rank(node, self.number), 60, f"a rank on {node}")
        os.kill(process, number)
        return process


class Jobs:
    """Submits from ``ROOT``, with ``shared`` as the folder that all nodes see."""

    def __init__(self, cluster: VirtualCluster, shared: Path) -> None:
        self.cluster, self.shared = cluster, shared
        self.environment = {
            "COMA_SHARED": str(shared),
            "COMA_PYTHON": sys.executable,
            "COMA_PREFLIGHT_SECONDS": "45",
            "COMA_MIN_FREE_GIB": "0.1",
            "OMP_NUM_THREADS": "1",
            "TEST_API_KEY": "not to be seen",
        }

    def command(self, *command: str, root: Path = ROOT, **environment: str) -> str:
        """What a command says that the user gives in ``root``."""
        return self.cluster.run(*command, cwd=root, **(self.environment | environment))

    def submit(
        self,
        name: str,
        *options: str,
        script: str = "slurm/compress.sh",
        words: tuple[str, ...] = ("demo-compress", *SMALL),
        root: Path = ROOT,
        **environment: str,
    ) -> Job:
        """``sbatch OPTIONS SCRIPT WORDS``, into a run named as the job."""
        run = self.shared / name
        log = f"--output={self.shared}/%x-%j.log"
        command = ["sbatch", "--parsable", f"--job-name={name}", log, *options, script, *words]
        if any("=" in word for word in words):
            command.append(f"output={run}")
        number = int(self.command(*command, root=root, **environment))
        return Job(self.cluster, self.shared, name, number, run)
