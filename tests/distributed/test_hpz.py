"""hpZ of ZeRO++: each node holds the weights a second time and gathers them from there.

Two "nodes" of two ranks.  DeepSpeed keeps the group of a node for the life of a process, so these
cases have worlds of their own.
"""

from __future__ import annotations

from dataclasses import asdict
from functools import cache
from pathlib import Path

import pytest

from tests.distributed.cases import LORA
from tests.distributed.exact import Case
from tests.distributed.harness import run_world
from tests.distributed.test_exact import TOLERANCE, is_exact

HPZ = str(Path(__file__).with_name("hpz.json"))
SOME = {"samples": 2}
CASES = {
    "match": Case("match", HPZ, chunk=SOME),
    "lora": Case("lora", HPZ, chunk=SOME, model=LORA),
    "compress": Case("compress", HPZ, "compress", chunk=SOME, images="all"),
}
RUN = ["optim.steps=4", "checkpoint.every=2", "optim.lr=1e-3"]


@cache
def found() -> list[dict[str, dict]]:
    """By rank."""
    cases = [asdict(case) for case in CASES.values()]
    return run_world(4, "tests.distributed.hpz:run_and_count", cases=cases)


@pytest.mark.parametrize("name", CASES)
def test_it_is_exact(name: str) -> None:
    for rank in found():
        assert is_exact(rank[name]), rank[name]
        assert rank[name]["moved"] > 500 * TOLERANCE


@pytest.mark.parametrize("name", CASES)
def test_only_what_an_update_changed_travels_between_nodes(name: str) -> None:
    """And that once, whatever the number of chunks; the rest as without."""
    for rank in found():
        counted = rank[name]
        assert counted["chunks"] >= 2
        assert counted["gathered"] == pytest.approx(counted["said"][0], rel=5e-3)
        assert counted["gathered_among_all"] == pytest.approx(counted["trained"], rel=2e-2)


def test_a_run_that_goes_on_reads_the_copy_of_its_checkpoint(tmp_path) -> None:
    """Not that of the weights that it was built with."""
    arguments = [*RUN, "deepspeed=zero3_hpz"]
    runs = [
        {"output": str(tmp_path / "whole"), "arguments": arguments},
        {"output": str(tmp_path / "cut"), "arguments": arguments, "stop_after": 3},
        {"output": str(tmp_path / "cut"), "arguments": arguments},
    ]
    for rank in run_world(2, "tests.distributed.training:train_each", runs=runs):
        whole, _, resumed = (
            [(line["step"], line["loss"], line["grad_norm"]) for line in run["lines"]]
            for run in rank
        )
        assert resumed == whole
