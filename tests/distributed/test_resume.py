"""An interrupted run goes on as if nothing had happened, or says why it cannot."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.distributed.harness import run_world

# Adapters with dropout and a learning rate that falls: all that a step depends on.
RUN = [
    "optim.steps=6", "checkpoint.every=2", "checkpoint.keep_last=0",
    "model.adapter=lora", "model.lora.dropout=0.3",
    "optim.schedule=cosine", "deepspeed=zero3",
]  # fmt: skip
MEASURED = [*RUN, "eval.every=2", "eval.bottleneck_questions=4"]
TARGET = "tests.distributed.training:train_each"


def shard(folder: Path, step: int) -> Path:
    """One rank's optimizer shard in a checkpoint."""
    return folder / "checkpoints" / f"step-{step:08d}" / "zero_pp_rank_1_mp_rank_00_optim_states.pt"


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("runs")
    return {name: root / name for name in ("whole", "cut", "none", "purpose", "measured", "ended")}


@pytest.fixture(scope="module")
def ranks(folders) -> list[dict[str, dict]]:
    """The runs by name, of each rank, one world in which they follow each other."""
    cut = {"output": str(folders["cut"]), "arguments": RUN}
    none = {"output": str(folders["none"]), "arguments": ["optim.steps=2", "deepspeed=zero0"]}
    whole = shard(folders["whole"], 4).parent
    wanted = {
        "whole": {"output": str(folders["whole"]), "arguments": RUN},
        "interrupted": {**cut, "stop_after": 5},
        "resumed": cut,
        "again": cut,
        "another rate": {**cut, "arguments": [*RUN, "optim.lr=7e-4"]},
        "fewer steps": {**cut, "arguments": [*RUN, "optim.steps=3"]},
        "another adapter": {**cut, "arguments": [*RUN, "model.adapter=dora"]},
        "another rate on purpose": {
            "output": str(folders["purpose"]),
            "arguments": [*RUN, "optim.lr=7e-4", f"checkpoint.resume={whole}"],
        },
        "after damage": {**cut, "cut": [str(shard(folders["cut"], 6))]},
        "once more": cut,
        "asked for a broken one": {
            "output": str(folders["cut"]),
            "arguments": [*RUN, f"checkpoint.resume={shard(folders['cut'], 2).parent}"],
            "cut": [str(shard(folders["cut"], 2))],
        },
        "all broken": {**cut, "cut": [str(shard(folders["cut"], step)) for step in (4, 6)]},
        "without checkpoints": {**none, "stop_after": 1},
        "started over": none,
        "finished": none,
        "evaluated": {"output": str(folders["measured"]), "arguments": MEASURED},
        "ended in an evaluation": {
            "output": str(folders["ended"]),
            "arguments": MEASURED,
            "stop_in": 4,
        },
        "evaluated after it": {"output": str(folders["ended"]), "arguments": MEASURED},
        "replaced": {**none, "arguments": [*none["arguments"], "checkpoint.resume=none"]},
    }
    found = run_world(2, TARGET, runs=list(wanted.values()))
    return [dict(zip(wanted, rank)) for rank in found]


@pytest.fixture(scope="module")
def runs(ranks) -> dict[str, dict]:
    """Those of rank 0, which speaks and writes."""
    return ranks[0]


def losses(run: dict) -> list[tuple]:
    """What each step measured that does not depend on the clock."""
    names = ("step", "loss", "answer_accuracy", "lr", "grad_norm")
    return [tuple(line[name] for name in names) for line in run["lines"]]


def test_a_resumed_run_ends_bit_equal_to_an_uninterrupted_one(runs):
    assert "interrupted" in runs["interrupted"]["said"]
    assert any("step 4 of 6" in line for line in runs["resumed"]["said"])
    assert [step for step, *_ in losses(runs["resumed"])] == [1, 2, 3, 4, 5, 6]
    assert losses(runs["resumed"]) == losses(runs["whole"])
    assert runs["resumed"]["weights"] == runs["whole"]["weights"] != ""
    assert len({loss for _, loss, *_ in losses(runs["whole"])}) == 6


def test_every_rank_sees_the_same_samples_and_random_numbers(ranks):
    for rank in ranks:
        whole, resumed = rank["whole"]["seen"], rank["resumed"]["seen"]
        assert [step for step, *_ in whole] == [1, 2, 3, 4, 5, 6]
        assert resumed == whole[4:]
        assert len({state for *_, state in whole}) == 6
    first, second = (rank["whole"]["seen"] for rank in ranks)
    for (_, samples, state), (_, others, another) in zip(first, second):
        assert not set(samples) & set(others) and state != another


