"""Preflight finds the bad node of a job in under a minute, and names it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.cluster.jobs import Job, Jobs
from tests.cluster.virtual import VirtualCluster

pytestmark = pytest.mark.usefixtures("calm")


@pytest.fixture(scope="module")
def pairs(jobs: Jobs) -> Path:
    """Pairs of a name and an image file."""
    folder = jobs.shared / "pairs"
    (folder / "images").mkdir(parents=True)
    rows = []
    for number in range(8):
        Image.new("RGB", (64, 64), (number, 0, 0)).save(folder / "images" / f"{number}.png")
        rows.append(json.dumps({"query": f"number {number}", "target_image": f"{number}.png"}))
    (folder / "pairs.jsonl").write_text("\n".join(rows) + "\n")
    return folder


def words_of(pairs: Path) -> tuple[str, ...]:
    """A run of stage 2 on them."""
    return (
        "demo-control", "data.format=pairs", f"data.path={pairs}/pairs.jsonl", "data.sources=[]",
        f"data.image_root={pairs}/images", "optim.batch_size=4", "eval.at_end=false",
    )  # fmt: skip


def failed(job: Job) -> list[str]:
    """The lines of a job that preflight ended, in under a minute."""
    found = job.wait(limit=75)
    assert (found["JobState"], found["ExitCode"]) == ("FAILED", "2:0"), job.log
    minutes, seconds = found["RunTime"].split(":")[1:]
    assert int(minutes) == 0, found["RunTime"] + seconds
    assert "coma-ds  " not in job.log, "a model was loaded"
    assert job.log.splitlines()[-1] == "job: error: preflight failed, nothing was started"
    return [line for line in job.log.splitlines() if line.startswith("error: ")]


def test_images_that_one_node_does_not_have(jobs, cluster: VirtualCluster, pairs: Path):
    images = str(pairs / "images")
    cluster.on("node2", "mount", "-t", "tmpfs", "tmpfs", images)
    try:
        job = jobs.submit("images", script="slurm/match.sh", words=words_of(pairs))
        (line,) = failed(job)
    finally:
        cluster.on("node2", "umount", images)
    assert line.startswith("error: node2: ") and "0.png" in line


def test_an_output_that_one_node_has_for_itself(jobs, cluster: VirtualCluster):
    output = jobs.shared / "unshared"
    output.mkdir()
    cluster.on("node2", "mount", "-t", "tmpfs", "tmpfs", str(output))
    try:
        lines = failed(jobs.submit("unshared"))
    finally:
        cluster.on("node2", "umount", str(output))
    assert lines and all("is not seen here: output must be on a file system" in x for x in lines)
    assert "node2" in lines[0]


def test_a_node_that_does_not_come(jobs, tmp_path: Path):
    python = tmp_path / "python"
    hang = '[ "$(hostname)" = node2 ] && [ -n "$SLURM_STEP_ID" ] && exec sleep 600'
    python.write_text(f'#!/bin/sh\n{hang}\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    limit = {"COMA_PREFLIGHT_SECONDS": "15", "COMA_PYTHON": str(python)}
    (line,) = failed(jobs.submit("hanging", **limit))
    assert line.startswith("error: node1: node2 did not come, or what is written there")
