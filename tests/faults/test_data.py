"""Bad rows, hostile images and a killed loader worker, met by real runs of two ranks."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from coma_ds.entry import killed_worker
from tests.distributed.harness import run_world
from tests.distributed.launched import Ended, launch
from tests.faults.data_runs import SMALL, global_batches
from tests.odd_images import odd_kinds, stored
from tests.pair_files import BROKEN, bad_rows, write

ROWS = 64  # all of them are read once


def data_of(folder: Path, *more: str) -> list[str]:
    """The arguments of a run over the pairs in ``folder``."""
    return [f"data.path={folder}/pairs.jsonl", f"data.image_root={folder}", *more]


def bad_line(number: int) -> int:
    """The line (from 1) of the bad row of that number; a good one follows."""
    return 4 * number + 2


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Three folders of pairs.

    ``odd``: every fourth row is bad, each in its way, and every kind of odd image.  ``clean``: the
    rows that stand in for the bad ones in their place, and the images as plain PNG.  ``rotten``:
    2000 rows, one in ten with a broken image, where a look before the run does not see it.
    """
    root = tmp_path_factory.mktemp("faults")
    odd, clean, rotten = (root / name for name in ("odd", "clean", "rotten"))
    for folder in (odd, clean, rotten):
        folder.mkdir()
    changes = {bad_line(i) - 1: change for i, (change, _) in enumerate(bad_rows(odd).values())}
    write(clean, {}, ROWS)
    for number, name in enumerate(odd_kinds(0)):
        row, (data, shown) = 4 * number + 3, odd_kinds(100 + number)[name]
        (odd / name).write_bytes(data)
        changes[row] = {"target_image": name}
        (clean / f"{row}.png").write_bytes(stored(shown))
    write(odd, changes, ROWS)
    lines = (clean / "pairs.jsonl").read_text().split("\n")
    for number in range(16):
        lines[bad_line(number) - 1] = lines[bad_line(number)]
    (clean / "pairs.jsonl").write_text("\n".join(lines))
    write(rotten, {})
    rows = [{"query": f"number {row}", "target_image": f"{row % 40}.png"} for row in range(2000)]
    looked_at = {row * 2000 // 500 for row in range(500)}
    for row in range(3, 2000, 10):
        assert row not in looked_at
        rows[row] |= BROKEN
    (rotten / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return root


@pytest.fixture(scope="module")
def world(root) -> dict:
    """The runs by name and the batches of ``odd``, from rank 0; what rank 1 said of its own."""
    odd = data_of(root / "odd", "data.bad_rows=0.3", "checkpoint.every=3")
    wanted = {
        "odd": {"output": f"{root}/runs/odd", "arguments": [*odd, "data.workers=1"]},
        "clean": {
            "output": f"{root}/runs/clean",
            "arguments": data_of(root / "clean", "data.workers=0"),
        },
        "cut": {
            "output": f"{root}/runs/cut",
            "arguments": [*odd, "data.workers=0"],
            "stop_after": 5,
        },
        "resumed": {"output": f"{root}/runs/cut", "arguments": [*odd, "data.workers=2"]},
        "rotten": {
            "output": f"{root}/runs/rotten",
            "arguments": data_of(root / "rotten", "data.bad_rows=0.05", "optim.steps=200"),
        },
    }
    ranks = run_world(
        2, "tests.faults.data_runs:train_and_read", runs=list(wanted.values()), arguments=odd
    )
    first, second = (dict(zip(wanted, rank["runs"])) for rank in ranks)
    return first | {"batches": ranks[0]["batches"], "rank 1": second}


def losses(run: dict) -> list[tuple]:
    names = ("step", "loss", "in_batch_accuracy", "masked_negatives", "lr", "grad_norm")
    return [tuple(line[name] for name in names) for line in run["lines"]]


def error_of(run: dict) -> str:
    (error,) = [line for line in run["said"] if line.startswith("error")]
    return error


def test_a_run_over_bad_rows_is_one_over_the_rows_in_their_place(world):
    """And odd images are what they show."""
    assert len(world["odd"]["lines"]) == 8
    assert losses(world["odd"]) == losses(world["clean"])
    assert world["odd"]["weights"] == world["clean"]["weights"] != ""


def test_each_kind_is_told_once_by_its_line(world, root):
    said = [line for line in world["odd"]["said"] if "so far)" in line]
    assert len(said) == 10 and len({line.partition(":")[2] for line in said}) == 10
    kinds = bad_rows_said(root)
    for count, line in enumerate(said, 1):
        where = f"{root}/odd/pairs.jsonl line "
        number = int(re.match(rf"{where}(\d+)", line)[1])
        assert kinds[number] in line
        assert line.endswith(f"; replaced by {where}{number + 1} ({count} so far)")
    (end,) = [line for line in world["odd"]["said"] if line.endswith("replaced (25 %)")]
    assert end == "16 of 64 rows were bad and replaced (25 %)"


def bad_rows_said(root: Path) -> dict[int, str]:
    """What is said of each bad row, by its line."""
    spare = root / "spare" / "spare"
    spare.mkdir(parents=True)
    return {bad_line(i): said for i, (_, said) in enumerate(bad_rows(spare).values())}


def test_they_are_counted(world):
    counts = [line["replaced_rows"] for line in world["odd"]["lines"]]
    assert counts == sorted(counts) and counts[0] > 0 and counts[-1] == 16
    assert "replaced_rows" not in world["clean"]["lines"][0]
    looked = [line for line in world["odd"]["said"] if "rows looked at are bad" in line]
    assert looked[0].startswith("16 of 64 rows looked at are bad; others will be read")


def test_a_resumed_run_reads_the_same_and_goes_on_counting(world):
    assert losses(world["resumed"]) == losses(world["odd"])
    assert world["resumed"]["weights"] == world["odd"]["weights"]
    for run in ("resumed", "odd"):
        assert world[run]["lines"][-1]["replaced_rows"] == 16
    assert any("step 3 of 8" in line for line in world["resumed"]["said"])
    told = [line for line in world["odd"]["said"] if "so far)" in line]
    again = [line for line in world["resumed"]["said"] if "so far)" in line]
    assert again and again == told[-len(again) :] and len(again) < len(told)


def test_a_world_of_one_reads_the_same_global_batches(world, root):
    alone = global_batches(data_of(root / "odd", "data.bad_rows=0.3", "data.workers=0"))
    assert world["batches"] == alone and [len(step) for step in alone] == [8] * 8


def test_too_many_bad_rows_end_the_run_on_every_rank(world, root):
    for run in (world["rotten"], world["rank 1"]["rotten"]):
        error = error_of(run)
        count, rows = (int(word) for word in error.split()[1:4:2])
        assert 10 < count < 30 and count > 0.05 * rows and rows % 8 == 0
        assert error.startswith(
            f"error: {count} of {rows} rows were bad and replaced "
            f"({100 * count / rows:.2g} %), more than data.bad_rows 0.05 allows: the first "
            f"{root}/rotten/pairs.jsonl line "
        )
        assert error.endswith("; repair or drop these rows, or raise data.bad_rows")
        assert error.count("broken.png is truncated or broken") == 5
        assert len(run["lines"]) == rows // 8 - 1
    assert error_of(world["rotten"]) == error_of(world["rank 1"]["rotten"])


def killed(root: Path) -> tuple[Ended, float]:
    """A run of the launcher, one loader worker of which gets SIGKILL; and seconds until its end."""
    output = root / "runs" / "killed"
    arguments = [*SMALL, *data_of(root / "clean", "data.workers=1"), f"output={output}"]
    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(launch, "torchrun", "coma_ds/train.py", *arguments, "optim.steps=100000")
        while not (output / "metrics.jsonl").is_file() or not workers(output):
            assert not job.done(), job.result().text
            time.sleep(0.1)
        os.kill(workers(output)[0], signal.SIGKILL)
        began = time.monotonic()
        return job.result(), time.monotonic() - began


def workers(output: Path) -> list[int]:
    """Processes that load data for the run that writes into ``output``."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            ours = f"output={output}".encode() in (process / "cmdline").read_bytes()
            if ours and (process / "comm").read_text().strip() == "pt_data_worker":
                found.append(int(process.name))
        except OSError:  # it has ended
            continue
    return found


def test_a_killed_loader_worker_ends_the_run_with_a_sentence(root):
    job, seconds = killed(root)
    assert job.code == 1, job.text
    (error,) = [line for line in job.lines if line.startswith("error")]
    assert error.startswith("error on rank "), job.text
    assert "a worker of the data loader was killed (DataLoader worker (pid" in error
    assert "memory was full; take fewer workers (data.workers)" in error
    assert error in job.lines[-2]  # of torchrun's table
    assert 'coma_ds/train.py", line' not in job.text  # a trace of where it happened to stand
    assert seconds < 30
    assert not workers(root / "runs" / "killed")


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "), True),
        (RuntimeError("DataLoader worker (pid(s) 7, 8) exited unexpectedly"), True),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. It is"), True),
        (RuntimeError("Caught RuntimeError in DataLoader worker process 0."), False),
        (ValueError("DataLoader worker (pid 7) is killed by signal: Killed. "), False),
        (KeyError("x"), False),
    ],
)
def test_only_a_killed_worker_is_told_as_one(error, told):
    assert bool(killed_worker(error)) == told
