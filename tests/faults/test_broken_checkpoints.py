"""The newest checkpoint is broken, or what is around it: the run goes on, from the one before."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.harness import run_world
from tests.distributed.test_resume import losses

RUN = ["optim.steps=6", "checkpoint.every=2", "checkpoint.keep_last=0", "deepspeed=zero3"]
SHARD = "zero_pp_rank_1_mp_rank_00_optim_states.pt"
# The step that the run goes on from, and what is said of the newest checkpoint, that of step 4.
KINDS = {
    "truncated": (2, f"{SHARD} is missing or not"),
    "flipped bit": (2, f"{SHARD} is not what was written"),
    "no shard": (2, f"{SHARD} is missing or not"),
    "no manifest": (2, "no readable manifest.json"),
    "half a manifest": (2, "no readable manifest.json"),
    "dangling pointer": (4, ""),
    "no pointer": (4, ""),
    "half a save": (4, ""),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("broken")


def folder(place: Path, kind: str) -> Path:
    return place / kind.replace(" ", "-")


@pytest.fixture(scope="module")
def runs(place) -> dict[str, dict]:
    first = {"output": str(place / "first"), "arguments": RUN, "stop_after": 5}
    copies = {kind: str(folder(place, kind)) for kind in KINDS}
    target = "tests.faults.broken_runs:go_on_each"
    return run_world(2, target, first=first, copies=copies, arguments=RUN)[0]


@pytest.fixture(scope="module")
def whole(place) -> dict:
    target = "tests.distributed.training:train_each"
    return run_world(2, target, runs=[{"output": str(place / "whole"), "arguments": RUN}])[0][0]


@pytest.mark.parametrize("kind", KINDS)
def test_it_goes_on_as_if_nothing_had_happened(runs, whole, place, kind):
    step, said = KINDS[kind]
    text = "\n".join(runs[kind]["said"])
    assert f"step-{step:08d}: step {step} of 6" in text
    assert said in text and ("falling back to the one before" in text) == (step == 2)
    assert losses(runs[kind]) == losses(whole)
    assert runs[kind]["weights"] == whole["weights"] != ""
    found = folder(place, kind) / "checkpoints"
    assert (found / "latest").read_text() == "step-00000006"
    assert not list(found.glob("staging-*"))
    # what was broken is kept, beside the one that was published anew
    assert (found / "broken-step-00000004").is_dir() == (step == 2)
    assert (found / "step-00000004" / "manifest.json").is_file()
