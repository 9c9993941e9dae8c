"""ZeRO-3's traffic: what is counted in a world of two is what the formula of the planner says."""

from __future__ import annotations

from dataclasses import asdict
from functools import cache
from pathlib import Path

import pytest

from tests.distributed.cases import LORA, TOWER, UNTIED
from tests.distributed.exact import Case
from tests.distributed.harness import run_world

# Nothing is fetched before it is needed, or stays for its next use: both save time, at the cost of
# a bucket that depends on the model's order.
PLAIN = str(Path(__file__).with_name("unfetched.json"))
CHUNKS = {"one chunk": 8, "some chunks": 2, "many chunks": 1}
ALL = {"images": "all"}
TAUGHT = {"compress": {"loss": "kl"}, **ALL}
# Nothing of these depends on the weights' parts, so a few show it.
WHOLE = (
    "whole match one chunk", "whole match many chunks", "whole match many chunks lora",
    "whole match kept tower", "whole compress", "whole compress lora",
)  # fmt: skip


def cases() -> list[Case]:
    """Sharded and whole, stages 1 and 2, by chunks and by what is trained."""
    found = []
    some, kept = {"samples": 2}, {"samples": 2, "keep": 2}
    for folder, name in ((PLAIN, "sharded"), ("zero3_whole", "whole")):
        for many, samples in CHUNKS.items():
            chunk = {"samples": samples}
            found.append(Case(f"{name} match {many}", folder, chunk=chunk))
            found.append(Case(f"{name} match {many} lora", folder, chunk=chunk, model=LORA))
        found += [
            Case(f"{name} match kept", folder, chunk=kept),
            Case(f"{name} match kept lora", folder, chunk=kept, model=LORA),
            Case(f"{name} match tower", folder, chunk=some, model=TOWER),
            Case(f"{name} match kept tower", folder, chunk=kept, model=TOWER),
            Case(f"{name} match untied", folder, chunk=some, model=UNTIED),
            Case(f"{name} match slices", folder, chunk=some, **ALL),
            Case(f"{name} compress", folder, "compress", chunk=some, **ALL),
            Case(f"{name} compress slices", folder, "compress", chunk=some, **ALL),
            Case(f"{name} compress untied", folder, "compress", chunk=some, model=UNTIED, **ALL),
            Case(f"{name} compress lora", folder, "compress", chunk=some, model=LORA, **ALL),
            Case(f"{name} compress tower", folder, "compress", chunk=some, model=TOWER, **ALL),
            Case(f"{name} taught", folder, "compress", chunk=some, **TAUGHT),
            Case(f"{name} taught untied", folder, "compress", chunk=some, model=UNTIED, **TAUGHT),
            Case(f"{name} taught lora", folder, "compress", chunk=some, model=LORA, **TAUGHT),
        ]
    return [c for c in found if c.deepspeed == PLAIN or c.name in WHOLE]


@cache
def counted() -> dict[str, dict]:
    """Both ranks move the same."""
    first, second = run_world(
        2, "tests.distributed.traffic:count", cases=[asdict(c) for c in cases()]
    )
    assert first == second
    return first


@pytest.mark.parametrize("name", [c.name for c in cases()])
def test_the_formula_says_what_is_moved(name: str) -> None:
    """Within the padding of shards, of which there are some hundreds."""
    found = counted()[name]
    gathered, reduced = found["said"]
    assert found["gathered"] == pytest.approx(gathered, rel=5e-3)
    assert found["reduced"] == pytest.approx(reduced, rel=2e-2)
    assert found["elsewhere"] < 100  # the norm


@pytest.mark.parametrize("name", [c.name for c in cases() if c.name.startswith("whole")])
def test_whole_weights_travel_once_a_step(name: str) -> None:
    """Whatever the number of chunks; so do the gradients."""
    found = counted()[name]
    assert found["gathered"] == found["weights"]
    assert found["reductions"] == 1


def test_adapters_are_reduced_once_where_the_rest_is_sharded() -> None:
    found = counted()["sharded match many chunks lora"]
    assert found["chunks"] >= 8 and found["reductions"] == 1
    assert counted()["sharded match many chunks"]["reductions"] == found["chunks"]


def test_many_small_gradients_add_up_in_fp32() -> None:
    """In bf16 1 + 2**-9 is 1, however often."""
    assert run_world(1, "tests.distributed.traffic:add_up_small_parts") == [1.5]
