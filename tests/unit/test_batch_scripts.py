"""What the batch scripts refuse, without a cluster: ``tests/cluster`` runs them on one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.distributed.launched import ROOT

WHOLE = "expected a whole number below ten million"


def sourced(**settings: str) -> subprocess.CompletedProcess[str]:
    """The start of a job with these settings."""
    environment = os.environ | {"SLURM_JOB_ID": "1", "SLURM_SUBMIT_DIR": str(ROOT)} | settings
    command = ["bash", "-c", "source slurm/common.sh"]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("COMA_LAUNCHER", "mpirun", "expected torchrun or deepspeed"),
        ("COMA_RANKS_PER_NODE", "two", WHOLE),
        ("COMA_MAX_RESTARTS", "many", WHOLE),
        ("COMA_DS_LEAD_SECONDS", "5min", WHOLE),
        ("COMA_MASTER_PORT", "abc", WHOLE),
        ("COMA_MASTER_PORT", "65536", "expected 65535 or less"),
        ("COMA_RANKS_PER_NODE", "08", WHOLE),
        ("COMA_RANKS_PER_NODE", "99999999999999999999", WHOLE),
        ("COMA_RANKS_PER_NODE", "1025", "expected 1024 or less"),
        ("COMA_PREFLIGHT_SECONDS", "-1", WHOLE),
        ("COMA_PREFLIGHT", "no", "expected 1, or 0 to leave it out"),
        ("COMA_MIN_FREE_GIB", "2G", "expected a number of GiB"),
        ("COMA_VENV", "/nowhere/venv", "there is no bin/python in it"),
    ],
)
def test_a_wrong_setting_is_named_before_anything_runs(name, value, said):
    done = sourced(**{name: value})
    assert done.returncode == 2 and not done.stdout
    assert done.stderr == f"job: error: {name} is '{value}': {said}\n"


@pytest.mark.parametrize(
    "name",
    ["COMA_RANKS_PER_NODE", "COMA_DS_LEAD_SECONDS", "COMA_MASTER_PORT", "COMA_PREFLIGHT_SECONDS"],
)
def test_none_at_all(name):
    done = sourced(**{name: "0"})
    assert done.returncode == 2
    assert done.stderr == f"job: error: {name} is 0: expected 1 or more\n"


LAUNCH = """
source slurm/common.sh
begin() { package=coma_ds; }
preflight() { printf '[%s]' preflight "$@"; echo; }
launch() { printf '[%s]' launch "$@"; echo; }
here=(true)
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
        (
            ["--bogus"],
            "'--bogus': a training takes --recipe NAME, --dry-run and --verify-gradients",
        ),
    ],
)
def test_two_recipes_or_none_are_refused(job, words, said):
    done = launched(job, *words)
    assert (done.returncode, done.stdout) == (2, "") and done.stderr == f"job: error: {said}\n"


@pytest.mark.parametrize(
    ("starts", "gained", "idle"),
    [
        ([0], [], 1),
        ([0], [0], 0),
        ([0, 1, 2], [0], 2),
        ([0, 1, 2], [0, 0, 2, 2], 0),  # also after it fell back from a broken checkpoint
        ([0, 1, 11], [1], 1),
    ],
)
def test_starts_in_which_nothing_was_gained(job, tmp_path, starts, gained, idle):
    script = "source slurm/common.sh; cp $0/* $COMA_DS_CONTROL; idle_starts"
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "starts").write_text("".join(f"{n} 0 - -\n" for n in starts))
    (tmp_path / "kept" / "gained").write_text("".join(f"{n}\n" for n in gained))
    call = ["bash", "-c", script, f"{tmp_path}/kept"]
    done = subprocess.run(call, cwd=ROOT, env=job, capture_output=True, text=True)
    assert done.stdout == f"{idle}\n", done.stderr


FULL = """
source slurm/common.sh
end_step() { :; }
hard_timer() { :; }
rm -f "$COMA_DS_CONTROL/stop"
ln -s "$1" "$COMA_DS_CONTROL/stop"
on_usr1
echo alive
"""


