"""What the batch script makes of each end of a start; a stub stands for the trainer."""

from __future__ import annotations

import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from tests.cluster.jobs import ROOT, Job, Jobs
from tests.cluster.virtual import VirtualCluster

SECRET = "hush-4711"
LONG = "600"


@pytest.fixture(scope="module")
def root(jobs: Jobs) -> Path:
    """A repository, in a folder with a space, whose package is ours but for the trainer."""
    folder = jobs.shared / "a stub"
    (folder / "coma_ds").mkdir(parents=True)
    for path in (ROOT / "coma_ds").iterdir():
        if path.name not in ("train.py", "__pycache__"):
            (folder / "coma_ds" / path.name).symlink_to(path)
    shutil.copytree(ROOT / "slurm", folder / "slurm", ignore=shutil.ignore_patterns("site.env"))
    options = "--nodes=1 --job-name=itself --output=$COMA_SHARED/%x-%j.log"
    (folder / "slurm" / "site.env").write_text(f'COMA_SBATCH="{options}"\n')
    source = Path(__file__).parent / "stub" / "coma_ds" / "train.py"
    (folder / "coma_ds" / "train.py").write_text(source.read_text())
    return folder


@pytest.fixture(scope="module")
def submitted(root: Path, jobs: Jobs, cluster: VirtualCluster):
    """All jobs of this file, at once: they cost nothing but their launchers."""
    light = {"COMA_PREFLIGHT": "0", "COMA_MAX_RESTARTS": "1", "PYTHONPATH": str(root)}

    def submit(name: str, how: str, *options: str, steps: str = "3", **more: str) -> Job:
        words, stub = ("demo-compress", "optim.steps=3"), {"STUB_HOW": how, "STUB_STEPS": steps}
        nodes = ("--nodes=1",) if "--nodes=2" not in options else ()
        return jobs.submit(name, *nodes, *options, words=words, root=root, **(light | stub | more))

    lead = {"COMA_DS_LEAD_SECONDS": "6"}
    words = ("demo-compress", "optim.steps=3")
    said = jobs.command("slurm/compress.sh", *words, root=root, STUB_STEPS="3", **light)
    itself = int(said.removeprefix("Submitted batch job "))
    yield {
        "itself": Job(cluster, jobs.shared, "itself", itself, jobs.shared / "itself"),
        "well": submit("well", "well", "--nodes=2", TEST_SECRET=SECRET, MY_PWD=SECRET, SITE_URL=f"https://me:{SECRET}@x/y"),
        "user": submit("user", "user's error"),
        "modules": submit("modules", "well", COMA_MODULES="none-such"),
        "refused": submit("refused", "well", "--no-requeue", steps="60"),
        "fault": submit("fault", "fault"),
        "limit": submit("limit", "fault after a step", steps=LONG),
        "held": submit("held", "held"),
        "elsewhere": submit("elsewhere", "well", "--nodes=1", PYTHONPATH=str(ROOT)),
        "newer": submit("newer", "newer"),
        "stop": submit("stop", "well", steps="60"),
        "hang": submit("hang", "hang", steps=LONG, **lead),
        "array": submit("array", "well", "--array=0-1", steps="60"),
        "killed": submit("killed", "well", "--nodes=2", steps="60"),
        "killed deepspeed": submit(
            "killed-deepspeed", "well", "--nodes=2", steps="60", COMA_LAUNCHER="deepspeed"
        ),
        "cancelled": submit("cancelled", "well", "--nodes=2", steps="600"),
        "first": submit("single", "well", "--dependency=singleton", steps="15"),
        "second": submit("single", "well", "--dependency=singleton", steps="15"),
    }  # fmt: skip
    cluster.clear()


def ended(job: Job) -> tuple[str, str, int]:
    """State, exit code and restarts of a job at its end."""
    found = job.wait()
    return found["JobState"], found["ExitCode"].split(":")[0], int(found["Restarts"])


def ask_to_stop(job: Job, task: str = "") -> None:
    """What SLURM does before the end of the time; to one ``task`` of an array."""
    job.wait_for_published(1)
    job.cluster.run("scancel", "--signal=USR1", "--batch", f"{job.number}{task}")


def test_stopped_jobs_come_back_and_end(submitted):
    """Asked first of all, while the others run."""
    for name in ("stop", "hang", "refused"):
        ask_to_stop(submitted[name])
    ask_to_stop(submitted["array"], task="_1")  # the one with the number of the whole
    for name in ("killed", "killed deepspeed"):
        submitted[name].wait_for_published(1)
        submitted[name].signal_rank("node2", signal.SIGKILL)
    submitted["cancelled"].wait_for_published(1)
    submitted["cancelled"].cluster.run("scancel", str(submitted["cancelled"].number))
    job = submitted["stop"]
    assert ended(job) == ("COMPLETED", "0", 1), job.log
    assert "job: requeued, restart 1 of at most 1: stopped at step" in job.log
    assert "done in start 1" in job.log and job.log.endswith("job: finished\n")


def test_a_job_that_goes_well(submitted):
    job = submitted["well"]
    assert ended(job) == ("COMPLETED", "0", 0), job.log
    lines = job.log.splitlines()
    assert lines[0].startswith(f"job: well {job.number}, restart 0: 2 node(s) node[1-2], 1 rank(s)")
    assert lines[1:] == ["done in start 0", "done in start 0", "job: finished"]


