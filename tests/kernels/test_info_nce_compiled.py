"""The shipped kernels of InfoNCE compile for cards that are not there, and fit them."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.kernels.compiling import SHARED_LIMIT

# Of the others, seconds to a minute each, ``python -m tests.kernels.compiled_info_nce`` prints all.
NAMES = ("terms", "terms, options", "accumulate", "cosines", "gather", "finish", "spread")
NAMES += ("collect", "rescale")
PRODUCTS = ("terms", "terms, options", "accumulate")
CORES = {80: "mma", 90: "wgmma", 100: "tcgen05"}


@pytest.fixture(scope="module")
def compiled() -> list[dict]:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.compiled_info_nce", *NAMES],
        capture_output=True,
        text=True,
        env=env,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert {(k["kernel"], k["card"]) for k in found} == {(n, c) for n in NAMES for c in CORES}
    return found


def test_nothing_spills_and_shared_memory_fits(compiled) -> None:
    for k in compiled:
        assert k["spills"] == 0 and k["stack"] == 0, k
        assert k["shared"] <= SHARED_LIMIT[k["card"]], k


def test_products_use_the_tensor_cores(compiled) -> None:
    """And the copy engine where there is one."""
    for k in compiled:
        assert (k[CORES[k["card"]]] > 0) == (k["kernel"] in PRODUCTS), k
        assert (k["bulk"] > 0) == (k["kernel"] in PRODUCTS and k["card"] >= 90), k


def test_there_is_no_atomic(compiled) -> None:
    assert not [k for k in compiled if k["atomics"]]


def test_no_minimum_of_numbers(compiled) -> None:
    """The hardware's minimum of NaN and a number is the number: a bad embedding would be hidden.

    (The interpreter's is NaN: no other test can see this.)
    """
    assert not [k for k in compiled if k["minima"]]