def test_a_full_disk_does_not_end_a_job_that_is_to_stop(job):
    """The file is there, if empty; where it cannot be, that is said."""
    heard, unheard = "asked the ranks to save and stop", "the ranks do not hear of it"
    for target, said in (("/dev/full", heard), ("/none/there", unheard)):
        call = ["bash", "-c", FULL, "bash", target]
        done = subprocess.run(call, cwd=ROOT, env=job, capture_output=True, text=True)
        assert done.returncode == 0 and done.stdout == "alive\n", done.stderr
        assert len(done.stderr.splitlines()) == 1 and said in done.stderr


@pytest.mark.parametrize("pause", [0.0, 0.001, 0.02, 0.3])
def test_a_warning_and_the_end_right_after_it(job, tmp_path, pause):
    """As in a pre-emption without grace: the script waits for its ranks all the same."""
    (tmp_path / "srun").write_text("#!/bin/bash\ntrap '' TERM\necho runs >&2\nsleep 1.5\n")
    (tmp_path / "srun").chmod(0o755)
    call = ["bash", "-c", "source slurm/common.sh; hard_timer() { :; }; run_step; echo alive"]
    script = subprocess.Popen(
        call, cwd=ROOT, env=job, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert script.stderr.readline() == "runs\n"
    script.send_signal(signal.SIGUSR1)
    time.sleep(pause)
    script.send_signal(signal.SIGTERM)
    out, text = script.communicate(timeout=30)
    assert (script.returncode, out) == (0, "alive\n"), text
    assert len(text.splitlines()) == 1 and "asked the ranks to save and stop" in text


@pytest.mark.parametrize("evaluates", [True, False])
def test_the_end_of_a_nodes_part(tmp_path, evaluates):
    """At TERM an evaluation is ended at once; a training is asked to save, and waited for."""
    stub = tmp_path / "python"
    stub.write_text(
        "#!/bin/bash\nif [[ $* == *rank_report* ]]; then exit 1; fi\n"
        "trap '' TERM\necho runs\nsleep 3\n"
    )
    stub.chmod(0o755)
    (tmp_path / "ranks").mkdir()
    (tmp_path / "starts").write_text("0 0 - -\n")
    settings = {
        "COMA_PYTHON_COMMAND": str(stub), "COMA_RANKS_PER_NODE": "1", "SLURM_NODEID": "0",
        "COMA_DS_RANK_REPORTS": str(tmp_path / "ranks"), "COMA_DS_CONTROL": str(tmp_path),
        "COMA_LAUNCHER": "torchrun", "SLURM_JOB_NUM_NODES": "1", "MASTER_ADDR": "x",
        "MASTER_PORT": "1", "COMA_NOTHING_TO_SAVE": "1" if evaluates else "",
    }  # fmt: skip
    node = subprocess.Popen(
        ["bash", "slurm/node.sh", "entry"], cwd=ROOT, env=os.environ | settings, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert node.stdout.readline() == "runs\n"
    node.send_signal(signal.SIGTERM)
    node.communicate(timeout=30)
    launched = (tmp_path / "ranks" / "failed").read_text().split()[-1]
    assert (node.returncode, launched) == (1, "137" if evaluates else "0")
    assert (tmp_path / "stop").exists()  # the batch script may not have heard of it


@pytest.mark.parametrize("seconds", ["0", "5"])
def test_a_job_that_starts_on_a_full_disk_says_so(job, tmp_path, seconds):
    control = tmp_path / "shared" / "jobs" / "j-1"
    control.mkdir(parents=True)
    (control / ".room").symlink_to("/dev/full")
    more = {"SLURM_RESTART_COUNT": "1", "COMA_ROOM_SECONDS": seconds}
    call = ["bash", "-c", "source slurm/common.sh; echo alive"]
    done = subprocess.run(call, cwd=ROOT, env=job | more, capture_output=True, text=True)
    assert done.returncode == 2 and not done.stdout
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"job: error: {control} has no room, as ") and "COMA_SHARED" in last
    assert ("waits for room" in done.stderr) == (seconds == "5")
    assert not (control / "starts").exists()


@pytest.mark.parametrize(
    ("why", "said"),
    [
        ("No space left on device", "has no room, as"),
        ("Disk quota exceeded", "has no room, as"),
        ("Permission denied", "cannot be made (Permission denied): COMA_SHARED must be a folder"),
    ],
)
def test_a_folder_that_cannot_be_made(job, tmp_path, why, said):
    """Also where the disk is too full for one more folder."""
    (tmp_path / "mkdir").write_text(f'#!/bin/bash\necho "mkdir: cannot: {why}" >&2; exit 1\n')
    (tmp_path / "mkdir").chmod(0o755)
    call = ["bash", "-c", "source slurm/common.sh; echo alive"]
    done = subprocess.run(
        call, cwd=ROOT, env=job | {"COMA_ROOM_SECONDS": "0"}, capture_output=True, text=True
    )
    assert done.returncode == 2 and not done.stdout and said in done.stderr, done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("number", "code", "said"),
    [
        (
            signal.SIGUSR1,
            0,
            "requeued, restart 1 of at most 20: SLURM warns of the end before anything",
        ),
        (signal.SIGTERM, 143, "ended by SLURM before anything was begun"),
    ],
)
@pytest.mark.parametrize("when", ["modules load", "it waits for room"])
def test_a_signal_before_anything_was_begun(job, tmp_path, number, code, said, when):
    """Bash alone would end, and the job would be lost."""
    called = tmp_path / "called"
    full = (
        "echo 'No space left' >&2; exit 1"
        if when == "it waits for room"
        else 'exec /bin/mkdir "$@"'
    )
    for name, does in {
        "module": "echo module >&2; sleep 1",
        "mkdir": full,
        "scontrol": f'echo "$*" >>{called}; echo node1',
    }.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{does}\n")
        (tmp_path / name).chmod(0o755)
    script = subprocess.Popen(
        [f"{ROOT}/slurm/compress.sh"], cwd=ROOT, env=job | {"COMA_MODULES": "x"}, text=True,
        stderr=subprocess.PIPE,
    )  # fmt: skip
    while "room" not in (line := script.stderr.readline()) and when == "it waits for room":
        assert line, "it ended"
    script.send_signal(number)
    text = script.communicate(timeout=30)[1]
    assert script.returncode == code and said in text, text
    assert ("requeue 1" in called.read_text()) == (number == signal.SIGUSR1)
    assert "error" not in text


