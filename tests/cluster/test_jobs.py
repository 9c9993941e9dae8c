"""Whole jobs of the trainer, and what clusters do to them.

A run that was stopped, killed and moved must have the losses of the one that was left alone.
"""

from __future__ import annotations

import json
import signal

import pytest

from tests.cluster.jobs import STEPS, Job, Jobs
from tests.cluster.virtual import VirtualCluster, wait_for

NO_PREFLIGHT = {"COMA_PREFLIGHT": "0"}  # it has its own tests
pytestmark = pytest.mark.usefixtures("calm")

# What a user sees of a job in which nothing happens: the first words of its lines.
EXPECTED = {
    "job:", "preflight:", "coma-ds", "model", "trained", "world", "attention", "loss", "images",
    "batch", "steps", "data", "step", "checkpoint", "done:",
}  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(jobs: Jobs) -> Job:
    """A job that nothing happens to."""
    job = jobs.submit("compress")
    job.wait()
    return job


def test_a_job_on_two_nodes_from_one_end_to_the_other(undisturbed):
    job = undisturbed
    assert job.wait()["JobState"] == "COMPLETED", job.log
    assert {line.split()[0] for line in job.log.splitlines() if line} <= EXPECTED, job.log
    assert "world      2 rank(s) on cpu, ZeRO-3 (zero3)" in job.log
    assert [step for step, _ in job.losses()] == list(range(1, STEPS + 1))
    assert (job.run / "model" / "model.safetensors").is_file()
    assert job.published == STEPS


def test_what_preflight_keeps_of_it(undisturbed):
    control = undisturbed.control
    mechanics = json.loads((control / "ds_config.json").read_text())
    assert mechanics["zero_optimization"]["stage"] == 3
    assert "\ndeepspeed 0." in (control / "versions.txt").read_text()


def test_time_limit_and_killed_worker_under_deepspeed(jobs, undisturbed):
    """The warning comes between 10 and 40 s after the start: the run is held until it does."""
    more = NO_PREFLIGHT | {"COMA_LAUNCHER": "deepspeed", "COMA_DS_LEAD_SECONDS": "50"}
    job = jobs.submit("limited", "--time=1", "--signal=B:USR1@50", **more)
    warning = "job: the end of the time is near: asked the ranks to save and stop"
    wait_for(lambda: job.losses() or warning in job.log, 90, "a step", log=lambda: job.log)
    if warning not in job.log:
        job.signal_rank("node2", signal.SIGSTOP)
        job.wait_for_words(warning)
        job.signal_rank("node2", signal.SIGCONT)
    jobs.command("scontrol", "update", f"JobId={job.number}", "TimeLimit=60")

    job.wait_for_start(1)
    job.wait_for_published(job.published + 1)
    job.signal_rank("node2", signal.SIGKILL)
    job.wait_for_words("error: rank 1 on node2 ended without a word")
    job.wait_for_words("requeued, restart 2 of at most 20: a fault after step")

    found = job.wait()
    assert (found["JobState"], found["Restarts"]) == ("COMPLETED", "2"), job.log
    assert "job: requeued, restart 1 of at most 20: stopped at step" in job.log
    assert job.losses() == undisturbed.losses()


def test_preemption_killed_worker_and_dead_node_under_torchrun(jobs, cluster, undisturbed):
    job = jobs.submit("moved", **NO_PREFLIGHT)
    job.wait_for_step(3)
    more = ("--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null")
    jobs.command("sbatch", *more, "--wrap", "sleep 1")
    job.wait_for_start(1)
    first = job.log.split("restart 1: ")[0]
    assert "asked the ranks to save and stop" in first, first
    assert "job: ended by SLURM at step" in first, first
    saved = job.published
    assert saved >= 3, first

    job.wait_for_published(saved + 1)
    job.signal_rank("node2", signal.SIGKILL)
    job.wait_for_start(2)
    job.wait_for_step(job.published + 1)
    cluster.crash("node2")
    cluster.wait_for_state(job.number, "PENDING", "COMPLETING", limit=60)
    cluster.power_on("node2")

    found = job.wait()
    assert (found["JobState"], found["Restarts"]) == ("COMPLETED", "3"), job.log
    assert job.losses() == undisturbed.losses()


