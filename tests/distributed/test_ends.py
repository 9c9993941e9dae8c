"""How ranks end: never by a signal of their own, and with the error last on the screen."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from PIL import Image

from tests.distributed.harness import free_port
from tests.distributed.launched import ROOT, Ended, launch

STARTS, AT_A_TIME = 20, 3
ENDING = "tests/distributed/ending.py"
TRAIN = "coma_ds/train.py"
USERS = "pairs.jsonl, line 3: empty query; give it a text or an image"


def start_bare_world() -> list[int]:
    """Exit codes of two ranks that meet over gloo and leave."""
    port, ranks = str(free_port()), []
    for rank in range(2):
        environment = os.environ | {
            "RANK": str(rank),
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        ranks.append(subprocess.Popen([sys.executable, ENDING, "well"], cwd=ROOT, env=environment))
    end = time.monotonic() + 60
    try:
        return [process.wait(max(0.1, end - time.monotonic())) for process in ranks]
    finally:
        for process in ranks:
            process.kill()


def test_twenty_starts_in_a_row_end_cleanly():
    """The interpreter's own end aborts (SIGABRT, code -6) in about one of twenty."""
    with ThreadPoolExecutor(AT_A_TIME) as pool:
        codes = list(pool.map(lambda _: start_bare_world(), range(STARTS)))
    assert codes == [[0, 0]] * STARTS


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    """64 pairs; the picture of line 38 is cut in half, which no look at the folder shows."""
    folder = tmp_path_factory.mktemp("pairs")
    lines = []
    for row in range(64):
        picture = folder / f"{row}.png"
        Image.effect_noise((64, 64), row + 1).save(picture)
        lines.append(json.dumps({"query": f"noise {row}", "target_image": picture.name}))
    content = (folder / "37.png").read_bytes()
    (folder / "37.png").write_bytes(content[: len(content) // 2])
    (folder / "pairs.jsonl").write_text("\n".join(lines))
    return folder


def jobs(pairs: Path, output: Path) -> dict[str, tuple[str, ...]]:
    """Everything that is started, by name: the machine's cores are kept busy by two at a time."""
    data = [f"data.path={pairs}/pairs.jsonl", f"data.image_root={pairs}", "data.format=pairs"]
    small = ["optim.steps=4", "optim.batch_size=16", "data.sub_batch=0", "deepspeed=zero2"]
    match = ["--recipe", "demo-match", "init_from=null", "data.sources=[]", *data, *small]
    return {
        "deepspeed user": ("deepspeed", ENDING, "user"),
        "deepspeed fault": ("deepspeed", ENDING, "fault"),
        "deepspeed well": ("deepspeed", ENDING, "well"),
        "torchrun user": ("torchrun", ENDING, "user"),
        "torchrun fault": ("torchrun", ENDING, "fault"),
        "torchrun well": ("torchrun", ENDING, "well"),
        "python all": ("python", ENDING, "all"),
        "python fault": ("python", ENDING, "fault"),
        "wrong key": ("deepspeed", TRAIN, "optim.learning_rate=1"),
        "wrong option": ("python", TRAIN, "--dry-runs"),
        "wrong path": ("torchrun", TRAIN, *match, "data.path=nowhere.jsonl", f"output={output}/no"),
        "broken picture": ("deepspeed", TRAIN, *match, f"output={output}"),
    }


@pytest.fixture(scope="module")
def ended(pairs, tmp_path_factory) -> dict[str, Future[Ended]]:
    output = tmp_path_factory.mktemp("output")
    with ThreadPoolExecutor(2) as pool:
        yield {name: pool.submit(launch, *job) for name, job in jobs(pairs, output).items()}


# The start of the error as the user sees it, and the exit code of the job.
EXPECTED = {
    "deepspeed user": (f"error on rank 1: {USERS}", 2),
    "deepspeed fault": ("error on rank 1: RuntimeError: the fault itself", 1),
    "torchrun user": (f"error on rank 1: {USERS}", 1),
    "torchrun fault": ("error on rank 1: RuntimeError: the fault itself", 1),
    "python all": (f"error: {USERS}", 2),
    "python fault": ("error on rank 0: RuntimeError: the fault itself", 1),
    "wrong key": (
        "error: override: unknown key 'optim.learning_rate'; did you mean 'optim.",
        2,
    ),
    "wrong option": ("error: unrecognized arguments: --dry-runs", 2),
    "wrong path": ("error: nowhere.jsonl: no such file", 1),
    "broken picture": ("error", 2),  # whichever rank draws it
}


@pytest.mark.parametrize("name", list(EXPECTED))
def test_the_error_is_last_on_the_screen(ended, name: str):
    """torchrun ends with a table, whose last entry it is."""
    job, (message, code) = ended[name].result(), EXPECTED[name]
    assert job.code == code, job.text
    last = job.lines[-1]
    if set(last) == {"="}:
        last = job.lines[-2].partition("traceback : ")[2]
    assert last.startswith(message), job.text


@pytest.mark.parametrize("name", list(EXPECTED))
def test_it_is_said_by_the_rank_that_knows(ended, name: str):
    """Once when it happens, once at the end, and by nobody else."""
    job = ended[name].result()
    spoken = [line for line in job.lines if line.startswith("error")]
    assert len(set(spoken)) == 1 and len(spoken) <= 2, job.text
    assert ("Traceback" in job.text) == ("fault" in name or "torchrun" in job.text), job.text
    assert "gloo" not in job.text  # the others met a lost connection: not the cause


def test_a_broken_picture_is_named(ended, pairs):
    job = ended["broken picture"].result()
    assert f"image {pairs}/37.png is truncated or broken" in job.lines[-1]
    assert "replace the file or drop its row" in job.lines[-1]


@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun"])
def test_a_good_end_is_silent(ended, launcher: str):
    job = ended[f"{launcher} well"].result()
    assert job.code == 0
    assert "error" not in job.text.lower(), job.text