def test_what_git_does_not_know_is_in_the_patch(job, tmp_path):
    package = tmp_path / "repository" / "coma_ds"
    package.mkdir(parents=True)
    (package / "train.py").write_text("old\n")
    git = ["git", "-C", str(package.parent), "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "first"]):
        subprocess.run([*git, *words], check=True)
    (package / "train.py").write_text("new\n")
    (package / "more.py").write_text("unknown\n")
    script = 'source slurm/common.sh; package=$0; record; cat "$COMA_DS_CONTROL/diff.patch"'
    call = ["bash", "-c", script, str(package)]
    done = subprocess.run(call, cwd=ROOT, env=job, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "-old\n+new\n" in done.stdout and "+unknown\n" in done.stdout


END = """
source slurm/common.sh
end_step() { echo 'the step is ended'; }
hard_timer() { :; }
is_newest() { true; }
is_ours() { true; }
requeue() { echo "requeued: $1"; }
nothing_to_save=$1
eval "$3"
finish $2 ''
"""


@pytest.mark.parametrize(
    ("evaluates", "code", "warned", "said", "ends"),
    [
        ("", 85, True, ["requeued: stopped at step 0"], 0),
        ("", 1, True, ["requeued: stopped at step 0"], 0),  # ended by the hard timer
        ("", 1, False, [], 1),
        ("", 2, True, [], 2),
        ("", 87, True, [], 87),
        (" before its end", 1, True, ["the step is ended", "requeued: stopped before its end"], 0),
        (" before its end", 1, False, [], 1),
        (" before its end", 1, "steps", ["requeued: stopped before its end"], 0),
    ],
)
def test_how_a_start_ends(job, evaluates, code, warned, said, ends):
    """An evaluation has nothing to save: at the warning it ends at once, to come back whole; also
    where only the steps have heard it."""
    heard = {True: "on_usr1; on_usr1", "steps": ': >"$COMA_DS_CONTROL/stop"'}.get(warned, "")
    call = ["bash", "-c", END, "bash", evaluates, str(code), heard]
    done = subprocess.run(call, cwd=ROOT, env=job, capture_output=True, text=True)
    assert (done.returncode, done.stdout.splitlines()) == (ends, said), done.stderr


@pytest.mark.parametrize("timed_out", [True, False])
def test_ranks_that_the_script_ended_are_not_called_killed_from_outside(job, timed_out):
    mark = 'touch "$COMA_DS_RANK_REPORTS/timed-out"' if timed_out else ":"
    script = END.replace("finish $2 ''", f"{mark}; finish $2 'error: ended without a word'")
    call = ["bash", "-c", script, "bash", "", "1", "on_usr1"]
    done = subprocess.run(call, cwd=ROOT, env=job, capture_output=True, text=True)
    assert done.stdout == "requeued: stopped at step 0\n"
    assert ("ended without a word" in done.stderr) != timed_out


INSIDE = """#!/bin/bash
while [[ $1 == --* ]]; do options+=" $1"; shift; done
echo "$options" >>"$SEEN"
PYTHONPATH=$PLACE exec "$@"
"""


@pytest.mark.parametrize("image", [True, False])
def test_a_container_that_srun_starts_has_the_package(job, tmp_path, image):
    """The batch script stands outside of it: its own calls of Python go through srun too."""
    (tmp_path / "srun").write_text(INSIDE)
    (tmp_path / "srun").chmod(0o755)
    python = tmp_path / "bare" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "bare"], check=True)
    options = "--container-image=x.sqsh --container-mounts=/a" if image else "-l"
    job |= {"COMA_SRUN": options, "COMA_PYTHON": str(python), "PLACE": str(ROOT)}
    job |= {"SEEN": str(tmp_path / "seen"), "PYTHONPATH": ""}
    call = ["bash", "-c", "source slurm/common.sh; find_package; echo $package"]
    done = subprocess.run(call, cwd=ROOT, env=job, capture_output=True, text=True)
    if not image:
        assert done.returncode == 2 and "Traceback" not in done.stderr
        assert "Python does not find coma_ds: install it there" in done.stderr
        return
    assert (done.returncode, done.stdout) == (0, f"{ROOT}/coma_ds\n"), done.stderr
    assert (tmp_path / "seen").read_text().endswith(f" --overlap --quiet --mpi=none {options}\n")


