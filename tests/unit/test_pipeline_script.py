"""What ``slurm/pipeline.sh`` checks, submits and refuses, without a cluster."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.launched import ROOT


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("match:optim.sise=3", "unknown key 'optim.sise'"),
        ("match:compress.loss=kl", "override compress.loss has no effect with objective 'match'"),
        ("compress:match.symmetric=true", "override match.symmetric has no effect"),
        ("match:output=/x", "'match:output=/x': output=FOLDER is that of both stages"),
        ("output=", "'output=': name the folder of both stages"),
        ("match:init_from=/x", "'match:init_from=/x': match goes on from this compress"),
        ("--partition gpu", "'gpu' is taken for the NAME of recipes: as a value of --partition"),
        ("--nodes 2 demo", "there is '2' (as a value of --nodes it would be one word with it"),
        ("match:", "'match:': expected match:KEY=VALUE"),
        ("evaluate:foo=3", "'evaluate:foo=3': the evaluation takes no words here"),
    ],
)
def test_the_pipeline_checks_all_stages_before_it_submits_one(tmp_path: Path, word, said):
    (tmp_path / "sbatch").write_text(f"#!/bin/bash\ntouch {tmp_path}/called\n")
    (tmp_path / "sbatch").chmod(0o755)
    path = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "COMA_PYTHON": sys.executable}
    done = subprocess.run(
        ["bash", "slurm/pipeline.sh", f"output={tmp_path}/run", *word.split()],
        cwd=ROOT, env=os.environ | path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2 and said in done.stderr
    assert not (tmp_path / "called").exists()


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
