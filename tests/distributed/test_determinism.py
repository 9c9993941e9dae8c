"""The same seed and number of ranks: bit-equal runs.  Another number: the same batches."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.harness import run_world

STEPS = "optim.steps=3"
LORA = ["model.adapter=lora", "model.lora.dropout=0.3"]
MIXED = ["data.sub_batch=4", "data.sources=[name_t2i,i2t,tags_t2i,i2i]"]
MATCH = ["--recipe", "demo-match", "init_from=null", *MIXED]
RUNS = {
    "compress": [],
    "compress with workers": ["data.workers=2"],
    "compress other seed": ["seed=1"],
    "match lora": [*MATCH, *LORA],
    "match lora again": [*MATCH, *LORA],
    "match": MATCH,
}


def run_all(world: int, names: list[str], folder: Path) -> dict[str, dict]:
    """The named runs in a world of that size, as rank 0 saw them."""
    runs = [
        {"output": str(folder / name.replace(" ", "-")), "arguments": [*RUNS[name], STEPS]}
        for name in names
    ]
    found = run_world(world, "tests.distributed.training:train_each", runs=runs)[0]
    return dict(zip(names, found))


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> dict[str, dict]:
    return run_all(2, list(RUNS), tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory) -> dict[str, dict]:
    return run_all(1, ["compress", "match"], tmp_path_factory.mktemp("one"))


def values(run: dict, *names: str) -> list[list[float]]:
    """The values of each step, without those of the clock."""
    assert [line["step"] for line in run["lines"]] == [1, 2, 3]
    return [[line[name] for name in names] for line in run["lines"]]


@pytest.mark.parametrize(
    "first, second",
    [
        ("compress", "compress with workers"),
        ("match lora", "match lora again"),
    ],
)
def test_the_same_run_twice_is_bit_equal(two_ranks, first: str, second: str):
    """Whoever reads the data, and with dropout on."""
    one, two = two_ranks[first], two_ranks[second]
    assert one["weights"] and one["weights"] == two["weights"]
    assert values(one, "loss", "grad_norm") == values(two, "loss", "grad_norm")


@pytest.mark.parametrize(
    "first, second",
    [
        ("compress", "compress other seed"),
        ("match", "match lora"),
    ],
)
def test_another_run_is_not(two_ranks, first: str, second: str):
    """What the test above compares does differ where it should."""
    one, two = two_ranks[first], two_ranks[second]
    assert one["weights"] != two["weights"]
    assert values(one, "loss") != values(two, "loss")


@pytest.mark.parametrize("name", ["compress", "match"])
def test_another_number_of_ranks_gives_the_same_steps(one_rank, two_ranks, name: str):
    """The same samples in each step, so the same loss to the rounding of fp32 sums."""
    one, two = one_rank[name], two_ranks[name]
    for mine, theirs in zip(values(one, "loss", "grad_norm"), values(two, "loss", "grad_norm")):
        assert mine == pytest.approx(theirs, rel=2e-4)
    assert values(one, "loss")[0] != values(one, "loss")[1]
