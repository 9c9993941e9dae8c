"""Whole jobs of the trainer, and what clusters do to them.

A run that was stopped, killed and moved must have the losses of the one that was left alone.
"""

from __future__ import annotations

import json
import signal

import pytest

from tests.cluster.jobs import SMALL, STEPS, Job, Jobs
from tests.cluster.virtual import VirtualCluster, wait_for

NO_PREFLIGHT = {"COMA_PREFLIGHT": "0"}  # it has its own tests
pytestmark = pytest.mark.usefixtures("calm")

# What a user sees of a job in which nothing happens: the first words of its lines.
EXPECTED = {
    "job:", "preflight:", "coma-ds", "model", "trained", "world", "attention", "loss", "images",
    "batch", "steps", "data", "step", "checkpoint", "done:",
}  # fmt: skip


def without_exit_barrier(log: str) -> list[str]:
    """The lines of a log, without what torchrun's agent (torch 2.13) now and then says after a good
    end: that of the first node, which holds their store, was gone before it."""
    lines = [line for line in log.splitlines() if line.strip()]
    if "Error waiting on exit barrier" not in log:
        return lines
    trace = ("[W", "Exception raised from recvBytes", "frame #", "<omitting python frames>")
    agent = "torch/distributed/elastic/agent/server/api.py"
    return [line for line in lines if not line.startswith(trace) and agent not in line]


def names_and_numbers(lines: str) -> dict[str, int]:
    """What slurm/pipeline.sh says that it has submitted."""
    words = [line.replace(",", " ").split() for line in lines.splitlines()]
    return {word[0]: int(word[1]) for word in words}


@pytest.fixture(scope="module")
def pipeline(jobs: Jobs, cluster: VirtualCluster) -> dict[str, Job]:
    """Both stages and their evaluation, with dependencies; nothing happens to them."""
    output = jobs.shared / "pipeline"
    log = f"--output={jobs.shared}/%x-%j.log"
    words = [f"compress:{word}" for word in SMALL]
    words += [f"match:{word}" for word in SMALL if not word.startswith("eval.")]
    words += ["match:optim.steps=2", "match:eval.every=0", "match:eval.sets=[name_t2i/unseen]"]
    said = jobs.command("slurm/pipeline.sh", log, "demo", f"output={output}", *words)
    found = {
        name: Job(cluster, jobs.shared, name, number, output / name)
        for name, number in names_and_numbers(said).items()
    }
    assert list(found) == ["compress", "match", "evaluate"]
    waiting = cluster.job(found["evaluate"].number)
    assert waiting["Dependency"].startswith(f"afterok:{found['match'].number}")
    for job in found.values():
        job.wait()
    return found


@pytest.fixture(scope="module")
def undisturbed(pipeline: dict[str, Job]) -> list[tuple[int, float]]:
    """The losses of a run that nothing happens to, on two nodes."""
    return pipeline["compress"].losses()


def test_a_job_on_two_nodes_from_one_end_to_the_other(pipeline):
    job = pipeline["compress"]
    assert job.wait()["JobState"] == "COMPLETED", job.log
    assert {line.split()[0] for line in without_exit_barrier(job.log)} <= EXPECTED, job.log
    assert "world      2 rank(s) on cpu, ZeRO-3 (zero3, weights whole)" in job.log
    assert [step for step, _ in job.losses()] == list(range(1, STEPS + 1))
    assert (job.run / "model" / "model.safetensors").is_file()
    assert job.published == STEPS


def test_the_pipeline(pipeline):
    ends = [pipeline[name].wait() for name in ("compress", "match", "evaluate")]
    logs = "\n".join(job.log for job in pipeline.values())
    assert [end["JobState"] for end in ends] == ["COMPLETED"] * 3, logs
    assert ends[0]["EndTime"] <= ends[1]["StartTime"] <= ends[1]["EndTime"] <= ends[2]["StartTime"]
    assert f"from {pipeline['compress'].run}/model" in pipeline["match"].log
    results = json.loads((pipeline["match"].run / "results.json").read_text())
    assert set(results["sets"]) == {"name_t2i/unseen"}


