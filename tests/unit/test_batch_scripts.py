"""What the batch scripts refuse, without a cluster: ``tests/cluster`` runs them on one."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.distributed.launched import ROOT


def sourced(**settings: str) -> subprocess.CompletedProcess[str]:
    """The start of a job with these settings."""
    environment = os.environ | {"SLURM_JOB_ID": "1", "SLURM_SUBMIT_DIR": str(ROOT)} | settings
    command = ["bash", "-c", "source slurm/common.sh"]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("COMA_LAUNCHER", "mpirun", "expected torchrun or deepspeed"),
        ("COMA_RANKS_PER_NODE", "two", "expected a whole number"),
        ("COMA_MAX_RESTARTS", "many", "expected a whole number"),
        ("COMA_DS_LEAD_SECONDS", "5min", "expected a whole number"),
        ("COMA_MASTER_PORT", "abc", "expected a whole number"),
        ("COMA_PREFLIGHT_SECONDS", "-1", "expected a whole number"),
        ("COMA_MIN_FREE_GIB", "2G", "expected a number of GiB"),
        ("COMA_VENV", "/nowhere/venv", "there is no bin/python in it"),
    ],
)
def test_a_wrong_setting_is_named_before_anything_runs(name, value, said):
    done = sourced(**{name: value})
    assert done.returncode == 2 and not done.stdout
    assert done.stderr == f"job: error: {name} is '{value}': {said}\n"


def test_no_rank_at_all():
    done = sourced(COMA_RANKS_PER_NODE="0")
    assert done.returncode == 2
    assert done.stderr == "job: error: COMA_RANKS_PER_NODE is 0: expected 1 or more\n"


@pytest.mark.parametrize("refused", [1, 2, 3])
def test_the_pipeline_ends_where_sbatch_refuses(tmp_path: Path, refused: int):
    """And submits nothing that would not wait for what was refused."""
    calls = tmp_path / "calls"
    (tmp_path / "sbatch").write_text(
        f'#!/bin/bash\necho "$*" >>{calls}\n'
        f"if (($(wc -l <{calls}) == {refused})); then echo no >&2; exit 1; fi\n"
        f"wc -l <{calls}\n"
    )
    (tmp_path / "sbatch").chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "slurm/pipeline.sh", "demo", f"output={tmp_path}/run"],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1 and done.stderr == "no\n"
    assert len(calls.read_text().splitlines()) == refused
    assert len(done.stdout.splitlines()) == refused - 1
    for number, call in enumerate(calls.read_text().splitlines()):
        assert (f"--dependency=afterok:{number} " in call) == (number > 0)
