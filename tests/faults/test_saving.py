"""What befalls a run while it trains: it saves, stops, skips or gives way, and nothing is lost."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from coma_ds.manifest import problems, published
from tests.distributed.harness import run_world

TARGET = "tests.faults.saving_runs:run_each"
RUN = ["optim.steps=6", "checkpoint.every=2", "model.adapter=lora", "model.lora.dropout=0.3"]
FULL = ["optim.steps=4", "logging.tensorboard=false"]
STAGES = {
    f"{zero} {precision}": [f"deepspeed={zero}", f"precision={precision}"]
    for zero, precision in (
        ("zero0", "fp32"), ("zero0", "bf16"), ("zero1", "fp32"), ("zero2", "bf16"),
        ("zero3", "fp32"), ("zero3", "bf16"),
    )
}  # fmt: skip


def run(folder: Path, *more: str, base: list[str] = RUN, **events: str) -> dict:
    happens = {step.removeprefix("at_"): what for step, what in events.items()}
    return {"output": str(folder), "arguments": [*base, *more], "events": happens}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module")
def runs(place) -> dict[str, list[dict]]:
    """Both ranks of each run, one after the other in one world of two."""
    seldom = ["checkpoint.every=5", "optim.steps=6"]
    wanted = {
        "whole": run(place / "whole"),
        "signal": run(place / "signal", *seldom, at_3="signal"),
        "signal, again": run(place / "signal", *seldom),
        "saved": run(place / "saved", *seldom, at_3="touch control/save"),
        "held": run(place / "held", *seldom, at_3="touch control/stop"),
        "held, again": run(place / "held", *seldom),
        "taken": run(place / "taken", at_3="take-over"),
    }
    found = run_world(2, TARGET, runs=list(wanted.values()))
    return {name: list(pair) for name, pair in zip(wanted, zip(*found))}


def losses(run: dict) -> list[tuple]:
    return [(line["step"], line["loss"], line["grad_norm"]) for line in run["lines"]]


def steps(folder: Path) -> list[int]:
    return [int(p.name[5:]) for p in published(folder / "checkpoints")]


def test_a_signal_to_one_rank_stops_all_of_them(runs, place):
    first, second = runs["signal"]
    assert first["code"] == second["code"] == 85
    assert first["said"][-1] == "stopped after step 3, which is saved: start it again to go on"
    again = runs["signal, again"][0]
    assert any("step 3 of 6" in line for line in again["said"])
    assert losses(again) == losses(runs["whole"][0])
    assert again["weights"] == runs["whole"][0]["weights"] != ""


def test_a_checkpoint_on_demand(runs, place):
    assert runs["saved"][0]["code"] == 0
    assert steps(place / "saved") == [6, 5]  # and 3, until it was one too many
    assert any("checkpoint of step 3: " in line for line in runs["saved"][0]["said"])
    assert not (place / "saved" / "control" / "save").exists()
    assert runs["saved"][0]["weights"] == runs["whole"][0]["weights"]


def test_a_run_that_is_held(runs, place):
    assert runs["held"][0]["code"] == runs["held"][1]["code"] == 87
    assert "stopped after step 3, which is saved: held by control/stop" in runs["held"][0]["said"]
    assert steps(place / "held") == [3]
    again = runs["held, again"]
    assert [r["code"] for r in again] == [2, 2]
    assert "control/stop holds this run: remove the file to go on" in again[0]["said"][-1]


def test_a_folder_that_a_newer_start_took_is_left_alone(runs, place):
    assert [r["code"] for r in runs["taken"]] == [86, 86]
    assert "is owned by a newer start of this run" in runs["taken"][0]["said"][-1]
    assert steps(place / "taken") == [2]
    assert [line["step"] for line in runs["taken"][0]["lines"]] == [1, 2, 3]


@pytest.fixture(scope="module")
def broken(place) -> dict[str, list[dict]]:
    """Runs in which one rank has a gradient that is not finite, or a loss jumps."""
    wanted = {}
    for name, how in STAGES.items():
        folder = place / name.replace(" ", "-")
        wanted[name] = run(folder, *how, base=FULL, at_3="nan")
        other, jumps = folder.with_name(f"{folder.name}-jump"), [*how, "guard.skip_spikes=true"]
        wanted[f"{name} jump"] = run(other, *jumps, base=FULL, at_2="low 0.001")
    end = run(place / "nan-end", base=FULL, at_2="nan", at_3="nan")
    end["arguments"].append("guard.skips_in_a_row=2")
    found = run_world(2, TARGET, runs=[*wanted.values(), end])
    return {name: list(pair) for name, pair in zip([*wanted, "end"], zip(*found))}


@pytest.mark.parametrize("name", STAGES)
def test_a_gradient_that_is_not_finite_on_one_rank_is_skipped_on_all(broken, place, name):
    first, second = broken[name]
    assert first["code"] == second["code"] == 0
    assert [line["skipped"] for line in first["lines"]] == [0.0, 0.0, 1.0, 0.0]
    assert all("step 3 was skipped on every rank" in "\n".join(r["said"]) for r in (first, second))
    assert all(line["loss"] == line["loss"] for line in first["lines"])  # no nan afterwards
    (line,) = (place / name.replace(" ", "-") / "skipped.jsonl").read_text().splitlines()
    samples = json.loads(line)["samples"]
    assert len(samples) == 8 and all(source == "dialogues" for source, _ in samples)


@pytest.mark.parametrize("name", STAGES)
def test_a_jump_can_be_left_out(broken, place, name):
    first = broken[f"{name} jump"][0]
    assert [line["skipped"] for line in first["lines"]] == [0.0, 0.0, 1.0, 1.0]
    assert "far above the last ones (median 0.001); the step is left out" in "\n".join(
        first["said"]
    )


def test_skipped_steps_change_nothing(broken):
    """The third step is left out: the fourth starts from what the second left."""
    for name in STAGES:
        skipped, jumped = broken[name][0], broken[f"{name} jump"][0]
        for line, other in zip(skipped["lines"][:3], jumped["lines"][:3]):
            assert line["loss"] == other["loss"], name
        assert skipped["lines"][3]["loss"] == jumped["lines"][3]["loss"], name


def test_too_many_in_a_row_end_the_run(broken):
    assert [r["code"] for r in broken["end"]] == [2, 2]
    assert "2 steps in a row were skipped, the last is 3" in broken["end"][0]["said"][-1]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 40 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", str(folder)]
    done = subprocess.run(mount, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_costs_a_checkpoint_and_no_more(small_disk, runs):
    output = small_disk / "run"
    end = small_disk / "end"
    # step 4 finds no room, or the very first checkpoint
    wanted = [
        run(output, at_3="fill", at_5="free"),
        run(small_disk / "1", at_1="fill", at_3="free"),
    ]
    wanted += [run(end, at_5="fill"), run(end), run(end, at_0="free")]
    (first, other, full, refused, again), (_, _, *others, _) = run_world(2, TARGET, runs=wanted)
    told = "\n".join(first["said"])
    assert first["code"] == 0
    assert "no checkpoint of step 4: " in told
    assert other["code"] == 0 and "no checkpoint of step 2: " in "\n".join(other["said"])
    assert steps(small_disk / "1") == [6, 4] and losses(other) == losses(first)
    assert "cannot be written, 0 MB are free there" in told
    assert steps(output) == [6, 2]
    assert all(problems(p) == [] for p in published(output / "checkpoints"))
    assert not list((output / "checkpoints").glob("staging-*"))
    assert first["weights"] == runs["whole"][0]["weights"]
    assert [step for step, *_ in losses(first)] == [1, 2, 3, 4, 5, 6]
    # at the end there is nothing more to go on with: it says so, on every rank, and ends
    for rank in (full, others[0]):
        assert rank["code"] == 2
        assert f"{end}/model cannot be written, 0 MB are free there" in rank["said"][-1]
    for rank in (refused, others[1]):
        assert rank["code"] == 2
        assert f"output '{end}' cannot be used, 0 MB are free there" in rank["said"][-1]
    assert "no checkpoint of step 6: " in "\n".join(full["said"])
    assert again["code"] == 0 and again["weights"] == runs["whole"][0]["weights"]
    assert any("step 4 of 6" in line for line in again["said"])
    assert not list(end.glob(".model*"))