def test_what_preflight_keeps_of_it(pipeline):
    control = pipeline["compress"].control
    mechanics = json.loads((control / "ds_config.json").read_text())
    assert mechanics["zero_optimization"]["stage"] == 3
    assert "\ndeepspeed 0." in (control / "versions.txt").read_text()


def test_time_limit_and_killed_worker_under_deepspeed(jobs, undisturbed):
    """The warning comes between 10 and 40 s after the start: the run is held until it does."""
    more = NO_PREFLIGHT | {"COMA_LAUNCHER": "deepspeed", "COMA_DS_LEAD_SECONDS": "50"}
    job = jobs.submit("limited", "--time=1", "--signal=B:USR1@50", **more)
    warning = (
        "job: SLURM warns of the end (time limit or pre-emption): asked the ranks to save and stop"
    )
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
    assert job.losses() == undisturbed


def test_preempted_lost_crashed_and_cancelled_under_torchrun(jobs, cluster, undisturbed):
    """On one node of the two, so that it can go on when SLURM loses its node."""
    job = jobs.submit("moved", "--nodes=1", **NO_PREFLIGHT)
    job.wait_for_step(3)
    urgent = ("--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null")
    jobs.command("sbatch", *urgent, "--wrap", "sleep 1")
    job.wait_for_start(1)
    first, _, _ = job.log.partition("restart 1: ")
    assert "asked the ranks to save and stop" in first, first
    assert f"job: ended by SLURM at step {job.published}\n" in first, first
    assert job.published >= 3

    # SLURM starts the job on the other node, while its old rank lives on
    node = cluster.job(job.number)["NodeList"]
    other = next(name for name in cluster.nodes if name != node)
    job.wait_for_published(job.published + 1)
    old = job.signal_rank(node, signal.SIGSTOP)
    cluster.kill_slurmd(node)
    job.wait_for_words("SLURM has taken this job from this node: this start of it ends")
    job.wait_for_words("is taken over from start")
    assert f"restart 2: 1 node(s) {other}," in job.log
    assert cluster.rank(node, job.number) == old
    job.wait_for_published(job.published + 1)
    job.signal_rank(node, signal.SIGCONT)
    wait_for(
        lambda: not cluster.rank(node, job.number), 60, "the old rank is gone", log=lambda: job.log
    )
    cluster.start_slurmd(node)

    cluster.crash(other)
    job.wait_for_start(3)
    job.wait_for_words(f"restart 3: 1 node(s) {node},")
    cluster.power_on(other)

    job.wait_for_published(job.published + 1)
    jobs.command("scancel", str(job.number))
    found = job.wait()
    job.wait_for_words(f"job: ended by SLURM at step {job.published}\n")
    assert (found["JobState"], found["Restarts"]) == ("CANCELLED", "3")
    losses = job.losses()
    steps = [step for step, _ in losses]
    assert steps == list(range(1, len(steps) + 1)) and job.published == len(steps)
    assert (job.run / "checkpoints" / f"step-{job.published:08d}" / "manifest.json").is_file()
    # another world size than that of the run beside it: the same batches, bf16
    for (_, mine), (_, theirs) in zip(losses, undisturbed):
        assert mine == pytest.approx(theirs, rel=0.05)


def test_what_follows_a_failed_stage_is_not_left_waiting(jobs, cluster: VirtualCluster):
    log = f"--output={jobs.shared}/%x-%j.log"
    said = jobs.command("slurm/pipeline.sh", "--nodes=1", log, "output=/proc/none")
    numbers = names_and_numbers(said)
    first = numbers["compress"]
    assert cluster.wait_for_state(first, "FAILED")["ExitCode"] == "2:0"
    text = (jobs.shared / f"compress-{first}.log").read_text()
    assert "output /proc/none/compress cannot be written" in text
    for name in ("match", "evaluate"):
        cluster.wait_for_state(numbers[name], "CANCELLED", limit=60)
