"""Start a script as a user does: under ``deepspeed``, under ``torchrun``, as plain ``python``."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.distributed.harness import free_port

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
RANKS = 2


@dataclass(frozen=True)
class Ended:
    """Exit code and everything on the screen, both streams in the order they came."""

    code: int
    text: str

    @property
    def lines(self) -> list[str]:
        """The lines that are not empty."""
        return [line for line in self.text.splitlines() if line.strip()]


def command(launcher: str, port: str) -> list[str]:
    """The words before the script."""
    return {
        "deepspeed": [
            str(BIN / "deepspeed"), "--num_accelerators", str(RANKS), "--master_port", port,
        ],
        "torchrun": [
            str(BIN / "torchrun"), "--nproc-per-node", str(RANKS), "--master-port", port,
        ],
        "python": [sys.executable],
    }[launcher]  # fmt: skip


def launch(launcher: str, script: str, *arguments: str, limit: float = 300, port: int = 0) -> Ended:
    """Run ``script`` (relative to the root) and wait; fails when the limit (seconds) is over.

    ``port`` 0: one that is free.
    """
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    environment["DS_ACCELERATOR"] = "cpu"
    process = subprocess.Popen(
        [*command(launcher, str(port or free_port())), script, *arguments],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        text, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        text, _ = process.communicate()
        raise AssertionError(f"{launcher} {script} still ran after {limit} s:\n{text}") from None
    return Ended(process.returncode, text)