def test_a_lost_node_lives_on_and_gives_way(jobs, cluster):
    """SLURM starts the job again on node2, while its old ranks and script still run on node1."""
    job = jobs.submit("lost", "--nodes=1", **NO_PREFLIGHT)
    job.wait_for_step(6)
    old = job.signal_rank("node1", signal.SIGSTOP)
    cluster.kill_slurmd("node1")
    job.wait_for_words("SLURM has taken this job from this node: this start of it ends")
    job.wait_for_words("resumed")
    assert job.log.count("node(s) node2,") == 1, job.log
    assert cluster.rank("node1") == old
    job.signal_rank("node1", signal.SIGCONT)
    wait_for(lambda: not cluster.rank("node1"), 60, "the old rank is gone", log=lambda: job.log)

    found = job.wait()
    assert (found["JobState"], found["Restarts"]) == ("COMPLETED", "1"), job.log
    steps = [step for step, _ in job.losses()]
    assert steps == list(range(1, STEPS + 1))
    assert job.log.endswith("job: finished\n")


def test_a_cancelled_job_saves_and_stays_away(jobs):
    job = jobs.submit("cancelled", "--nodes=1", **NO_PREFLIGHT)
    job.wait_for_step(7)
    jobs.command("scancel", str(job.number))
    job.wait_for_words("job: ended by SLURM at step")
    found = job.wait()
    assert found["JobState"] == "CANCELLED" and found["Restarts"] == "0"
    last = job.losses()[-1][0]
    assert job.published == last and last < STEPS, job.log
    assert (job.run / "checkpoints" / f"step-{last:08d}" / "manifest.json").is_file()


def test_the_pipeline(jobs, cluster: VirtualCluster):
    output = jobs.shared / "pipeline"
    few = ("optim.steps=2", "optim.batch_size=8", "data.length=2000", "data.workers=0")
    words = (*few, "eval.at_end=false", "eval.every=0", "match:eval.sets=[name_t2i/unseen]")
    log = f"--output={jobs.shared}/%x-%j.log"
    command = ("slurm/pipeline.sh", "--nodes=1", log, "demo", f"output={output}", *words)
    lines = jobs.command(*command).splitlines()
    numbers = [int(line.split()[1].rstrip(",")) for line in lines]
    assert [line.split()[0] for line in lines] == ["compress", "match", "evaluate"]
    names = ("compress", "match", "evaluate")
    stages = [
        Job(cluster, jobs.shared, name, number, output / name)
        for name, number in zip(names, numbers)
    ]
    waiting = cluster.job(stages[2].number)
    assert waiting["Dependency"].startswith(f"afterok:{stages[1].number}")
    ends = [stage.wait() for stage in stages]
    assert [end["JobState"] for end in ends] == ["COMPLETED"] * 3, stages[-1].log
    assert ends[0]["EndTime"] <= ends[1]["StartTime"] <= ends[1]["EndTime"] <= ends[2]["StartTime"]
    assert f"from {output}/compress/model" in stages[1].log
    results = json.loads((output / "match" / "results.json").read_text())
    assert set(results["sets"]) == {"name_t2i/unseen"}


def test_what_follows_a_failed_stage_is_not_left_waiting(jobs, cluster: VirtualCluster):
    lines = jobs.command(
        "slurm/pipeline.sh", "--nodes=1", f"--output={jobs.shared}/%x-%j.log", "optim.stepz=1"
    ).splitlines()
    numbers = [int(line.split()[1].rstrip(",")) for line in lines]
    assert cluster.wait_for_state(numbers[0], "FAILED")["ExitCode"] == "2:0"
    log = (jobs.shared / f"compress-{numbers[0]}.log").read_text()
    assert "unknown key 'optim.stepz'; did you mean 'optim.steps'?" in log
    for number in numbers[1:]:
        cluster.wait_for_state(number, "CANCELLED", limit=60)
