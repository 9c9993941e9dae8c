"""The shipped pooling kernels compile for cards that are not there, and fit them."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from coma_ds.kernels.attention_pool import launch
from tests.kernels.compiling import SHARED_LIMIT

REGISTERS = 65_536  # of a multiprocessor


@pytest.fixture(scope="module")
def compiled() -> list[dict]:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.compiled_pool"],
        capture_output=True,
        text=True,
        env=env,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == 40 and {k["card"] for k in found} == {80, 90, 100}
    return found


def test_nothing_spills_and_shared_memory_fits(compiled) -> None:
    for k in compiled:
        assert k["spills"] == 0 and k["stack"] == 0, k
        assert k["shared"] <= SHARED_LIMIT[k["card"]], k


def test_there_is_no_float_atomic(compiled) -> None:
    """The tickets of the query's gradient are integers; nothing else is atomic."""
    for k in compiled:
        asked = "backward" in k["kernel"] and "mean" not in k["kernel"]
        assert k["float_atomics"] == 0 and k["atomics"] == (2 if asked else 0), k


def test_all_stores_come_before_the_ticket(compiled) -> None:
    """A barrier of the block, then an atomic that releases them to the whole card."""
    for k in compiled:
        assert k["tickets"] == k["atomics"], k


def test_rows_are_moved_16_bytes_at_a_time(compiled) -> None:
    """All of them: a tile a stage, in copies to shared memory that run ahead of the sums."""
    for k in compiled:
        if k["width"] == 64:  # narrower than a warp's 16 bytes a thread
            continue
        assert k["wide_stores"] > 0, k
        if k["kernel"] == "mean.backward":  # reads no rows
            assert k["wide_copies"] == 0 and k["wide_loads"] > 0, k
        else:
            block = launch.power(k["heads"]) * launch.power(k["width"] // k["heads"])
            size = k["rows"] * block * {"bf16": 2, "fp32": 4}[k["dtype"]]
            assert k["wide_copies"] == k["stages"] * size // (16 * 32 * k["warps"]), k


def test_two_programs_share_a_multiprocessor(compiled) -> None:
    """One loads while the other one adds up.  Other dtypes, heads and widths may have just one."""
    for k in compiled:
        if k["card"] == 80 or k["dtype"] != "bf16" or k["heads"] > 1 or k["width"] > 4096:
            continue
        by_registers = REGISTERS // (32 * k["warps"] * k["registers"])
        by_shared = SHARED_LIMIT[k["card"]] // (k["shared"] + 1024)
        assert min(by_registers, by_shared) >= 2, k


@pytest.mark.parametrize("width", [1, 64, 896, 1152, 2560, 3584, 4096, 8192])
@pytest.mark.parametrize("backward", [False, True])
def test_a_tile_is_a_power_of_two_that_fits(width, backward) -> None:
    for heads in (h for h in (1, 2, 7, 28) if width % h == 0):
        block_h, block_e = launch.tile(width, heads)
        assert block_h >= heads and block_e >= width // heads
        for count in (1, 3, 32, 128):
            config = launch.choose(width, heads, count, backward=backward)
            assert config.rows & (config.rows - 1) == 0 and config.rows < 2 * count
            assert config.rows * block_h * block_e <= 64 * 32 * config.warps or config.rows == 1