def test_launchers_do_not_look_into_the_current_folder(job):
    """``-m coma_ds...`` below them is the package that was found, not that of the folder."""
    below = "import sys; print(sys.flags.safe_path)"
    look = f"import subprocess, sys; subprocess.run([sys.executable, '-c', '{below}'])"
    script = 'source slurm/common.sh; eval "python=($COMA_PYTHON_COMMAND)"; "${python[@]}" -c "$0"'
    call = ["bash", "-c", script, look]
    done = subprocess.run(call, cwd=ROOT, env=job, capture_output=True, text=True)
    assert done.stdout == "True\n", done.stderr


@pytest.mark.parametrize("python", ["/nonexistent/python", "false"])
def test_a_python_that_is_none(job, python):
    script = "source slurm/common.sh; find_package"
    job |= {"COMA_PYTHON": python}
    call = ["bash", "-c", script]
    done = subprocess.run(call, cwd=ROOT, env=job, capture_output=True, text=True)
    assert done.returncode == 2 and "Python does not find coma_ds: install it there" in done.stderr
    assert ("No such file" in done.stderr) == ("/" in python)


@pytest.mark.parametrize("name", ["compress", "match", "evaluate"])
def test_submitted_from_elsewhere(tmp_path: Path, name: str):
    environment = os.environ | {"SLURM_JOB_ID": "1", "SLURM_SUBMIT_DIR": str(tmp_path)}
    script = f"{ROOT}/slurm/{name}.sh"
    done = subprocess.run([script], env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == "error: submit from the root of the repository\n"