def test_a_run_that_is_ended_in_an_evaluation_loses_no_step(runs):
    """Its checkpoint stands before that; the evaluation is made up for."""
    assert "step 4 of 6" in "".join(runs["evaluated after it"]["said"])
    assert [step for step, *_ in runs["evaluated after it"]["seen"]] == [5, 6]

    def measured(name: str) -> list[dict]:
        aside = ("time", "training_seconds")
        return [
            {k: v for k, v in line.items() if k not in aside} for line in runs[name]["evaluations"]
        ]

    assert [line["step"] for line in measured("ended in an evaluation")] == [2]
    assert [line["step"] for line in measured("evaluated")] == [2, 4]
    assert measured("evaluated after it") == measured("evaluated")
    assert losses(runs["evaluated after it"]) == losses(runs["whole"])


def test_each_step_stands_once_in_tensorboard(runs, folders):
    """Also the step that was logged before the interruption and taken again after it."""
    board = EventAccumulator(str(folders["cut"] / "tensorboard"), size_guidance={"scalars": 0})
    board.Reload()
    curve = Counter(event.step for event in board.Scalars("train/loss"))
    assert curve == Counter(range(1, 7))
    whole = EventAccumulator(str(folders["whole"] / "tensorboard")).Reload()
    expected = [event.value for event in whole.Scalars("train/loss")]
    assert [event.value for event in board.Scalars("train/loss")] == expected


def test_a_finished_run_takes_no_step_again(runs):
    assert "is finished, 6 steps: nothing to do" in runs["again"]["said"][-1]
    assert losses(runs["again"]) == losses(runs["whole"])
    assert runs["again"]["weights"] == runs["whole"]["weights"]


def test_a_broken_checkpoint_falls_back_to_the_one_before(runs, folders):
    said = "\n".join(runs["after damage"]["said"])
    name = shard(folders["cut"], 6).name
    assert f"{name} is missing or not" in said and "falling back to the one before" in said
    assert "step 4 of 6" in said
    assert runs["after damage"]["weights"] == runs["whole"]["weights"]
    assert (folders["cut"] / "checkpoints" / "broken-step-00000006").is_dir()
    # and the step is published again, whole
    assert "is finished, 6 steps: nothing to do" in runs["once more"]["said"][-1]


def test_a_broken_checkpoint_that_was_asked_for_is_an_error(runs):
    (error,) = [line for line in runs["asked for a broken one"]["said"] if "error" in line]
    assert "step-00000002" in error and "is missing or not" in error


def test_a_run_never_starts_over_silently(runs):
    (error,) = [line for line in runs["all broken"]["said"] if line.startswith("error")]
    assert "no checkpoint is whole" in error and "checkpoint.resume=none starts over" in error
    assert losses(runs["all broken"]) == losses(runs["whole"])  # the record stands
    assert any("no checkpoint to go on from" in line for line in runs["started over"]["said"])
    assert not any("no checkpoint" in line for line in runs["without checkpoints"]["said"])


def error_of(run: dict) -> str:
    (error,) = [line for line in run["said"] if line.startswith("error")]
    return error


def test_a_run_goes_on_with_its_own_config_only(runs, folders):
    whole = shard(folders["whole"], 4).parent
    assert "made with another config (optim.lr: " in error_of(runs["another rate"])
    assert "-> 0.0007): give the same one, go on with" in error_of(runs["another rate"])
    assert "is at step 6, optim.steps is 3" in error_of(runs["fewer steps"])
    assert "is of another run (model.adapter: lora -> dora)" in error_of(runs["another adapter"])
    purpose = runs["another rate on purpose"]["said"]
    assert any("changed since the checkpoint: optim.lr: " in line for line in purpose)
    assert any(f"resumed {whole}: step 4 of 6" in line for line in purpose)


def test_a_finished_run_is_replaced_on_purpose_only(runs):
    assert "holds a finished run: give another output" in error_of(runs["finished"])
    assert not any(line.startswith("error") for line in runs["replaced"]["said"])
    assert [step for step, *_ in losses(runs["replaced"])] == [1, 2]


def test_a_checkpoint_says_what_it_holds(runs, folders):
    checkpoint = shard(folders["whole"], 6).parent
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    assert (manifest["step"], manifest["world"], manifest["stage"]) == (6, 2, 3)
    held = {str(p.relative_to(checkpoint)) for p in checkpoint.rglob("*") if p.is_file()}
    assert set(manifest["files"]) == held - {"manifest.json"}
    assert (checkpoint.parent / "latest").read_text() == "step-00000006"