def test_a_script_that_is_run_submits_itself_with_the_sites_options(submitted):
    job = submitted["itself"]
    assert ended(job) == ("COMPLETED", "0", 0), job.log
    lines = job.log.splitlines()
    assert lines[0].startswith(f"job: itself {job.number}, restart 0: 1 node(s)")
    assert lines[1:] == ["done in start 0", "job: finished"]


def test_what_is_kept_of_a_job(submitted, jobs):
    job = submitted["well"]
    job.wait()
    found = {path.name for path in job.control.iterdir()}
    kept = {"config.yaml", "commit.txt", "environment.txt", "job.txt", "starts"}
    assert kept <= found
    assert "optim:" in (job.control / "config.yaml").read_text()
    package = jobs.shared / "a stub" / "coma_ds"
    assert (job.control / "commit.txt").read_text() == f"no git at {package}\n"
    environment = (job.control / "environment.txt").read_text()
    assert "\nCOMA_LAUNCHER=torchrun\n" in environment
    assert "TEST_API_KEY=" in environment and "TEST_SECRET=***\n" in environment
    assert SECRET not in environment and "not to be seen" not in environment
    assert (job.control / "environment.txt").stat().st_mode & 0o077 == 0


def test_the_code_that_runs_is_the_one_that_is_written_down(submitted, jobs):
    """The package that Python finds, wherever the job was submitted."""
    job = submitted["elsewhere"]
    job.wait()
    said = f"job: the code that runs is that of {ROOT}/coma_ds, not of {jobs.shared}/a stub"
    assert job.log.splitlines()[1] == said
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    assert (job.control / "commit.txt").read_text() == head.stdout
    diff = subprocess.run(["git", "diff", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    assert (job.control / "diff.patch").read_text() == diff.stdout
    assert "s of training)" in job.log and "done in start" not in job.log  # of our trainer, no stub


def test_a_users_error_is_said_and_not_tried_again(submitted):
    job = submitted["user"]
    assert ended(job) == ("FAILED", "2", 0)
    assert job.log.splitlines()[-1] == "error: unknown key"


def test_a_node_without_modules(submitted):
    assert ended(submitted["modules"])[:2] == ("FAILED", "2")
    words = "job: error: COMA_MODULES is 'none-such': this node has no command 'module'\n"
    assert submitted["modules"].log.endswith(words)


def test_a_requeue_that_slurm_refuses_is_said(submitted):
    assert ended(submitted["refused"]) == ("FAILED", "85", 0)
    assert submitted["refused"].log.endswith("job: not started again: SLURM refused the requeue\n")


def test_a_fault_without_a_step_is_not_tried_again(submitted):
    job = submitted["fault"]
    assert ended(job) == ("FAILED", "1", 0)
    assert job.log.splitlines()[-2:] == [
        "error: RuntimeError: at once",
        "job: not started again: no step was published since step 0",
    ]


def test_a_fault_after_a_step_is_tried_again_up_to_the_limit(submitted):
    job = submitted["limit"]
    assert ended(job) == ("FAILED", "1", 1)
    assert job.log.count("error: RuntimeError: after a step") == 2
    assert "job: requeued, restart 1 of at most 1: a fault after step 1 was published" in job.log
    last = "job: not started again: 1 restarts are the limit (COMA_MAX_RESTARTS)"
    assert job.log.splitlines()[-1] == last


def test_a_held_run_stays_and_nothing_goes_on_from_it(submitted):
    job = submitted["held"]
    assert ended(job) == ("FAILED", "87", 0)
    assert "held by the switch control/stop of the run" in job.log


def test_an_older_start_ends_without_a_requeue(submitted):
    job = submitted["newer"]
    assert ended(job) == ("COMPLETED", "0", 0)
    assert job.log.endswith("job: this job runs elsewhere by now: this start of it ends\n")


def test_ranks_that_do_not_stop_are_ended_in_time(submitted):
    job = submitted["hang"]
    job.wait_for_words("job: the ranks did not stop within 4 s: they are ended")
    job.wait_for_words("requeued, restart 1 of at most 1: stopped at step")


@pytest.mark.parametrize("name", ["killed", "killed deepspeed"])
def test_a_killed_rank_fails_the_start_and_the_next_goes_on(submitted, name):
    """Whatever the launcher's exit code is."""
    job = submitted[name]
    assert ended(job) == ("COMPLETED", "0", 1), job.log
    assert "error: rank 1 on node2 ended without a word: killed from outside" in job.log
    assert "requeued, restart 1 of at most 1: a fault after step" in job.log
    assert job.log.count("done in start 1") == 2


def test_a_cancelled_job_saves_and_stays_away(submitted):
    job = submitted["cancelled"]
    found = job.wait()
    assert (found["JobState"], found["Restarts"]) == ("CANCELLED", "0")
    assert f"job: ended by SLURM at step {job.published}\n" in job.log
    assert (job.control / "stop").exists()


def test_a_task_of_an_array_is_requeued_alone(submitted, jobs):
    """The last task of an array has the number of the whole."""
    first = submitted["array"]
    numbers = [int(path.name.split("-")[1]) for path in first.control.parent.glob("array-*")]
    assert len(numbers) == 2 and first.number in numbers
    restarts = {}
    for number in numbers:
        task = Job(first.cluster, first.shared, "array", number, first.run)
        state, _, restarts[number] = ended(task)
        assert state == "COMPLETED", task.log
    assert restarts == {number: int(number == first.number) for number in numbers}


def test_singletons_run_one_after_the_other(submitted):
    first, second = submitted["first"].wait(), submitted["second"].wait()
    assert first["JobState"] == second["JobState"] == "COMPLETED"
    assert second["StartTime"] >= first["EndTime"]
