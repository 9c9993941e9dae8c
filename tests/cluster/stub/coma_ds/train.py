"""Stands for coma_ds/train.py where the batch script is tested: steps that cost nothing.

It keeps the trainer's promises: says what is published, looks for the stop file, reports its code.
STUB_HOW says how it ends, STUB_STEPS when.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from coma_ds import rank_report

how, steps = os.environ.get("STUB_HOW", "well"), int(os.environ["STUB_STEPS"])
control = Path(os.environ["COMA_DS_CONTROL"])
published = control / "published"


def end(code: int, message: str = "") -> None:
    """Report, and end as a rank does that ended as it was asked to."""
    rank_report.write_report(code, message)
    os._exit(0 if code in rank_report.AS_ASKED else code)


def announce(step: int, gained: bool = True) -> None:
    """Say what is published, on rank 0."""
    if os.environ["RANK"] != "0":
        return
    partial = published.with_suffix(".tmp")
    partial.write_text(str(step))
    partial.replace(published)
    if gained:
        with (control / "gained").open("a") as file:
            file.write(f"{os.environ.get('SLURM_RESTART_COUNT', 0)}\n")


step = int(published.read_text()) if published.exists() else 0
announce(step, gained=False)
if how == "user's error":
    end(2, "error: unknown key")
if how == "fault":
    end(1, "error: RuntimeError: at once")
if how == "held":
    end(87)
while step < steps:
    if (control / "stop").exists() and how != "hang":
        end(85, "stopped")
    time.sleep(0.2)
    step += 1
    announce(step)
    if how == "fault after a step":
        end(1, "error: RuntimeError: after a step")
    if how == "newer":
        with (control / "starts").open("a") as file:
            file.write("7 0 - -\n")  # the job runs elsewhere
        end(86)
sys.stdout.write(f"done in start {os.environ.get('SLURM_RESTART_COUNT', 0)}\n")
end(0)
