"""``--verify-gradients`` says equal where the chunked step is right, and fails where it is not."""

from __future__ import annotations

from dataclasses import asdict

import pytest

from tests.distributed.cases import ATTENTION, LEARNED, LORA, STAGES, TOWER
from tests.distributed.exact import Case
from tests.distributed.harness import run_world

ALL = {"model": LORA | TOWER | ATTENTION | LEARNED, "kind": "adamw", "uneven": True}
GOOD = [
    *[Case(f"match {d}", d) for d in STAGES],
    *[Case(f"compress {d}", d, "compress", images="all") for d in STAGES],
    Case("match zero2 all at once", "zero2", **ALL),
    Case("match strict all at once", **ALL),
    Case("compress strict tower", stage="compress", model=TOWER, kind="adamw"),
]
BAD = [
    Case("parts are lost", "zero0", broken="parts but the last are lost"),
    Case("no boundary calls", "zero1", broken="no boundary calls"),
    Case("every part is the last", "zero2", "compress", broken="every part is the last"),
]
WORLDS = {1: GOOD, 2: GOOD + BAD}
_results: dict[int, list[dict]] = {}


def found(world: int, name: str) -> list[dict]:
    """What each rank of that world found; the first question starts the world."""
    if world not in _results:
        _results[world] = []
        listed = [asdict(case) for case in WORLDS[world]]
        target = "tests.distributed.verifying:verify_each"
        _results[world] = run_world(world, target, cases=listed)
    assert _results[world], "the world of this case failed, see the first of its tests"
    return [rank[name] for rank in _results[world]]


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("case", GOOD, ids=lambda case: case.name)
def test_a_right_step_is_equal(world: int, case: Case):
    for result in found(world, case.name):
        assert not result["error"]
        assert "layers" in result["differences"] or "lora" in result["differences"]
        assert max(result["differences"].values()) < 1e-4
        assert result["changed"] == 0.0  # the model is as it was


@pytest.mark.parametrize("case", BAD, ids=lambda case: case.name)
def test_a_broken_step_fails(case: Case):
    """Faults of the loss itself, which both steps share, are for ``test_exact.py``."""
    for result in found(2, case.name):
        assert "the chunked gradient differs from the plain one by" in result["error"]


def test_every_part_of_the_model_is_looked_at():
    for result in found(2, "match strict all at once"):
        assert set(result["differences"]) == {"lora", "visual", "tokens", "pooling", "temperature"}
    for result in found(2, "match strict"):
        assert {"layers", "embed_tokens", "tokens"} <= set(result["differences"])
