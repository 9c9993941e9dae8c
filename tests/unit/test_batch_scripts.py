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


LAUNCH = """
source slurm/common.sh
begin() { package=coma_ds; }
preflight() { printf '[%s]' preflight "$@"; echo; }
launch() { printf '[%s]' launch "$@"; echo; }
python=(true)
launch_train demo-compress "$@"
"""


@pytest.fixture
def job(tmp_path: Path) -> dict[str, str]:
    """The environment of the third task of an array, as far as the script looks at it."""
    (tmp_path / "scontrol").write_text("#!/bin/bash\necho node1\n")
    (tmp_path / "scontrol").chmod(0o755)
    path = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "COMA_SHARED": f"{tmp_path}/shared"}
    named = {"SLURM_JOB_NAME": "j", "SLURM_JOB_NODELIST": "node1", "SLURM_ARRAY_TASK_ID": "3"}
    return os.environ | path | named | {"SLURM_JOB_ID": "1", "SLURM_SUBMIT_DIR": str(ROOT)}


def launched(job: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    call = ["bash", "-c", LAUNCH, "bash", *words]
    return subprocess.run(call, cwd=ROOT, env=job, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("words", "recipe", "overrides", "options"),
    [
        ([], "demo-compress", [], []),
        (["mine.yaml", "seed=%a"], "mine.yaml", ["seed=3"], []),
        (["seed=1", "mine.yaml"], "mine.yaml", ["seed=1"], []),
        (["--recipe", "demo-%a", "output=a b"], "demo-3", ["output=a b"], []),
        (["--dry-run", "--recipe=mine", "seed=1"], "mine", ["seed=1"], ["--dry-run"]),
    ],
)
def test_what_is_checked_is_what_is_trained(job, words, recipe, overrides, options):
    done = launched(job, *words)
    assert done.returncode == 0, done.stderr
    checked, trained = done.stdout.splitlines()
    named = ["--recipe", recipe]
    assert checked == "".join(f"[{word}]" for word in ["preflight", *named, *overrides])
    words = ["launch", "coma_ds/train.py", *named, *options, *overrides]
    assert trained == "".join(f"[{word}]" for word in words)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["one", "two"], "'two': one recipe is expected, and there is 'one'"),
        (["one", "--recipe=two"], "'two': one recipe is expected, and there is 'one'"),
        (["--recipe"], "--recipe: the name of a recipe is expected"),
    ],
)
def test_two_recipes_or_none_are_refused(job, words, said):
    done = launched(job, *words)
    assert (done.returncode, done.stdout) == (2, "") and done.stderr == f"job: error: {said}\n"


@pytest.mark.parametrize("name", ["compress", "match", "evaluate"])
def test_submitted_from_elsewhere(tmp_path: Path, name: str):
    environment = os.environ | {"SLURM_JOB_ID": "1", "SLURM_SUBMIT_DIR": str(tmp_path)}
    script = f"{ROOT}/slurm/{name}.sh"
    done = subprocess.run([script], env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == "error: submit from the root of the repository\n"


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
